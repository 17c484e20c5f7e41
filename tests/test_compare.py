"""evaluate.py --compare: adapters on the same rows."""

import csv
import json
import shutil
from types import SimpleNamespace

import pytest

import evaluate
import result_utils
from conftest import refusal
from data_utils import load_conversations
from settings_utils import DEFAULTS, Settings


def some_scores(losses, tokens=10):
    return [{"row": row, "tokens": tokens, "base": 50.0, "tuned": loss} for row, loss in enumerate(losses, 1)]


def named(*names):
    return [{"run": name, "adapter": f"output/{name}", "base_model": "a/base"} for name in names]


FIRST = [20.0 + row % 3 for row in range(20)]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps([{"instruction": f"Say {row}", "response": "x" * (row + 1)} for row in range(20)]))
    return load_conversations(str(path))[0]


def test_each_adapter_is_compared_with_the_first_on_the_same_rows(conversations):
    better, same = (
        [loss - 3 - row % 2 for row, loss in enumerate(FIRST)],
        [loss + (-1) ** row for row, loss in enumerate(FIRST)],
    )
    metrics, columns, rows = result_utils.compare_scores(
        named("a", "b", "c"), [some_scores(losses) for losses in (FIRST, better, same)], conversations
    )
    a, b, c = metrics["adapters"]
    assert a["loss"] == pytest.approx(sum(FIRST) / 200)
    assert a["difference"] is None
    assert b["difference"]["mean"] == pytest.approx(-0.35)
    assert b["difference"]["low"] < -0.35 < b["difference"]["high"] < 0
    assert (b["verdict"], c["verdict"]) == ("better", "no clear difference")
    assert metrics["verdict"] == "By the loss on these answers b is better than a."
    assert metrics["unit"] == "token"
    assert columns == ("row", "tokens", "a", "b", "c")
    assert rows[0] == {"row": 1, "tokens": 10, "a": 20.0, "b": 17.0, "c": 21.0}


def test_adapters_that_cut_answers_into_other_tokens_are_compared_by_the_character(conversations):
    scores = [some_scores(FIRST), some_scores(FIRST, tokens=4)]
    metrics, columns, rows = result_utils.compare_scores(named("a", "b"), scores, conversations)
    assert metrics["unit"] == "character"
    assert "perplexity" not in metrics["adapters"][0]
    assert metrics["adapters"][0]["loss"] == pytest.approx(sum(FIRST) / sum(range(1, 21)))
    assert columns[1] == "characters"
    assert [row["characters"] for row in rows[:3]] == [
        len(messages[-1]["content"]) for _, messages in conversations[:3]
    ]


def test_only_rows_that_all_could_be_measured_on_count(conversations):
    metrics, _, rows = result_utils.compare_scores(
        named("a", "b"), [some_scores(FIRST), some_scores(FIRST)[5:]], conversations
    )
    assert metrics["rows"] == 15
    assert [row["row"] for row in rows] == list(range(6, 21))
    message = refusal(result_utils.compare_scores, named("a", "b"), [some_scores(FIRST), []], conversations)
    assert "no row in common" in message


@pytest.mark.parametrize(
    ("verdicts", "sentence"),
    [
        (("worse", "worse"), "By the loss on these answers first is better than all others."),
        (("worse",), "By the loss on these answers first is better than run 1."),
        (("no clear difference", "worse"), "By the loss on these answers none is clearly better than first."),
        (("better", "better"), "By the loss on these answers run 2 is better than first."),
        (("too few rows", "too few rows"), "Too few rows for a verdict."),
    ],
)
def test_the_verdict_of_a_comparison_says_no_more_than_its_intervals(verdicts, sentence):
    others = [
        {"run": f"run {number}", "verdict": verdict, "loss": 3 - number} for number, verdict in enumerate(verdicts, 1)
    ]
    assert result_utils.comparison_verdict([{"run": "first", "verdict": None, "loss": 3.0}, *others]) == sentence


def test_what_is_compared_is_two_or_more_different_adapters(tmp_path):
    def options(*paths, adapter_path=None, benchmarks=()):
        return SimpleNamespace(compare=list(map(str, paths)), adapter_path=adapter_path, benchmarks=benchmarks)

    assert evaluate.check_compared(options(tmp_path / "a", tmp_path / "b")) == [tmp_path / "a", tmp_path / "b"]
    assert "two or more" in refusal(evaluate.check_compared, options(tmp_path / "a"))
    assert "without --adapter_path" in refusal(evaluate.check_compared, options("a", "b", adapter_path="c"))
    assert "twice" in refusal(evaluate.check_compared, options(tmp_path / "a", tmp_path / "b/../a"))


def test_adapters_of_one_run_are_told_apart_by_numbers(tmp_path):
    settings = [Settings(**DEFAULTS)] * 2
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text('{"run": "demo"}')
    names = [found["run"] for found in evaluate.name_adapters([tmp_path / "one", tmp_path / "two"], settings)]
    assert names == ["demo (1)", "demo (2)"]


def test_two_adapters_are_measured_on_rows_that_neither_was_trained_on(undisturbed, dataset, tmp_path, capsys):
    out = undisturbed()
    checkpoint = max((out / "checkpoints").iterdir())
    shutil.copytree(out / "lora-adapter", tmp_path / "out/lora-adapter")
    flags = [
        "--validation_dataset_path",
        str(dataset),
        "--eval_samples",
        "2",
        "--max_new_tokens",
        "4",
        "--device",
        "cpu",
    ]
    compared = ["--compare", str(tmp_path / "out/lora-adapter"), str(checkpoint)]
    capsys.readouterr()
    evaluate.main([*compared, *flags, "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == len(set(lines)), "the same line is said of each adapter"
    assert "24 rows: these adapters were trained on 22 of them, which are left out" in said.err
    assert "Verdict: Too few rows for a verdict." in said.out
    folder = tmp_path / "out/evaluation/comparison-rows"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rows"] == 2
    assert metrics["trained_rows_left_out"] == 22
    assert [adapter["run"] for adapter in metrics["adapters"]] == ["run", f"run-{checkpoint.name}"]
    assert all(adapter["chrf"] >= 0 for adapter in metrics["adapters"])
    with open(folder / "rows.csv", encoding="utf-8-sig", newline="") as file:
        assert next(csv.reader(file)) == ["row", "tokens", "run_loss", f"run-{checkpoint.name}_loss"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"run-{checkpoint.name}" in page
    assert "2 adapters on the same 2 held-out rows" in page


def test_all_adapters_are_asked_alike(capsys):
    first = Settings(**DEFAULTS)._replace(max_new_tokens=48)
    second = first._replace(max_new_tokens=96, max_seq_length=256, system_prompt="Be kind.")
    settings = evaluate.ask_alike([first, second])
    assert [each.max_new_tokens for each in settings] == [96, 96]
    assert [each.max_seq_length for each in settings] == [512, 512]
    assert [each.system_prompt for each in settings] == [None, None]
    told = capsys.readouterr().err
    assert told.count("All are measured with") == 3
    assert "max_new_tokens = 96, though not all would be by themselves; --max_new_tokens sets it" in told
    assert evaluate.ask_alike([first, first]) == [first, first]
    assert capsys.readouterr().err == ""
