"""Tiny models with an adapter, rows of random tokens, and the plain way to their gradients, to compare with."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GemmaConfig, LlamaConfig, MistralConfig, Qwen3Config

from conftest import TINY_BASE
from engine_lora import FastLora
from engine_passes import PLAIN, Patches, pass_losses, probe_losses, probe_rows
from model_utils import attach_lora, build_quantization_config, load_base_model
from settings_utils import DEFAULTS, Settings

CPU = torch.device("cpu")
SETTINGS = Settings(**DEFAULTS)._replace(
    base_model_name=TINY_BASE, lora_r=4, lora_dropout=0.0, gradient_checkpointing=False
)
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "mistral with a sliding window": MistralConfig(**TINY, sliding_window=7),
    "llama": LlamaConfig(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=8),
    "gemma": GemmaConfig(**TINY, head_dim=8),
    "gemma 2, soft caps and every other layer a sliding window": Gemma2Config(**TINY, head_dim=8, sliding_window=7),
}


def make_rows(lengths=(5, 17, 9, 30, 3), seed=0, vocabulary=300):
    """Rows of random tokens whose second half is trained."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :], "row": number})
    return rows


def with_adapter(base, settings=SETTINGS, std=0.1):
    """The base in training mode with an adapter whose B is not zero, so that every gradient of it is not."""
    model = attach_lora(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return model.train()


def make_model(name="mistral", seed=0, settings=SETTINGS):
    torch.manual_seed(seed)
    return with_adapter(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])), settings)


def bundled_model(four_bit=False, **changes):
    """The bundled base in float32 with an adapter."""
    settings = SETTINGS._replace(use_4bit_quantization=four_bit, **changes)
    quantization = build_quantization_config(settings, torch.float32)
    return with_adapter(load_base_model(TINY_BASE, CPU, torch.float32, quantization), settings, std=0.05)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def reference_gradients(model, rows):
    """The plain way: one row at a time, no packing, the sum of losses over the number of trained tokens of all rows."""
    model.zero_grad()
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        (F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def fast_lora(model):
    """The model's LoRA layers, computing with the fused operation from now on."""
    return FastLora(model, partial(probe_losses, model, probe_rows(model)), Patches())


def some_rows():
    """Three rows for the bundled model."""
    return make_rows((5, 17, 9), vocabulary=8000)


def plain_gradients(model, rows, kernels=PLAIN):
    """The gradients of the sum of the rows' losses, computed in one pass."""
    pass_losses(model, rows, kernels)[0].sum().backward()
    found = gradients(model)
    model.zero_grad()
    return found


def assert_same(found, expected, tolerance=1e-5):
    """Each gradient is there, and within the tolerance, relative to its length, of the expected one."""
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


def run_out_of_memory(model, tokens):
    """Let the model run out of memory in passes of more than so many tokens; returns the sizes of those that fit.

    It happens in the backward pass, when some gradients have been added.
    """
    sizes, layers = [], model.get_base_model().get_decoder().layers

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def watch(module, inputs, hidden):
        size = hidden.shape[1]
        if size <= tokens:
            sizes.append(size)
        elif hidden.requires_grad:
            hidden.register_hook(fail)

    layers[0].register_forward_hook(watch)
    return sizes


def state_of(model):
    """What a module's instances hold beside weights and submodules, hooks included."""
    held = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("training", "_parameters", "_buffers")}
        held[name] = {key: dict(value) if isinstance(value, dict) else value for key, value in own.items()}
    return held, model.get_base_model().config.to_dict(), model.get_base_model().config._attn_implementation


def plain_pass(runner, rows, scale):
    """What StepRunner._replay computes, without a recording."""
    losses, _ = pass_losses(runner.model, rows, runner.plan.kernels)
    loss = losses.sum() * scale
    loss.backward()
    return loss.detach()
