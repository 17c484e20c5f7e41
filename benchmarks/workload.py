"""What benchmarks/speed.py trains on: a model of a well-known shape with random weights, and the tokenized rows."""

import json
import statistics
import time
from pathlib import Path

MAX_SEQ_LENGTH, SEED = 512, 42
WORDS = 32_000
# hidden size, inner size, layers, heads, key-value heads
SHAPES = {
    "13b": (5120, 13824, 40, 40, 40),  # Llama 2 13B
    "34b": (8192, 22016, 48, 64, 8),  # Code Llama 34B
    "70b": (8192, 28672, 80, 64, 8),  # Llama 2 70B
}


def prepare(folder, device, path, shape="7b"):
    """Fill the folder with the model, its 4-bit copy and the tokenized rows; on a CPU the bundled model serves.

    Of shapes other than Mistral-7B's only the 4-bit copy is made, and of the model itself no more than its config.
    """
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
        save_models(base, copy, device) if shape == "7b" else save_four_bits(base, copy, device, SHAPES[shape])
    natural = tokenize(base, conversations, folder / "cache")
    prepared = {"base": base, "copy": copy, "natural": natural, "shape": shape}
    (folder / "prepared.json").write_text(json.dumps(prepared))
    mean = statistics.mean(len(row["input_ids"]) for row in natural)
    print(f"{len(natural)} rows of {mean:.0f} tokens on average, in {folder}, {time.time() - started:.0f} s")


def train_tokenizer(conversations, folder):
    """A byte-level BPE tokenizer of at most WORDS tokens, learned from the rows that it will encode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet)
    texts = (message["content"] for _, messages in conversations for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def save_models(base, copy, device):
    """Random weights of Mistral-7B-v0.1's shape, made on the device in bf16, and the same in 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, set_seed

    set_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):  # transformers' defaults for Mistral are the 7B's
        model = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=WORDS, dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(base)
    del model
    torch.cuda.empty_cache()  # nothing to do without a GPU
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=four_bits(), device_map={"": device}, dtype=torch.bfloat16
    )
    model.save_pretrained(copy)
    AutoTokenizer.from_pretrained(base).save_pretrained(copy)


def four_bits():
    """QLoRA's quantization."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def save_four_bits(base, copy, device, shape):
    """Random weights of a Llama of this shape, quantized one by one, so that they are never there in 16 bits."""
    import torch
    from accelerate import init_empty_weights
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    config = LlamaConfig(
        vocab_size=WORDS, max_position_embeddings=4096, dtype="bfloat16", **dict(zip(names, shape, strict=True))
    )
    config.save_pretrained(base)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    draw, parts = torch.Generator(device).manual_seed(SEED), {}
    for name, weight in model.named_parameters():
        values = torch.ones(weight.shape, dtype=torch.bfloat16, device=device)
        if weight.dim() == 2:  # small enough that rounding does not grow from layer to layer, as in trained models
            written = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = shape[0] ** -0.5 / (2 * shape[2]) ** (0.5 * written)
            values.normal_(std=std, generator=draw)
        part = parts.setdefault(name.split(".layers.")[-1].split(".")[0], {})
        part[name] = values
        if name in linear - {"lm_head.weight"}:
            part[name], state = quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
            part |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        part.update({key: value.cpu() for key, value in part.items()})
    Path(copy).mkdir(exist_ok=True)
    index = {}
    for number, part in parts.items():
        file = f"model-{number}.safetensors"
        save_file({key: value.contiguous() for key, value in part.items()}, Path(copy, file), {"format": "pt"})
        index |= dict.fromkeys(part, file)
    index = json.dumps({"metadata": {}, "weight_map": index})
    Path(copy, "model.safetensors.index.json").write_text(index, encoding="utf-8")
    config.quantization_config = four_bits().to_dict()
    config.architectures = [type(model).__name__]
    config.save_pretrained(copy)
    AutoTokenizer.from_pretrained(base).save_pretrained(copy)


def tokenize(base, conversations, cache_dir):
    """The rows as this project tokenizes them: lists of input_ids and labels, at most MAX_SEQ_LENGTH long."""
    import model_utils
    import token_utils

    tokenizer = model_utils.load_tokenizer(base)
    return list(token_utils.tokenize_conversations(tokenizer, conversations, MAX_SEQ_LENGTH, "rows", cache_dir))
