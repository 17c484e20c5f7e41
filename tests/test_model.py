"""Tokenizer, device, quantization and LoRA; adapters saved, loaded, refused and merged."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, MistralConfig, TrainerState

import model_utils
from conftest import TINY_BASE
from file_utils import resolve_path
from generation_utils import build_generation_config, generate_replies
from message_utils import UserError
from model_utils import (
    ADAPTER_WEIGHTS,
    Base,
    attach_lora,
    build_quantization_config,
    choose_dtype,
    choose_pad_token,
    count_parameters,
    empty_model,
    load_base_model,
    load_tokenizer,
    load_trained_model,
    merge_and_save_model,
    merged_folder,
    resolve_device,
    save_adapter,
    save_finished_adapter,
    write_recorded_settings,
)
from prompt_utils import ALPACA_TEMPLATE
from settings_utils import DEFAULTS, Settings

CPU = torch.device("cpu")
# device="cpu": the same on a machine with a GPU
SETTINGS = Settings(**DEFAULTS)._replace(lora_r=4, lora_dropout=0.0, use_4bit_quantization=False, device="cpu")
FOUR_BIT = SETTINGS._replace(use_4bit_quantization=True)
LINEAR_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are too small to share out: waiting for a busy second core costs twenty times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_base(folder, layers=2, hidden_size=64, tied=True):
    """A small random Mistral in a folder of its own, with the bundled tokenizer."""
    config = MistralConfig(
        vocab_size=8000,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY_BASE) / name, folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The path of a small base model with two layers; tests read it only."""
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def float32_base(tmp_path_factory):
    """The path of the bundled base model in float32, in which a merge rounds nothing away; tests read it only."""
    folder = tmp_path_factory.mktemp("models") / "float32"
    AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TINY_BASE) / name, folder)
    return str(folder)


def make_model(base, settings=SETTINGS, dtype=torch.float32):
    """A base model with LoRA whose B weights are not zero, as after training, so that the adapter changes answers."""
    settings = settings._replace(base_model_name=base)
    quantization = build_quantization_config(settings, dtype)
    model = attach_lora(load_base_model(str(resolve_path(base)), CPU, dtype, quantization), settings)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=draw)
    return model


def save_trained(folder, base, settings=SETTINGS):
    """Save such a model's adapter as a run does; returns the model and the folder."""
    model = make_model(base, settings)
    save_adapter(model, load_tokenizer(str(resolve_path(base))), folder)
    write_recorded_settings(folder, settings._replace(base_model_name=base))
    return model, folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def refusal(function, *args, **kwargs):
    """The message of the UserError that the call must raise; it is one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    return message


# ---- Tokenizer -------------------------------------------------------------------------------------------------------
def save_tokenizer(folder, **changes):
    """The bundled tokenizer with some of its attributes changed, in a folder; returns its path."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_base_models_tokenizer_pads_with_an_existing_token_other_than_eos():
    tokenizer = load_tokenizer(TINY_BASE)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(TINY_BASE))
    assert tokenizer.pad_token_id < json.loads((Path(TINY_BASE) / "config.json").read_text())["vocab_size"]


def test_a_pad_token_that_is_eos_is_replaced_and_another_is_kept(tmp_path):
    replaced = load_tokenizer(save_tokenizer(tmp_path / "eos", pad_token="</s>"))
    kept = load_tokenizer(save_tokenizer(tmp_path / "own", pad_token="<s>"))
    assert replaced.pad_token != replaced.eos_token == "</s>"
    assert kept.pad_token == "<s>"


def test_padding_is_on_the_right_whatever_the_folder_says(tmp_path):
    path = save_tokenizer(tmp_path / "left", padding_side="left")
    edit_json(tmp_path / "left/tokenizer_config.json", padding_side="left")
    assert AutoTokenizer.from_pretrained(path).padding_side == "left"  # the check can tell
    assert load_tokenizer(path).padding_side == "right"


def test_a_tokenizer_without_a_chat_template_gets_ours():
    assert AutoTokenizer.from_pretrained(TINY_BASE).chat_template is None
    assert load_tokenizer(TINY_BASE).chat_template == ALPACA_TEMPLATE


def test_a_tokenizer_with_a_chat_template_keeps_it(tmp_path):
    own = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    assert load_tokenizer(save_tokenizer(tmp_path, chat_template=own)).chat_template == own


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    path = save_tokenizer(tmp_path, eos_token=None)
    assert AutoTokenizer.from_pretrained(path).eos_token is None
    message = refusal(load_tokenizer, path)
    assert path in message
    assert "end-of-text token" in message


def test_a_folder_without_a_tokenizer_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    message = refusal(load_tokenizer, str(tmp_path / "bare"))
    assert str(tmp_path / "bare") in message
    assert "tokenizer" in message


def test_a_damaged_tokenizer_file_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "torn")
    (tmp_path / "torn/tokenizer.json").write_text('{"version": "1.')
    assert str(tmp_path / "torn") in refusal(load_tokenizer, str(tmp_path / "torn"))


def fake_tokenizer(unk_token, *special, plain=()):
    added = [AddedToken(token, special=True) for token in special]
    added += [AddedToken(token, special=False) for token in plain]
    return SimpleNamespace(unk_token=unk_token, eos_token="</s>", added_tokens_decoder=dict(enumerate(added)))


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (fake_tokenizer("<unk>", "</s>", "<|reserved_0|>"), "<unk>"),
        (fake_tokenizer(None, "</s>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"), "<|reserved_"),
        (fake_tokenizer(None, "</s>", "<|padding|>"), "<|padding|>"),
        (fake_tokenizer(None, "</s>", "<unused0>", plain=["reserved word"]), "<unused0>"),
        (fake_tokenizer(None, "</s>", plain=["reserved word"]), "</s>"),
        (fake_tokenizer(None, "</s>", "<|im_start|>"), "</s>"),
    ],
    ids=["unk", "reserved", "padding", "unused", "no special one", "control tokens only"],
)
def test_the_pad_token_is_unk_then_a_spare_special_token_and_eos_only_at_last(tokenizer, expected):
    assert choose_pad_token(tokenizer).startswith(expected)


def test_an_unk_token_that_is_eos_does_not_pad_while_a_spare_token_is_there():
    # Pythia: unk, bos and eos are all <|endoftext|>, and <|padding|> is there for this
    assert choose_pad_token(fake_tokenizer("</s>", "</s>", "<|padding|>")) == "<|padding|>"


# ---- Devices and number formats --------------------------------------------------------------------------------------
@pytest.fixture
def gpus(monkeypatch):
    """Pretend a machine: gpus(cuda, bf16, mps)."""

    def pretend(cuda=False, bf16=False, mps=False):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        # as on a T4: without bf16 hardware torch still says that it can emulate it, slowly
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )

    return pretend


def test_a_gpu_computes_in_bf16_where_it_can_and_else_in_fp16(gpus, capsys):
    gpus(cuda=True, bf16=True)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    assert choose_dtype(torch.device("cuda", 0), use_fp16=True) == torch.bfloat16
    gpus(cuda=True, bf16=False)
    assert choose_dtype(torch.device("cuda", 0), use_fp16=True) == torch.float16
    assert choose_dtype(torch.device("cuda", 0), use_fp16=False) == torch.float32
    assert capsys.readouterr().err == ""


def test_without_a_gpu_the_fallback_is_announced_and_computes_in_float32(gpus, capsys):
    gpus()
    assert resolve_device("cuda") == CPU
    assert capsys.readouterr().err == "Running on CPU: no CUDA GPU found\n"
    gpus(mps=True)
    assert resolve_device("cuda") == torch.device("mps")
    assert "MPS" in capsys.readouterr().err
    assert {choose_dtype(torch.device(name), use_fp16=True) for name in ("cpu", "mps")} == {torch.float32}


def test_the_cpu_can_be_forced_on_a_machine_with_a_gpu(gpus, capsys):
    gpus(cuda=True, bf16=True)
    assert resolve_device("cpu") == CPU
    assert capsys.readouterr().err == ""


def test_each_process_of_a_launcher_takes_the_gpu_of_its_local_rank(gpus, monkeypatch):
    gpus(cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resolve_device("cuda") == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    message = refusal(resolve_device, "cuda")
    assert "5 processes were started on this machine and 4 GPUs can be used" in message
    assert "--num_processes 4" in message
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # by accelerate launch --cpu
    assert resolve_device("cuda") == CPU


# ---- Quantization ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantization_is_double_nf4_that_computes_in_the_models_number_format(dtype):
    config = build_quantization_config(FOUR_BIT, dtype)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == dtype


def test_quantization_switched_off_is_none():
    assert build_quantization_config(SETTINGS, torch.bfloat16) is None


def test_a_4_bit_model_on_a_cpu_is_4_bit_and_trains_its_adapter_alone(base, capsys):
    model = make_model(base, FOUR_BIT).train()
    assert "slower" in capsys.readouterr().err
    layers = {name.split(".")[-2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert layers == LINEAR_LAYERS
    quantized = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert quantized.dtype == torch.uint8
    assert quantized.quant_state.quant_type == "nf4"
    assert quantized.quant_state.nested
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_4_bit_on_apple_mps_is_refused_with_the_flags_that_help(base):
    quantization = build_quantization_config(FOUR_BIT, torch.float32)
    message = refusal(load_base_model, base, torch.device("mps"), torch.float32, quantization)
    assert "--use_4bit_quantization false" in message
    assert "--device cpu" in message


# ---- LoRA ------------------------------------------------------------------------------------------------------------
def first_weights(base, seed, drawn_before):
    torch.manual_seed(drawn_before)
    model = attach_lora(load_base_model(base, CPU, torch.float32), SETTINGS._replace(seed=seed))
    return {name: p for name, p in model.named_parameters() if "lora_A" in name}


def test_the_adapters_first_weights_are_fixed_by_the_seed_alone(base):
    first, again, other = first_weights(base, 1, 7), first_weights(base, 1, 8), first_weights(base, 2, 7)
    assert first
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_but_the_output_is_adapted_and_nothing_else_trains(tied, tmp_path):
    path = save_base(tmp_path, tied=tied)
    model = attach_lora(load_base_model(path, CPU, torch.float32), SETTINGS)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == LINEAR_LAYERS
    assert len(trained) == 2 * 2 * len(LINEAR_LAYERS)  # A and B of each, in two layers


def test_chosen_target_modules_are_the_only_ones_adapted(base):
    settings = SETTINGS._replace(lora_target_modules="q_proj, v_proj", lora_r=3, lora_alpha=12, lora_dropout=0.25)
    model = attach_lora(load_base_model(base, CPU, torch.float32), settings)
    trained = {name.split(".")[-4]: p for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    assert trained.keys() == {"q_proj", "v_proj"}
    assert trained["q_proj"].shape == (3, 64)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 12 / 3
    assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize("quantized", [False, True])
def test_a_16_bit_base_stays_16_bit_and_its_adapter_is_float32(base, quantized):
    # peft's prepare_model_for_kbit_training would turn norms and embeddings to float32
    model = make_model(base, FOUR_BIT if quantized else SETTINGS, torch.bfloat16)
    formats = {True: set(), False: set()}
    for parameter in model.parameters():
        formats[parameter.requires_grad].add(parameter.dtype)
    assert formats[True] == {torch.float32}
    assert formats[False] == {torch.bfloat16, torch.uint8} if quantized else {torch.bfloat16}


def test_wrong_target_modules_name_the_models_linear_layers(base):
    model = load_base_model(base, CPU, torch.float32)
    message = refusal(attach_lora, model, SETTINGS._replace(lora_target_modules="query,value"))
    assert "--lora_target_modules query,value" in message
    assert all(name in message for name in LINEAR_LAYERS)


def test_one_mistyped_target_module_among_right_ones_is_not_left_out_in_silence(base):
    model = load_base_model(base, CPU, torch.float32)
    message = refusal(attach_lora, model, SETTINGS._replace(lora_target_modules="q_proj,v_porj"))
    assert "v_porj" in message
    assert "v_proj" in message


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_from_the_config_as_the_loaded_model_counts_them(tied, tmp_path):
    path = save_base(tmp_path, tied=tied)
    parameters = list(make_model(path).parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert count_parameters(empty_model(path, SETTINGS)) == (sum(p.numel() for p in parameters), trainable)
    (tmp_path / "model.safetensors").unlink()
    assert count_parameters(empty_model(path, FOUR_BIT))[1] == trainable  # no weights are read


def test_the_base_model_is_recorded_as_the_user_gave_it(tmp_path):
    settings = SETTINGS._replace(base_model_name="models/tiny-base")
    model = attach_lora(load_base_model(TINY_BASE, CPU, torch.float32), settings)
    save_adapter(model, load_tokenizer(TINY_BASE), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "models/tiny-base"


# ---- Base models that cannot be loaded -------------------------------------------------------------------------------
def test_a_base_model_without_weights_or_with_damaged_ones_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(tmp_path / "base") in refusal(load_base_model, str(tmp_path / "base"), CPU, torch.float32)
    weights.unlink()
    assert "safetensors" in refusal(load_base_model, str(tmp_path / "base"), CPU, torch.float32)


def test_pickled_weights_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    torch.save(load_file(tmp_path / "base/model.safetensors"), tmp_path / "base/pytorch_model.bin")
    (tmp_path / "base/model.safetensors").unlink()
    assert "safetensors" in refusal(load_base_model, str(tmp_path / "base"), CPU, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 3}, {"intermediate_size": 128}, {"model_type": "t5"}, {"model_type": "no-such-model"}],
    ids=["weights of a layer missing", "weights of another shape", "no causal model", "unknown kind"],
)
def test_weights_that_do_not_fill_the_base_model_are_refused(base, tmp_path, changes):
    shutil.copytree(base, tmp_path / "base")
    edit_json(tmp_path / "base/config.json", **changes)
    assert str(tmp_path / "base") in refusal(load_base_model, str(tmp_path / "base"), CPU, torch.float32)


@pytest.mark.parametrize("load", [load_base_model, empty_model], ids=["loading", "counting"])
def test_a_model_that_ships_code_is_refused_without_asking_to_run_it(load, base, tmp_path, monkeypatch):
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
    shutil.copytree(base, tmp_path / "base")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_json(tmp_path / "base/config.json", model_type="shipped", auto_map=code)
    arguments = (CPU, torch.float32) if load is load_base_model else (SETTINGS,)
    refusal(load, str(tmp_path / "base"), *arguments)
    assert questions == []


# ---- Saved adapters --------------------------------------------------------------------------------------------------
def test_a_loaded_adapter_computes_what_the_saved_model_did(base, tmp_path):
    model, folder = save_trained(tmp_path / "adapter", base)
    loaded, tokenizer = load_trained_model(folder)
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    with loaded.disable_adapter():
        assert (logits(loaded) - logits(model)).abs().max() > 0.01  # the adapter changes something
    assert tokenizer.chat_template == ALPACA_TEMPLATE
    assert tokenizer.pad_token != tokenizer.eos_token


def test_an_adapter_is_loaded_with_the_quantization_it_was_trained_with(base, tmp_path):
    _, folder = save_trained(tmp_path / "adapter", base, FOUR_BIT)
    loaded, _ = load_trained_model(str(folder))
    assert isinstance(loaded.base_model.model.model.layers[0].mlp.up_proj.base_layer, Linear4bit)


@pytest.mark.parametrize("kind", ["base", "other_base"])
def test_the_base_model_and_the_adapter_are_named_when_loading(base, tmp_path, capsys, kind):
    name = save_base(tmp_path / kind)
    _, folder = save_trained(tmp_path / "adapter", name)
    capsys.readouterr()
    load_trained_model(folder)
    notices = capsys.readouterr().err
    assert name in notices
    assert str(folder) in notices


def cut_short(folder):
    weights = folder / ADAPTER_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-64])


def drop_one_weight(folder):
    edit_weights(folder / ADAPTER_WEIGHTS, lambda weights: weights.pop(min(weights)))


def add_one_weight(folder):
    edit_weights(
        folder / ADAPTER_WEIGHTS,
        lambda weights: weights.update({next(iter(weights)).replace("layers.0", "layers.7"): torch.ones(4, 64)}),
    )


# what happens to a saved adapter -> (how, words of the message)
DAMAGES = {
    "its folder is gone": (shutil.rmtree, ["does not exist", "train"]),
    "its config is gone": (lambda folder: (folder / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "its weights are gone": (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), [ADAPTER_WEIGHTS]),
    "its weights are cut short": (cut_short, [ADAPTER_WEIGHTS, "damaged"]),
    "its weights are an empty file": (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b""), ["damaged"]),
    "its weights are text": (lambda folder: (folder / ADAPTER_WEIGHTS).write_text("version 1"), ["damaged"]),
    "one weight is missing": (drop_one_weight, ["does not fit", "1 weight missing"]),
    "one weight is unknown": (add_one_weight, ["does not fit", "1 unknown"]),
    "its rank is another": (lambda folder: edit_json(folder / "adapter_config.json", r=8), ["does not fit"]),
    "its config is cut short": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r": 4, '),
        ["adapter_config.json", "cannot be read"],
    ),
    "its config is a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), ["adapter_config.json"]),
    "its config has no type": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "models/tiny-base"}'),
        ["adapter_config.json"],
    ),
    "it is no LoRA adapter": (lambda folder: edit_json(folder / "adapter_config.json", peft_type="IA3"), [""]),
    "its config has a rank of text": (lambda folder: edit_json(folder / "adapter_config.json", r="x"), [""]),
    "its config names no base": (
        lambda folder: edit_json(folder / "adapter_config.json", base_model_name_or_path=None),
        ["adapter_config.json", "base model"],
    ),
    "its base is gone": (
        lambda folder: edit_json(folder / "adapter_config.json", base_model_name_or_path="/no/such/base"),
        ["/no/such/base", "does not exist"],
    ),
    "its settings are cut short": (lambda folder: (folder / "settings.json").write_text("{"), ["settings.json"]),
    "its settings are bytes": (lambda folder: (folder / "settings.json").write_bytes(b"\xff\xfe\x00"), ["settings"]),
    "its settings are a list": (lambda folder: (folder / "settings.json").write_text("[1]"), ["settings.json"]),
    "its settings hold a length of text": (
        lambda folder: edit_json(folder / "settings.json", max_seq_length="many"),
        ["max_seq_length", "'many'"],
    ),
    "its tokenizer is gone": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        ["adapter", "tokenizer"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_is_refused_in_one_line_when(damage, base, tmp_path):
    _, folder = save_trained(tmp_path / "adapter", base)
    spoil, words = DAMAGES[damage]
    spoil(folder)
    message = refusal(load_trained_model, folder)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "other",
    [{"layers": 2}, {"layers": 4}, {"layers": 3, "hidden_size": 32}],
    ids=["fewer layers", "more layers", "another shape"],
)
def test_an_adapter_is_refused_by_a_base_model_with(other, tmp_path):
    # three layers: below that peft records the full name of every layer, and more layers are left alone
    _, folder = save_trained(tmp_path / "adapter", save_base(tmp_path / "base", layers=3))
    other_base = save_base(tmp_path / "other", **other)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=other_base)
    message = refusal(load_trained_model, folder)
    assert "does not fit its base model" in message
    assert other_base in message


def test_an_adapter_without_recorded_settings_is_loaded_onto_its_base(base, tmp_path):
    model, folder = save_trained(tmp_path / "adapter", base)
    (folder / "settings.json").unlink()
    settings = SETTINGS._replace(base_model_name=base)
    torch.testing.assert_close(logits(load_trained_model(folder, settings)[0]), logits(model), rtol=0, atol=1e-6)


def run_record():
    return {"steps": 3, "training_rows": 9, "validation_rows": 1, "validation_loss": 1.5}


def base_record(base):
    return Base(base, None, CPU, torch.float32, load_tokenizer(base), shapes=None, content="0123456789ab")


def test_a_finished_adapter_holds_no_pickle_and_can_be_read_by_others(base, tmp_path):
    previous = os.umask(0o022)
    try:
        model = make_model(base)
        save_finished_adapter(model, base_record(base), tmp_path / "adapter", SETTINGS, run_record(), TrainerState())
    finally:
        os.umask(previous)
    files = {path.name: path for path in (tmp_path / "adapter").iterdir()}
    assert {path.suffix for path in files.values()} == {".safetensors", ".json", ".jinja", ".md"}
    assert {"settings.json", "run.json", "README.md", "tokenizer.json", "adapter_config.json"} <= files.keys()
    assert {name: oct(path.stat().st_mode & 0o777) for name, path in files.items()} == dict.fromkeys(files, "0o644")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_whose_saving_fails_does_not_appear_under_its_name(base, tmp_path):
    model, record = make_model(base), base_record(base)
    with pytest.raises(TypeError):
        save_finished_adapter(
            model, record, tmp_path / "adapter", SETTINGS, run_record() | {"steps": object()}, TrainerState()
        )
    assert not (tmp_path / "adapter").exists()
    save_finished_adapter(model, record, tmp_path / "adapter", SETTINGS, run_record(), TrainerState())
    assert not (tmp_path / "adapter.incomplete").exists()


def test_a_tokenizer_with_several_templates_is_saved_readable(base, tmp_path):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = {"default": ALPACA_TEMPLATE, "tool_use": ALPACA_TEMPLATE}
    save_adapter(make_model(base), tokenizer, tmp_path)
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert folders  # transformers writes additional_chat_templates/
    assert all(path.stat().st_mode & 0o500 == 0o500 for path in folders)  # else nobody but root can open it


# ---- Merging ---------------------------------------------------------------------------------------------------------
PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("How do I repair a flat tyre?", "Why is the sky blue?", "Name three fruits.", "Write a short poem.")
]


def test_the_merged_folder_gives_the_adapters_answers_in_plain_transformers(float32_base, tmp_path):
    model, folder = save_trained(tmp_path / "adapter", float32_base)
    model, tokenizer = load_trained_model(folder)
    merge_and_save_model(model, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (merged_tokenizer.chat_template, merged_tokenizer.pad_token) == (ALPACA_TEMPLATE, tokenizer.pad_token)
    generation = build_generation_config(tokenizer, SETTINGS._replace(do_sample=False, max_new_tokens=24))
    expected = generate_replies(model, tokenizer, PROMPTS, generation)
    assert generate_replies(merged, merged_tokenizer, PROMPTS, generation) == expected
    with model.disable_adapter():
        unadapted = generate_replies(model, tokenizer, PROMPTS, generation)
    assert all(reply != other for reply, other in zip(expected, unadapted, strict=True))  # the check can tell


NAME = "model.layers.1.self_attn.q_proj"


def expected_weight(base, model, into):
    """A weight of the base, as stored or as the 4-bit model has it, plus alpha / r times B A, by hand."""
    adapted = model.get_submodule(f"base_model.model.{NAME}")
    update = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    weight = load_file(Path(base) / "model.safetensors")[f"{NAME}.weight"]
    if into == "dequantized":
        weight = dequantize_4bit(adapted.base_layer.weight.data, adapted.base_layer.weight.quant_state)
    return weight + SETTINGS.lora_alpha / SETTINGS.lora_r * update.detach()


@pytest.mark.parametrize(("settings", "into"), [(SETTINGS, "full"), (FOUR_BIT, "full"), (FOUR_BIT, "dequantized")])
def test_a_merged_model_is_unquantized_and_the_exact_sum_of_base_and_adapter(settings, into, tmp_path):
    base = save_base(tmp_path / "base")
    edit_json(tmp_path / "base/config.json", use_cache=False)  # as the Trainer leaves it
    model, folder = save_trained(tmp_path / "adapter", base, settings)
    loaded, tokenizer = load_trained_model(folder)
    previous = os.umask(0o022)
    try:
        with merged_folder(loaded, tokenizer, tmp_path / "merged", into=into) as (_, merge):
            pass
    finally:
        os.umask(previous)
    assert (merge.merged_into, merge.dtype, merge.losses) == (into, "float32", {})
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["use_cache"] is True
    assert "quantization_config" not in config
    weights = load_file(tmp_path / "merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not [name for name in weights if "lora" in name]
    torch.testing.assert_close(weights[f"{NAME}.weight"], expected_weight(base, model, into), rtol=0, atol=1e-6)
    files = list((tmp_path / "merged").iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jinja"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_merged_model_keeps_the_number_format_of_its_base_on_a_cpu(tmp_path):
    _, folder = save_trained(tmp_path / "adapter", TINY_BASE)
    merge = merge_and_save_model(*load_trained_model(folder), tmp_path / "merged")
    stored, merged = (load_file(path / "model.safetensors") for path in (Path(TINY_BASE), tmp_path / "merged"))
    assert {name: weight.dtype for name, weight in merged.items()} == {name: torch.bfloat16 for name in stored}
    assert merge.dtype == json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_too_small_for_sixteen_bits_is_merged_on_average():
    """Beside bf16 weights of 1 stands an update of a tenth of their last place, which the nearest would take back."""
    for dtype in (torch.bfloat16, torch.float16):
        update = torch.finfo(dtype).eps / 10
        weight = torch.tensor([1.0, -1.0]).repeat_interleave(100_000)
        rounded = model_utils.round_stochastically(weight + update, dtype, torch.Generator().manual_seed(0))
        assert rounded.dtype == dtype
        for found, sign in ((rounded[:100_000].float().mean(), 1), (rounded[100_000:].float().mean(), -1)):
            assert abs(found - sign - update).item() < 0.05 * update
        exact = torch.tensor([0.0, -0.0, 1.5, -2.0, 2.0**-20, torch.finfo(dtype).max]).to(dtype)
        again = model_utils.round_stochastically(exact.float(), dtype, torch.Generator().manual_seed(0))
        assert torch.equal(again, exact)


def test_merging_into_a_sixteen_bit_base_keeps_a_small_update(tmp_path):
    """As a short training leaves it: most of its changes are smaller than the distance of the weights' numbers."""
    model, folder = save_trained(tmp_path / "adapter", TINY_BASE)
    with torch.no_grad():
        model.get_submodule(f"base_model.model.{NAME}").lora_B["default"].weight *= 0.001
    save_adapter(model, load_tokenizer(TINY_BASE), folder)
    merge_and_save_model(*load_trained_model(folder), tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")[f"{NAME}.weight"].flatten()
    stored = load_file(Path(TINY_BASE) / "model.safetensors")[f"{NAME}.weight"].flatten().float()
    update = expected_weight(TINY_BASE, model, "full").flatten().float() - stored
    arrived = torch.dot(merged.float() - stored, update) / torch.dot(update, update)
    assert arrived.item() == pytest.approx(1, abs=0.1)
    nearest = torch.dot((stored + update).to(merged.dtype).float() - stored, update) / torch.dot(update, update)
    assert nearest.item() < 0.5  # the check can tell


def merge_by_scores(tmp_path, base, scores, **options):
    """Merge a 4-bit adapter where base + adapter and the candidates score so, in this order; returns the Merge."""
    loaded, tokenizer = load_trained_model(save_trained(tmp_path / "adapter", base, FOUR_BIT)[1])
    scores = iter(scores)
    with merged_folder(loaded, tokenizer, tmp_path / "merged", score=lambda model: next(scores), **options) as (
        _,
        merge,
    ):
        assert not (tmp_path / "merged").exists()
    return merge


@pytest.mark.parametrize(("full", "dequantized", "better"), [(1.99, 2.01, "full"), (2.01, 1.99, "dequantized")])
def test_after_training_in_four_bits_the_base_that_scores_better_is_merged_into(
    full, dequantized, better, base, tmp_path
):
    merge = merge_by_scores(tmp_path, base, [2.0, full, dequantized])
    assert merge == (base, better, "float32", 2.0, {"full": full, "dequantized": dequantized})
    assert json.loads((tmp_path / "merged/merge.json").read_text()) == merge._asdict()
    stored = load_file(tmp_path / "merged/model.safetensors")[f"{NAME}.weight"]
    torch.testing.assert_close(stored, expected_weight(base, make_model(base, FOUR_BIT), better), rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    assert not [path for path in (tmp_path / "merged").iterdir() if path.is_dir()]


def test_the_base_that_was_asked_for_is_merged_into_whatever_it_scores(base, tmp_path):
    merge = merge_by_scores(tmp_path, base, [2.0, 3.0], into="full")
    assert (merge.merged_into, merge.losses) == ("full", {"full": 3.0})


@pytest.mark.parametrize("scores", [(2.0, 2.2, 2.1), (2.0, float("nan"), float("nan"))])
def test_merged_models_that_all_score_worse_than_the_adapter_are_not_saved(scores, base, tmp_path):
    with pytest.raises(RuntimeError, match="merging changed the model"):
        merge_by_scores(tmp_path, base, scores)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_that_was_not_trained_in_four_bits_has_nothing_to_dequantize(base, tmp_path):
    loaded, tokenizer = load_trained_model(save_trained(tmp_path / "adapter", base)[1])
    with pytest.raises(UserError, match="not trained in 4 bits"):
        merged_folder(loaded, tokenizer, tmp_path / "merged", into="dequantized").__enter__()


def test_a_merge_is_compared_with_the_adapter_without_its_dropout(float32_base, tmp_path, monkeypatch):
    _, folder = save_trained(tmp_path / "adapter", float32_base, SETTINGS._replace(lora_dropout=0.9))
    loaded, tokenizer = load_trained_model(folder)
    scores, probe_loss = [], model_utils.probe_loss
    monkeypatch.setattr(model_utils, "probe_loss", lambda *args: scores.append(probe_loss(*args)) or scores[-1])
    merge_and_save_model(loaded, tokenizer, tmp_path / "merged")
    assert scores == pytest.approx([probe_loss(loaded, tokenizer)] * 3, abs=1e-4)  # before, after, and read back


def test_merging_leaves_the_model_in_memory_as_it_was(float32_base, tmp_path):
    model, folder = save_trained(tmp_path / "adapter", float32_base)
    loaded, tokenizer = load_trained_model(folder)
    merge_and_save_model(loaded, tokenizer, tmp_path / "merged")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].base_model_name_or_path == float32_base


def test_an_evaluation_leaves_the_gradients_of_a_four_bit_model_as_they_were():
    model = make_model(TINY_BASE, FOUR_BIT)

    def gradients():
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    before = gradients()
    logits(model)
    assert all(torch.equal(found, expected) for found, expected in zip(gradients(), before, strict=True))


def test_merging_refuses_to_overwrite_a_folder(base, tmp_path):
    loaded, tokenizer = load_trained_model(save_trained(tmp_path / "adapter", base)[1])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine.txt").write_text("keep")
    message = refusal(merge_and_save_model, loaded, tokenizer, tmp_path / "merged")
    assert str(tmp_path / "merged") in message
    assert "exists already" in message
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("losses", [(1.0, 1.2), (1.2, 1.0), (1.0, float("nan"))])
def test_a_merge_that_changes_the_model_is_not_saved(losses, base, tmp_path, monkeypatch):
    loaded, tokenizer = load_trained_model(save_trained(tmp_path / "adapter", base)[1])
    scores = iter(losses)
    monkeypatch.setattr(model_utils, "probe_loss", lambda model, tokenizer: next(scores))
    with pytest.raises(RuntimeError, match="merging changed the model"):
        merge_and_save_model(loaded, tokenizer, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_merge_that_cannot_be_written_leaves_no_folder_under_its_name_and_can_be_repeated(
    base, tmp_path, monkeypatch
):
    loaded, tokenizer = load_trained_model(save_trained(tmp_path / "adapter", base)[1])

    def disk_full(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", disk_full)
        with pytest.raises((OSError, UserError)):
            merge_and_save_model(loaded, tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_and_save_model(loaded, tokenizer, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


@pytest.mark.parametrize("generation", [{"temperature": 0.6}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_a_base_with_sampling_settings_but_no_do_sample_merges_and_decodes_as_before(generation, tmp_path):
    base = save_base(tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(generation))
    loaded, tokenizer = load_trained_model(save_trained(tmp_path / "adapter", base)[1])
    merge_and_save_model(loaded, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 6}
    assert torch.equal(merged.generate(**batch), loaded.generate(**batch))
