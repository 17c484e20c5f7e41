"""What does not go together is found before weights load: token ids, positions, pad tokens, layers for LoRA."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, MptConfig, OPTConfig

import model_utils
from conftest import TINY_BASE, refusal
from fit_utils import check_prompt, check_rows, check_target_modules, count_embeddings, fit_pad_token, left_out
from model_utils import attach_lora, choose_pad_token, load_tokenizer
from tiny import SETTINGS, TINY

GPT2 = GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2)
OPT = OPTConfig(
    vocab_size=300,
    hidden_size=32,
    ffn_dim=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    word_embed_proj_dim=32,
)
MPT = MptConfig(vocab_size=300, d_model=32, n_heads=4, n_layers=2, max_seq_len=32)
MAMBA = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)
PHIMOE = AutoConfig.for_model("phimoe", **TINY, num_local_experts=4)


def shapes_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def tokenized(*rows):
    """TokenizedRows of these lists of ids, with row numbers from 1."""
    lengths = np.array([len(row) for row in rows])
    index = {"length": lengths, "start": lengths.cumsum() - lengths, "row": np.arange(1, len(rows) + 1)}

    class Rows(SimpleNamespace):
        def __len__(self):
            return len(rows)

    return Rows(ids=np.array([number for row in rows for number in row]), index=index)


# ---- Tokens and positions --------------------------------------------------------------------------------------------
def test_an_id_without_an_embedding_is_refused_with_its_row_and_token():
    tokenizer = load_tokenizer(TINY_BASE)
    rows = tokenized([1, 2, 3], [4, 299, 300, 5])
    message = refusal(check_rows, shapes_of(LlamaConfig(**TINY)), tokenizer, rows, "training data")
    assert message.startswith("training data, row 2: the token ")
    assert "the id 300" in message
    assert "0 to 299 only" in message
    check_rows(shapes_of(LlamaConfig(**TINY)), tokenizer, tokenized([1, 299]), "training data")
    check_rows(shapes_of(LlamaConfig(**TINY)), tokenizer, tokenized(), "validation data")


@pytest.mark.parametrize("config", [GPT2, OPT, MPT], ids=["gpt2", "opt", "mpt"])
def test_a_row_beyond_a_table_of_positions_is_refused(config):
    message = refusal(check_rows, shapes_of(config), None, tokenized([5] * 33, [6] * 32, [7] * 40), "training data")
    assert message.startswith("2 rows of the training data beyond the model's 32 positions, up to 40 tokens")
    assert "--max_seq_length to 32" in message
    check_rows(shapes_of(config), None, tokenized([5] * 32), "training data")


def test_a_row_beyond_the_positions_of_a_rotary_model_is_announced(capsys):
    check_rows(shapes_of(LlamaConfig(**TINY)), None, tokenized([5] * 128), "training data")
    assert capsys.readouterr().err == ""
    check_rows(shapes_of(LlamaConfig(**TINY)), None, tokenized([5] * 129, [5] * 3), "validation data")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "1 row of the validation data beyond the model's 128 positions, up to 129 tokens" in said


def test_a_model_without_positions_takes_rows_of_any_length(capsys):
    check_rows(shapes_of(MAMBA), None, tokenized([5] * 10_000), "training data")
    assert capsys.readouterr().err == ""


def test_a_pad_token_beyond_the_embeddings_is_replaced_and_named(capsys):
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY | {"vocab_size": 8000}))
    assert tokenizer.pad_token_id == count_embeddings(model) == 8000
    fit_pad_token(tokenizer, model, choose_pad_token)
    assert tokenizer.pad_token_id < 8000
    assert tokenizer.pad_token != tokenizer.eos_token
    assert "[PAD]" in capsys.readouterr().err
    fit_pad_token(tokenizer, model, choose_pad_token)
    assert capsys.readouterr().err == ""


# ---- Layers ----------------------------------------------------------------------------------------------------------
def test_a_plain_model_leaves_nothing_out():
    model = shapes_of(LlamaConfig(**TINY))
    assert left_out(model) == check_target_modules(model, "all-linear") == []
    assert attach_lora(model, SETTINGS).peft_config["default"].exclude_modules is None


def test_an_output_layer_that_shares_the_embeddings_weight_is_refused_by_its_name():
    targets = "q_proj,lm_head"
    message = refusal(check_target_modules, shapes_of(LlamaConfig(**TINY, tie_word_embeddings=True)), targets)
    assert "lm_head shares its weight with the input embeddings" in message
    assert check_target_modules(shapes_of(LlamaConfig(**TINY)), targets) == []


@pytest.mark.parametrize(("config", "layer"), [(MAMBA, "out_proj"), (PHIMOE, "router")], ids=["mamba", "phimoe"])
def test_a_listed_layer_that_takes_no_adapter_is_refused_with_those_that_do(config, layer):
    message = refusal(check_target_modules, shapes_of(config), layer)
    assert f"no linear layer {layer} that takes an adapter" in message
    assert ("in_proj" if config is MAMBA else "q_proj") in message


def test_listed_layers_are_those_of_the_language_model_alone():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    text = TINY | {"head_dim": 8}
    model = shapes_of(AutoConfig.for_model("gemma3", text_config=text, vision_config=vision | {"patch_size": 14}))
    adapted = attach_lora(model, SETTINGS._replace(lora_target_modules="q_proj,v_proj"))
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == 4
    assert not any("vision" in name for name in names)


# ---- Tokenizers ------------------------------------------------------------------------------------------------------
def test_a_tokenizer_model_alone_names_the_library_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr(model_utils, "find_spec", lambda name: None)
    message = refusal(load_tokenizer, str(tmp_path))
    assert "pip install sentencepiece" in message
    assert "tokenizer.json" in message


def test_a_tokenizer_is_never_read_from_tekken_json(monkeypatch):
    # where mistral-common is installed, transformers would prefer it, and its tokenizer gives no character offsets
    asked, usual = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        model_utils.AutoTokenizer,
        "from_pretrained",
        lambda *args, **kwargs: asked.append(kwargs) or usual(*args, **kwargs),
    )
    load_tokenizer(TINY_BASE)
    assert [options["mistral_format"] for options in asked] == [False]


def test_an_adapter_of_another_tool_without_a_tokenizer_gets_its_bases(tmp_path, capsys):
    model = model_utils.load_base_model(TINY_BASE, torch.device("cpu"), torch.float32)
    attach_lora(model, SETTINGS._replace(base_model_name=TINY_BASE)).save_pretrained(tmp_path / "adapter")
    settings = SETTINGS._replace(base_model_name=TINY_BASE, use_4bit_quantization=False, device="cpu")
    _, tokenizer = model_utils.load_trained_model(tmp_path / "adapter", settings)
    assert len(tokenizer) == len(load_tokenizer(TINY_BASE))
    assert "holds no tokenizer; its base model's is used" in capsys.readouterr().err


def test_a_template_whose_tokens_have_no_embedding_is_refused_before_a_chat():
    tokenizer = load_tokenizer(TINY_BASE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    model = shapes_of(LlamaConfig(**TINY | {"vocab_size": 8000}))
    check_prompt(model, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
    assert refusal(check_prompt, model, tokenizer).startswith(
        "the chat template: the token <|im_start|> has the id 8000"
    )


def test_another_tools_adapter_of_a_tied_output_layer_is_not_merged(tmp_path):
    base = model_utils.load_base_model(TINY_BASE, torch.device("cpu"), torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    message = refusal(model_utils.merge_and_save_model, model, load_tokenizer(TINY_BASE), tmp_path / "merged")
    assert "cannot be merged" in message
    assert not (tmp_path / "merged").exists()
