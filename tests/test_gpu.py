"""What only a CUDA GPU can show. Skipped, with the reason, where there is none."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig

import engine_blocks
import engine_lora
import engine_passes
import generation_utils
import plan_utils
from conftest import PROJECT, TINY_BASE, small_run
from engine_passes import Kernels, score_rows
from engine_replies import Decoder
from engine_runner import StepRunner
from message_utils import Stopped
from model_utils import attach_lora, build_quantization_config, choose_dtype, load_base_model, resolve_device
from plan_utils import StepPlan
from settings_utils import DEFAULTS, Settings
from test_blocks import NORMS, rounded_otherwise
from test_replies import FAMILIES, GREEDY, by_turns, generated, joined, make_prompts, tiny, tuned_model, written
from tiny import state_of
from training_utils import LoraTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine"),
]


CUDA = torch.device("cuda", 0)


def four_bit_model():
    device = resolve_device("cuda")
    settings = Settings(**DEFAULTS)
    dtype = choose_dtype(device, True)
    return attach_lora(
        load_base_model(TINY_BASE, device, dtype, build_quantization_config(settings, dtype)),
        settings._replace(base_model_name=TINY_BASE),
    )


def test_the_default_settings_train_in_four_bits_and_merge(run, tmp_path):
    rows = [{"instruction": f"Count to {n}", "response": " ".join(map(str, range(1, n + 1)))} for n in range(2, 42)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    where = ("--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs")
    data = ("--custom_dataset_path", tmp_path / "rows.json", "--max_new_tokens", 8)
    base = ("--base_model_name", TINY_BASE)
    done = run("train.py", *base, *data, *where, "--max_steps", 6, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    assert "4-bit NF4, bfloat16 on CUDA" in done.stderr
    assert "demo settings" not in done.stderr
    assert "slower" not in done.stderr  # than recorded passes and replies
    record = json.loads((tmp_path / "out/lora-adapter/run.json").read_text())
    assert record["last_loss"] < record["first_loss"]
    code = (
        "from model_utils import load_trained_model, merge_and_save_model\n"
        f"model, tokenizer = load_trained_model({str(tmp_path / 'out/lora-adapter')!r})\n"
        f"merge_and_save_model(model, tokenizer, {str(tmp_path / 'merged')!r})\n"
    )
    (tmp_path / "merge.py").write_text(code)
    merged = run(
        tmp_path / "merge.py",
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="0",
        PYTHONPATH=f"{PROJECT}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert merged.returncode == 0, merged.stderr
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_only_the_lora_weights_are_float32_in_a_four_bit_model():
    model = four_bit_model()
    float32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert float32 == {name for name, p in model.named_parameters() if p.requires_grad}


def test_rows_laid_end_to_end_do_not_read_each_other_on_the_gpu():
    model = four_bit_model()
    ids = [1, *torch.randint(20, 7000, (60,), generator=torch.Generator().manual_seed(0)).tolist()]
    row = {"input_ids": ids, "labels": ids}
    alone = score_rows(model, [row], 4096)[0][0]
    second = score_rows(model, [row, row], 4096)[1][0]
    # the same tokens in one row: there the second half does read the first
    halves = {"input_ids": ids + ids, "labels": [-100] * len(ids) + [-100, *ids[1:]]}
    joined = score_rows(model, [halves], 4096)[0][0]
    assert second == pytest.approx(alone, rel=0.01)
    assert abs(joined - alone) > 0.05 * alone  # the check can tell


# ---- The step's kernels ----------------------------------------------------------------------------------------------
def trained_model(dtype=torch.bfloat16, quantize=True, base=None, dropout=0.0, dora=False):
    """The bundled base with an adapter whose B is not zero, in training mode."""
    settings = Settings(**DEFAULTS)._replace(base_model_name=TINY_BASE, lora_dropout=dropout, use_dora=dora)
    quantization = build_quantization_config(settings, dtype) if quantize else None
    base = base or load_base_model(TINY_BASE, CUDA, dtype, quantization)
    model = attach_lora(base, settings).to(CUDA).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def some_rows(lengths=(60, 200, 17, 90), vocabulary=7000):
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, vocabulary, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]], "row": number} for number, ids in enumerate(rows)]


def step_gradients(runner, groups):
    """The gradients of a step that is cut into these passes."""
    runner.begin()
    for rows in groups:
        runner.run_pass(rows, 0.01)
    found = {name: p.grad.clone() for name, p in runner.model.named_parameters() if p.requires_grad}
    runner.release_gradients()
    return found


def plain_gradients(model, rows):
    """The gradients by transformers' and peft's own layers, a row a pass."""
    with StepRunner(model, StepPlan()) as runner:
        return step_gradients(runner, [[row] for row in rows])


def distance(found, expected):
    """Relative distance of two sets of gradients as wholes."""
    difference = sum((found[name] - gradient).square().sum() for name, gradient in expected.items())
    return (difference / sum(gradient.square().sum() for gradient in expected.values())).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_dequantizes_to_bitsandbytes_bits(dtype):
    layer = bnb.nn.Linear4bit(192, 1000, bias=False, quant_type="nf4", compress_statistics=True).to(CUDA)
    layer.weight.quant_state.dtype = dtype
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    found = engine_lora.dequantize(engine_lora.frozen_tensors(layer), torch.empty_like(expected))
    assert torch.equal(found, expected)


def test_tritons_dropout_keeps_share_and_mean_also_in_place():
    x, seed = torch.ones(333, 1001, device=CUDA), torch.tensor([5], device=CUDA)
    dropped = engine_lora.drop(x, seed, 0.25)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(dropped, engine_lora.drop(x, seed + 1, 0.25))
    assert torch.equal(engine_lora.drop(x, seed, 0.25, out=x), dropped)
    assert torch.equal(x, dropped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [257, 4096, 9001])
def test_tritons_cross_entropy_has_torchs_losses_and_gradient(words, dtype):
    logits = (torch.randn(70, words, device=CUDA) * 4).to(dtype)
    logits[3, 5] = -math.inf
    targets = torch.randint(6, words, (70,), device=CUDA)
    values = logits.float().requires_grad_()
    expected = F.cross_entropy(values, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), values)
    before = logits.clone()
    torch.testing.assert_close(engine_passes.cross_entropy_(logits, targets, False), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)
    torch.testing.assert_close(engine_passes.cross_entropy_(logits, targets, True), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, gradient.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


def norm_of(x, more=0.0):
    weight = torch.linspace(0.5, 1.5, x.shape[-1], device=CUDA, dtype=x.dtype)
    values = x.float()
    normed = (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return engine_blocks.ScaledNorm.apply(x, weight, 1e-6, more, False), normed * (weight + more)


def gate_of(x, gelu=False, joint=False):
    gate, up = x.chunk(2, -1)
    inputs = [x] if joint else [gate.contiguous(), up.contiguous()]
    wanted = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
    return engine_blocks.Gate.apply(gelu, *inputs), wanted


def rotation_of(x, heads=6):
    """Six of eight heads are the query's, two the key's; laid as attention has them."""
    q, k = x.view(2, 25, 8, 40).transpose(1, 2).split([heads, 8 - heads], 1)
    angles = torch.linspace(0, 9, 50, device=CUDA).view(2, 25, 1) * torch.linspace(1, 0.1, 40, device=CUDA)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def turned(part):
        halves = torch.cat([-part[..., 20:], part[..., :20]], -1)
        return part * cos[:, None] + halves * sin[:, None]

    return torch.cat(engine_blocks.Rotation.apply(q, k, cos, sin), 1), torch.cat([turned(q), turned(k)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "block",
    [
        norm_of,
        partial(norm_of, more=1.0),
        gate_of,
        partial(gate_of, gelu=True),
        partial(gate_of, joint=True),
        rotation_of,
    ],
)
def test_fused_blocks_have_torchs_outputs_and_gradients(block, dtype):
    x = torch.randn(2, 25, 320, device=CUDA).to(dtype).requires_grad_()
    found, wanted = block(x)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found, wanted, **close)
    upper = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, x, upper, retain_graph=True)[0] for out in (found, wanted)]
    torch.testing.assert_close(*gradients, **close)


@pytest.mark.parametrize("kind", NORMS)
def test_fused_norms_round_where_the_models_own_do(kind):
    assert rounded_otherwise(kind, CUDA, trained=True) < 0.02


def test_a_runner_fuses_the_blocks_of_a_model_that_it_does_not_compile():
    for compiled in (False, True):
        model = trained_model()
        with StepRunner(model, ALL._replace(compiled=compiled)):
            changed = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
        assert any(name.endswith("RMSNorm") for name in changed) is not compiled
        assert any(name.endswith("MLP") for name in changed) is not compiled


ALL = StepPlan(Kernels(attention=True, loss=True, lora=True), blocks=True, max_pass_tokens=4096)
RECORDED = ALL._replace(compiled=True, recorded=True, rows_a_step=4, longest_row=200)


def test_the_fast_step_has_the_gradients_of_peft_and_transformers():
    model, rows = trained_model(), some_rows()
    with torch.autocast("cuda", torch.bfloat16):
        expected = plain_gradients(model, rows)
    runner = StepRunner(model, ALL)
    assert all(runner.plan.kernels)
    assert distance(step_gradients(runner, [rows]), expected) < 0.08
    assert distance(step_gradients(runner, [rows[:3]]), expected) > 0.2  # the check can tell


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dora_takes_varlen_attention_and_the_fused_loss(checkpointing):
    model, rows = trained_model(dora=True), some_rows()
    with torch.autocast("cuda", torch.bfloat16):
        expected = plain_gradients(model, rows)
        runner = StepRunner(model, ALL._replace(checkpointing=checkpointing))
        assert runner.plan.kernels.attention
        assert runner.plan.kernels.loss
        assert distance(step_gradients(runner, [rows]), expected) < 0.08
        assert distance(step_gradients(runner, [rows[:3]]), expected) > 0.2  # the check can tell


ways = pytest.mark.parametrize(
    ("checkpointing", "compiled"), [(False, False), (False, True), (True, False), (True, True)]
)


@ways
def test_recorded_passes_have_the_gradients_of_passes_launched_one_by_one(checkpointing, compiled):
    model, rows = trained_model(), some_rows()
    with StepRunner(model, ALL) as runner:
        expected = step_gradients(runner, [rows])
    runner = StepRunner(model, RECORDED._replace(checkpointing=checkpointing, compiled=compiled))
    for groups in ([rows], [rows[:2], rows[2:]], [[row] for row in rows], [rows]):
        assert distance(step_gradients(runner, groups), expected) < 0.08
    assert runner.plan.recorded
    assert sorted(runner.recordings.graphs) == [128, 256, 384]


def test_checkpoints_that_wait_on_the_host_change_no_gradient_and_take_less_memory():
    model, found = trained_model(dropout=0.3), []
    rows = some_rows((4000,))  # a row that fills the layers' inputs, of 2 MB each
    for offloaded in (False, True):
        with StepRunner(model, ALL._replace(checkpointing=True, offloaded=offloaded, longest_row=4000)) as runner:
            step_gradients(runner, [rows])  # loads the kernels
            torch.manual_seed(1)
            torch.cuda.reset_peak_memory_stats()
            found.append((step_gradients(runner, [rows]), torch.cuda.max_memory_allocated()))
    (expected, more), (gradient, less) = found
    assert distance(gradient, expected) < 0.02
    assert less < more - 2 * 4000 * 256 * 2  # of the bundled base's eight inputs at least two


@ways
def test_recorded_passes_draw_their_dropout_anew_each_time(checkpointing, compiled):
    model, rows = trained_model(dropout=0.3), some_rows()

    def gradients(runner, seed):
        torch.manual_seed(seed)
        return step_gradients(runner, [rows])

    with StepRunner(model, ALL) as plain:
        expected = [gradients(plain, seed) for seed in (1, 2, 1)]
    recorded = StepRunner(model, RECORDED._replace(checkpointing=checkpointing, compiled=compiled))
    for seed, wanted in zip((1, 2, 1), expected, strict=True):
        assert distance(gradients(recorded, seed), wanted) < 0.08
    assert distance(gradients(recorded, 2), gradients(recorded, 1)) > 0.2  # the check can tell


def test_a_pass_of_short_rows_may_be_filled_up_by_more_tokens_than_any_row_has():
    model, rows = trained_model(), some_rows((20, 60, 24))
    with StepRunner(model, ALL) as runner:
        expected = step_gradients(runner, [rows])
    runner = StepRunner(model, RECORDED._replace(longest_row=60))
    assert distance(step_gradients(runner, [rows, rows[:1]]), expected) > 0.05  # the check can tell
    assert distance(step_gradients(runner, [rows]), expected) < 0.08
    assert list(runner.recordings.graphs) == [128]
    runner = StepRunner(model, RECORDED._replace(longest_row=60, lengths=(1024,)))
    assert distance(step_gradients(runner, [rows]), expected) < 0.08
    assert list(runner.recordings.graphs) == [1024]


@pytest.mark.parametrize("kernels", [Kernels(attention=True, loss=True), Kernels(True, True, True)])
def test_recorded_scores_are_those_of_passes_launched_one_by_one_and_follow_the_adapter(kernels):
    model, rows = trained_model(dropout=0.3), some_rows((60, 200, 17, 90, 150, 40, 33, 128, 77, 300))
    plan = StepPlan(kernels, max_pass_tokens=512, longest_row=300)

    def losses(runner):
        return [nll for nll, _ in runner.score(rows)]

    with StepRunner(model, plan._replace(scores_recorded=True)) as recorded:
        found = []
        for _ in range(2):
            found.append(losses(recorded))
            assert list(recorded.recordings.scores) == [512]
            with StepRunner(model, plan) as plain:
                assert found[-1] == pytest.approx(losses(plain), rel=0.01)
            with torch.no_grad():  # as an optimizer does it
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(3)
        assert found[1] != pytest.approx(found[0], rel=0.02)  # the check can tell
        assert recorded.plan.scores_recorded


def compute_what_waits_for_the_gpu():
    """Passes and scores of a model in which the host waits for the GPU, by a plan that records them, and without."""
    model, rows = trained_model(), some_rows()
    plan = ALL._replace(rows_a_step=4, longest_row=200, max_pass_tokens=400)
    with StepRunner(model, plan) as runner:
        expected, scores = step_gradients(runner, [rows]), [nll for nll, _ in runner.score(rows)]
    layer = model.get_base_model().get_decoder().layers[1]
    layer.register_forward_pre_hook(lambda module, inputs: inputs[0].sum().item() and None)
    with StepRunner(model, plan._replace(recorded=True, scores_recorded=True)) as runner:
        found = [nll for nll, _ in runner.score(rows)]
        runner.model.train()
        runner.step(rows)
        plain = not (runner.plan.recorded or runner.plan.scores_recorded)
        print(json.dumps([plain, found, scores, distance(step_gradients(runner, [rows]), expected)]))


def test_what_cannot_be_recorded_on_a_gpu_is_computed_without():
    code = "import test_gpu; test_gpu.compute_what_waits_for_the_gpu()"
    # in a process of its own: PyTorch 2.11 leaves its memory pools unusable when a recording breaks off
    path = os.pathsep.join([str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "This model's scores cannot be recorded (" in done.stderr
    assert "This model's passes cannot be recorded (" in done.stderr
    launched_one_by_one, found, scores, apart = json.loads(done.stdout.splitlines()[-1])
    assert launched_one_by_one
    assert found == pytest.approx(scores, rel=0.01)
    assert apart < 0.08


def test_varlen_attention_keeps_to_the_sliding_window():
    shape = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(MistralConfig(**shape, **heads, sliding_window=16)).to(CUDA, torch.bfloat16)
    model, rows = trained_model(base=base), some_rows(vocabulary=300)
    expected = plain_gradients(model, rows)
    with StepRunner(model, ALL) as runner:
        assert runner.plan.kernels.attention
        assert distance(step_gradients(runner, [rows]), expected) < 0.08
    base.config.sliding_window = None
    for layer in base.get_decoder().layers:
        layer.self_attn.sliding_window = None
    assert distance(step_gradients(StepRunner(model, ALL), [rows]), expected) > 0.2  # the check can tell


def test_blocks_of_memory_grow_in_place():
    code = (
        "import torch\n"
        "from model_utils import grow_gpu_memory\n"
        "grow_gpu_memory(torch.device('cuda', 0))\n"
        "block = torch.empty(2**20, device='cuda')\n"
        "print([segment['is_expandable'] for segment in torch.cuda.memory_snapshot()])\n"
        "torch._C._accelerator_setAllocatorSettings('expandable_segments:False')\n"
        "block = torch.empty(2**26, device='cuda')\n"
        "print(sorted({segment['is_expandable'] for segment in torch.cuda.memory_snapshot()}))\n"
    )
    usual = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=usual, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, both = map(json.loads, done.stdout.lower().splitlines())
    assert grown
    assert all(grown)
    assert both == [False, True]  # what grow_gpu_memory does where a driver refuses is possible at that time


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_runs_out_makes_passes_smaller_and_changes_no_result(recorded, capsys):
    model, rows = trained_model(quantize=False), some_rows((400,) * 32)
    plan = RECORDED._replace(rows_a_step=32, longest_row=400) if recorded else StepPlan()

    def gradients(runner):
        runner.step(rows)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    with StepRunner(model, plan._replace(max_pass_tokens=400)) as runner:
        expected = gradients(runner)
    runner = StepRunner(model, plan._replace(max_pass_tokens=100_000))
    torch.cuda.empty_cache()
    total, room = torch.cuda.get_device_properties(0).total_memory, 2**29 if recorded else 2**30
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    try:
        found = gradients(runner)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory with a pass of 12,800 tokens; from here on at most 6,400" in capsys.readouterr().err
    assert distance(found, expected) < 0.08
    if recorded:
        assert runner.recordings.graphs


@pytest.mark.parametrize("recorded", [False, True])
def test_a_model_is_as_it_was_when_the_runner_is_closed(recorded):
    model, rows = trained_model(), some_rows()
    before = state_of(model)
    with StepRunner(model, RECORDED if recorded else ALL) as runner:
        runner.rehearse(rows, rows[:2])
        runner.step(rows)
        assert runner.plan.recorded is recorded
        assert state_of(model) != before
    assert state_of(model) == before


SMALL_RUN = {"device": "cuda", "use_4bit_quantization": True, "lora_target_modules": "all-linear", "num_epochs": 2}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recorded_run_evaluates_answers_stops_and_goes_on(compiled, dataset, tmp_path, monkeypatch, capsys):
    original = LoraTrainer.training_step
    options = SMALL_RUN | {"torch_compile": compiled}
    monkeypatch.setattr(plan_utils, "PASSES_WORTH_RECORDING", 0)

    def last_loss(name):
        return json.loads((tmp_path / name / "out/lora-adapter/run.json").read_text())["last_loss"]

    def signalled_step(self, *arguments):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    small_run(dataset, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", signalled_step)
        with pytest.raises(Stopped, match="Stopped at step 5 of 12"):
            small_run(dataset, tmp_path / "stopped", **options)
    small_run(dataset, tmp_path / "stopped", **options)
    said = capsys.readouterr().err
    assert "Going on with the interrupted run" in said
    assert "slower" not in said
    assert last_loss("stopped") == pytest.approx(last_loss("whole"), rel=0.01)


# ---- Older GPUs, several GPUs ----------------------------------------------------------------------------------------
def last_losses(folder):
    record = json.loads((folder / "lora-adapter/run.json").read_text())
    return record["last_loss"], record["validation_loss"]


@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_without_bfloat16_learns_as_much(compiled, dataset, tmp_path, monkeypatch, capsys):
    options = SMALL_RUN | {"torch_compile": compiled}
    expected = last_losses(small_run(dataset, tmp_path / "bfloat16", **options))
    # from the usual 65536 the first steps would be left out, which is another run
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=1024.0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    found = last_losses(small_run(dataset, tmp_path / "float16", **options))
    said = capsys.readouterr().err
    assert "4-bit NF4, float16 on CUDA" in said
    assert "slower" not in said  # than compiled layers and recorded passes
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs on this machine")
@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing", "false"), ("--torch_compile", "true")])
def test_two_gpus_train_like_one_with_the_same_rows_to_a_step(flags, run, dataset, tmp_path):
    losses = {}
    flags = (*flags, "--base_model_name", TINY_BASE, "--custom_dataset_path", dataset, "--lora_dropout", 0)
    flags += ("--max_steps", 4, "--eval_steps", 2, "--max_new_tokens", 4, "--gradient_accumulation_steps", 2)
    for name, launcher, batch in (("two", ("--nproc_per_node", "2"), 1), ("one", (), 2)):
        folders = ("--output_dir", tmp_path / name, "--logs_dir", tmp_path / "logs")
        done = run("train.py", *flags, "--batch_size", batch, *folders, torchrun=launcher, CUDA_VISIBLE_DEVICES="0,1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Done in") == 1
        for word in ("slower", "barrier", "destroy_process_group"):  # passes not recorded; notices that ask for nothing
            assert word not in done.stderr
        losses[name] = last_losses(tmp_path / name)
    assert losses["two"] == pytest.approx(losses["one"], rel=0.01)


# ---- Replies ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64])
def test_four_bit_layers_compute_few_rows_as_if_dequantized(rows, dtype):
    draw = torch.Generator().manual_seed(rows)
    inputs, outputs, rank = 192, 320, 12
    layer = bnb.nn.Linear4bit(inputs, outputs, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    layer = layer.to(CUDA)
    frozen = engine_lora.frozen_tensors(layer)
    weight = engine_lora.dequantize(frozen, torch.empty(outputs, inputs, device=CUDA)).float()
    x, down, b, bias = (
        torch.randn(shape, generator=draw).to(CUDA, dtype)
        for shape in ((rows, inputs), (rows, rank), (outputs, rank), (outputs,))
    )
    plain, whole = engine_lora.few_rows_linear(x, [(frozen, None, None, None), (frozen, bias, down, b)])
    expected = x.float() @ weight.T
    assert (plain - expected).norm() < 0.005 * expected.norm()
    expected += down.float() @ b.float().T + bias.float()
    assert (whole - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_steps_write_the_tokens_of_generate(name):
    """In float32, where rounding does not choose tokens; with experts that the host chooses, generate writes them."""
    model, prompts = tiny(name).to(CUDA), make_prompts()
    expected = [generated(model, prompt, GREEDY).tolist() for prompt in prompts]
    assert joined(generation_utils.write_replies(model, prompts, GREEDY)) == dict(enumerate(expected))
    if name != "mixtral":
        assert written(model, prompts, GREEDY) == expected


@pytest.mark.parametrize("adapter", [True, False])
def test_recorded_steps_of_a_four_bit_model_are_as_exact_as_its_own(adapter):
    """Both compute in half precision; they are compared with float32 on the same weights."""
    model, prompts = four_bit_model().eval(), make_prompts((30, 7, 200))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.02)
    with contextlib.nullcontext() if adapter else model.disable_adapter(), torch.no_grad():
        with Decoder(model, GREEDY, 3, 256) as decoder:
            decoder.begin(dict(enumerate(prompts)))
            decoder.clock.zero_()
            chosen = decoder.tokens[:, 0].tolist()
            decoder.replay()
            found = decoder.logits.float()
        rows = [torch.tensor([[*prompt, token]], device=CUDA) for prompt, token in zip(prompts, chosen, strict=True)]
        with torch.autocast("cuda", model.dtype):
            plain = torch.stack([model(ids).logits[0, -1].float() for ids in rows])
        model.float()
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                layer.compute_dtype = torch.float32
        exact = torch.stack([model(ids).logits[0, -1] for ids in rows])
    assert (found - exact).norm() < 1.5 * (plain - exact).norm() + 0.002 * exact.norm()
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_recorded_steps_draw_anew_each_time():
    model = tiny("llama").to(CUDA)
    generation = GenerationConfig(max_new_tokens=40, do_sample=True, temperature=1.0, top_p=0.99, pad_token_id=0)
    replies = written(model, [[5, 6, 7]] * 4, generation, slots=2)
    assert len({tuple(reply) for reply in replies}) == 4
    assert len(set(replies[0])) > 20


def test_recorded_steps_of_model_and_base_can_be_replayed_by_turns():
    model, [prompt] = tuned_model().to(CUDA), make_prompts((8,))
    tuned, base = by_turns(model, prompt)
    assert tuned == generated(model, prompt, GREEDY).tolist() != base
    with model.disable_adapter():
        assert base == generated(model, prompt, GREEDY).tolist()


def test_replies_leave_no_memory_behind():
    model, allocated = tiny("llama").to(CUDA), []
    for _ in range(5):  # the first may load what libraries keep
        written(model, make_prompts(), GREEDY, slots=4, length=4096)
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1] == allocated[-1]
