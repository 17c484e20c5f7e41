"""What a run announces of its time, how many rows it evaluates, and the log that it keeps."""

import json
import re
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training_utils
from conftest import adapter_bytes, small_run
from message_utils import VOICE, note, say
from plan_utils import RunTimes, count_rounds, describe_rounds
from run_utils import RunLog


# ---- The whole time --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("steps", "eval_steps", "done", "rounds"),
    [(92, 23, 0, 4), (92, 23, 23, 3), (90, 23, 0, 4), (90, 23, 69, 1), (90, 23, 90, 0), (5, 50, 0, 1), (92, 23, 92, 0)],
)
def test_evaluations_come_every_eval_steps_and_at_the_last_step(steps, eval_steps, done, rounds):
    assert count_rounds(steps, eval_steps, done) == rounds


def test_the_time_of_a_run_is_that_of_steps_evaluations_answers_saves_and_the_end():
    times = RunTimes(steps=100, eval_steps=25, began=time.time() - 3)
    for part, seconds in {"step": 2, "evaluation": 10, "answers": 5, "save": 1, "end": 40}.items():
        times.expect(part, seconds)
    assert times.left(0) == 100 * 2 + 4 * 16 + 40
    assert times.left(50) == 50 * 2 + 2 * 16 + 40
    assert times.describe(0, 500, 3, 2000) == (
        "Time: 3 s so far, 100 x 2.00 s a step, 4 x 10.0 s an evaluation of 500 rows, 4 x 5.00 s for 3 answers,"
        " 4 x 1.00 s a save, 1 x 40.0 s for all 2,000 rows at the end; about 5 min 7 s in all"
    )


def test_what_is_measured_on_the_way_corrects_what_was_rehearsed():
    times = RunTimes(steps=100)
    times.expect("step", 2)
    times.measured("step", 98 * 4, 98)
    assert 3.9 < times.each("step") < 4


@pytest.fixture(scope="module")
def bounded(dataset, tmp_path_factory):
    """A run that measures one of its two validation rows at each evaluation, and rehearses every part of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_utils, "SHORT_RUN", 0)
        return small_run(dataset, tmp_path_factory.mktemp("bounded"), eval_rows=1)


def test_what_is_rehearsed_leaves_no_trace_in_the_adapter(bounded, undisturbed):
    record = json.loads((bounded / "lora-adapter/run.json").read_text())
    checkpoint = undisturbed() / f"checkpoints/checkpoint-{record['best_step']}/adapter_model.safetensors"
    assert adapter_bytes(bounded) == checkpoint.read_bytes()
    assert not list((bounded / "checkpoints").glob("incomplete*"))


def test_every_part_of_the_time_is_announced(bounded):
    (line,) = re.findall(r"Time: .*", (bounded / "train.log").read_text())
    number = "[^,;]+"
    assert re.fullmatch(
        rf"Time: {number} so far, 6 x {number} a step, 3 x {number} an evaluation of 1 row, 3 x {number} for 1 answer,"
        rf" 3 x {number} a save, 1 x {number} for all 2 rows at the end; about {number} in all",
        line,
    )
    assert sum_of_parts(line) == pytest.approx(in_seconds(line.split("about ")[1]), abs=1)


def in_seconds(text):
    """Of '1 min 5 s', '0.26 s' or '14.3 ms'."""
    units = {"h": 3600, "min": 60, "s": 1, "ms": 0.001}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (h|min|ms|s)\b", text))


def sum_of_parts(line):
    """Seconds that the parts of a Time line add up to."""
    parts = line.removeprefix("Time: ").split(";")[0].split(", ")
    factors = [int(part.split(" x ")[0].replace(",", "")) if " x " in part else 1 for part in parts]
    return sum(factor * in_seconds(part.split(" x ")[-1]) for factor, part in zip(factors, parts, strict=True))


def test_the_parts_of_the_time_add_up_however_short_a_step_is():
    times = RunTimes(steps=40_000, eval_steps=10_000, began=time.time() - 65)
    for part, seconds in {"step": 0.0145, "evaluation": 0.05, "save": 75.4}.items():
        times.expect(part, seconds)
    line = times.describe(0, 20, 0, 0)
    assert line.startswith("Time: 1 min 5 s so far, 40,000 x 14.5 ms a step, 4 x 50.0 ms an evaluation of 20 rows")
    assert sum_of_parts(line) == pytest.approx(in_seconds(line.split("about ")[1]), rel=0.01)


@pytest.mark.parametrize(
    ("steps", "eval_steps", "said"),
    [
        (22, 23, "1 evaluation, after the last step"),
        (23, 23, "1 evaluation, after the last step"),
        (92, 23, "4 evaluations, one every 23 steps"),
        (90, 23, "4 evaluations, one every 23 steps and one after the last"),
        (3, 1, "3 evaluations, one after each step"),
        (1, 1, "1 evaluation, after the last step"),
    ],
)
def test_the_plan_says_how_often_a_run_is_evaluated(steps, eval_steps, said):
    assert describe_rounds(steps, eval_steps) == said


def evaluated(state):
    """{step: validation loss} of a trainer_state.json."""
    return {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}


def test_the_kept_checkpoint_is_measured_on_all_validation_rows(bounded, undisturbed):
    record = json.loads((bounded / "lora-adapter/run.json").read_text())
    assert (record["evaluated_rows"], record["validation_rows"]) == (1, 2)
    states = [json.loads(path.read_text()) for path in undisturbed().glob("checkpoints/*/trainer_state.json")]
    on_all = {step: loss for state in states for step, loss in evaluated(state).items()}
    assert record["validation_loss"] == pytest.approx(on_all[record["best_step"]], rel=1e-5)
    state = json.loads(next(bounded.glob("checkpoints/*/trainer_state.json")).read_text())
    assert evaluated(state)[2] != pytest.approx(on_all[2], rel=1e-3)  # the check can tell
    (final,) = EventAccumulator(str(bounded.parent / "logs" / "run")).Reload().Scalars("final/validation_loss")
    assert final.value == pytest.approx(record["validation_loss"], rel=1e-5)


def test_which_rows_are_evaluated_belongs_to_a_run_only_where_they_are_not_all(bounded, undisturbed):
    manifests = [next(out.glob("checkpoints/*/manifest.json")) for out in (bounded, undisturbed())]
    identities = [json.loads(path.read_text())["identity"] for path in manifests]
    assert identities[0].pop("evaluated_rows").startswith("1 rows ")
    assert identities[0] == identities[1]


# ---- The log ---------------------------------------------------------------------------------------------------------
def test_a_run_keeps_all_its_lines_beside_its_adapter(bounded):
    log = (bounded / "train.log").read_text()
    assert re.match(r"---- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  python ", log)
    for line in ("Data: ", "Plan: 22 rows", "Rehearsal: ", "step 1/6  loss ", "step 6/6  validation loss ", "Done in "):
        assert re.search(rf"^(\d\d:\d\d:\d\d  )?{re.escape(line)}", log, flags=re.M), line


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(VOICE, "note", None)
    return RunLog()


def test_lines_wait_for_the_log_and_one_that_exists_is_appended_to(log, tmp_path):
    path = tmp_path / "train.log"
    path.write_text("an earlier start\n")
    say("\x1b[1;32mbefore\x1b[0m", styled=True)
    log.open(path)
    note("after")
    lines = path.read_text().splitlines()
    assert lines[0] == "an earlier start"
    assert [line[10:] for line in lines[2:]] == ["before", "after"]


def test_a_log_that_cannot_be_written_costs_the_log_alone(log, tmp_path, capsys):
    (tmp_path / "train.log").mkdir()
    log.open(tmp_path / "train.log")
    say("a line")
    said = capsys.readouterr().err
    assert "The run's log ends here" in said
    assert said.endswith("a line\n")


def test_a_link_in_the_place_of_the_log_is_not_followed(log, tmp_path):
    (tmp_path / "other.txt").write_text("the user's own")
    (tmp_path / "train.log").symlink_to(tmp_path / "other.txt")
    log.open(tmp_path / "train.log")
    note("a line")
    assert (tmp_path / "other.txt").read_text() == "the user's own"
