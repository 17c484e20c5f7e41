"""An optimizer step is exact: its gradient and its loss are those of single rows, however the rows are cut."""

import weakref
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import engine_runner
from engine_passes import decoder_layers, mean_loss, pass_losses, score_rows
from engine_runner import StepRunner
from plan_utils import StepPlan, plan_pass_tokens
from tiny import (
    CONFIGS,
    SETTINGS,
    TINY,
    assert_same,
    gradients,
    make_model,
    make_rows,
    reference_gradients,
    with_adapter,
)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_pass_tokens", [1, 31, 40, 1000])
def test_the_gradient_of_a_step_equals_that_of_single_rows(name, max_pass_tokens):
    model, rows = make_model(name), make_rows()
    expected = reference_gradients(model, rows)
    StepRunner(model, StepPlan(max_pass_tokens=max_pass_tokens)).step(rows)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_changing_one_row_changes_no_other_rows_losses(name):
    model, rows = make_model(name).eval(), make_rows()
    changed = [*make_rows(seed=1)[:2], *rows[2:]]
    before, after = score_rows(model, rows, 1000), score_rows(model, changed, 1000)
    assert before[0][0] != pytest.approx(after[0][0])
    for index in (2, 3, 4):
        assert before[index][0] == pytest.approx(after[index][0], rel=1e-5)


MIXING = {
    "lfm2 (convolution)": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "opt (learned positions)": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_rows_gets_one_row_a_pass_and_then_scores_them_right(name, capsys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, **MIXING[name], initializer_range=0.3)).eval()
    rows, runner = make_rows(), StepRunner(model, StepPlan(max_pass_tokens=1000))
    assert runner.plan.max_pass_tokens == 0
    assert "each row is computed by itself" in capsys.readouterr().err
    alone = [score_rows(model, [row], 1000)[0][0] for row in rows]
    assert [nll for nll, _ in runner.score(rows)] == pytest.approx(alone, rel=1e-5)
    assert [nll for nll, _ in score_rows(model, rows, 1000)] != pytest.approx(alone, rel=1e-3)


SCALED = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def scaled_model(rope_type):
    """A tiny Llama whose positions are scaled from 32 on, as the longest position of a pass has it."""
    torch.manual_seed(0)
    positions = 32 if rope_type == "dynamic" else 128
    scaling = {"rope_type": rope_type, "rope_theta": 10000.0} | SCALED[rope_type]
    changes = {"max_position_embeddings": positions, "rope_parameters": scaling, "initializer_range": 0.3}
    return with_adapter(AutoModelForCausalLM.from_config(LlamaConfig(**TINY | changes)))


@pytest.mark.parametrize("rope_type", SCALED)
def test_rows_whose_positions_are_scaled_by_the_longest_get_one_row_a_pass(rope_type, capsys):
    rows = make_rows((5, 60, 17, 40, 31))
    alone = [score_rows(scaled_model(rope_type), [row], 1000)[0][0] for row in rows]  # each meets a fresh model
    model = scaled_model(rope_type)
    runner = StepRunner(model, StepPlan(max_pass_tokens=1000, longest_row=60))
    assert runner.plan.max_pass_tokens == 0
    assert "each row is computed by itself" in capsys.readouterr().err
    for _ in range(2):
        assert [nll for nll, _ in runner.score(rows)] == pytest.approx(alone, rel=1e-6)
    assert [nll for nll, _ in score_rows(model, rows, 1000)] != pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("rope_type", SCALED)
def test_rows_within_the_original_length_are_still_laid_end_to_end(rope_type):
    rows = make_rows((5, 17, 9, 30, 3))
    model = scaled_model(rope_type)
    expected = reference_gradients(model, rows)
    runner = StepRunner(model, StepPlan(max_pass_tokens=1000, longest_row=30))
    assert runner.plan.max_pass_tokens == 1000
    runner.step(rows)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_keeps_rows_apart_gets_the_passes_that_were_planned(name):
    model = make_model(name)
    most = (
        TINY["hidden_size"] // 2 if name.startswith("gemma 2") else 2 * TINY["hidden_size"]
    )  # what a block mask allows
    for batch_size, expected in ((1, min(50, most)), (20, most)):
        settings = SETTINGS._replace(batch_size=batch_size, max_seq_length=50)
        plan = StepPlan(max_pass_tokens=plan_pass_tokens(model.get_base_model(), settings, StepPlan().kernels))
        assert StepRunner(model, plan).plan.max_pass_tokens == expected
    assert model.training


def test_gradient_checkpointing_changes_no_gradient():
    model, rows = make_model(), make_rows()
    expected = reference_gradients(model, rows)
    StepRunner(model, StepPlan(checkpointing=True, max_pass_tokens=40)).step(rows)
    assert_same(gradients(model), expected)


def test_checkpointing_computes_all_layers_again_but_the_last():
    model, computed = make_model(), Counter()
    layers = decoder_layers(model)
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda module, inputs: computed.update([module]))
    with StepRunner(model, StepPlan(checkpointing=True, max_pass_tokens=1000)) as runner:
        computed.clear()  # the runner has tried the model
        runner.step(make_rows())
    assert [computed[layer.self_attn] for layer in layers] == [2] * (len(layers) - 1) + [1]


def test_what_checkpointing_computes_again_meets_the_same_dropout():
    found = []
    for checkpointing in (False, True):
        model, rows = make_model(settings=SETTINGS._replace(lora_dropout=0.5)), make_rows()
        runner = StepRunner(model, StepPlan(checkpointing=checkpointing, max_pass_tokens=1000))
        torch.manual_seed(3)
        runner.step(rows)
        found.append(gradients(model))
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter], gradient, rtol=1e-5, atol=1e-8)


def test_checkpoints_that_wait_on_the_host_change_no_bit():
    found, rows = [], make_rows()
    for offloaded in (False, True):
        model = make_model(settings=SETTINGS._replace(lora_dropout=0.5))
        plan = StepPlan(checkpointing=True, offloaded=offloaded, max_pass_tokens=40)
        torch.manual_seed(3)
        found.append((StepRunner(model, plan).step(rows), gradients(model)))
    (expected_loss, expected), (loss, gradient) = found
    assert loss == expected_loss
    assert all(torch.equal(gradient[name], expected[name]) for name in expected)


def test_a_layer_s_input_is_let_go_while_it_waits_on_the_host(monkeypatch):
    waiting, live = [], []
    offload, call = engine_runner.OffloadedInput.offload, engine_runner.OffloadedInput.call

    def watched_offload(self):
        waiting.append(weakref.ref(self.hidden))
        offload(self)

    def watched_call(self, *args, **kwargs):
        live.append(sum(ref() is not None for ref in waiting))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(engine_runner.OffloadedInput, "offload", watched_offload)
    monkeypatch.setattr(engine_runner.OffloadedInput, "call", watched_call)
    model = make_model()
    StepRunner(model, StepPlan(checkpointing=True, offloaded=True, max_pass_tokens=1000)).step(make_rows())
    assert len(live) == 2 * (TINY["num_hidden_layers"] - 1)  # the last layer's is needed at once
    assert max(live) <= 1


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens():
    model, rows = make_model(), make_rows()
    loss = StepRunner(model, StepPlan(max_pass_tokens=31)).step(rows).item()
    assert loss == pytest.approx(mean_loss(score_rows(model, rows, 1000)), rel=1e-5)


def test_scores_do_not_depend_on_how_rows_are_grouped():
    model, rows = make_model().eval(), make_rows()
    alone = [score_rows(model, [row], 1000)[0] for row in rows]
    for max_tokens in (1, 31, 1000):
        for (nll, tokens), (expected, expected_tokens) in zip(score_rows(model, rows, max_tokens), alone, strict=True):
            assert nll == pytest.approx(expected, rel=1e-5)
            assert tokens == expected_tokens


def test_only_positions_before_a_trained_token_cost_logits():
    model, rows = make_model(), make_rows()
    losses, row_of_target = pass_losses(model, rows)
    assert len(losses) == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert row_of_target.tolist() == sorted(row_of_target.tolist())
