"""The plan: what a run will do, how its steps will be computed and what they need, before any weight is loaded."""

import math
import os
import time
from typing import NamedTuple

import numpy as np
import psutil
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch._dynamo.exc import TorchDynamoException

from checkpoint_utils import output_bytes
from engine_blocks import activation, has_blocks
from engine_lora import all_plain, triton
from engine_passes import (
    GRAPH_TOKENS,
    PLAIN,
    Kernels,
    LinearCrossEntropy,
    block_mask_tokens,
    cost_of,
    decoder_layers,
    lengths_in_use,
    own_dropout,
    planned_length,
    stores_scores,
    transformers_model,
)
from length_utils import best_lengths, cut_steps
from message_utils import UserError, counted, say
from model_utils import GIB, count_parameters
from progress_utils import format_duration

PASSES_WORTH_RECORDING = 20
# What recording a pass costs in tokens that could be trained meanwhile, measured on an H100 whose host is slow
LAYER_SECONDS, CHECKPOINTED_LAYER_SECONDS = 0.012, 0.025
GPU_OPERATIONS, GPU_TOKENS = 4e14, 250_000  # a second, at most: small models keep no GPU busy
SURELY_LONGER = 1.03  # so many times as long as plain passes must recorded ones be expected to take, to be left out
# Passes of more hidden values fill a GPU no better, where nothing is done but once a pass
ENOUGH_TOKENS, ENOUGH_VALUES = 4096, 4096 * 4096
ALLOCATOR = 1.06  # PyTorch reserves so much more than its tensors take, as measured on an H200
NF4_BYTES = 1 / 2 + (1 + 4 / 256) / 64  # a weight takes four bits, and 64 weights share a scale of one byte, scaled too


# ---- Rows and steps --------------------------------------------------------------------------------------------------
def row_lengths(rows):
    """The tokens of each row, (rows,), without reading the rows of TokenizedRows, which know them."""
    if isinstance(rows, list):
        return np.array([len(row["input_ids"]) for row in rows])
    return rows.index["length"]


def longest_rows(rows, count):
    """The `count` longest rows of a dataset."""
    lengths = row_lengths(rows)
    return [rows[int(index)] for index in np.argsort(-lengths, kind="stable")[:count]]


def longest_row(*datasets):
    """The tokens of the longest row of all."""
    return max(int(row_lengths(rows).max()) for rows in datasets if len(rows))


def count_steps(rows, settings, processes=1):
    """Optimizer steps of a run, as the Trainer counts them."""
    rows_a_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    steps = settings.num_epochs * math.ceil(rows / rows_a_step)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def tokens_a_step(rows, rows_a_step, processes):
    """Tokens in a step of one process, on average over an epoch, whose last step may be short."""
    steps = math.ceil(len(rows) / (rows_a_step * processes))
    return int(row_lengths(rows).sum()) / processes / steps


def count_passes(rows, settings, max_pass_tokens, processes=1):
    """About how many passes a process computes in a run; where max_pass_tokens is 0, each row is a pass."""
    rows_a_step = min(settings.batch_size * settings.gradient_accumulation_steps, len(rows))
    tokens = float(row_lengths(rows).mean()) * rows_a_step
    passes = math.ceil(tokens / max_pass_tokens) if max_pass_tokens else rows_a_step
    return count_steps(len(rows), settings, processes) * passes


def draw_steps(rows, rows_a_step, steps):
    """The lengths of the rows of steps that are drawn at random, a list for each step.

    No more steps than the run has, nor than take long to cut into passes.
    """
    lengths, generator = row_lengths(rows), np.random.default_rng(0)
    rows_a_step = min(rows_a_step, len(lengths))
    count = min(steps, max(10, 16_000 // rows_a_step))
    return [generator.choice(lengths, rows_a_step, replace=False).tolist() for _ in range(count)]


def draw_passes(rows, plan, steps, lengths=()):
    """The tokens of the rows of steps that are drawn at random, and those of the passes into which they are cut."""
    drawn = draw_steps(rows, plan.rows_a_step, steps)
    return sum(map(sum, drawn)), cut_steps(drawn, plan.max_pass_tokens, lengths)


# ---- The plan --------------------------------------------------------------------------------------------------------
class Gpu(NamedTuple):
    """What a plan must know of a CUDA GPU: its memory in bytes, and which kernels it can run."""

    free: int
    total: int
    flash_attention: bool = True  # of the Ampere generation or newer
    triton: bool = True  # Triton, in which the fused kernels are written, is installed


def look_at_gpu(device):
    """The Gpu that a device is, or None where it is no CUDA GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    free = min(free, allowed - torch.cuda.memory_reserved(device))
    return Gpu(free, allowed, flash_attention=properties.major >= 8, triton=triton is not None)


class StepPlan(NamedTuple):
    """How the optimizer steps of a run are computed: plan_steps makes it, and StepRunner alone carries it out.

    Where a kernel does not serve the model or the memory runs out, the runner lowers its plan.
    """

    kernels: Kernels = PLAIN
    checkpointing: bool = False  # the activations of a decoder layer are computed again in the backward pass
    offloaded: bool = False  # what checkpointing keeps of each layer, its input, waits on the host
    dequantized: bool = False  # frozen 4-bit weights stay dequantized
    compiled: bool = False  # decoder layers are compiled
    blocks: bool = False  # norms, gates and rotations compute in one kernel each, if layers are not compiled
    recorded: bool = False  # passes are recorded as CUDA graphs, one for each length
    scores_recorded: bool = False  # so are passes that are only scored, if they are about as long as passes may be
    lengths: tuple = ()  # of recorded passes, in tokens; a shorter pass is filled up to the next one
    max_pass_tokens: int = 0  # a pass holds at most so many tokens; 0: each row is a pass of its own
    rows_a_step: int = 1  # in each process
    longest_row: int = 1  # in tokens, of the rows that are scored too
    expected_bytes: float = 0.0  # peak of the GPU's memory; 0 on other devices
    expected_seconds: float = 0.0  # of all steps; the rehearsal tells
    shards: int = 1  # so many processes share out the frozen weights, and must compute equally many passes


def plan_steps(shapes, settings, dtype, rows, gpu=None, processes=1, held_out=(), shards=None):
    """Decide how the steps of a run on these TokenizedRows are computed, and say it of a CUDA GPU; a StepPlan.

    shapes: the model with its adapter, without weights. gpu: None where there is no CUDA GPU. held_out: the rows that
    are only scored. shards: the ShardEngine, or None.
    """
    base, rows_a_step = transformers_model(shapes), settings.batch_size * settings.gradient_accumulation_steps
    longest = longest_row(rows, held_out)
    kernels = plan_kernels(shapes, settings, dtype, gpu, longest)
    max_pass_tokens = plan_pass_tokens(base, settings, kernels)
    plan = StepPlan(
        kernels,
        checkpointing=settings.gradient_checkpointing is True,
        compiled=settings.torch_compile,
        max_pass_tokens=max_pass_tokens,
        rows_a_step=rows_a_step,
        longest_row=longest,
    )
    if shards:
        say_shards(shapes, settings, dtype, shards, gpu)
        kernels = kernels._replace(lora=kernels.lora and shards.whole_layers)
        plan = plan._replace(shards=shards.processes, compiled=False, kernels=kernels)
    if gpu is None:
        return plan
    steps = count_steps(len(rows), settings, processes)
    if shards:
        return plan_memory(plan, shapes, settings, dtype, rows, steps, gpu)
    worth = count_passes(rows, settings, max_pass_tokens, processes) >= PASSES_WORTH_RECORDING
    fused = computes_fused(plan, shapes)
    plan = plan._replace(
        recorded=worth and fused and all(kernels), blocks=fused and not plan.compiled and has_blocks(shapes)
    )
    plan = plan_memory(plan, shapes, settings, dtype, rows, steps, gpu)
    if not plan.recorded:
        return plan
    # in the memory of recorded passes there is room for those that are only scored
    return plan_recorded_scores(plan, held_out, settings.eval_rows, count_rounds(steps, settings.eval_steps))


def plan_recorded_scores(plan, rows, most=0, times=1):
    """Let a plan record the passes that score so many of these rows, 0 for all, so often, if they are many."""
    if not (len(rows) and plan.max_pass_tokens and plan.kernels.attention and plan.kernels.loss):
        return plan
    tokens = float(row_lengths(rows).mean()) * min(len(rows), most or len(rows))
    return plan._replace(scores_recorded=times * tokens / plan.max_pass_tokens >= PASSES_WORTH_RECORDING)


def plan_lengths(plan, shapes, rows, steps):
    """The lengths of recorded passes of a run of so many steps; the last one is what a pass holds at most.

    What recording costs is the same whenever it is asked, so that a run that goes on computes as it did before.
    """
    seconds = len(decoder_layers(shapes)) * (CHECKPOINTED_LAYER_SECONDS if plan.checkpointing else LAYER_SECONDS)
    operations = (6 if plan.checkpointing else 4) * count_parameters(shapes)[0]
    price = seconds * min(GPU_OPERATIONS / operations, GPU_TOKENS)
    drawn = draw_steps(rows, plan.rows_a_step, steps)
    return best_lengths(drawn, plan.max_pass_tokens, longest_row(rows), price * len(drawn) / steps)


def longest_tokens(plan, rows):
    """The tokens that no pass of these rows exceeds."""
    longest = int(np.sort(row_lengths(rows))[-plan.rows_a_step :].sum())
    return min(max(plan.max_pass_tokens, plan.longest_row), longest)


def say_shards(shapes, settings, dtype, shards, gpu):
    """Say what each process holds of the base model that a ShardEngine shares out, and what a GPU then does without."""
    whole, held, gathered = shard_bytes(shapes, settings, dtype, shards.processes)
    say(
        f"Shards: {shards.processes} processes share the base model's {whole / GIB:.2f} GiB by {shards.name}; each"
        f" holds {held / GIB:.2f} GiB of it, gathers {gathered / GIB:.2f} GiB at a time, and keeps the adapter whole"
    )
    if gpu and not shards.whole_layers:
        say(f"{shards.name} takes memory of its own beside what is expected, 3 GiB at 7 billion parameters")
    if gpu or settings.torch_compile:
        fused = "" if shards.whole_layers else "fused nor "
        say(f"The layers are neither {fused}compiled nor recorded, since their weights come and go, which is slower")


def plan_kernels(model, settings, dtype, gpu, longest):
    """The Kernels that should serve a model; the runner tries them and leaves out those that do not.

    Without a GPU only the loss, and that where the logits of a pass would take more than a chunk of them.
    longest: the tokens of the longest row.
    """
    base = transformers_model(model)
    head, half = base.get_output_embeddings(), dtype != torch.float32
    loss = type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
    if gpu is None:
        tokens = max(plan_pass_tokens(base, settings, PLAIN), longest)
        return Kernels(loss=loss and tokens * head.out_features > LinearCrossEntropy.LOGITS)
    return Kernels(
        attention=half and gpu.flash_attention and not own_dropout(base) and not stores_scores(base),
        loss=loss,
        lora=half and gpu.triton,
    )


def plan_scores(model, settings, rows):
    """The StepPlan by which the rows of an evaluation are scored."""
    base, longest = transformers_model(model), longest_row(rows)
    kernels = plan_kernels(model, settings, model.dtype, look_at_gpu(base.device), longest)._replace(lora=False)
    plan = StepPlan(kernels, max_pass_tokens=plan_pass_tokens(base, settings, kernels), longest_row=longest)
    return plan_recorded_scores(plan, rows)


def plan_pass_tokens(base, settings, kernels):
    """The tokens that a pass may hold: those of a padded batch, or fewer where a block mask must keep rows apart."""
    ceiling = settings.batch_size * settings.max_seq_length
    return ceiling if kernels.attention else min(ceiling, block_mask_tokens(base))


def computes_fused(plan, shapes):
    """Whether all of a model's LoRA layers compute with the fused operation."""
    return plan.kernels.lora and all_plain(shapes)


def plan_memory(plan, shapes, settings, dtype, rows, steps, gpu):
    """Complete a StepPlan by what depends on a GPU's memory, and say how much training should take.

    The fastest way is taken that leaves a tenth of the free memory over; where none does, the one that takes least.
    GRADIENT_CHECKPOINTING = "auto" recomputes where all others do not fit. Checkpoints wait on the host where they do
    not fit on the GPU beside the rest, as those of rows of tens of thousands of tokens.
    """
    tried = []
    for way in memory_ways(plan, shapes, settings, dtype, rows, steps):
        tried.append(way)
        if way.expected_bytes <= 0.9 * gpu.free:
            break
    plan = tried[-1]
    tokens, peak = longest_tokens(plan, rows), plan.expected_bytes
    reason = ""
    if settings.gradient_checkpointing == "auto":
        plain = [way.expected_bytes for way in tried if not way.checkpointing][-1]
        reason = f", as {plain / GIB:.1f} GiB would {'not fit' if plan.checkpointing else 'fit'} without it"
    if plan.dequantized:
        more = dequantized_bytes(shapes, dtype)
        reason += f"; {more / GIB:.1f} GiB are for weights that are dequantized once, which is faster"
    if plan.offloaded:
        kept = checkpoint_bytes(shapes, settings, dtype) * tokens
        reason += f"; the {kept / GIB:.1f} GiB that it keeps wait in the host's memory, which is slower"
    say(
        f"Memory: about {peak / GIB:.1f} GiB at most, passes of up to {tokens:,} tokens; {gpu.free / GIB:.1f} of"
        f" {gpu.total / GIB:.1f} GiB are free; gradient checkpointing {'on' if plan.checkpointing else 'off'}{reason}"
    )
    if peak > gpu.free:
        say("That may not fit: lower --batch_size or --max_seq_length; passes that do not fit are made smaller")
    return plan


def memory_ways(plan, shapes, settings, dtype, rows, steps):
    """The ways in which memory can be used, the fastest first: StepPlans.

    Weights stay dequantized, or checkpoints wait on the host, where they may take half of what is free. Passes need no
    more tokens than fill the GPU, unless each of them dequantizes the frozen 4-bit weights.
    """
    hidden = transformers_model(shapes).config.get_text_config().hidden_size
    whole, enough = plan.max_pass_tokens, max(ENOUGH_TOKENS, ENOUGH_VALUES // hidden // GRAPH_TOKENS * GRAPH_TOKENS)
    fused = computes_fused(plan, shapes)
    keeps = settings.use_4bit_quantization and fused and plan.shards == 1
    more = dequantized_bytes(shapes, dtype) if keeps else 0
    few = min(whole, enough) if fused else whole
    elsewhere = 0
    if plan.shards > 1:
        all_weights, held, gathered = shard_bytes(shapes, settings, dtype, plan.shards)
        elsewhere = ALLOCATOR * (all_weights - held - gathered)

    def way(checkpointing, tokens, more=0):
        tried = plan._replace(max_pass_tokens=tokens, checkpointing=checkpointing, dequantized=more > 0)
        if plan.recorded:
            lengths = plan_lengths(tried, shapes, rows, steps)
            tried = tried._replace(lengths=lengths, max_pass_tokens=lengths[-1])
        how = (plan.compiled or plan.blocks, plan.recorded, plan.kernels.loss)
        peak = expected_peak(shapes, settings, dtype, longest_tokens(tried, rows), checkpointing, *how) - elsewhere
        return tried._replace(expected_bytes=peak + more)

    if settings.gradient_checkpointing is not True:
        if more or not settings.use_4bit_quantization:
            yield way(False, few, more)
        yield way(False, whole)
        if few < whole:
            yield way(False, few)
    if settings.gradient_checkpointing is not False:
        last = way(True, whole)
        yield last
        if few < whole:
            last = way(True, few)
            yield last
        kept = checkpoint_bytes(shapes, settings, dtype) * longest_tokens(last, rows)
        if kept <= psutil.virtual_memory().available / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            peak = last.expected_bytes - ALLOCATOR * kept
            yield last._replace(offloaded=True, recorded=False, lengths=(), expected_bytes=peak)


def checkpoint_bytes(model, settings, dtype):
    """Bytes that checkpointing keeps of a token until the backward pass: the inputs of all layers but two at work."""
    config = transformers_model(model).config.get_text_config()
    width = 4 if settings.use_dora else dtype.itemsize  # peft's DoRA gives float32
    return max(config.num_hidden_layers - 2, 0) * width * config.hidden_size


def count_rounds(steps, eval_steps, done=0):
    """The evaluations, or saves, behind the step `done`: one every eval_steps, and one at the last step."""
    return -(-steps // eval_steps) - done // eval_steps if done < steps else 0


def describe_rounds(steps, eval_steps):
    """'4 evaluations, one every 23 steps', where the last one falls on the last step, or as it is else."""
    rounds = count_rounds(steps, eval_steps)
    if rounds == 1:
        return "1 evaluation, after the last step"
    last = " and one after the last" if steps % eval_steps else ""
    often = f"every {eval_steps:,} steps" if eval_steps > 1 else "after each step"
    return f"{counted(rounds, 'evaluation')}, one {often}{last}"


class RunTimes:
    """Seconds that the parts of a run take: as they were rehearsed, and then as they turn out."""

    REHEARSED = 2  # a rehearsed time counts as much as so many measured ones

    def __init__(self, steps=0, eval_steps=1, began=None):
        self.steps, self.eval_steps = steps, eval_steps
        self.began = time.time() if began is None else began
        self.sums = {}  # of each part: seconds, and how many times they were spent

    def expect(self, part, seconds):
        """part: "step", "evaluation", "answers", "save", or "end": what comes after the last step."""
        self.sums[part] = (seconds * self.REHEARSED, self.REHEARSED)

    def measured(self, part, seconds, count=1):
        sum_of_seconds, times = self.sums.get(part, (0.0, 0))
        self.sums[part] = (sum_of_seconds + seconds, times + count)

    def each(self, part):
        sum_of_seconds, times = self.sums.get(part, (0.0, 1))
        return sum_of_seconds / times

    def elapsed(self):
        return time.time() - self.began

    def left(self, step):
        """Seconds from the end of a step to the end of the run."""
        rounds = count_rounds(self.steps, self.eval_steps, step)
        a_round = sum(self.each(part) for part in ("evaluation", "answers", "save"))
        return (self.steps - step) * self.each("step") + rounds * a_round + self.each("end")

    def describe(self, step, evaluated, answered, final):
        """The line that tells what a run will take: steps, evaluations of so many rows, answers, saves, and all.

        Its parts add up to the whole; what went by before the first step is one of them.
        """
        steps, rounds = self.steps - step, count_rounds(self.steps, self.eval_steps, step)
        parts = [
            (steps, "step", "a step"),
            (rounds, "evaluation", f"an evaluation of {counted(evaluated, 'row')}"),
            (rounds, "answers", f"for {counted(answered, 'answer')}"),
            (rounds, "save", "a save"),
            (1, "end", f"for all {counted(final, 'row')} at the end"),
        ]
        # of a run of seconds nothing but the steps was rehearsed
        parts = [
            f"{times:,} x {format_seconds(self.each(part))} {what}" for times, part, what in parts if part in self.sums
        ]
        elapsed = self.elapsed()
        before = f"{format_duration(elapsed)} so far"
        return f"Time: {', '.join([before, *parts])}; about {format_duration(elapsed + self.left(step))} in all"


def format_seconds(seconds):
    """Seconds to about a percent, since they are multiplied: '14.3 ms', '0.21 s', '12.4 s', '2 min 5 s'."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    return format_duration(seconds)


def expected_seconds(plan, rehearsal, rows, steps, processes=1):
    """Seconds that so many steps will take: the rehearsed pass's speed, and what recording each new length takes."""
    tokens = steps * tokens_a_step(rows, plan.rows_a_step, processes)
    if not plan.recorded:
        return tokens / rehearsal.tokens * rehearsal.seconds
    drawn, passes = draw_passes(rows, plan, steps, lengths_in_use(plan))
    filled, longest = [planned_length(plan, size) for size in passes], planned_length(plan, rehearsal.tokens)
    training = tokens / drawn * cost_of(filled) / cost_of([longest]) * rehearsal.seconds
    return training + len({*filled} - {longest}) * rehearsal.recording_seconds


def worth_recording(plan, rehearsal, rows, steps, processes=1):
    """Whether so many steps take less time with recorded passes than with plain ones, for which the GPU may wait."""
    drawn, passes = draw_passes(rows, plan, steps)
    a_token = rehearsal.seconds / cost_of([planned_length(plan, rehearsal.tokens)])
    plain = sum(max(rehearsal.launch_seconds, a_token * cost_of([size])) for size in passes)
    plain *= steps * tokens_a_step(rows, plan.rows_a_step, processes) / drawn
    return expected_seconds(plan, rehearsal, rows, steps, processes) <= plain * SURELY_LONGER


def check_compiler(plan, device):
    """Raise UserError if layers are to be compiled on a CPU that has no C++ compiler; a tiny function tells."""
    if device.type != "cpu" or not plan.compiled:
        return
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except TorchDynamoException as error:
        raise UserError(
            "--torch_compile true needs a working C++ compiler on a CPU, and PyTorch found none; install one (g++ or"
            " clang), or leave it at false"
        ) from error
    say("The layers will be compiled, half a minute or so, which seldom pays on a CPU (--torch_compile false: no)")


def print_plan(settings, base, rows, validation_rows, evaluated_rows, processes=1):
    """Say, before any weight is loaded, what the run will do and what it needs; base: model_utils.Base.

    evaluated_rows: those of the validation rows that are measured during the training.
    """
    total, trainable = count_parameters(base.shapes)
    steps = count_steps(len(rows), settings, processes)
    tokens, trained = int(rows.index["length"].sum()), int(rows.index["trained"].sum())
    quantized = "4-bit NF4, " if settings.use_4bit_quantization else ""
    rows_a_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    disk = output_bytes(trainable, settings.save_total_limit) / 2**20
    say(
        f"Model: {settings.base_model_name}, {total:,} parameters, {quantized}{str(base.dtype).removeprefix('torch.')}"
        f" on {base.device.type.upper()}; LoRA r={settings.lora_r} trains {trainable:,} ({trainable / total:.2%})"
    )
    say(
        f"Plan: {counted(len(rows), 'row')} ({counted(tokens, 'token')}, {trained / tokens:.0%} trained),"
        f" {len(validation_rows):,} held out; {counted(rows_a_step, 'row')} a step, {counted(steps, 'step')};"
        f" about {disk:,.0f} MiB on disk"
    )
    if len(validation_rows):
        rows_a_round = counted(len(evaluated_rows), "row")
        if len(evaluated_rows) < len(validation_rows):
            rows_a_round += f" of the {len(validation_rows):,}, all of them at the end"
        answers = min(settings.sample_prompts, len(validation_rows))
        answers = f"{counted(answers, 'answer')} and " if answers else ""
        say(f"Plan: {describe_rounds(steps, settings.eval_steps)}, on {rows_a_round}, with {answers}a checkpoint")
    if steps == 1 and settings.warmup_ratio > 0:
        say("A run of one step trains nothing, since the learning rate starts at 0; add --warmup_ratio 0")


# ---- Memory ----------------------------------------------------------------------------------------------------------
def weight_bytes(model, settings, dtype, part=None):
    """Bytes of the base's weights as they will be loaded: where quantized, linear layers but the output are in NF4.

    part: the module of it whose weights count; None: all of them.
    """
    base = transformers_model(model)
    head, seen, total = base.get_output_embeddings(), set(), 0
    for module in (part or base).modules():
        quantized = settings.use_4bit_quantization and isinstance(module, torch.nn.Linear) and module is not head
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel() * (NF4_BYTES if quantized and name == "weight" else dtype.itemsize)
    return total


def shard_bytes(model, settings, dtype, processes):
    """Of weights that so many processes share out: the bytes of all, of a process's part, and of what it gathers.

    Gathered are the layer that computes, the one after it, which is copied once on its way, and the output layer. The
    scales of 4-bit weights stay whole in each process.
    """
    base = transformers_model(model)
    whole, layers = weight_bytes(model, settings, dtype), decoder_layers(base)
    largest = max((weight_bytes(model, settings, dtype, layer) for layer in layers), default=whole / 2)
    in_layers = sum(weight_bytes(model, settings, dtype, layer) for layer in layers)
    scales = in_layers * (1 - 0.5 / NF4_BYTES) if settings.use_4bit_quantization else 0
    head = base.get_output_embeddings().weight.numel() * dtype.itemsize
    return whole, (whole - scales) / processes + scales, min(whole, 3 * largest + head)


def dequantized_bytes(model, dtype):
    """Bytes of the 4-bit weights of the layers with an adapter once more, dequantized."""
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


def expert_values(model):
    """How many numbers the experts chosen for a token keep of it in a layer, and the width within the MLPs beside them.

    (0, None) for a model without experts. transformers stacks the weights of all experts of a layer in one module,
    which engine_blocks leaves as it is.
    """
    base = transformers_model(model)
    config = base.config.get_text_config()
    mixtures = [
        (layer, module)
        for layer in decoder_layers(base)
        for module in layer.modules()
        if isinstance(getattr(module, "down_proj", None), torch.nn.Parameter)
    ]
    if not mixtures:
        return 0, None
    layer, experts = mixtures[-1]  # the first layers of some models have none
    width = experts.down_proj[0].numel() // config.hidden_size
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
    # gate, up and the activated gate, or the steps of gpt-oss's own activation, which is no module; and the output
    kept = (3 if activation(experts) else 6) * width + config.hidden_size
    if any(isinstance(module, ParamWrapper) for module in layer.modules()):  # the inputs of both matrices too
        kept += width + config.hidden_size
    beside = [
        module.in_features
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(("down_proj", "down_proj.base_layer"))
    ]
    return chosen * kept, sum(beside)


def score_bytes(base, unit):
    """Bytes that a layer keeps of each score, of a pair of tokens in a head, where attention is not one fused kernel.

    unit: bytes of a number. The softmax is in float32, and so kept twice, but for gpt-oss's with its sinks.
    """
    config = base.config.get_text_config()
    if not (stores_scores(base) and getattr(config, "num_attention_heads", None)):
        return 0
    if any(name.endswith("sinks") for name, _ in base.named_parameters()):
        return unit
    return 4 + unit + (unit if getattr(config, "attn_logit_softcapping", None) else 0)


def expected_peak(model, settings, dtype, tokens, checkpointing, lean, recorded, fused_loss=True):
    """Expected peak of PyTorch's memory on a CUDA GPU in bytes, when passes of so many tokens are trained.

    It counts the weights; the adapter in float32 with its gradients, AdamW's two moments (a byte each in 8 bits) and
    the copies that the layers multiply with; what each layer keeps for its backward pass, or with checkpointing each
    layer's input and one layer whole; the largest weight dequantized; and a chunk of logits, or all of them where the
    loss is not fused with the output layer. Of a mixture of experts all layers count as if they had one. lean: whether
    outputs of norms and gates are computed again in the backward pass, as compiled layers and engine_blocks do, and not
    kept. peft's DoRA computes in float32, keeps more of each output, keeps each weight dequantized where there is
    dropout, and multiplies with unit matrices. The allocator rounds up and leaves gaps.
    """
    base = transformers_model(model)
    config, unit = base.config.get_text_config(), dtype.itemsize
    # not every config names the inner width; the layers' own matrices tell the widest one
    shapes = {p.shape for layer in decoder_layers(base) for p in layer.parameters() if not p.requires_grad}
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or max((max(shape) for shape in shapes), default=4 * hidden)
    experts, beside = expert_values(model)
    inner = beside if experts else inner
    trainable = count_parameters(model)[1]
    moments = 2 if settings.optimizer == "paged_adamw_8bit" else 8
    fixed = weight_bytes(model, settings, dtype) + trainable * (4 + 4 + moments + unit)
    # a layer keeps two residuals; query, key, value and attention's output; gate and up; and attention's scores
    scores = heads * tokens * score_bytes(base, unit)
    kept = unit * (2 * hidden + 2 * (heads + groups) * width + 2 * inner + experts) + scores
    if recorded:  # such a pass has gradients of its own, which are then added to the step's
        fixed += trainable * 4
    if not lean:  # norms, copied in float32, and the product of gate and up
        kept += unit * (2 * hidden + inner) + 2 * (4 + unit) * hidden
    # peft keeps the sums of stacked weights and their adapters
    stacked = sum(module.get_param().numel() for module in model.modules() if isinstance(module, ParamWrapper))
    inputs, constant = unit * hidden, unit * stacked / layers
    working = tokens * (unit * (3 * inner + 3 * hidden + experts) + 2 * scores)
    if settings.use_dora:
        outputs, weights, widest = dora_shapes(model)
        inputs, kept = 4 * hidden, kept + 8 * outputs / layers
        constant = unit * weights / layers if settings.lora_dropout else 0
        working += (4 + unit) * widest**2
    saved = tokens * (layers * inputs + kept) + constant if checkpointing else layers * (tokens * kept + constant)
    largest = max((shape.numel() for shape in shapes), default=hidden * inner) * unit
    count, in_place = tokens * config.vocab_size, fused_loss and triton
    logits = (min(count, LinearCrossEntropy.LOGITS) if fused_loss else count) * (unit if in_place else 4 + 4 + unit)
    return (fixed + saved + max(working + largest, logits)) * ALLOCATOR
