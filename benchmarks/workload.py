"""What benchmarks/speed.py trains on: a model of Mistral-7B's shape with random weights, and the tokenized rows."""

import json
import statistics
import time

MAX_SEQ_LENGTH, SEED = 512, 42


def prepare(folder, device, path):
    """Fill the folder with the model, its 4-bit copy and the tokenized rows; on a CPU the bundled model serves."""
    import data_utils
    from file_utils import resolve_path

    started = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    conversations, _ = data_utils.load_announced("Rows", path, {}, folder / "cache")
    conversations, _ = data_utils.split_conversations(conversations, 0, SEED)  # shuffled
    base = copy = str(resolve_path("models/tiny-base"))
    if device == "cuda":
        base, copy = str(folder / "base"), str(folder / "base-4bit")
        train_tokenizer(conversations, base)
        save_models(base, copy, device)
    natural = tokenize(base, conversations, folder / "cache")
    prepared = {"base": base, "copy": copy, "natural": natural, "full": [fill(row) for row in natural]}
    (folder / "prepared.json").write_text(json.dumps(prepared))
    mean = statistics.mean(len(row["input_ids"]) for row in natural)
    print(f"{len(natural)} rows of {mean:.0f} tokens on average, in {folder}, {time.time() - started:.0f} s")


def train_tokenizer(conversations, folder):
    """A byte-level BPE tokenizer of at most Mistral's 32,000 tokens, learned from the rows that it will encode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet)
    texts = (message["content"] for _, messages in conversations for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_models(base, copy, device):
    """Random weights of Mistral-7B-v0.1's shape, made on the device in bf16, and the same in 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, MistralConfig, set_seed

    set_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):  # transformers' defaults for Mistral are the 7B's
        model = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=32_000, dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(base)
    del model
    torch.cuda.empty_cache()  # nothing to do without a GPU
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, device_map={"": device}, dtype=torch.bfloat16
    )
    model.save_pretrained(copy)
    AutoTokenizer.from_pretrained(base).save_pretrained(copy)


def tokenize(base, conversations, cache_dir):
    """The rows as this project tokenizes them: lists of input_ids and labels, at most MAX_SEQ_LENGTH long."""
    import model_utils
    import token_utils

    tokenizer = model_utils.load_tokenizer(base)
    return list(token_utils.tokenize_conversations(tokenizer, conversations, MAX_SEQ_LENGTH, "rows", cache_dir))


def fill(row):
    """The row with its answer repeated up to MAX_SEQ_LENGTH tokens."""
    answer = [token for token in row["labels"] if token != -100]
    room = MAX_SEQ_LENGTH - len(row["input_ids"])
    more = (answer * (room // len(answer) + 1))[:room]
    return {**row, "input_ids": row["input_ids"] + more, "labels": row["labels"] + more}
