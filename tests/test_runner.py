"""The runner carries out a plan, lowers it where it must, and leaves the model as it was."""

import time
from functools import partial
from itertools import pairwise

import pytest
import torch

from conftest import refusal
from engine_passes import (
    Kernels,
    decoder_layers,
    mean_loss,
    planned_length,
    recorded_tokens,
    score_rows,
    transformers_model,
)
from engine_runner import StepRunner, fill_up
from plan_utils import StepPlan
from tiny import (
    SETTINGS,
    assert_same,
    bundled_model,
    gradients,
    make_model,
    make_rows,
    plain_pass,
    reference_gradients,
    run_out_of_memory,
    state_of,
)

LONG = StepPlan(max_pass_tokens=1000)


# ---- Everything is taken back ----------------------------------------------------------------------------------------
def test_a_row_longer_than_passes_may_be_is_recorded_in_a_planned_length_and_lengths_that_did_not_fit_are_not_used():
    plan = StepPlan(max_pass_tokens=4096, lengths=(1024, 4096, 6144, 8192), recorded=True)
    assert [planned_length(plan, count) for count in (1000, 1025, 4096, 5000, 6145)] == [1024, 4096, 4096, 6144, 8192]
    lowered = plan._replace(max_pass_tokens=2000)  # memory ran out with passes of 4,096
    assert [planned_length(lowered, count) for count in (1000, 1025, 1900)] == [
        1024,
        recorded_tokens(1025),
        recorded_tokens(1900),
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_is_as_it_was_when_the_runner_is_closed(checkpointing, compiled, monkeypatch):
    model, rows = bundled_model(), make_rows(vocabulary=8000)
    compile_to(monkeypatch)
    before = state_of(model)
    plan = LONG._replace(kernels=Kernels(loss=True, lora=True), checkpointing=checkpointing, compiled=compiled)
    with StepRunner(model, plan) as runner:
        assert runner.plan.kernels == Kernels(loss=True, lora=True)
        runner.step(rows)
        assert state_of(model) != before  # the check can tell
    assert state_of(model) == before


def test_a_runner_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch):
    model = bundled_model()
    before = state_of(model)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        StepRunner(model, LONG._replace(kernels=Kernels(lora=True), compiled=True))
    assert state_of(model) == before


# ---- Kernels ---------------------------------------------------------------------------------------------------------
def test_a_planned_kernel_that_does_not_serve_is_left_out():
    plan = StepPlan(Kernels(attention=True, loss=True), max_pass_tokens=1000)
    runner = StepRunner(make_model(), plan)
    assert runner.plan.kernels == Kernels(loss=True)  # varlen attention needs a GPU
    assert runner.plan.max_pass_tokens == 64  # what a block mask allows a layer of width 32


# ---- Compiled and recorded passes ------------------------------------------------------------------------------------
def compile_to(monkeypatch, factor=1.0):
    """Let torch.compile return the layer's own forward, whose output is multiplied; returns a list of its calls."""
    calls = []

    def compiled(forward, **_):
        return lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs) * factor

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_compiled_layers_are_used_only_if_they_have_the_gradients_of_plain_ones(factor, monkeypatch, capsys):
    model, rows = make_model(), make_rows()
    expected, calls = reference_gradients(model, rows), compile_to(monkeypatch, factor)
    runner = StepRunner(model, LONG._replace(compiled=True))
    runner.rehearse(rows, rows[:2])
    assert calls
    assert runner.plan.compiled is (factor == 1)
    assert ("Compiled layers have other gradients" in capsys.readouterr().err) is (factor != 1)
    runner.step(rows)
    assert_same(gradients(model), expected)


def test_what_cannot_be_compiled_is_computed_without(monkeypatch, capsys):
    model, rows = make_model(), make_rows()
    expected = reference_gradients(model, rows)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: lambda *args, **kwargs: 1 / 0)
    runner = StepRunner(model, LONG._replace(compiled=True))
    runner.step(rows)
    messages = capsys.readouterr().err
    assert messages.count("This model's passes cannot be compiled (ZeroDivisionError: division by zero)") == 1
    assert_same(gradients(model), expected)


def test_what_cannot_be_recorded_is_computed_without(capsys):
    model, rows = make_model(), make_rows()
    expected = reference_gradients(model, rows)
    runner = StepRunner(model, LONG)
    runner.lower(recorded=True)  # which a CPU cannot do
    runner.step(rows)
    assert "This model's passes cannot be recorded (" in capsys.readouterr().err
    assert not runner.plan.recorded
    assert_same(gradients(model), expected)


def test_an_error_with_nothing_left_to_do_without_is_a_bug_and_raised():
    model = make_model()
    model.get_base_model().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        StepRunner(model, StepPlan()).step(make_rows())


def test_passes_that_are_computed_again_have_the_same_dropout(monkeypatch):
    settings = SETTINGS._replace(lora_dropout=0.5)
    model, rows, calls = make_model(settings=settings), make_rows(), []
    runner = StepRunner(model, LONG)
    torch.manual_seed(1)
    runner.step(rows)
    expected = gradients(model)

    def compiled(forward, **_):
        def fail_late(*args, **kwargs):
            if len(calls) == 2:  # in the second layer, when the first has drawn its dropout
                raise RuntimeError("this is known too late")
            return calls.append(1) or forward(*args, **kwargs)

        return fail_late

    monkeypatch.setattr(torch, "compile", compiled)
    runner = StepRunner(model, LONG._replace(compiled=True))
    calls.append(1)
    torch.manual_seed(1)
    runner.step(rows)
    assert not runner.plan.compiled
    for parameter, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[parameter]), parameter
    runner.step(rows)
    assert not torch.equal(gradients(model)[parameter], expected[parameter])  # the next step's is another


# ---- Out of memory ---------------------------------------------------------------------------------------------------
def test_out_of_memory_makes_the_passes_smaller_and_changes_no_result(capsys):
    model, rows = make_model(), make_rows()
    expected = reference_gradients(model, rows)
    sizes = run_out_of_memory(model, 35)
    runner = StepRunner(model, LONG)
    loss = runner.step(rows).item()
    assert_same(gradients(model), expected)
    assert loss == pytest.approx(mean_loss(score_rows(model, rows, 30)), rel=1e-5)
    assert runner.plan.max_pass_tokens == 32  # 64 tokens of the whole step, halved
    message = "Out of memory with a pass of 64 tokens; from here on at most 32"
    assert capsys.readouterr().err.count(message) == 1
    assert max(sizes) <= 32
    runner.step(rows)
    assert "Out of memory" not in capsys.readouterr().err


def test_a_row_that_does_not_fit_by_itself_ends_in_one_line():
    model, rows = make_model(), make_rows()
    run_out_of_memory(model, 20)
    message = refusal(StepRunner(model, LONG).step, rows)
    assert "out of memory with a single row of 30 tokens" in message
    assert "--max_seq_length" in message


@pytest.mark.parametrize("count", [1, 4])
def test_memory_that_runs_out_gives_up_dequantized_weights_first(count, capsys):
    model, rows = bundled_model(four_bit=True), make_rows(vocabulary=8000)[:count]
    expected = reference_gradients(model, rows)
    runner = StepRunner(model, LONG._replace(kernels=Kernels(lora=True), dequantized=True))

    def fail_while_dequantized(*_):
        if runner.plan.dequantized:
            raise torch.OutOfMemoryError("fake")

    model.get_base_model().register_forward_pre_hook(fail_while_dequantized)
    runner.step(rows)
    assert not runner.plan.dequantized
    messages = capsys.readouterr().err
    assert "Out of memory; from here on frozen weights are dequantized in each pass" in messages
    assert "at most" not in messages
    assert runner.plan.max_pass_tokens == 1000
    assert_same(gradients(model), expected, 3e-5)


# ---- The rehearsal ---------------------------------------------------------------------------------------------------
def test_the_rehearsal_tells_the_longest_pass_and_leaves_no_trace():
    model, rows = make_model(settings=SETTINGS._replace(lora_dropout=0.5)), make_rows()
    runner, found = StepRunner(model, LONG), []
    for rehearse in (False, True):
        torch.manual_seed(3)
        if rehearse:
            rehearsal = runner.rehearse([rows[3], rows[1]], rows[:2])
            assert all(parameter.grad is None for parameter in runner.parameters)
        runner.step(rows[:2])
        found.append(gradients(model))
    assert rehearsal.tokens == 47
    assert rehearsal.seconds > 0
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_the_rehearsal_of_recorded_passes_tells_what_launching_plain_ones_takes(monkeypatch):
    model, rows = make_model(), make_rows()
    monkeypatch.setattr(StepRunner, "_replay", plain_pass)  # a CPU can record none
    model.get_base_model().register_forward_pre_hook(lambda *_: time.sleep(0.2))
    runner = StepRunner(model, LONG)
    runner.lower(recorded=True)
    assert 0.2 < runner.rehearse(rows, rows[:2]).launch_seconds < 0.4
    assert runner.plan.recorded
    runner.record_nothing()
    assert runner.rehearse(rows, rows[:2]).launch_seconds == 0


# ---- Recorded passes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ends", [[7], [3, 9], [4, 8, 10], [60]])
def test_a_pass_is_filled_up_by_rows_that_are_no_longer_than_attention_reads(ends):
    starts = fill_up(torch.tensor([0, *ends], dtype=torch.int32), tokens=60, longest=16, rows=8).tolist()
    assert starts[: len(ends) + 1] == [0, *ends]
    lengths = [end - start for start, end in pairwise(starts)]
    assert len(lengths) == 8
    assert sum(lengths) == 60
    assert all(0 <= length <= 16 for length in lengths[len(ends) :])


# ---- What compiled layers keep ---------------------------------------------------------------------------------------
def test_a_compiled_layer_keeps_only_what_takes_a_product_to_compute(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    model, tokens, held = make_model(), 40, {}
    base = transformers_model(model)
    hidden = torch.randn(1, tokens, base.config.hidden_size, requires_grad=True)
    positions = torch.arange(tokens)[None]
    rotary = base.get_decoder().rotary_emb(hidden, positions)

    def hold(tensor):
        if tensor.dim() > 1 and tokens in tensor.shape:
            held[tensor.untyped_storage().data_ptr()] = tensor.numel() // tokens
        return tensor

    with StepRunner(model, LONG._replace(kernels=Kernels(lora=True), compiled=True)):
        layer = decoder_layers(base)[0].train()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            layer(hidden, position_embeddings=rotary, position_ids=positions, attention_mask=None)
    inner = base.config.intermediate_size
    assert list(held.values()).count(inner) == 2, held  # gate and up, and not their product
