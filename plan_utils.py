"""The plan: what a run will do and what it needs, said before any weight is loaded."""

import math
from collections import namedtuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch._dynamo.exc import TorchDynamoException

from checkpoint_utils import output_bytes
from engine_lora import triton
from engine_passes import LinearCrossEntropy, decoder_layers, pack_rows, transformers_model
from engine_runner import can_compile, recorded_tokens
from message_utils import UserError, say
from model_utils import GIB, count_parameters

PASSES_WORTH_COMPILING = 200


ALLOCATOR = 1.06  # reserved by PyTorch over what tensors take, as measured on an H200


NF4_BYTES = 1 / 2 + (1 + 4 / 256) / 64  # a weight: four bits, and of each 64 a scale of one byte with its own scale


# ---- Rows and steps --------------------------------------------------------------------------------------------------


def row_lengths(rows):
    """(rows,) tokens each."""
    index = getattr(rows, "index", None)
    return index["length"] if isinstance(index, np.ndarray) else np.array([len(row["input_ids"]) for row in rows])


def typical_rows(rows, count):
    """The `count` rows from the median length on upwards."""
    order = np.argsort(row_lengths(rows), kind="stable")
    return [rows[int(index)] for index in order[len(order) // 2 :][:count]]


def longest_rows(rows, count):
    """The `count` longest rows of a dataset."""
    lengths = row_lengths(rows)
    return [rows[int(index)] for index in np.argsort(-lengths, kind="stable")[:count]]


def longest_pass(rows, max_tokens):
    """Of the passes of at most max_tokens tokens into which these rows are cut, the rows of the longest."""
    lengths = [len(row["input_ids"]) for row in rows]
    passes = pack_rows(lengths, max_tokens)
    return [rows[index] for index in max(passes, key=lambda group: sum(lengths[index] for index in group))]


def count_steps(rows, settings, processes=1):
    """Optimizer steps of a run, as the Trainer counts them."""
    rows_a_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    steps = settings.num_epochs * math.ceil(rows / rows_a_step)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def tokens_a_step(rows, rows_a_step, processes):
    """Tokens of a process's step on average over an epoch, whose last step is short, or filled up for processes."""
    steps = math.ceil(len(rows) / (rows_a_step * processes))
    rows_an_epoch = len(rows) if processes == 1 else steps * rows_a_step * processes
    return float(row_lengths(rows).mean()) * rows_an_epoch / processes / steps


def count_passes(rows, settings, max_pass_tokens, processes=1):
    """About how many passes a process computes in a run; with max_pass_tokens 0 each row is one."""
    rows_a_step = min(settings.batch_size * settings.gradient_accumulation_steps, len(rows))
    tokens = float(row_lengths(rows).mean()) * rows_a_step
    passes = math.ceil(tokens / max_pass_tokens) if max_pass_tokens else rows_a_step
    return count_steps(len(rows), settings, processes) * passes


def count_recordings(rows, rows_a_step, processes, steps, max_pass_tokens):
    """About how many lengths of pass are met, and recorded, in so many steps; by steps of rows drawn at random.

    Where one process records a length, the others wait.
    """
    lengths, generator, met = row_lengths(rows), np.random.default_rng(0), set()
    for _ in range(min(steps * processes, 1000)):
        step = generator.choice(lengths, rows_a_step)
        met |= {recorded_tokens(int(step[group].sum())) for group in pack_rows(step.tolist(), max_pass_tokens)}
    return len(met)


# ---- The plan --------------------------------------------------------------------------------------------------------


def print_plan(settings, device, dtype, rows, validation_rows, parameters, processes=1):
    """Say, before any weight is loaded, what the run will do and what it needs."""
    total, trainable = parameters
    steps = count_steps(len(rows), settings, processes)
    tokens, trained = int(rows.index["length"].sum()), int(rows.index["trained"].sum())
    quantized = "4-bit NF4, " if settings.use_4bit_quantization else ""
    disk = output_bytes(trainable, settings.save_total_limit) / 2**20
    say(
        f"Model: {settings.base_model_name}, {total:,} parameters, {quantized}{str(dtype).removeprefix('torch.')}"
        f" on {device.type.upper()}; LoRA r={settings.lora_r} trains {trainable:,} ({trainable / total:.2%})"
    )
    say(
        f"Plan: {len(rows)} rows ({tokens:,} tokens, {trained / tokens:.0%} trained), {len(validation_rows)} held out;"
        f" {settings.batch_size * settings.gradient_accumulation_steps * processes} rows a step, {steps} steps;"
        f" about {disk:,.0f} MiB on disk"
    )
    if steps == 1 and settings.warmup_ratio > 0:
        say("A run of one step trains nothing, since the learning rate starts at 0; add --warmup_ratio 0")


# whether activations are recomputed, and whether frozen 4-bit weights stay dequantized
MemoryPlan = namedtuple("MemoryPlan", "checkpointing dequantized", defaults=(False, False))


def plan_memory(shapes, settings, device, dtype, rows, processes=1):
    """Say how much GPU memory training should take; returns the MemoryPlan.

    shapes: the model without weights. GRADIENT_CHECKPOINTING = "auto" recomputes where a tenth of the free memory
    would not be left over. Without it frozen 4-bit weights stay dequantized where that leaves a tenth.
    """
    if device.type != "cuda":
        return MemoryPlan(settings.gradient_checkpointing is True)
    count = settings.batch_size * settings.gradient_accumulation_steps
    step = int(np.sort(row_lengths(rows))[-count:].sum())
    ceiling = settings.batch_size * settings.max_seq_length
    tokens = min(max(ceiling, int(row_lengths(rows).max())), step)
    compiled = compiling_pays(settings, device, count_passes(rows, settings, ceiling, processes))
    compiled = compiled and (settings.torch_compile is True or not settings.use_dora)  # as choose_compilation does
    free, total = torch.cuda.mem_get_info(device)
    checkpointing, reason = settings.gradient_checkpointing, ""
    if checkpointing == "auto":
        plain = expected_peak(shapes, settings, dtype, tokens, False, compiled)
        checkpointing = plain > 0.9 * free
        reason = f", as {plain / GIB:.1f} GiB would {'not ' * checkpointing}fit without it"
    peak = expected_peak(shapes, settings, dtype, tokens, checkpointing, compiled)
    fused = triton and dtype != torch.float32 and not settings.use_dora
    more = dequantized_bytes(shapes, dtype) if settings.use_4bit_quantization and fused else 0
    dequantized = 0 < more <= 0.9 * free - peak and not checkpointing
    if dequantized:
        peak += more
        reason += f"; {more / GIB:.1f} GiB are for weights that are dequantized once, which is faster"
    say(
        f"Memory: about {peak / GIB:.1f} GiB at most, passes of up to {tokens:,} tokens; {free / GIB:.1f} of"
        f" {total / GIB:.1f} GiB are free; gradient checkpointing {'on' if checkpointing else 'off'}{reason}"
    )
    if peak > free:
        say("That may not fit: lower --batch_size or --max_seq_length; passes that do not fit are made smaller")
    return MemoryPlan(checkpointing, dequantized)


def compiling_pays(settings, device, passes):
    """Whether a run is to compile its layers: as TORCH_COMPILE says, by "auto" on CUDA if so many passes repay it."""
    if settings.torch_compile != "auto":
        return settings.torch_compile
    return device.type == "cuda" and triton is not None and passes >= PASSES_WORTH_COMPILING


def check_compiler(settings, device):
    """Raise UserError if layers are to be compiled on a CPU that has no C++ compiler; found out on a tiny function."""
    if device.type != "cpu" or settings.torch_compile is not True:
        return
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except TorchDynamoException as error:
        raise UserError(
            "--torch_compile true needs a working C++ compiler on a CPU, and PyTorch found none; install one (g++ or"
            " clang), or leave it at auto, which compiles on CUDA only"
        ) from error
    say("The layers will be compiled, half a minute or so, which seldom pays on a CPU (--torch_compile false: no)")


def choose_compilation(model, settings, device, passes):
    """Whether to compile this model's layers in a run of so many passes; says why or why not on a CUDA GPU."""
    pays = compiling_pays(settings, device, passes)
    if settings.torch_compile == "auto" and device.type == "cuda":
        if not can_compile(model):
            say("The layers are not compiled: that pays with the fused kernels, which do not serve this model or GPU")
            return False
        if pays:
            say(f"Compiling the layers takes half a minute or so, which {passes:,} passes repay")
        else:
            say(f"The layers are not compiled: {passes:,} passes would not repay it; --torch_compile true does it")
    return pays


# ---- Memory ----------------------------------------------------------------------------------------------------------


def weight_bytes(model, settings, dtype):
    """Memory of the base's weights as they will be loaded: linear layers but the output in NF4 where quantized."""
    base = transformers_model(model)
    head, seen, total = base.get_output_embeddings(), set(), 0
    for module in base.modules():
        quantized = settings.use_4bit_quantization and isinstance(module, torch.nn.Linear) and module is not head
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel() * (NF4_BYTES if quantized and name == "weight" else dtype.itemsize)
    return total


def dequantized_bytes(model, dtype):
    """Memory of the 4-bit weights of LoRA's layers once more, dequantized."""
    bases = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    head = transformers_model(model).get_output_embeddings()
    linear = [base.weight for base in bases if isinstance(base, torch.nn.Linear) and base.weight is not head.weight]
    return sum(weight.numel() for weight in linear) * dtype.itemsize


def dora_shapes(model):
    """Of all linear layers with an adapter: their outputs, their weights' elements, and the most inputs of one."""
    bases = [module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)]
    shapes = [base.weight.shape for base in bases if isinstance(base, torch.nn.Linear)]
    outputs, weights = sum(shape[0] for shape in shapes), sum(shape.numel() for shape in shapes)
    return outputs, weights, max((shape[1] for shape in shapes), default=0)


def expected_peak(model, settings, dtype, tokens, checkpointing, compiled):
    """Expected peak of PyTorch's memory on a CUDA GPU in bytes, when passes of so many tokens are trained.

    Counted: the weights; the adapter in float32 with gradients, AdamW's two moments (a byte each in 8 bits) and the
    copies that the layers multiply with; what each layer keeps for its backward pass, or with checkpointing its input
    and one layer whole; the largest weight dequantized; a chunk of logits. peft's DoRA computes in float32, keeps more
    of each output, with dropout each weight dequantized too, and multiplies with unit matrices. The allocator rounds up
    and leaves gaps.
    """
    base = transformers_model(model)
    config, unit = base.config.get_text_config(), dtype.itemsize
    # configs differ in what they name; the layers' own matrices always tell the widest one
    shapes = {p.shape for layer in decoder_layers(base) for p in layer.parameters() if not p.requires_grad}
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or max((max(shape) for shape in shapes), default=4 * hidden)
    trainable = count_parameters(model)[1]
    moments = 2 if settings.optimizer == "paged_adamw_8bit" else 8
    fixed = weight_bytes(model, settings, dtype) + trainable * (4 + 4 + moments + unit)
    # two residuals and norms; query, key, value and attention's output; gate, up and their product
    kept = unit * (4 * hidden + 2 * (heads + groups) * width + 3 * inner)
    if compiled:  # a recorded pass has gradients of its own, which are then added to the step's
        fixed += trainable * 4
    else:  # the norms' copies in float32
        kept += 2 * (4 + unit) * hidden
    inputs, constant = unit * hidden, 0
    working = tokens * unit * (3 * inner + 3 * hidden)
    if settings.use_dora:
        outputs, weights, widest = dora_shapes(model)
        inputs, kept = 4 * hidden, kept + 8 * outputs / layers
        constant = unit * weights / layers if settings.lora_dropout else 0
        working += (4 + unit) * widest**2
    saved = tokens * (layers * inputs + kept) + constant if checkpointing else layers * (tokens * kept + constant)
    largest = max((shape.numel() for shape in shapes), default=hidden * inner) * unit
    logits = min(tokens * config.vocab_size, LinearCrossEntropy.LOGITS) * (unit if triton else 4 + 4 + unit)
    return (fixed + saved + max(working + largest, logits)) * ALLOCATOR
