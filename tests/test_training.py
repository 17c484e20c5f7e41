"""The training step is exact, the figures are token-weighted, and a run is reproducible."""

import copy
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import engine_lora
import progress_utils
import train
import training_utils
from conftest import TINY_BASE, adapter_bytes, refusal, small_run
from engine_passes import PassKernels, mean_loss, pass_losses, score_rows, transformers_model
from engine_runner import StepRunner, choose_pass_tokens
from model_utils import attach_lora
from plan_utils import check_compiler, count_steps, expected_peak
from settings_utils import DEFAULTS, Settings
from training_utils import LoraTrainer, build_training_arguments

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
CPU = torch.device("cpu")
SETTINGS = Settings(**DEFAULTS)._replace(lora_r=4, lora_dropout=0.0, gradient_checkpointing=False)


def make_rows(lengths=(5, 17, 9, 30, 3), seed=0):
    """Rows of random tokens whose second half is trained."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :], "row": number})
    return rows


def make_model(name="mistral", seed=0, settings=SETTINGS):
    """A tiny model with LoRA whose B weights are not zero, so that every LoRA gradient is."""
    torch.manual_seed(seed)
    model = attach_lora(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])), settings)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_trainer(model, rows, tmp_path, max_pass_tokens, settings=SETTINGS):
    arguments = build_training_arguments(settings, tmp_path, CPU, torch.float32, has_validation=False)
    return LoraTrainer(model=model, args=arguments, train_dataset=rows, max_pass_tokens=max_pass_tokens)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def reference_gradients(model, rows):
    """The plain way: one row at a time, no packing, sum of losses over the number of trained tokens of all rows."""
    model.zero_grad()
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        targets = torch.tensor(row["labels"][1:])
        (F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count).backward()
    return gradients(model)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_pass_tokens", [1, 31, 40, 1000])
def test_the_gradient_of_a_step_equals_that_of_single_rows(name, max_pass_tokens, tmp_path):
    model, rows = make_model(name), make_rows()
    expected = reference_gradients(model, rows)
    model.zero_grad()
    make_trainer(model, rows, tmp_path, max_pass_tokens).training_step(model, rows)
    for parameter, gradient in gradients(model).items():
        assert (gradient - expected[parameter]).norm() <= 1e-5 * expected[parameter].norm(), parameter


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
    rows = make_rows()
    limit = choose_pass_tokens(model, 1000)
    assert limit == 0
    assert "each row is computed by itself" in capsys.readouterr().err
    alone = [score_rows(model, [row], 1000)[0][0] for row in rows]
    assert [nll for nll, _ in score_rows(model, rows, limit)] == pytest.approx(alone, rel=1e-5)
    assert [nll for nll, _ in score_rows(model, rows, 1000)] != pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_keeps_rows_apart_gets_full_passes(name):
    model = make_model(name)
    assert choose_pass_tokens(model, 50) == 50
    assert choose_pass_tokens(model, 1000) == 2 * TINY["hidden_size"]  # a block mask grows with the square
    assert model.training


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    model, rows = make_model(), make_rows()
    trainer = make_trainer(model, rows, tmp_path, 40)
    trainer.training_step(model, rows)
    expected = gradients(model)
    model.zero_grad()
    trainer.runner = StepRunner(model, checkpointing=True)
    trainer.training_step(model, rows)
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-8)


def test_what_checkpointing_computes_again_meets_the_same_dropout():
    found = []
    for checkpointing in (False, True):
        model, rows = make_model(settings=SETTINGS._replace(lora_dropout=0.5)), make_rows()
        runner = StepRunner(model, checkpointing=checkpointing)
        torch.manual_seed(3)
        runner.run(model, rows, 1.0, torch.Tensor.backward)
        found.append(gradients(model))
    for parameter, gradient in found[0].items():
        torch.testing.assert_close(found[1][parameter], gradient, rtol=1e-5, atol=1e-8)


def test_the_reported_loss_is_the_mean_over_the_steps_trained_tokens(tmp_path):
    model, rows = make_model(), make_rows()
    loss = make_trainer(model, rows, tmp_path, 31).training_step(model, rows).item()
    assert loss == pytest.approx(mean_loss(score_rows(model, rows, 1000)), rel=1e-5)


def test_scores_do_not_depend_on_how_rows_are_grouped():
    model, rows = make_model().eval(), make_rows()
    alone = [score_rows(model, [row], 1000)[0] for row in rows]
    for max_tokens in (1, 31, 1000):
        for (nll, tokens), (expected, expected_tokens) in zip(score_rows(model, rows, max_tokens), alone, strict=True):
            assert nll == pytest.approx(expected, rel=1e-5)
            assert tokens == expected_tokens


def test_the_validation_loss_is_weighted_by_tokens_and_not_by_rows(tmp_path):
    model, rows = make_model(), make_rows()
    trainer = make_trainer(model, rows, tmp_path, 40)
    found = trainer.evaluate(rows)["eval_loss"]
    scores = score_rows(model, rows, 1000)
    by_rows = sum(nll / tokens for nll, tokens in scores) / len(scores)
    assert found == pytest.approx(sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores), rel=1e-5)
    assert abs(found - by_rows) > 1e-3  # the check can tell
    assert trainer.evaluate(rows)["eval_perplexity"] == pytest.approx(math.exp(found))


def test_only_positions_before_a_trained_token_cost_logits():
    model, rows = make_model(), make_rows()
    losses, row_of_target = pass_losses(model, rows)
    assert len(losses) == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert row_of_target.tolist() == sorted(row_of_target.tolist())


def test_a_diverged_loss_ends_the_run_with_the_adapter_as_it_was_and_is_not_logged_as_zero(tmp_path):
    model, rows = make_model(), make_rows((8,) * 8)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=1, num_epochs=1, logging_steps=1)
    trainer = make_trainer(model, rows, tmp_path, 1000, settings)
    trainer.args.set_save("no")
    before = [p.detach().clone() for p in trainer.runner.parameters]
    message = refusal(trainer.train)
    assert "the loss of step 1 is not finite" in message
    assert [entry for entry in trainer.state.log_history if "loss" in entry] == []
    assert all(map(torch.equal, trainer.runner.parameters, before))


def test_two_visible_gpus_without_a_launcher_do_not_scale_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(training_utils.TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n", 2)))
    assert build_training_arguments(SETTINGS, tmp_path, CPU, torch.float32, False)._n_gpu == 1


def test_checkpoints_fall_on_evaluations():
    arguments = build_training_arguments(SETTINGS._replace(eval_steps=7), "unused", CPU, torch.float32, True)
    assert (arguments.eval_strategy, arguments.save_strategy) == ("steps", "steps")
    assert arguments.eval_steps == arguments.save_steps == 7
    assert arguments.load_best_model_at_end


def test_the_speed_counts_training_time_only(tmp_path, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(training_utils, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    rows = make_rows((8,) * 8)
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=1, num_epochs=2, logging_steps=4)
    trainer = make_trainer(make_model(), rows, tmp_path, 1000, settings)
    trainer.args.set_save("no")
    trainer.args.set_evaluate("steps", steps=2, batch_size=4, delay=0)
    trainer.eval_dataset = rows
    evaluate, step = trainer.evaluate, trainer.accelerator.backward

    def slow_evaluate(*args, **kwargs):
        clock["now"] += 1000
        return evaluate(*args, **kwargs)

    def slow_backward(*args, **kwargs):
        clock["now"] += 2
        return step(*args, **kwargs)

    trainer.evaluate = slow_evaluate
    trainer.accelerator.backward = slow_backward
    trainer.train()
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    assert speeds == [16, 16]  # 4 rows of 8 tokens in 2 s, at the first step and over the other three


def test_the_speed_counts_the_time_that_the_host_waits_for_the_gpu(tmp_path, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(training_utils, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))

    def start_copy(flags):
        return flags, lambda: clock.update(now=clock["now"] + 2)

    monkeypatch.setattr(training_utils, "start_copy_to_host", start_copy)
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=1, num_epochs=2, logging_steps=4)
    trainer = make_trainer(make_model(), make_rows((8,) * 8), tmp_path, 1000, settings)
    trainer.args.set_save("no")
    trainer.args.set_evaluate("steps", steps=1, batch_size=4, delay=0)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    speeds = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    assert speeds == [16, 16]


@pytest.mark.parametrize(("rows", "expected"), [(1, 3), (16, 3), (17, 6), (33, 9)])
def test_the_plan_counts_steps_as_the_trainer_does(rows, expected, tmp_path):
    examples = make_rows((6,) * rows)
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=4, num_epochs=3)
    trainer = make_trainer(make_model(), examples, tmp_path, 1000, settings)
    planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    assert count_steps(rows, settings) == planned == expected
    assert count_steps(rows, settings._replace(max_steps=2)) == 2


# ---- Whole small runs, in this process -------------------------------------------------------------------------------
def test_a_run_is_reproducible_to_the_byte_and_its_seed_matters(dataset, tmp_path, undisturbed):
    first = adapter_bytes(undisturbed())
    assert adapter_bytes(small_run(dataset, tmp_path / "2")) == first
    assert adapter_bytes(small_run(dataset, tmp_path / "3", seed=43)) != first


def test_sample_answers_during_training_do_not_change_the_result(dataset, tmp_path, undisturbed):
    assert adapter_bytes(small_run(dataset, tmp_path, sample_prompts=0)) == adapter_bytes(undisturbed())


def test_batch_size_and_accumulation_only_matter_by_their_product(dataset, tmp_path):
    by_batch = small_run(dataset, tmp_path / "1", batch_size=4, gradient_accumulation_steps=1, lora_dropout=0.0)
    by_steps = small_run(dataset, tmp_path / "2", batch_size=1, gradient_accumulation_steps=4, lora_dropout=0.0)
    first, second = (json.loads((out / "lora-adapter/run.json").read_text()) for out in (by_batch, by_steps))
    assert first["steps"] == second["steps"]
    assert first["last_loss"] == pytest.approx(second["last_loss"], rel=1e-4)
    assert first["validation_loss"] == pytest.approx(second["validation_loss"], rel=1e-4)


def test_the_best_checkpoint_is_kept_and_becomes_the_adapter(undisturbed, contradicted):
    out = undisturbed(**contradicted)
    state = json.loads(max(out.glob("checkpoints/*/trainer_state.json"), key=lambda p: p.stat().st_mtime).read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best != max(losses)  # the check can tell best from last
    assert (out / f"checkpoints/checkpoint-{best}/adapter_model.safetensors").read_bytes() == adapter_bytes(out)
    record = json.loads((out / "lora-adapter/run.json").read_text())
    assert record["best_step"] == best
    assert record["validation_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert len(list(out.glob("checkpoints/*"))) == 2


def test_early_stopping_ends_a_run_that_gets_worse(undisturbed, contradicted):
    changes = contradicted | {"early_stopping_patience": 1}
    record = json.loads((undisturbed(**changes) / "lora-adapter/run.json").read_text())
    assert record["steps"] < 6 * changes["num_epochs"]
    assert record["best_step"] < record["steps"]


def test_a_run_without_validation_rows_trains_and_saves(dataset, tmp_path):
    out = small_run(dataset, tmp_path, validation_split=0.0)
    assert json.loads((out / "lora-adapter/run.json").read_text())["validation_loss"] is None
    assert not (out / "validation.jsonl").exists()


def test_a_second_run_moves_the_first_aside_and_overwrites_nothing(dataset, tmp_path):
    first = adapter_bytes(small_run(dataset, tmp_path))
    small_run(dataset, tmp_path, seed=7)
    (moved,) = (tmp_path / "out" / "previous").iterdir()
    assert (moved / "lora-adapter" / "adapter_model.safetensors").read_bytes() == first
    assert (moved / "validation.jsonl").exists()
    assert adapter_bytes(tmp_path / "out") != first


def test_tensorboard_holds_the_curves_the_samples_and_the_settings(undisturbed):
    board = EventAccumulator(str(undisturbed().parent / "logs" / "run")).Reload()
    scalars = set(board.Tags()["scalars"])
    assert scalars == set(progress_utils.RunBoard.NAMES.values())
    for name in scalars:
        assert all(math.isfinite(event.value) for event in board.Scalars(name)), name
    texts = {tag.removesuffix("/text_summary") for tag in board.Tags()["tensors"]}
    assert {"settings", "samples"} <= texts
    settings_text = board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lora_dropout | 0.1 |" in settings_text


def test_no_pickle_but_the_optimizers_own_and_no_training_arguments_are_saved(undisturbed):
    out = undisturbed()
    names = {path.name for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")}
    bare_numbers = {"ids.bin", "trained.bin"}  # of the tokenized rows, read by numpy.memmap
    assert names - bare_numbers == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent.parent for path in out.rglob("*") if path.name in bare_numbers} == {out / "cache"}
    archives = list(out.rglob("*.npz"))
    assert archives
    for path in archives:
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind != "O" for name in arrays.files)
    assert {path.suffix for path in (out / "lora-adapter").iterdir()} == {".safetensors", ".json", ".jinja", ".md"}


def test_a_dry_run_prints_the_plan_and_an_example_and_writes_its_report_alone(dataset, tmp_path, capsys):
    settings = Settings(**DEFAULTS)._replace(
        base_model_name=TINY_BASE,
        device="cpu",
        custom_dataset_path=str(dataset),
        output_dir=str(tmp_path / "out"),
        logs_dir=str(tmp_path / "logs"),
    )
    train.train(settings, dry_run=True)
    captured = capsys.readouterr()
    assert "Plan: 22 rows" in captured.err
    assert captured.out == ""
    assert re.search(r"### Response:\n\[(red|green|blue|grey)( \1)*</s>\]\n", captured.err)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cache", "data_report.json"]


# ---- Memory ----------------------------------------------------------------------------------------------------------
def expected_bytes(config, **changes):
    with torch.device("meta"):
        model = attach_lora(AutoModelForCausalLM.from_config(config), SETTINGS)
    known = {"dtype": torch.bfloat16, "tokens": 2048, "checkpointing": False, "compiled": False}
    return expected_peak(model, SETTINGS, **(known | changes))


def test_the_expected_memory_is_that_of_weights_activations_and_logits():
    config = MistralConfig(vocab_size=32_000)
    weights = 3.8 * 2**30  # of 7.24 billion, embeddings and output, 262 million, in 16 bits and the others in 4
    assert weights < expected_bytes(config, checkpointing=True) < 2 * weights
    assert expected_bytes(config) > 2 * expected_bytes(config, checkpointing=True)
    assert expected_bytes(config, tokens=4096) > expected_bytes(config) > expected_bytes(config, compiled=True)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt", "falcon", "bloom", "mpt", "gpt_bigcode", "phi3", "gemma2"])
def test_memory_is_expected_of_configs_that_name_their_sizes_in_other_ways(kind):
    config = AutoConfig.for_model(kind)
    assert expected_bytes(config, checkpointing=True) < expected_bytes(config) < 400 * 2**30


def out_of_memory_above(monkeypatch, tokens):
    """Let passes of more than so many tokens run out of memory; returns the sizes of those that did not."""
    original, sizes = StepRunner.run, []

    def run(runner, model, rows, *args):
        size = sum(len(row["input_ids"]) for row in rows)
        if size > tokens:
            original(runner, model, rows, *args)  # memory may run out late, when gradients have been added
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(size)
        return original(runner, model, rows, *args)

    monkeypatch.setattr(StepRunner, "run", run)
    return sizes


def test_out_of_memory_makes_the_passes_smaller_and_changes_no_result(tmp_path, monkeypatch, capsys):
    model, rows = make_model(), make_rows()
    expected = reference_gradients(model, rows)
    sizes = out_of_memory_above(monkeypatch, 35)
    trainer = make_trainer(model, rows, tmp_path, 1000)
    trainer.rehearsed = True
    loss = trainer.training_step(model, rows).item()
    for parameter, gradient in gradients(model).items():
        assert (gradient - expected[parameter]).norm() <= 1e-5 * expected[parameter].norm(), parameter
    assert loss == pytest.approx(mean_loss(score_rows(model, rows, 1000)), rel=1e-5)
    assert trainer.max_pass_tokens == 32  # 64 tokens of the whole step, halved
    message = "Out of memory with a pass of 64 tokens; from here on at most 32"
    assert capsys.readouterr().err.count(message) == 1
    assert max(sizes) <= 32
    trainer.training_step(model, rows)
    assert "Out of memory" not in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_compiled_layers_are_used_only_if_they_have_the_gradients_of_plain_ones(factor, tmp_path, monkeypatch, capsys):
    model, rows = make_model(), make_rows()
    expected = reference_gradients(model, rows)
    calls = []

    def compile_to(forward, **_):
        return lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs) * factor

    monkeypatch.setattr(torch, "compile", compile_to)
    trainer = make_trainer(model, rows, tmp_path, 1000)
    trainer.runner = StepRunner(model, compiled=True)
    trainer.training_step(model, rows)
    assert calls
    assert trainer.runner.compiled is (factor == 1)
    assert ("Compiled layers have other gradients" in capsys.readouterr().err) is (factor != 1)
    for parameter, gradient in gradients(model).items():
        assert (gradient - expected[parameter]).norm() <= 1e-5 * expected[parameter].norm(), parameter


def test_the_comparison_of_compiled_layers_leaves_room_for_float16s_loss_scaling(tmp_path, monkeypatch, capsys):
    model, rows = make_model(), make_rows()
    model.get_base_model().half()
    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    trainer = make_trainer(model, rows, tmp_path, 1000)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer.accelerator.scaler.get_scale() == 65536
    trainer.runner = StepRunner(model, compiled=True)
    trainer._compare_with_plain_passes()
    assert trainer.runner.compiled
    assert "Compiled layers" not in capsys.readouterr().err


def test_what_cannot_be_recorded_or_compiled_is_computed_without(tmp_path, monkeypatch, capsys):
    model, rows = make_model(), make_rows()
    expected = reference_gradients(model, rows)
    trainer = make_trainer(model, rows, tmp_path, 1000)
    trainer.rehearsed = True
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: lambda *args, **kwargs: 1 / 0)
    trainer.runner = StepRunner(model, compiled=True)
    trainer.runner.recording = True

    def record(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    trainer.runner._graph, trainer.runner.flat, trainer.runner.gradients = record, torch.zeros(1), []
    trainer.runner.begin = trainer.runner.release_gradients
    trainer.training_step(model, rows)
    messages = capsys.readouterr().err
    assert messages.count("This model's passes cannot be recorded (RuntimeError: operation not permitted") == 1
    assert messages.count("This model's passes cannot be compiled (ZeroDivisionError: division by zero)") == 1
    for parameter, gradient in gradients(model).items():
        assert (gradient - expected[parameter]).norm() <= 1e-5 * expected[parameter].norm(), parameter
    monkeypatch.setattr(StepRunner, "run", record)
    with pytest.raises(RuntimeError, match="capturing"):  # with nothing left to do without, it is a bug of ours
        trainer.training_step(model, rows)


def test_passes_that_are_computed_again_have_the_same_dropout(tmp_path, monkeypatch):
    settings = SETTINGS._replace(lora_dropout=0.5)
    model, rows = make_model(settings=settings), make_rows()
    trainer = make_trainer(model, rows, tmp_path, 1000, settings)
    trainer.rehearsed = True
    torch.manual_seed(1)
    trainer.training_step(model, rows)
    expected, run = gradients(model), StepRunner.run

    def run_and_fail_once(runner, *args):
        done = run(runner, *args)
        if runner.compiled:
            raise RuntimeError("this is known too late")
        return done

    monkeypatch.setattr(StepRunner, "run", run_and_fail_once)
    trainer.runner.compiled = True
    torch.manual_seed(1)
    trainer.training_step(model, rows)
    assert not trainer.runner.compiled
    for parameter, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[parameter]), parameter
    trainer.training_step(model, rows)
    assert not torch.equal(gradients(model)[parameter], expected[parameter])  # the next step's is another


def test_a_row_that_does_not_fit_by_itself_ends_in_one_line(tmp_path, monkeypatch):
    model, rows = make_model(), make_rows()
    out_of_memory_above(monkeypatch, 20)
    message = refusal(make_trainer(model, rows, tmp_path, 1000).training_step, model, rows)
    assert "out of memory with a single row of 30 tokens" in message
    assert "--max_seq_length" in message


def test_memory_that_runs_out_in_the_optimizer_ends_in_one_line(dataset, tmp_path, monkeypatch):
    def step(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    message = refusal(small_run, dataset, tmp_path)
    assert "out of memory beside the passes of step 1" in message
    assert "--gradient_checkpointing" in message


def test_a_compiler_that_is_not_there_ends_in_one_line(tmp_path, monkeypatch):
    def run(*args):
        raise torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: No working C++ compiler\n\nmore")

    monkeypatch.setattr(StepRunner, "run", run)
    model, rows = make_model(), make_rows()
    message = refusal(make_trainer(model, rows, tmp_path, 1000).training_step, model, rows)
    assert message.startswith("the layers cannot be compiled: InvalidCxxCompiler: No working C++ compiler; mend that")


def test_the_rehearsal_tells_what_the_longest_pass_takes_and_leaves_no_trace(tmp_path, capsys):
    settings = SETTINGS._replace(batch_size=2, gradient_accumulation_steps=1, lora_dropout=0.5)
    model, rows = make_model(settings=settings), make_rows()
    trainer = make_trainer(model, rows, tmp_path, 1000, settings)
    trainer.state.max_steps = 7
    torch.manual_seed(3)
    trainer.training_step(model, rows[:2])
    rehearsed = gradients(model)
    assert re.search(r"Rehearsal: the longest pass, 47 tokens, .* GiB; the 7 steps will take", capsys.readouterr().err)
    torch.manual_seed(3)
    trainer.training_step(model, rows[:2])
    assert "Rehearsal" not in capsys.readouterr().err
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, rehearsed[name])


def test_the_rehearsal_counts_the_short_last_step_of_an_epoch(tmp_path, capsys, monkeypatch):
    settings = SETTINGS._replace(batch_size=4, gradient_accumulation_steps=1)
    model, rows = make_model(), make_rows((20, 20, 20, 20, 20))
    trainer = make_trainer(model, rows, tmp_path, 1000, settings)
    trainer.state.max_steps = 8  # four epochs of a step of 80 tokens and one of 20
    clock = iter(range(0, 1000, 80))  # a pass of 80 tokens takes 80 seconds
    monkeypatch.setattr(training_utils, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer.training_step(model, rows[:4])
    assert "the 8 steps will take about 6 min 40 s" in capsys.readouterr().err


def test_the_rehearsal_counts_the_lengths_of_pass_that_will_be_recorded(tmp_path, capsys, monkeypatch):
    settings = SETTINGS._replace(batch_size=2, gradient_accumulation_steps=1)
    model, rows = make_model(), make_rows((20,) * 8)
    trainer = make_trainer(model, rows, tmp_path, 30, settings)  # each row is a pass, of a single length
    trainer.state.max_steps = 8
    trainer.runner.compiled = trainer.runner.recording = True  # in name, since nothing is compiled or recorded here
    monkeypatch.setattr(StepRunner, "_replay", lambda runner, rows, *_: StepRunner.run(plain, model, rows, *_))
    plain = StepRunner(model)
    clock = iter([0, 0, 100, 200, 210, 220])  # the first try takes 100 seconds, the second 10
    monkeypatch.setattr(training_utils, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer.training_step(model, rows[:2])
    assert "the 8 steps will take about 4 min 10 s" in capsys.readouterr().err  # 16 passes, and 90 more for recording


# ---- What a CPU cannot do --------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform == "win32", reason="there PyTorch looks for its compiler in the registry")
def test_compiling_without_a_compiler_ends_in_one_line_before_the_model_is_loaded(run, dataset, tmp_path):
    places = ["--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs"]
    none = {"CC": "/nonexistent", "CXX": "/nonexistent", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = run("train.py", "--custom_dataset_path", dataset, *places, "--torch_compile", "true", "--dry_run", **none)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: --torch_compile true needs a working C++ compiler on a CPU")
    assert "install one" in line


@pytest.mark.parametrize("value", ["auto", False])
def test_only_compiling_asks_for_a_compiler(value, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", None)
    check_compiler(SETTINGS._replace(torch_compile=value), CPU)
    assert capsys.readouterr().err == ""


def test_the_optimizer_in_8_bits_trains_on_a_cpu_with_a_line_and_no_warning(dataset, tmp_path, capsys, recwarn):
    small_run(dataset, tmp_path, optimizer="paged_adamw_8bit")
    assert capsys.readouterr().err.count("On a CPU paged_adamw_8bit keeps its state in 8 bits") == 1
    assert not [warning for warning in recwarn if "aged" in str(warning.message)]


@pytest.mark.parametrize("count", [1, 4])
def test_memory_that_runs_out_gives_up_dequantized_weights_first(count, tmp_path, monkeypatch, capsys):
    model, rows = make_model(), make_rows()[:count]
    expected = reference_gradients(model, rows)
    trainer = make_trainer(model, rows, tmp_path, 1000)
    trainer.rehearsed = True
    transformers_model(model).pass_kernels = PassKernels()
    transformers_model(model).pass_kernels.fused_lora = True
    trainer.runner = StepRunner(model, dequantized=True)

    def run_out(*_):
        raise torch.OutOfMemoryError("fake")

    monkeypatch.setattr(engine_lora.LoraGroup, "set_dequantized", lambda group, on: run_out() if on else None)
    trainer.training_step(model, rows)
    assert not trainer.runner.dequantized
    messages = capsys.readouterr().err
    assert (
        "Out of memory; from here on frozen weights are dequantized in each pass: slower, the same result" in messages
    )
    assert "at most" not in messages
    assert trainer.max_pass_tokens == 1000
    for parameter, gradient in gradients(model).items():
        assert (gradient - expected[parameter]).norm() <= 1e-5 * expected[parameter].norm(), parameter
