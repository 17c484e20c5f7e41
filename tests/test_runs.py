"""Whole small runs, in this process: the same seed gives the same bytes, the best checkpoint is kept."""

import json
import math
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import board_utils
import page_utils
import result_utils
import run_utils
import train
from conftest import TINY_BASE, adapter_bytes, refusal, small_run
from settings_utils import DEFAULTS, Settings


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


def test_what_to_type_next_can_be_pasted(dataset, tmp_path, capsys):
    out = small_run(dataset, tmp_path / "my out", max_steps=1)
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith("Next: python inference.py")]
    assert shlex.split(line)[3:5] == ["--output_dir", str(out)]
    (line,) = [line for line in said.err.splitlines() if "tensorboard --logdir" in line]
    assert shlex.split(line.partition("with: ")[2])[-1] == str(tmp_path / "my out/logs")


def test_tensorboard_holds_the_curves_the_samples_and_the_settings(undisturbed):
    board = EventAccumulator(str(undisturbed().parent / "logs" / "run")).Reload()
    scalars = set(board.Tags()["scalars"])
    assert scalars == {*board_utils.RunBoard.NAMES.values(), *board_utils.RunBoard.FINAL}
    for name in scalars:
        assert all(math.isfinite(event.value) for event in board.Scalars(name)), name
    texts = {tag.removesuffix("/text_summary") for tag in board.Tags()["tensors"]}
    assert {"settings", "samples"} <= texts
    settings_text = board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| lora_dropout | 0.1 |" in settings_text


def test_the_hparams_tab_holds_settings_and_final_figures_and_no_second_run(undisturbed):
    out = undisturbed()
    logs = out.parent / "logs"
    assert [path.name for path in logs.rglob("*") if path.is_dir()] == ["run"]
    board = EventAccumulator(str(logs / "run")).Reload()
    content = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["lora_dropout"].number_value == pytest.approx(0.1)
    assert hparams["use_dora"].string_value == "False"
    record = json.loads((out / "lora-adapter/run.json").read_text())
    (best,) = board.Scalars("final/validation_loss")
    assert best.value == pytest.approx(record["validation_loss"], rel=1e-5)


def test_a_name_that_earlier_logs_have_gets_a_number(tmp_path, capsys):
    settings = Settings(**DEFAULTS)._replace(logs_dir=str(tmp_path), run_name="mine")
    assert train.choose_run_name(settings, None) == "mine"
    (tmp_path / "mine").mkdir()
    assert train.choose_run_name(settings, None) == "mine"  # no logs in it
    for name in ("mine", "mine-2"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "events").touch()
    assert train.choose_run_name(settings, None) == "mine-3"
    assert "this run is named mine-3" in capsys.readouterr().err
    assert train.choose_run_name(settings, SimpleNamespace(run_name="mine-2")) == "mine-2"


def test_the_losses_of_all_steps_lie_beside_the_adapter(undisturbed):
    adapter = undisturbed() / "lora-adapter"
    state = json.loads((adapter / "trainer_state.json").read_text())
    record = json.loads((adapter / "run.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert losses[record["best_step"]] == pytest.approx(record["validation_loss"], rel=1e-5)
    assert state["best_model_checkpoint"] is None  # a path of this machine
    assert record["run"] == "run"
    shown = page_utils.read_run(adapter)
    assert f"lowest at step {record['best_step']}" in page_utils.describe_curves(shown["history"], 1)["says"]
    assert page_utils.describe_data(shown["data_report"])["sets"]["training"]["rows"] == 22


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
        use_4bit_quantization=False,
        custom_dataset_path=str(dataset),
        output_dir=str(tmp_path / "out"),
        logs_dir=str(tmp_path / "logs"),
    )
    train.train(settings, dry_run=True)
    captured = capsys.readouterr()
    assert "Plan: 22 rows" in captured.err
    assert re.search(r"^Time: .* so far, 6 x .* a step.*; about .* in all$", captured.err, flags=re.M)
    assert captured.out == ""
    assert re.search(r"### Response:\n\[(red|green|blue|grey)( \1)*</s>\]\n", captured.err)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cache", "data_report.json"]


def test_memory_that_runs_out_in_the_optimizer_ends_in_one_line(dataset, tmp_path, monkeypatch):
    def step(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    message = refusal(small_run, dataset, tmp_path)
    assert "out of memory beside the passes of step 1" in message
    assert "--gradient_checkpointing" in message


@pytest.mark.skipif(sys.platform == "win32", reason="there PyTorch looks for its compiler in the registry")
def test_compiling_without_a_compiler_ends_in_one_line_before_the_model_is_loaded(run, dataset, tmp_path):
    places = ["--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs"]
    none = {"CC": "/nonexistent", "CXX": "/nonexistent", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    flags = ("--custom_dataset_path", dataset, "--torch_compile", "true", "--dry_run")
    result = run("train.py", *flags, *places, cold=True, **none)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: --torch_compile true needs a working C++ compiler on a CPU")
    assert "install one" in line


def test_the_optimizer_in_8_bits_trains_on_a_cpu_with_a_line_and_no_warning(dataset, tmp_path, capsys, recwarn):
    small_run(dataset, tmp_path, optimizer="paged_adamw_8bit")
    assert capsys.readouterr().err.count("On a CPU paged_adamw_8bit keeps its state in 8 bits") == 1
    assert not [warning for warning in recwarn if "aged" in str(warning.message)]


@pytest.mark.parametrize("name", ["\x1b[2Jrun", "run\u202e", "two\nlines", "a/b", "..", ""])
def test_a_record_with_a_name_that_is_no_folders_is_not_taken_at_its_word(name, tmp_path):
    folder = tmp_path / "ad\x1b[31mapter"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run": name}))
    assert run_utils.read_run_name(folder) == "ad[31mapter"


def test_an_evaluation_prints_no_name_that_steers_a_terminal(tmp_path, capsys):
    adapters = [{"run": f"\x1b[2J{n}", "loss": 1.0, "difference": None} for n in range(2)]
    metrics = {"rows": 2, "held_out": True, "unit": "token", "verdict": "\u202e is better.", "adapters": adapters}
    result_utils.print_comparison(tmp_path, metrics)
    assert not {"\x1b", "\u202e"} & set(capsys.readouterr().out)
