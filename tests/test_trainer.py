"""The Trainer: its figures are weighted by tokens, what is not finite ends it, and its speed is that of training."""

import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

import plan_utils
import training_utils
from conftest import refusal
from engine_passes import cost_of, score_rows
from engine_runner import Rehearsal, StepRunner
from engine_shards import ShardEngine
from plan_utils import StepPlan, count_steps
from tiny import CPU, SETTINGS, make_model, make_rows, plain_pass
from training_utils import LoraTrainer, SpeedMeter, build_training_arguments


def make_trainer(model, rows, tmp_path, max_pass_tokens=1000, settings=SETTINGS):
    arguments = build_training_arguments(settings, tmp_path, CPU, torch.float32, has_validation=False)
    arguments.set_save("no")
    plan = StepPlan(max_pass_tokens=max_pass_tokens, rows_a_step=arguments.per_device_train_batch_size)
    return LoraTrainer(model=model, args=arguments, train_dataset=rows, plan=plan)


def test_this_release_of_transformers_has_all_that_the_trainer_relies_on(tmp_path):
    lost = [name for name in training_utils.TRAINER_METHODS if not callable(getattr(Trainer, name, None))]
    arguments, attributes = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), training_utils.TRAINER_ATTRIBUTES
    trainer = make_trainer(make_model(), make_rows(), tmp_path, settings=SETTINGS._replace(max_steps=1))
    trainer.train()
    lost += [name for name in attributes if not (hasattr(trainer, name) or hasattr(arguments, name))]
    assert not lost, (
        f"this release of transformers has no {', '.join(lost)}, which training_utils.LoraTrainer relies on"
    )


def test_the_validation_loss_is_weighted_by_tokens_and_not_by_rows(tmp_path):
    model, rows = make_model(), make_rows()
    trainer = make_trainer(model, rows, tmp_path, 40)
    found = trainer.evaluate(rows)["eval_loss"]
    scores = score_rows(model, rows, 1000)
    by_rows = sum(nll / tokens for nll, tokens in scores) / len(scores)
    assert found == pytest.approx(sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores), rel=1e-5)
    assert abs(found - by_rows) > 1e-3  # the check can tell
    assert trainer.evaluate(rows)["eval_perplexity"] == pytest.approx(math.exp(found))


def test_a_diverged_loss_ends_the_run_with_the_adapter_as_it_was_and_is_not_logged_as_zero(tmp_path):
    model, rows = make_model(), make_rows((8,) * 8)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=1, num_epochs=1, logging_steps=1)
    trainer = make_trainer(model, rows, tmp_path, settings=settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    message = refusal(trainer.train)
    assert "the loss of step 1 is not finite" in message
    assert [entry for entry in trainer.state.log_history if "loss" in entry] == []
    assert all(map(torch.equal, trained, before))


def test_two_visible_gpus_without_a_launcher_do_not_scale_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n", 2)))
    assert build_training_arguments(SETTINGS, tmp_path, CPU, torch.float32, False)._n_gpu == 1


def test_checkpoints_fall_on_evaluations():
    arguments = build_training_arguments(SETTINGS._replace(eval_steps=7), "unused", CPU, torch.float32, True)
    assert (arguments.eval_strategy, arguments.save_strategy) == ("steps", "steps")
    assert arguments.eval_steps == arguments.save_steps == 7
    assert arguments.load_best_model_at_end


# ---- Speed and time --------------------------------------------------------------------------------------------------
def test_the_speed_counts_the_seconds_between_start_and_pause():
    meter = SpeedMeter()
    time.sleep(0.3)  # before the first step
    meter.start()
    meter.tokens += 100
    time.sleep(0.1)
    meter.pause()
    time.sleep(0.1)  # waiting for the GPU while a loss is read belongs to the training
    meter.pause()
    assert 250 < meter.read() < 520
    meter.start()
    meter.tokens += 10
    time.sleep(0.1)
    meter.pause()
    assert 50 < meter.read() < 110


def test_the_logged_speed_leaves_out_evaluations(tmp_path):
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=1, num_epochs=2, logging_steps=4)
    rows = make_rows((8,) * 8)
    trainer = make_trainer(make_model(), rows, tmp_path, settings=settings)
    trainer.args.set_evaluate("steps", steps=2, batch_size=4, delay=0)
    trainer.eval_dataset = rows
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: time.sleep(2) or evaluate(*args, **kwargs)
    trainer.train()
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    assert len(speeds) == 2
    assert speeds[1] > 3 * 4 * 8 / 2  # the three steps of 4 rows since the first log took less than an evaluation


@pytest.mark.parametrize(("rows", "expected"), [(1, 3), (16, 3), (17, 6), (33, 9)])
def test_the_plan_counts_steps_as_the_trainer_does(rows, expected, tmp_path):
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=4, num_epochs=3)
    trainer = make_trainer(make_model(), make_rows((6,) * rows), tmp_path, settings=settings)
    planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert count_steps(rows, settings) == planned == expected
    assert count_steps(rows, settings._replace(max_steps=2)) == 2


def test_the_first_step_is_rehearsed_once_and_said(tmp_path, capsys):
    settings = SETTINGS._replace(batch_size=2, gradient_accumulation_steps=1)
    model, rows = make_model(), make_rows()
    trainer = make_trainer(model, rows, tmp_path, settings=settings)
    trainer.state.max_steps = 7
    trainer.training_step(model, rows[:2])
    said = capsys.readouterr().err
    assert re.search(r"^Rehearsal: the longest pass, 47 tokens, takes .* s and .* GiB$", said, flags=re.M)
    assert re.search(r"^Time: .* so far, 7 x .* a step.*; about .* s in all$", said, flags=re.M)
    assert trainer.runner.plan.expected_seconds > 0
    trainer.training_step(model, rows[:2])
    assert "Rehearsal" not in capsys.readouterr().err


def test_the_expected_time_counts_the_short_last_step_of_an_epoch():
    plan = StepPlan(rows_a_step=4, max_pass_tokens=1000)
    # eight steps are four epochs of a step of 80 tokens and one of 20; a pass of 80 tokens takes 80 seconds
    assert plan_utils.expected_seconds(plan, Rehearsal(80, 80.0, 0.0, 0.0), make_rows((20,) * 5), steps=8) == 400


def test_the_expected_time_counts_the_lengths_of_pass_that_will_be_recorded():
    plan = StepPlan(rows_a_step=1, max_pass_tokens=512, recorded=True, lengths=(256, 512))
    rehearsal = Rehearsal(300, 10.0, 90.0, 0.0)  # of a pass that is filled up to 512 tokens
    seconds = plan_utils.expected_seconds(plan, rehearsal, make_rows((20,) * 8), steps=8)
    of_256 = 10 * cost_of([256]) / cost_of([512])
    assert seconds == pytest.approx(8 * of_256 + 90)  # eight passes, and what the first of them takes more


def test_the_expected_time_leaves_out_lengths_that_the_memory_ran_out_with():
    plan = StepPlan(rows_a_step=4, max_pass_tokens=512, recorded=True, lengths=(256, 2048))
    rehearsal = Rehearsal(500, 10.0, 0.0, 0.0)
    # two passes of 512 tokens a step, not one of 2,048
    assert plan_utils.expected_seconds(plan, rehearsal, make_rows((250,) * 8), steps=8) == pytest.approx(8 * 2 * 10)


def test_passes_are_recorded_unless_plain_ones_take_less_time_over_the_whole_run():
    plan = StepPlan(rows_a_step=4, max_pass_tokens=2048, recorded=True, lengths=(2048,))

    def worth(rows, seconds, launching, recording=1.0, **changes):
        rehearsal = Rehearsal(2048, seconds, recording, launching)
        return plan_utils.worth_recording(plan._replace(**changes), rehearsal, rows, steps=100)

    filled_up = make_rows((450,) * 40)  # each pass by a tenth
    assert worth(filled_up, seconds=0.1, launching=0.3)  # the GPU would wait
    assert worth(filled_up, seconds=0.3, launching=0.3)
    assert not worth(filled_up, seconds=0.5, launching=0.3)
    whole = make_rows((512,) * 40)
    assert worth(whole, seconds=0.5, launching=0.3)
    several = {"lengths": (1024, 2048), "rows_a_step": 6}  # recording of the shorter one takes a tenth of the run
    assert not worth(whole, seconds=0.5, launching=0.1, recording=8.0, **several)
    # the host launches a pass of few tokens no faster than a long one
    rests = {"lengths": (512, 2048), "rows_a_step": 5}
    assert worth(whole, seconds=0.5, launching=0.3, **rests)


@pytest.mark.parametrize("before", [None, True, False])
@pytest.mark.parametrize("worth", [True, False])
def test_a_run_that_goes_on_records_its_passes_if_it_had_before(before, worth, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(make_model(), make_rows(), tmp_path)
    trainer.runner.lower(recorded=True)
    monkeypatch.setattr(StepRunner, "_replay", plain_pass)  # a CPU can record none
    monkeypatch.setattr(training_utils, "worth_recording", lambda *_: worth)
    progress = {} if before is None else {"passes_recorded": before}
    trainer.checkpoints = SimpleNamespace(resumption=SimpleNamespace(progress=progress))
    trainer.state.max_steps = 4
    trainer.rehearse(None)
    assert trainer.runner.plan.recorded is (worth if before is None else before)
    said = "Passes are not recorded, since the run is expected to take no longer without" in capsys.readouterr().err
    assert said is (before is None and not worth)


@pytest.mark.parametrize("other", [True, False])
def test_passes_are_recorded_in_all_processes_if_that_is_worth_it_in_one(other, tmp_path, monkeypatch):
    trainer = make_trainer(make_model(), make_rows(), tmp_path)
    trainer.runner.lower(recorded=True)
    monkeypatch.setattr(StepRunner, "_replay", plain_pass)  # a CPU can record none
    monkeypatch.setattr(training_utils, "worth_recording", lambda *_: False)
    monkeypatch.setattr(training_utils, "gather_object", lambda found: [*found, other])
    trainer._rehearse_passes(steps=4)
    assert trainer.runner.plan.recorded is other


@pytest.mark.parametrize(("wish", "shards"), [(False, None), (True, ShardEngine("FSDP2", 2, None))])
def test_only_a_plan_that_compiles_asks_for_a_compiler(wish, shards, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", None)
    model, settings = make_model("llama"), SETTINGS._replace(torch_compile=wish)
    plan = plan_utils.plan_steps(model, settings, torch.float32, make_rows(), shards=shards)
    plan_utils.check_compiler(plan, CPU)
    said = capsys.readouterr().err
    assert "will be compiled" not in said
    assert ("The layers are neither compiled nor recorded" in said) == (shards is not None)
