"""The plan: memory expected before a model is loaded, and what is decided by it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
)

import model_utils
import plan_utils
from conftest import refusal, small_run
from engine_passes import Kernels, recorded_tokens
from length_utils import cut_steps
from message_utils import UserError
from model_utils import GIB, attach_lora, count_parameters, grow_gpu_memory
from plan_utils import (
    Gpu,
    count_passes,
    dequantized_bytes,
    expected_peak,
    expert_values,
    longest_rows,
    plan_steps,
    tokens_a_step,
    weight_bytes,
)
from settings_utils import DEFAULTS, Settings

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SETTINGS = Settings(**DEFAULTS)


def rows_of(*lengths):
    return [{"input_ids": [5] * length, "labels": [5] * length, "row": number} for number, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def seven_billion():
    """Mistral-7B's shape without weights, 32,000 words."""
    with torch.device("meta"):
        return attach_lora(AutoModelForCausalLM.from_config(MistralConfig(vocab_size=32000)), SETTINGS)


@pytest.fixture(scope="module")
def dora():
    """The same with DoRA."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=32000))
        return attach_lora(base, SETTINGS._replace(use_dora=True))


# ---- Expected memory -------------------------------------------------------------------------------------------------
def thirteen_billion():
    """Llama-2-13B's shape without weights."""
    shape = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    with torch.device("meta"):
        return attach_lora(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=32000, **shape)), SETTINGS)


@pytest.mark.parametrize(
    ("tokens", "checkpointing", "dequantized", "measured"),
    [(8192, False, True, 41.95), (8192, False, False, 31.13), (4096, False, True, 30.07), (2048, True, False, 6.07)],
)
def test_the_expected_memory_is_within_a_tenth_of_what_an_h100_measured(
    seven_billion, tokens, checkpointing, dequantized, measured
):
    peak = expected_peak(seven_billion, SETTINGS, torch.bfloat16, tokens, checkpointing, lean=True, recorded=True)
    peak += dequantized_bytes(seven_billion, torch.bfloat16) if dequantized else 0
    assert peak / GIB == pytest.approx(measured, rel=0.1)  # benchmarks/README.md, 2026-11-28


def test_so_is_that_of_a_larger_model_of_dora_and_of_layers_that_are_not_compiled(seven_billion, dora):
    peak = expected_peak(thirteen_billion(), SETTINGS, torch.bfloat16, 2048, True, lean=True, recorded=True)
    assert peak / GIB == pytest.approx(10.48, rel=0.1)
    recorded = expected_peak(seven_billion, SETTINGS, torch.bfloat16, 2048, True, lean=False, recorded=True)
    assert recorded / GIB == pytest.approx(6.53, rel=0.1)
    peak = expected_peak(seven_billion, SETTINGS, torch.bfloat16, 2048, False, lean=False, recorded=False)
    assert (peak + dequantized_bytes(seven_billion, torch.bfloat16)) / GIB == pytest.approx(29.19, rel=0.1)
    settings = SETTINGS._replace(use_dora=True)
    for checkpointing, dropout, measured in (
        (False, 0.05, 51.04),
        (False, 0.0, 39.38),
        (True, 0.05, 8.72),
        (True, 0.0, 8.29),
    ):
        changed = settings._replace(lora_dropout=dropout)
        peak = expected_peak(dora, changed, torch.bfloat16, 2048, checkpointing, lean=False, recorded=False)
        assert peak / GIB == pytest.approx(measured, rel=0.1)


def test_the_weights_in_four_bits_take_what_was_measured(seven_billion):
    assert weight_bytes(seven_billion, SETTINGS, torch.bfloat16) / GIB == pytest.approx(3.847, rel=0.01)
    whole = weight_bytes(seven_billion, SETTINGS._replace(use_4bit_quantization=False), torch.bfloat16)
    total, trainable = count_parameters(seven_billion)
    assert whole == 2 * (total - trainable)


def expected_bytes(config, **changes):
    with torch.device("meta"):
        model = attach_lora(AutoModelForCausalLM.from_config(config), SETTINGS)
    known = {"dtype": torch.bfloat16, "tokens": 2048, "checkpointing": False, "lean": False, "recorded": False}
    return expected_peak(model, SETTINGS, **(known | changes))


def test_the_expected_memory_is_that_of_weights_activations_and_logits():
    config = MistralConfig(vocab_size=32_000)
    weights = 3.8 * 2**30  # of 7.24 billion, embeddings and output, 262 million, in 16 bits and the others in 4
    assert weights < expected_bytes(config, checkpointing=True) < 2 * weights
    assert expected_bytes(config) > 2 * expected_bytes(config, checkpointing=True)
    assert expected_bytes(config, tokens=4096) > expected_bytes(config) > expected_bytes(config, lean=True)
    long = {"tokens": 32_768, "checkpointing": True}
    logits = expected_bytes(config, fused_loss=False, **long) - expected_bytes(config, **long)
    assert logits > 32_768 * 32_000 * 2  # which without the fused loss are there at once


EXPERTS = {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 96}


def model_with_experts(kind, chosen, targets="q_proj,v_proj"):
    """Two layers, of each of which so many of eight experts are chosen for a token."""
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **shape, **heads, **EXPERTS, num_experts_per_tok=chosen), dtype=torch.bfloat16
    )
    return attach_lora(base, SETTINGS._replace(lora_target_modules=targets, lora_dropout=0.0))


def kept_bytes(model, tokens):
    """Bytes that a forward pass keeps for the backward pass, beside the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("mixtral", "q_proj,v_proj"),
        ("mixtral", "all-linear"),
        ("qwen2_moe", "all-linear"),
        ("qwen3_moe", "q_proj,v_proj"),
        ("gpt_oss", "q_proj,v_proj"),
    ],
)
def test_each_expert_chosen_for_a_token_keeps_what_is_expected(kind, targets):
    few, many = (model_with_experts(kind, chosen, targets) for chosen in (2, 6))
    kept = (kept_bytes(many, 200) - kept_bytes(few, 200)) / (2 * 200)  # of a token in a layer
    assert 2 * (expert_values(many)[0] - expert_values(few)[0]) == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("lean", [True, False])
def test_the_expected_memory_grows_by_what_experts_keep(lean):
    few, many = (
        expected_peak(model_with_experts("mixtral", chosen), SETTINGS, torch.bfloat16, 10_000, False, lean, False)
        for chosen in (2, 6)
    )
    assert many - few > 10_000 * 2 * 4 * 2 * (3 * 96 + 64)  # tokens, layers, experts more, bytes; values of each


def test_adapted_experts_are_expected_to_keep_their_sums_with_the_adapter():
    plain, adapted = (model_with_experts("mixtral", 2, targets) for targets in ("q_proj,v_proj", "all-linear"))
    sums = 2 * 8 * (3 * 96 * 64 + 64) * 2  # layers, experts, weights of each and of the router for it, bytes

    def expected(model):
        """In a pass of no tokens, without the adapter, of which each weight takes 18 bytes."""
        peak = expected_peak(model, SETTINGS, torch.bfloat16, 0, checkpointing=False, lean=True, recorded=False)
        return peak / plan_utils.ALLOCATOR - 18 * count_parameters(model)[1]

    assert expected(adapted) - expected(plain) == pytest.approx(sums)


def test_mlps_beside_experts_count_by_their_own_width():
    assert expert_values(model_with_experts("qwen2_moe", 2, "all-linear"))[1] == 96
    assert expert_values(model_with_experts("mixtral", 2))[1] == 0
    with torch.device("meta"):
        assert expert_values(AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))) == (0, None)


SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
STORING_SCORES = {
    "gemma2 (soft caps)": Gemma2Config(**SHAPE, **HEADS),
    "gpt_oss (sinks)": GptOssConfig(**SHAPE, **HEADS, num_local_experts=4),
    "bloom (biases)": BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("name", STORING_SCORES)
def test_attention_keeps_its_scores_as_expected_where_no_kernel_is_fused(name):
    base = AutoModelForCausalLM.from_config(STORING_SCORES[name]).to(torch.bfloat16)
    squared = (kept_bytes(base, 280) - 2 * kept_bytes(base, 140)) / (280**2 - 2 * 140**2)  # bytes of a pair of tokens
    assert squared == pytest.approx(2 * 4 * plan_utils.score_bytes(base, unit=2), rel=0.02)  # layers, heads


def test_the_expected_memory_and_the_passes_are_those_of_attention_that_stores_its_scores():
    of_one_kernel, storing = (
        [expected_bytes(config, tokens=tokens) for tokens in (1000, 2000, 4000)]
        for config in (GemmaConfig(**SHAPE, **HEADS), Gemma2Config(**SHAPE, **HEADS))
    )
    assert of_one_kernel[2] - of_one_kernel[1] == pytest.approx(2 * (of_one_kernel[1] - of_one_kernel[0]), rel=0.05)
    assert storing[2] - storing[1] > 3 * (storing[1] - storing[0])
    with torch.device("meta"):
        found = plan(attach_lora(AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, **HEADS)), SETTINGS))
    assert (found.kernels.attention, found.recorded) == (False, False)
    assert found.max_pass_tokens == 32


@pytest.mark.parametrize(("rows", "fused"), [((300, 8192), True), ((300, 1000), False)])
def test_without_a_gpu_the_loss_is_fused_where_the_logits_of_a_pass_are_many(rows, fused):
    with torch.device("meta"):
        config = LlamaConfig(vocab_size=30_000, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
        model = attach_lora(AutoModelForCausalLM.from_config(config), SETTINGS)
    settings = SETTINGS._replace(batch_size=1, gradient_checkpointing=True)
    plan = plan_steps(model, settings, torch.float32, rows_of(*rows))
    assert plan.kernels == Kernels(loss=fused)


def test_a_row_longer_than_passes_is_a_pass_and_expected_to_be(seven_billion, capsys):
    settings = SETTINGS._replace(max_seq_length=32_768, batch_size=1, lora_dropout=0.0)
    gpu = Gpu(free=78 * 2**30, total=80 * 2**30)
    for checkpointing in (True, False):
        changed = settings._replace(gradient_checkpointing=checkpointing)
        plan = plan_steps(seven_billion, changed, torch.bfloat16, rows_of(32_768, 700, 600), gpu)
        assert " passes of up to 32,768 tokens;" in capsys.readouterr().err
        known = (seven_billion, changed, torch.bfloat16, 32_768, checkpointing)
        expected = expected_peak(*known, lean=plan.compiled or plan.blocks, recorded=plan.recorded)
        assert plan.expected_bytes >= expected


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt", "falcon", "bloom", "mpt", "gpt_bigcode", "phi3", "gemma2"])
def test_memory_is_expected_of_configs_that_name_their_sizes_in_other_ways(kind):
    config = AutoConfig.for_model(kind)
    assert expected_bytes(config, checkpointing=True) < expected_bytes(config) < 400 * 2**30


def test_only_linear_layers_may_stay_dequantized():
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(MixtralConfig(**shape, **heads))
        experts = attach_lora(base, SETTINGS._replace(lora_dropout=0.0))
    attention = 2 * (64 * 64 + 32 * 64)  # query, output; key, value
    assert dequantized_bytes(experts, torch.bfloat16) == 2 * 2 * attention


def test_what_saves_memory_is_expected_to(seven_billion):
    def peak(tokens=4096, checkpointing=False, lean=True, **changes):
        how = (tokens, checkpointing, lean, True)
        return expected_peak(seven_billion, SETTINGS._replace(**changes), torch.bfloat16, *how)

    assert peak(checkpointing=True) < peak() / 2
    assert peak(optimizer="paged_adamw_8bit") < peak()
    assert peak() < peak(lean=False)
    assert peak(tokens=2048) < peak()
    assert peak(use_4bit_quantization=False) > peak() + 9 * GIB


@pytest.mark.parametrize(
    ("system", "machine", "release", "variable", "grows"),
    [
        ("Linux", "x86_64", "6.8.0-generic", None, True),
        ("Linux", "x86_64", "5.15.90.1-microsoft-standard-WSL2", None, False),
        ("Linux", "aarch64", "5.15.148-tegra", None, False),
        ("Windows", "AMD64", "11", None, False),
        ("Linux", "x86_64", "6.8.0-generic", "PYTORCH_ALLOC_CONF", False),
        ("Linux", "x86_64", "6.8.0-generic", "PYTORCH_CUDA_ALLOC_CONF", False),
    ],
)
def test_gpu_memory_grows_in_place_where_drivers_allow_it(system, machine, release, variable, grows, monkeypatch):
    told = allocator(monkeypatch, SimpleNamespace(system=system, machine=machine, release=release))
    if variable:
        monkeypatch.setenv(variable, "backend:native")
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: told.append(device))
    grow_gpu_memory(CPU)
    assert told == []
    grow_gpu_memory(CUDA)
    assert told == (["expandable_segments:True", CUDA] if grows else [])


def test_a_driver_that_refuses_growing_blocks_gets_fixed_ones(monkeypatch):
    told = allocator(monkeypatch, SimpleNamespace(system="Linux", machine="x86_64", release="6.8.0-generic"))

    def refuse(*sizes, device):
        raise RuntimeError("CUDA driver error: operation not supported")

    monkeypatch.setattr(torch, "empty", refuse)
    grow_gpu_memory(CUDA)
    assert told == ["expandable_segments:True", "expandable_segments:False"]


def test_training_asks_for_growing_blocks(dataset, tmp_path, monkeypatch):
    def asked(device):
        raise UserError(f"asked for {device}")

    monkeypatch.setattr(model_utils, "grow_gpu_memory", asked)
    assert refusal(small_run, dataset, tmp_path) == "asked for cpu"


def allocator(monkeypatch, system):
    """What PyTorch's allocator of GPU memory is told on such a system, as a list to look into."""
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(model_utils.platform, "uname", lambda: system)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    return told


# ---- What is decided -------------------------------------------------------------------------------------------------
def plan(shapes, rows=None, free=80, **changes):
    """The StepPlan of 40 rows of 512 tokens on an 80 GB GPU of which so many GiB are free."""
    of_gpu = {name: changes.pop(name) for name in ("triton", "flash_attention") if name in changes}
    gpu, dtype = Gpu(free * GIB, 80 * GIB, **of_gpu), changes.pop("dtype", torch.bfloat16)
    held_out = changes.pop("held_out", ())
    rows = rows or rows_of(*[512] * 40)
    return plan_steps(shapes, SETTINGS._replace(**changes), dtype, rows, gpu, held_out=held_out)


@pytest.mark.parametrize(("free", "checkpointing"), [(80, False), (12, True)])
def test_auto_recomputes_activations_only_where_they_would_not_fit(seven_billion, free, checkpointing, capsys):
    assert plan(seven_billion, free=free, gradient_checkpointing="auto").checkpointing is checkpointing
    message = capsys.readouterr().err
    assert f"passes of up to 2,048 tokens; {free}.0 of 80.0 GiB are free" in message
    assert f"gradient checkpointing {'on' if checkpointing else 'off'}, as" in message
    assert f"GiB would {'not fit' if checkpointing else 'fit'} without it" in message


@pytest.mark.parametrize(
    ("free", "changes", "dequantized"),
    [
        (40, {}, True),
        (80, {"dtype": torch.float32}, False),
        (24, {}, False),
        (40, {"triton": False}, False),
        (40, {"gradient_checkpointing": True}, False),
        (40, {"use_4bit_quantization": False}, False),
        (40, {"use_dora": True}, False),
    ],
)
def test_weights_stay_dequantized_where_there_is_room(free, changes, dequantized, seven_billion, dora, capsys):
    shapes = dora if changes.get("use_dora") else seven_billion
    found = plan(shapes, free=free, **{"gradient_checkpointing": False} | changes)
    assert found.dequantized is dequantized
    assert ("; 13.0 GiB are for weights that are dequantized once" in capsys.readouterr().err) is dequantized


def test_memory_that_will_not_do_is_said_before_the_model_is_loaded(seven_billion, capsys):
    found = plan(seven_billion, free=5)
    assert (found.checkpointing, found.dequantized) == (True, False)
    assert found.expected_bytes > 5 * GIB
    assert "That may not fit: lower --batch_size or --max_seq_length" in capsys.readouterr().err


def test_checkpoints_wait_on_the_host_where_smaller_passes_do_not_fit_either(seven_billion, monkeypatch, capsys):
    def found(length, batch_size, free, host=64):
        monkeypatch.setattr(plan_utils.psutil, "virtual_memory", lambda: SimpleNamespace(available=host * GIB))
        rows = {"rows": rows_of(*[length] * 40), "max_seq_length": length, "batch_size": batch_size}
        return plan(seven_billion, free=free, num_epochs=60, **rows)

    whole, fewer, offloaded = found(512, 64, 40), found(512, 64, 14), found(32768, 1, 16)
    assert (whole.max_pass_tokens, whole.offloaded) == (40 * 512, False)
    assert (fewer.max_pass_tokens, fewer.offloaded, fewer.recorded) == (plan_utils.ENOUGH_TOKENS, False, True)
    assert (offloaded.offloaded, offloaded.recorded, offloaded.blocks) == (True, False, True)
    assert "; the 7.5 GiB that it keeps wait in the host's memory, which is slower" in capsys.readouterr().err
    assert found(32768, 1, 40).expected_bytes - offloaded.expected_bytes == pytest.approx(7.5 * GIB, rel=0.1)
    assert not found(32768, 1, 40).offloaded
    assert not found(32768, 1, 16, host=14).offloaded


def test_on_a_cpu_only_true_recomputes_and_only_the_loss_is_fused(seven_billion, capsys):
    for setting, expected in ((True, True), (False, False), ("auto", False)):
        settings = SETTINGS._replace(gradient_checkpointing=setting)
        found = plan_steps(seven_billion, settings, torch.float32, rows_of(5, 9))
        assert found == plan_utils.StepPlan(
            Kernels(loss=True), checkpointing=expected, max_pass_tokens=2048, rows_a_step=16, longest_row=9
        )
    assert capsys.readouterr().err == ""


def test_kernels_are_planned_for_the_gpus_and_models_that_they_serve(seven_billion):
    assert all(plan(seven_billion).kernels)
    assert plan(seven_billion, dtype=torch.float32).kernels == Kernels(loss=True)
    older = plan(seven_billion, flash_attention=False)
    assert older.kernels == Kernels(loss=True, lora=True)
    assert not plan(seven_billion, triton=False).kernels.lora
    wide = plan(seven_billion, batch_size=64)
    assert (wide.max_pass_tokens, plan(seven_billion, batch_size=64, flash_attention=False).max_pass_tokens) == (
        64 * 512,
        2 * 4096,  # a block mask costs as the square of a pass
    )


def test_norms_and_gates_are_fused_unless_layers_are_compiled_or_have_others(seven_billion, dora):
    assert plan(seven_billion).blocks
    assert not plan(seven_billion).compiled
    compiled = plan(seven_billion, torch_compile=True)
    assert compiled.compiled
    assert not compiled.blocks
    for shapes, changes in ((dora, {"use_dora": True}), (seven_billion, {"triton": False})):
        assert not plan(shapes, **changes).blocks
    others = GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    with torch.device("meta"):
        assert not plan(attach_lora(AutoModelForCausalLM.from_config(others), SETTINGS)).blocks


def test_passes_are_recorded_compiled_or_not_unless_a_run_has_few(seven_billion, dora):
    for compiled in (True, False):
        assert plan(seven_billion, torch_compile=compiled).recorded
    assert not plan(seven_billion, num_epochs=1, max_steps=2).recorded
    for shapes, changes in ((dora, {"use_dora": True}), (seven_billion, {"triton": False})):
        assert not plan(shapes, **changes).recorded


def test_passes_that_are_only_scored_are_recorded_where_they_are_many(seven_billion):
    one_round = {"max_steps": 10, "eval_steps": 10, "held_out": rows_of(*[512] * 100)}  # 25 passes
    assert plan(seven_billion, **one_round).scores_recorded
    assert not plan(seven_billion, **one_round, eval_rows=40).scores_recorded
    assert plan(seven_billion, **one_round | {"eval_steps": 5}, eval_rows=40).scores_recorded
    assert not plan(seven_billion, **one_round, flash_attention=False).scores_recorded
    assert not plan(seven_billion).scores_recorded


# ---- Rows and steps --------------------------------------------------------------------------------------------------
def test_passes_are_counted_by_the_tokens_that_they_hold():
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=2, num_epochs=3)
    rows = rows_of(*[100] * 20)  # 8 rows a step, three steps an epoch
    assert count_passes(rows, settings, 800) == 9
    assert count_passes(rows, settings, 400) == 18
    assert count_passes(rows, settings, 0) == 9 * 8
    assert count_passes(rows, settings._replace(max_steps=2), 400) == 4


def test_a_step_has_the_tokens_of_its_rows():
    rows = rows_of(*[100] * 20)
    assert tokens_a_step(rows, 8, 1) == 2000 / 3  # the third step is short
    assert tokens_a_step(rows, 4, 2) == 1000 / 3  # also where two processes share its rows out
    assert tokens_a_step(rows, 20, 1) == 2000


def test_a_run_records_the_more_lengths_the_longer_it_is_and_its_longest_pass(seven_billion):
    rows = rows_of(*np.random.default_rng(0).integers(20, 512, 400).tolist())
    short = plan(seven_billion, rows, torch_compile=True).lengths
    assert short == plan(seven_billion, rows, torch_compile=True).lengths  # a run that goes on meets the same
    assert len(short) < len(plan(seven_billion, rows, torch_compile=True, num_epochs=50).lengths) <= 16
    assert short[-1] <= 2048
    assert plan(seven_billion, rows, torch_compile=True).max_pass_tokens == short[-1]
    assert plan(seven_billion, rows, max_steps=2).lengths == ()


@pytest.mark.parametrize("length", [700, 1100, 2000])
def test_rows_of_one_length_are_recorded_in_what_few_of_them_take(seven_billion, length):
    rows = rows_of(*[length] * 160)
    found = plan(seven_billion, rows, max_seq_length=length, gradient_checkpointing=False, num_epochs=90)
    sizes = cut_steps([[length] * 16], found.max_pass_tokens, found.lengths)
    filled = sum(recorded_tokens(size, found.lengths) for size in sizes)
    assert filled < 1.06 * 16 * length


def test_a_long_row_that_is_only_scored_makes_no_pass_longer(seven_billion):
    rows, changes = rows_of(*[500] * 640), {"max_seq_length": 32768, "num_epochs": 9, "gradient_checkpointing": False}
    alone = plan(seven_billion, rows, **changes)
    assert alone.lengths
    assert alone.max_pass_tokens <= plan_utils.ENOUGH_TOKENS
    assert plan(seven_billion, rows, held_out=rows_of(30000), **changes).lengths == alone.lengths


def test_passes_hold_what_fills_a_gpu_where_no_pass_dequantizes(seven_billion):
    wide = {"batch_size": 16, "gradient_checkpointing": False}
    assert (plan(seven_billion, **wide).max_pass_tokens, plan(seven_billion, **wide).dequantized) == (4096, True)
    short = plan(seven_billion, free=24, **wide)
    assert (short.max_pass_tokens, short.dequantized) == (4096, False)
    assert plan(seven_billion, use_4bit_quantization=False, **wide).max_pass_tokens == 4096


def test_the_longest_rows_come_first_whatever_holds_them():
    rows = rows_of(3, 9, 5, 9)
    assert [row["row"] for row in longest_rows(rows, 3)] == [1, 3, 2]

    class OnDisk:
        """As TokenizedRows, whose lengths are known without reading the rows."""

        index = {"length": np.array([3, 9, 5, 9])}  # noqa: RUF012

        def __len__(self):
            return 4

        def __getitem__(self, position):
            read.append(position)
            return rows[position]

    read = []
    assert [row["row"] for row in longest_rows(OnDisk(), 2)] == [1, 3]
    assert read == [1, 3]
