"""Checkpoints are whole or do not count, and a run that goes on from one ends in the same bytes."""

import json
import math
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import checkpoint_utils
import engine_runner
import evaluate
import file_utils
import inference
import train
import training_utils
from checkpoint_utils import differences, find_newest, list_checkpoints, rows_content, verify
from conftest import TINY_BASE, adapter_bytes, refusal, small_run
from file_utils import write_json
from message_utils import Stopped
from model_utils import base_content, load_trained_model
from token_utils import TokenizedRows


class Killed(BaseException):
    """Stands in for the end of the process: nothing of ours catches it but what removes a torn save."""


def kill_at_step(monkeypatch, step):
    """Let the next run of this test end abruptly at a step."""
    original = training_utils.LoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training_utils.LoraTrainer, "training_step", training_step)


def stop_at_step(monkeypatch, step, number=signal.SIGTERM):
    """Let the next run of this test get a signal in a step."""
    original = training_utils.LoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training_utils.LoraTrainer, "training_step", training_step)


def losses(output_dir):
    """What a run reports: its record's figures and every loss that it logged."""
    record = json.loads((output_dir / "lora-adapter/run.json").read_text())
    figures = {name: record[name] for name in ("steps", "best_step", "first_loss", "last_loss", "validation_loss")}
    newest = list_checkpoints(output_dir / "checkpoints")[0]
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return figures | {"logged": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]}


def interrupted(dataset, folder, monkeypatch, step=5, **changes):
    """A run of which step `step` + 1 never ended; returns its output folder."""
    with monkeypatch.context() as patch:
        kill_at_step(patch, step)
        with pytest.raises(Killed):
            small_run(dataset, folder, **changes)
    return folder / "out"


# ---- The same bytes --------------------------------------------------------------------------------------------------
def test_a_run_killed_in_every_third_step_ends_like_an_undisturbed_one(
    dataset, tmp_path, monkeypatch, capsys, undisturbed
):
    changes = {"num_epochs": 3, "logging_steps": 3, "eval_steps": 2}
    expected = undisturbed(**changes)
    for step in (5, 8, 11, 14):
        interrupted(dataset, tmp_path / "killed", monkeypatch, step, **changes)
    capsys.readouterr()
    found = small_run(dataset, tmp_path / "killed", **changes)
    assert "Going on" in capsys.readouterr().err
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert losses(found) == losses(expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=["TERM", "INT", "HUP"])
def test_a_signal_saves_after_the_step_and_the_run_ends_the_same(number, dataset, tmp_path, monkeypatch, undisturbed):
    changes = {"num_epochs": 2, "logging_steps": 4, "eval_steps": 4}
    expected = undisturbed(**changes)
    for step in (2, 6):
        with monkeypatch.context() as patch:
            stop_at_step(patch, step, number)
            with pytest.raises(Stopped) as stop:
                small_run(dataset, tmp_path / "stopped", **changes)
        assert stop.value.exit_code == 128 + number
        assert f"step {step + 1} of 12" in str(stop.value)
        assert "same command" in str(stop.value)
        assert verify(tmp_path / f"stopped/out/checkpoints/checkpoint-{step + 1}")["finished"] is False
    found = small_run(dataset, tmp_path / "stopped", **changes)
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert losses(found) == losses(expected)


def test_early_stopping_counts_on_and_the_best_checkpoint_is_kept_across_kills(
    dataset, tmp_path, monkeypatch, undisturbed, contradicted
):
    changes = contradicted | {"early_stopping_patience": 2}
    expected = undisturbed(**changes)
    steps = losses(expected)["steps"]
    assert losses(expected)["best_step"] < steps < 18  # early stopping has work to do
    for step in range(3, steps, 2):
        interrupted(dataset, tmp_path / "killed", monkeypatch, step, **changes)
    found = small_run(dataset, tmp_path / "killed", **changes)
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert losses(found) == losses(expected)


def stop_in_evaluation(monkeypatch, number):
    """Let the next run get a signal in the second pass of its evaluation `number`; returns the passes that it began."""
    monkeypatch.setattr(training_utils, "SHORT_RUN", math.inf)  # a slow machine would rehearse an evaluation too
    original, evaluations, passes = engine_runner.score_rows, [], []

    def score_rows(model, rows, max_tokens, kernels, before_pass, *others):
        evaluations.append(len(evaluations) + 1)

        def begin():
            passes.append(evaluations[-1])
            if passes.count(number) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            before_pass()

        return original(model, rows, max_tokens, kernels, begin, *others)

    monkeypatch.setattr(engine_runner, "score_rows", score_rows)
    return passes


@pytest.mark.parametrize("end", ["the best is an early step", "the best is the last step", "early stopping"])
def test_a_signal_in_each_evaluation_stops_it_and_the_run_ends_the_same(
    end, dataset, tmp_path, monkeypatch, undisturbed, contradicted
):
    changes = {"validation_split": 1 / 3} if "last" in end else contradicted  # the last of four steps ends the epoch
    changes = changes | {"batch_size": 1, "max_seq_length": 48, "gradient_accumulation_steps": 4}
    changes |= {"early_stopping_patience": 2} if end == "early stopping" else {"max_steps": 4 if "last" in end else 6}
    changes |= {"base_model_name": TINY_BASE} if "an early" in end else {}  # small_base() gets better to the last step
    expected = undisturbed(**changes)
    evaluations = losses(expected)["steps"] // 2
    # the first evaluation, the same again when it is made up for, then what follows upon each that was made up for
    for number, step in [(1, 2), (1, 2), *((2, 2 * n) for n in range(2, evaluations + 1))]:
        with monkeypatch.context() as patch:
            passes = stop_in_evaluation(patch, number)
            with pytest.raises(Stopped) as stop:
                small_run(dataset, tmp_path / "stopped", **changes)
        assert f"in the evaluation of step {step} " in str(stop.value)
        assert passes.count(number) == 2  # of four or more
    found = small_run(dataset, tmp_path / "stopped", **changes)
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert losses(found) == losses(expected)
    assert (losses(expected)["best_step"] == losses(expected)["steps"]) == ("last" in end)


@pytest.mark.parametrize("early", [False, True], ids=["at the last step", "by early stopping"])
def test_a_run_killed_between_its_last_checkpoint_and_the_adapter_trains_no_more(
    early, dataset, tmp_path, monkeypatch, undisturbed, contradicted
):
    changes = (contradicted | {"early_stopping_patience": 1}) if early else {"max_steps": 4}
    expected = undisturbed(**changes)
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            small_run(dataset, tmp_path / "killed", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(training_utils.LoraTrainer, "training_step", lambda *args: pytest.fail("a step was trained"))
        found = small_run(dataset, tmp_path / "killed", **changes)
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert losses(found) == losses(expected)


def test_a_run_goes_on_where_its_folder_was_moved(dataset, tmp_path, monkeypatch, undisturbed, contradicted):
    expected = undisturbed(**contradicted)
    interrupted(dataset, tmp_path / "old", monkeypatch, 15, **contradicted)
    shutil.move(tmp_path / "old", tmp_path / "new")
    found = small_run(dataset, tmp_path / "new", **contradicted)
    assert losses(found)["best_step"] < 14  # the best was found before the move
    assert adapter_bytes(found) == adapter_bytes(expected)


# ---- Whole or not at all ---------------------------------------------------------------------------------------------
def remove(name):
    return lambda folder: (folder / name).unlink()


def flip_a_bit(folder):
    flip_bit_of(folder / "optimizer.pt")


def flip_bit_of(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forget_the_optimizer(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["optimizer.pt"]
    write_json(folder / "manifest.json", manifest)
    (folder / "optimizer.pt").unlink()


def change_manifest(**changes):
    return lambda folder: write_json(
        folder / "manifest.json", json.loads((folder / "manifest.json").read_text()) | changes
    )


def leave_out(name):
    def spoil(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest[name]
        write_json(folder / "manifest.json", manifest)

    return spoil


# what happens to a checkpoint -> words of the reason
DAMAGES = {
    "no manifest": (remove("manifest.json"), "no manifest.json"),
    "no optimizer": (remove("optimizer.pt"), "optimizer.pt is missing"),
    "no random state": (remove("rng_state.pth"), "rng_state.pth is missing"),
    "no scheduler": (remove("scheduler.pt"), "scheduler.pt is missing"),
    "no weights": (remove("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
    "cut short": (lambda folder: os.truncate(folder / "optimizer.pt", 100), "optimizer.pt has 100 bytes, expected"),
    "one bit": (flip_a_bit, "optimizer.pt is damaged"),
    "a torn manifest": (lambda folder: os.truncate(folder / "manifest.json", 40), "cannot be read"),
    "an empty manifest": (lambda folder: (folder / "manifest.json").write_text("{}"), "is damaged"),
    "a manifest without the optimizer": (forget_the_optimizer, "lacks optimizer.pt"),
    "a stray model": (
        lambda folder: shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors"),
        "it holds model.safetensors, which its manifest.json does not list",
    ),
    "a stray pickle": (lambda folder: (folder / "pytorch_model.bin").touch(), "it holds pytorch_model.bin"),
    "an empty folder": (lambda folder: (folder / "global_step4").mkdir(), "it holds global_step4"),
    "a folder as a file": (
        lambda folder: (remove("optimizer.pt")(folder), (folder / "optimizer.pt").mkdir()),
        "no file",
    ),
    "a run that leads elsewhere": (change_manifest(run_name="../../elsewhere"), "is damaged (run_name)"),
    "a run without a name": (change_manifest(run_name=""), "is damaged (run_name)"),
    "a step that is a text": (change_manifest(step="4"), "is damaged (step)"),
    "a best step that is a path": (change_manifest(best_step="../2"), "is damaged (best_step)"),
    "files in a list": (change_manifest(files=[]), "is damaged"),
    "a list of identities": (change_manifest(identity=[]), "is damaged"),
    "endlessly many processes": (
        change_manifest(identity={"processes": 10**12, "number_format": "float32"}),
        "is damaged (processes)",
    ),
} | {
    f"no {name}": (leave_out(name), "is damaged")
    for name in ("step", "best_step", "finished", "run_name", "identity", "files")
}
DAMAGES |= {
    "a manifest deeper than Python reads": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        "its manifest",
    ),
}


@pytest.fixture(scope="module")
def halfway(dataset, tmp_path_factory):
    """The output folder of a run that was killed in its sixth step: checkpoints 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        return interrupted(dataset, tmp_path_factory.mktemp("halfway"), patch)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_checkpoint_is_skipped_with_its_reason_if_it_has(damage, halfway, tmp_path):
    folder = shutil.copytree(halfway / "checkpoints", tmp_path / "checkpoints")
    assert find_newest(folder)[0][0].name == "checkpoint-4"
    spoil, words = DAMAGES[damage]
    spoil(folder / "checkpoint-4")
    (newest, manifest), skipped = find_newest(folder)
    assert (newest.name, manifest["step"]) == ("checkpoint-2", 2)
    assert [path.name for path, _ in skipped] == ["checkpoint-4"]
    assert words in skipped[0][1]


def test_a_checkpoint_under_another_ones_name_does_not_count(halfway, tmp_path):
    shutil.copytree(halfway / "checkpoints/checkpoint-4", tmp_path / "checkpoint-9")
    assert find_newest(tmp_path)[0] is None


def test_a_run_goes_on_from_the_newest_whole_one_and_says_what_it_skipped(
    halfway, tmp_path, capsys, dataset, undisturbed
):
    expected = undisturbed()
    shutil.copytree(halfway, tmp_path / "again/out")
    flip_a_bit(tmp_path / "again/out/checkpoints/checkpoint-4")
    capsys.readouterr()
    found = small_run(dataset, tmp_path / "again")
    said = capsys.readouterr().err
    assert "Skipped" in said
    assert "checkpoint-4: optimizer.pt is damaged" in said
    assert "checkpoint-2; --fresh" in said
    assert adapter_bytes(found) == adapter_bytes(expected)
    (aside,) = (found / "previous").glob("*/checkpoint-4")
    assert (aside / "optimizer.pt").exists()


def test_without_a_whole_checkpoint_the_run_is_set_aside_and_begins_again(
    halfway, tmp_path, capsys, dataset, undisturbed
):
    expected = undisturbed()
    shutil.copytree(halfway, tmp_path / "again/out")
    for path in list_checkpoints(tmp_path / "again/out/checkpoints"):
        (path / "manifest.json").unlink()
    capsys.readouterr()
    found = small_run(dataset, tmp_path / "again")
    said = capsys.readouterr().err
    assert said.count("Skipped") == 2
    assert "no whole checkpoint; starting afresh" in said
    assert adapter_bytes(found) == adapter_bytes(expected)
    assert len(list((found / "previous").glob("*/checkpoints/checkpoint-*"))) == 2


def test_a_lost_best_checkpoint_is_named_and_the_run_still_goes_on(
    dataset, tmp_path, monkeypatch, capsys, contradicted
):
    out = interrupted(dataset, tmp_path, monkeypatch, 15, **contradicted)
    best = json.loads((out / "checkpoints/checkpoint-14/manifest.json").read_text())["best_step"]
    assert best < 14
    flip_a_bit(out / f"checkpoints/checkpoint-{best}")
    capsys.readouterr()
    small_run(dataset, tmp_path, **contradicted)
    assert f"checkpoint-{best}, is lost (optimizer.pt is damaged" in capsys.readouterr().err
    assert losses(out)["best_step"] >= 14


def spoil_at_step(monkeypatch, step, spoil):
    """Do something to the checkpoints' folder before a step of the next run of this test."""
    original = training_utils.LoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            spoil(self.checkpoints.folder)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training_utils.LoraTrainer, "training_step", training_step)


SPOILT = {
    "one bit": lambda folder: flip_bit_of(folder / "adapter_model.safetensors"),
    "gone": shutil.rmtree,
    "a stray model": lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 99),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_best_checkpoint_that_is_spoilt_before_the_end_gives_way_to_the_next_best(
    how, dataset, tmp_path, monkeypatch, capsys, contradicted, undisturbed
):
    expected = undisturbed(**contradicted, save_total_limit=9)
    history = json.loads((expected / "checkpoints/checkpoint-18/trainer_state.json").read_text())["log_history"]
    losses_by_step = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best, second = sorted(losses_by_step, key=losses_by_step.get)[:2]
    assert best < 18
    spoil_at_step(monkeypatch, 17, lambda folder: SPOILT[how](folder / f"checkpoint-{best}"))
    capsys.readouterr()
    found = small_run(dataset, tmp_path, **contradicted, save_total_limit=9)
    said = capsys.readouterr().err
    assert f"The best checkpoint, checkpoint-{best}, is lost" in said
    assert f"The best whole one is that of step {second}, validation loss {losses_by_step[second]:.4f}" in said
    assert (
        adapter_bytes(found) == (expected / f"checkpoints/checkpoint-{second}/adapter_model.safetensors").read_bytes()
    )
    assert losses(found)["best_step"] == second
    assert losses(found)["validation_loss"] == losses_by_step[second]


def test_where_every_checkpoint_is_spoilt_the_last_steps_weights_become_the_adapter(
    dataset, tmp_path, monkeypatch, contradicted, undisturbed
):
    expected = undisturbed(**contradicted, save_total_limit=9)
    monkeypatch.setattr(
        training_utils.LoraTrainer,
        "_finalize_training",
        with_before(training_utils.LoraTrainer._finalize_training, lambda self: shutil.rmtree(self.checkpoints.folder)),
    )
    found = small_run(dataset, tmp_path, **contradicted)
    assert adapter_bytes(found) == (expected / "checkpoints/checkpoint-18/adapter_model.safetensors").read_bytes()
    record = json.loads((found / "lora-adapter/run.json").read_text())
    assert record["best_step"] == 18


def with_before(original, action):
    def called(self, *args, **kwargs):
        action(self)
        return original(self, *args, **kwargs)

    return called


def test_checkpoints_hold_no_absolute_path(halfway):
    for path in (halfway / "checkpoints").rglob("*.json"):
        if path.name != "settings.json":
            assert str(halfway) not in path.read_text(), path


def test_an_old_checkpoint_is_deleted_only_after_the_new_one_verifies(dataset, tmp_path, monkeypatch):
    seen = []
    original = checkpoint_utils.verify

    def watched(folder):
        seen.append(sorted(path.name for path in list_checkpoints(folder.parent)))
        return original(folder)

    monkeypatch.setattr(checkpoint_utils, "verify", watched)
    small_run(dataset, tmp_path, save_total_limit=1)
    assert seen[1] == ["checkpoint-2", "checkpoint-4"]


# ---- Tokenizers with several templates -------------------------------------------------------------------------------
def test_a_tokenizer_with_several_templates_trains_goes_on_and_is_evaluated(
    dataset, tmp_path, monkeypatch, tokenizer, capsys
):
    base = tmp_path / "base"
    shutil.copytree(TINY_BASE, base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(base)
    assert (base / "additional_chat_templates").is_dir()
    expected = small_run(dataset, tmp_path / "whole", base_model_name=str(base))
    interrupted(dataset, tmp_path / "killed", monkeypatch, base_model_name=str(base))
    capsys.readouterr()
    found = small_run(dataset, tmp_path / "killed", base_model_name=str(base))
    assert "Going on" in capsys.readouterr().err
    assert adapter_bytes(found) == adapter_bytes(expected)
    template = found / "lora-adapter/additional_chat_templates/tool_use.jinja"
    assert template.read_text() == "{{ messages }}"
    evaluate.main(["--adapter_path", str(found / "lora-adapter"), "--device", "cpu", "--eval_samples", "1"])
    assert (found / "evaluation/run-validation/metrics.json").is_file()
    inference.main(["Hi", "--adapter_path", str(found / "lora-adapter"), "--device", "cpu", "--max_new_tokens", "2"])
    template.write_text("{{ 1 }}")
    assert "tool_use.jinja" in refusal(load_trained_model, found / "lora-adapter")


# ---- Another run -----------------------------------------------------------------------------------------------------
CHANGES = {
    "learning rate": ({"learning_rate": 5e-4}, "learning_rate 0.001 -> 0.0005"),
    "alpha": ({"lora_alpha": 8}, "lora_alpha 32 -> 8"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps 2 -> 1"),
    "seed": ({"seed": 7}, "seed 42 -> 7"),
    "length": ({"max_seq_length": 64}, "max_seq_length 512 -> 64"),
    "quantization": ({"use_4bit_quantization": True}, "use_4bit_quantization False -> True"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_run_refuses_to_go_on_with_another(change, halfway, tmp_path, dataset):
    shutil.copytree(halfway, tmp_path / "out")
    changes, words = CHANGES[change]
    message = refusal(lambda: small_run(dataset, tmp_path, **changes))
    assert words in message
    assert "--fresh" in message
    assert find_newest(tmp_path / "out/checkpoints")[0][0].name == "checkpoint-4"  # nothing was touched


def test_other_data_is_refused_with_both_contents(halfway, tmp_path, dataset):
    shutil.copytree(halfway, tmp_path / "out")
    rows = json.loads(dataset.read_text())
    rows[0]["response"] = "another answer"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    message = refusal(lambda: small_run(tmp_path / "rows.json", tmp_path))
    assert "_data 2" in message
    assert " rows " in message


def test_what_shapes_no_weight_may_change(halfway, tmp_path, dataset, undisturbed):
    expected = undisturbed()
    shutil.copytree(halfway, tmp_path / "again/out")
    free = {"logging_steps": 2, "sample_prompts": 0, "save_total_limit": 3, "max_new_tokens": 2}
    free["gradient_checkpointing"] = True
    assert adapter_bytes(small_run(dataset, tmp_path / "again", **free)) == adapter_bytes(expected)


def test_other_library_versions_are_a_warning(halfway, tmp_path, capsys, monkeypatch, dataset):
    shutil.copytree(halfway, tmp_path / "out")
    for path in list_checkpoints(tmp_path / "out/checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["identity"]["versions"]["peft"] = "0.1"
        write_json(path / "manifest.json", manifest)
    small_run(dataset, tmp_path)
    assert "peft 0.1 -> " in capsys.readouterr().err


def test_a_fresh_start_sets_the_interrupted_run_aside(halfway, tmp_path, dataset):
    shutil.copytree(halfway, tmp_path / "out")
    small_run(dataset, tmp_path, fresh=True, seed=7)
    (aside,) = (tmp_path / "out/previous").iterdir()
    assert find_newest(aside / "checkpoints")[0][0].name == "checkpoint-4"


def test_a_resumed_run_keeps_its_name_in_tensorboard(halfway, tmp_path, dataset):
    shutil.copytree(halfway, tmp_path / "out")
    small_run(dataset, tmp_path, run_name=None)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["run"]


def test_a_moved_base_is_the_same_and_another_is_not():
    old = {"base_model": "models/a @ 12ab", "seed": 1}
    assert differences(old, {"base_model": "/elsewhere/a @ 12ab", "seed": 1}) == []
    assert differences(old, {"base_model": "models/a @ 34cd", "seed": 1}) == [
        "base_model models/a @ 12ab -> models/a @ 34cd"
    ]


def test_the_content_of_a_base_changes_with_any_tensor_and_not_with_its_files_or_place(tmp_path):

    expected = base_content(TINY_BASE, None)
    copy = Path(shutil.copytree(TINY_BASE, tmp_path / "copy"))
    assert base_content(str(copy), None) == expected
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert base_content(str(copy), None) != expected


def stored_rows(folder, rows, gaps=()):
    """TokenizedRows of [(ids, which are trained)]; behind each place in gaps the file holds tokens of no row."""
    folder.mkdir()
    index = {name: np.zeros(len(rows), kind) for name, kind in TokenizedRows.INDEX.items()}
    ids, trained = [], []
    for number, (row_ids, row_trained) in enumerate(rows):
        index["start"][number], index["length"][number] = len(ids), len(row_ids)
        index["row"][number] = number + len(gaps)
        ids += row_ids + [9] * (number in gaps)
        trained += row_trained + [True] * (number in gaps)
    np.array(ids, np.int32).tofile(folder / "ids.bin")
    np.array(trained, bool).tofile(folder / "trained.bin")
    np.savez(folder / "index.npz", **index)
    return TokenizedRows(folder)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_the_content_of_rows_depends_on_ids_labels_and_order_alone(block, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_utils, "BLOCK", block)
    a, b, c = ([1, 2], [False, True]), ([3], [True]), ([4, 5, 6], [False, False, True])
    others = {
        "order": [b, a, c],
        "a row less": [a, b],
        "ids": [a, b, ([4, 5, 7], c[1])],
        "labels": [a, b, (c[0], [False, True, True])],
        "borders": [([1], [False]), ([2, 3], [True, True]), c],
        "none": [],
    }
    expected = rows_content(stored_rows(tmp_path / "rows", [a, b, c]))
    assert rows_content(stored_rows(tmp_path / "again", [a, b, c], gaps=(0, 1))) == expected
    contents = [rows_content(stored_rows(tmp_path / name, rows)) for name, rows in others.items()]
    assert len({expected, *contents}) == len(others) + 1


Usage = namedtuple("Usage", "total used free")


# ---- Disk ------------------------------------------------------------------------------------------------------------
def test_too_little_disk_for_the_run_is_said_before_training(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(file_utils.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**6))
    message = refusal(lambda: small_run(dataset, tmp_path))
    assert "1 MiB free" in message
    assert "the run needs" in message
    assert "--output_dir" in message
    assert not (tmp_path / "out/checkpoints").exists()


def test_too_little_disk_for_the_next_checkpoint_keeps_the_last_one(dataset, tmp_path, monkeypatch, undisturbed):
    free = {"bytes": 10**12}
    original = training_utils.LoraTrainer.training_step

    def fill(self, *args, **kwargs):
        if self.state.global_step == 2:
            free["bytes"] = 1000
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(file_utils.shutil, "disk_usage", lambda path: Usage(10**12, 0, free["bytes"]))
        patch.setattr(training_utils.LoraTrainer, "training_step", fill)
        message = refusal(lambda: small_run(dataset, tmp_path / "full"))
    assert "checkpoint-4 needs" in message
    assert "last good checkpoint" in message
    assert "checkpoint-2" in message
    assert adapter_bytes(small_run(dataset, tmp_path / "full")) == adapter_bytes(undisturbed())
