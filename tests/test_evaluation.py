"""The figures of evaluate.py and what it writes."""

import csv
import json
import math

import pytest

import engine_passes
import evaluate
from conftest import TINY_BASE
from engine_runner import StepRunner
from model_utils import attach_lora, load_base_model
from plan_utils import StepPlan
from settings_utils import DEFAULTS, Settings
from tiny import CPU, make_rows


@pytest.mark.parametrize(
    ("perplexity", "name"),
    [
        (1.0, "excellent"),
        (9.99, "excellent"),
        (10.0, "good"),
        (19.9, "good"),
        (20.0, "acceptable"),
        (29.9, "acceptable"),
        (30.0, "needs improvement"),
        (math.inf, "needs improvement"),
    ],
)
def test_perplexities_fall_into_the_customary_bands(perplexity, name):
    assert evaluate.band(perplexity) == name


def test_the_perplexity_is_that_of_all_answer_tokens_together():
    metrics = evaluate.compare([(30.0, 10), (2.0, 2)], [(10.0, 10), (2.0, 2)])
    assert metrics["base_loss"] == pytest.approx(32 / 12)
    assert metrics["tuned_perplexity"] == pytest.approx(math.exp(12 / 12))
    assert metrics["answer_tokens"] == 12


def test_the_verdict_needs_more_than_chance():
    base = [(20.0 + index % 3, 10) for index in range(30)]
    better = [(nll - 3, n) for nll, n in base]
    mixed = [(nll + (2 if index % 2 else -2), n) for index, (nll, n) in enumerate(base)]
    assert evaluate.compare(base, better)["verdict"] == "better"
    assert evaluate.compare(better, base)["verdict"] == "worse"
    assert evaluate.compare(base, mixed)["verdict"] == "no different"
    assert evaluate.compare(base, base)["verdict"] == "no different"


def test_the_base_is_measured_without_the_adapter_in_the_same_load():
    base = load_base_model(TINY_BASE, CPU, "float32")
    rows = make_rows((20, 30))
    expected = engine_passes.mean_loss(engine_passes.score_rows(base, rows, 100))
    model = attach_lora(base, Settings(**DEFAULTS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    metrics = evaluate.measure(model.eval(), StepRunner(model, StepPlan(max_pass_tokens=100)), rows)
    assert metrics["base_loss"] == pytest.approx(expected, rel=1e-6)
    assert abs(metrics["tuned_loss"] - expected) > 0.01


def test_cells_that_a_spreadsheet_would_run_are_defused_in_csv_and_raw_in_json(tmp_path):
    dangerous = ["=1+1", "+1", "-1", "@sum", "\tx"]
    samples = [
        {"row": number, "prompt": text, "expected": "fine", "base": text, "tuned": 'a "quoted", cell\nof two lines'}
        for number, text in enumerate(dangerous)
    ]
    evaluate.write_report(tmp_path / "evaluation", {"rows": 5}, samples)
    with open(tmp_path / "evaluation/samples.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["'" + text for text in dangerous]
    assert rows[0]["tuned"] == samples[0]["tuned"]
    assert json.loads((tmp_path / "evaluation/samples.json").read_text()) == samples


def test_a_report_without_samples_has_a_header_only(tmp_path):
    evaluate.write_report(tmp_path, {"rows": 5}, [])
    assert (tmp_path / "samples.csv").read_text(encoding="utf-8-sig").strip() == "row,prompt,expected,base,tuned"
