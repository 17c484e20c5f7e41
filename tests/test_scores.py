"""Intervals that hold as often as they promise, and the figures of answers."""

import math
import sys
import time

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

import score_utils
from conftest import PROJECT
from message_utils import percent, shown_as
from page_utils import show_figure

sys.path.insert(0, str(PROJECT / "benchmarks"))
from interval import DIFFERENCES, GAIN, LENGTHS, draw_rows, error


# ---- Intervals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (4, 2.776445), (9, 2.262157), (30.5, 2.040869)])
def test_the_quantiles_of_students_t_are_those_of_the_tables(degrees, quantile):
    assert score_utils.t_quantile(degrees) == pytest.approx(quantile, rel=1e-6)
    assert score_utils.t_quantile(1e7) == pytest.approx(1.959964, rel=1e-6)


def test_of_rows_of_one_length_the_interval_is_the_usual_t_interval_and_a_little_wider_of_few():
    differences = np.array([-3.0, -1.0, 2.0, -4.0, 0.5])
    reach = 2.776445 * differences.std(ddof=1) / math.sqrt(5) * (1 + 1 / 25)
    expected = [-1.1, -1.1 - reach, -1.1 + reach]
    assert list(score_utils.ratio_interval(differences * 10, np.full(5, 10))) == pytest.approx(expected, rel=1e-6)
    assert list(score_utils.mean_interval(differences)) == pytest.approx(expected, rel=1e-6)


def test_the_degrees_of_freedom_are_those_of_the_matrix():
    for rows in (2, 3, 5, 40):
        tokens = np.random.default_rng(rows).integers(1, 300, rows).astype(float)
        weights = tokens / tokens.sum()
        factors = weights**2 / (1 - weights)
        residual = np.eye(rows) - np.outer(np.ones(rows), weights)
        form = residual.T @ np.diag(factors) @ residual
        expected = np.trace(form) ** 2 / np.trace(form @ form)
        assert score_utils.degrees_of_freedom(weights, factors) == pytest.approx(expected)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_interval_misses_the_truth_no_more_often_than_it_promises(lengths):
    draw = np.random.default_rng(7)
    for differences in DIFFERENCES:
        for rows in (5, 10, 20, 50, 500):
            near = (lengths, differences) == ("even", "skewed") and rows < 50  # what comes near the limit
            draws = 20_000 if near else 1500 if rows == 500 else 3000
            amounts, tokens = draw_rows(draw, lengths, differences, (draws, rows))
            missed = error(*score_utils.ratio_interval(amounts, tokens)[1:])
            assert missed <= 0.065, (differences, rows)
            if lengths == "even" or rows == 500:
                assert missed >= 0.03, (differences, rows)  # nor is it wider than it must be


def test_the_interval_is_narrow_enough_to_find_what_is_there():
    draw = np.random.default_rng(3)
    amounts, tokens = draw_rows(draw, "lognormal", "both", (2000, 20))
    ratio, _, high = score_utils.ratio_interval(amounts, tokens)
    assert ratio.mean() == pytest.approx(GAIN, abs=0.01)
    assert np.mean(high < 0) > 0.95


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (0.1, 0.4), (0.5, 0.7), (0.9, 0.95), (0.0, 1.0)])
def test_the_interval_of_two_shares_holds_at_few_rows_and_is_never_a_point(before, after):
    draw = np.random.default_rng(5)
    for rows in (5, 10, 20, 50, 500):
        base, tuned = draw.random((4000, rows)) < before, draw.random((4000, rows)) < after
        mean, low, high = score_utils.share_interval(base, tuned)
        assert error(low - 1e-9, high + 1e-9, after - before) <= 0.065, rows
        assert (high > low).all()
        assert mean == pytest.approx(tuned.mean(-1) - base.mean(-1))


def test_figures_of_answers_speak_against_a_verdict_only_with_their_whole_interval():
    difference = {
        "loss": -0.2,
        "chrf": {"mean": -4.0, "low": -8.0, "high": -0.5},
        "rouge_l": {"mean": -0.1, "low": -0.3, "high": 0.1},
        "repetition": {"mean": 0.2, "low": 0.1, "high": 0.3},
        "ended": {"mean": 0.5, "low": 0.2, "high": 0.8},
        "exact_match": {"mean": -1.0, "low": None, "high": None},
    }
    assert score_utils.speaks_against("better", difference) == ["chrf", "repetition"]
    assert score_utils.speaks_against("worse", difference) == ["ended"]
    assert score_utils.speaks_against("too few rows", difference) == []


def test_no_difference_is_said_to_be_larger_than_it_can_be():
    base, tuned = ([{"repetition": r, "chrf": 100 * r} for r in shares] for shares in ((1, 0.9, 1), (0.9, 0, 0)))
    differences = score_utils.compare_answers(base, tuned)
    assert differences["repetition"]["low"] == -1 < differences["repetition"]["mean"] < 0
    assert differences["chrf"]["low"] == -100


def test_one_row_has_a_difference_and_no_interval():
    figures = score_utils.as_figures(score_utils.ratio_interval([-3.0], [2]), "loss")
    assert figures == {"loss": -1.5, "low": None, "high": None}


def test_there_is_a_verdict_from_ten_rows_on_where_the_interval_leaves_out_zero():
    assert score_utils.verdict(9, -2.0, -1.0) == "too few rows"
    assert score_utils.verdict(10, -2.0, -1.0) == "better"
    assert score_utils.verdict(10, 0.1, 0.2) == "worse"
    assert score_utils.verdict(10, -0.1, 0.2) == "no clear difference"


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
    assert score_utils.band(perplexity) == name


# ---- Answers ---------------------------------------------------------------------------------------------------------
def test_the_figures_of_an_answer_are_those_of_the_libraries():
    text, expected = "The cat sat on the mat.", "The black cat sat on a mat, purring."
    figures = score_utils.score_answer(text, expected)
    usual = RougeScorer(["rougeL"]).score(expected, text)["rougeL"].fmeasure
    assert figures["rouge_l"] == pytest.approx(usual)
    assert 0 < figures["chrf"] < 100
    assert figures["exact_match"] == 0
    assert "accuracy" not in figures
    same = score_utils.score_answer("Yes,  it is.\n", "Yes, it is.")
    assert (same["exact_match"], same["rouge_l"]) == (1, 1)
    assert score_utils.score_answer("Yes, it is.", "Yes, it is.")["chrf"] == pytest.approx(100)
    nothing = score_utils.score_answer("", "Yes.")
    assert (nothing["chrf"], nothing["rouge_l"], nothing["repetition"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "expected"), [("Это кот", "Это большой кот"), ("我爱北京", "我很爱北京"), ("ça va", "ça va là")]
)
def test_words_of_other_scripts_count(text, expected):
    assert 0.7 < score_utils.score_answer(text, expected)["rouge_l"] < 1


def test_repetition_is_the_share_of_sequences_of_four_words_that_came_before():
    assert score_utils.score_answer("a b c d e f g", "x")["repetition"] == 0
    assert score_utils.score_answer("a b c d a b c d", "x")["repetition"] == pytest.approx(1 / 5)
    assert score_utils.score_answer("One, or other, " * 20, "x")["repetition"] > 0.9


@pytest.mark.parametrize(
    ("check", "text", "expected", "right"),
    [
        ("number", "5 + 7 = 12\n#### 12", "It is 12.\n#### 12", 1),
        ("number", "#### 1,234.50", "#### 1234.5", 1),
        ("number", "#### 12\n\nQuestion: more?\n#### 99", "#### 12", 1),  # the first is the answer
        ("number", "So she has 12 apples", "#### 12", 1),
        ("number", "So she has 13 apples", "#### 12", 0),
        ("number", "\u22125", "-5", 1),
        ("number", "nothing", "#### 12", 0),
        ("number", "$12", "The price is $12.00.", 1),
        ("number", "from 10-12", "12", 1),
        ("number", "A debt: -$3", "3", 0),
        ("number", "-$3", "$-3", 1),
        ("number", r"So \(x = \boxed{1,234}\), as 5 of them say", r"$\boxed{1234}$", 1),
        ("number", "2/4", r"\boxed{\frac{1}{4}}", 0),
        ("number", "1.5e3", "1500", 1),
        ("number", "3,5", "35", 0),
        ("choice", "(B)", "B", 1),
        ("choice", "The answer is B.", "B", 1),
        ("choice", "B) Paris, since", "B", 1),
        ("choice", "A dog ran home", "A", 0),
        ("choice", "The answer is a dog", "A", 0),
        ("choice", "The answer is b)", "B", 1),
        ("choice", "**c**", "C", 1),
        ("choice", "A) Paris\nB) Rome\nThe answer is (B), since", "B", 1),
        ("choice", "Yes, since it is.", "yes", 1),
        ("choice", "No", "Yes.", 0),
        ("choice", "I think B", "I", 0),
        ("choice", "C", "B", 0),
        ("json", 'Here:\n```json\n{"a": 1, "b": [2.0]}\n```', '{"b": [2], "a": 1}', 1),
        ("json", '{"a": 1', '{"a": 1}', 0),
        ("json", '{"a": 2}', '{"a": 1}', 0),
        ("json", '{"a": true}', '{"a": 1}', 0),
        ("json", '{"a": "1"}', '{"a": 1}', 0),
        ("json", 'They are ["x", 1.0].', '```json\n["x", 1]\n```', 1),
    ],
)
def test_right_is_what_says_the_same(check, text, expected, right):
    assert score_utils.score_answer(text, expected, check)["accuracy"] == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>A) is 3, B) is 4.</think>\n\nB", 1),
        ("The answer is A? No.\n</think>\n\nB", 1),  # the prompt had opened the thought
        ("[THINK]B[/THINK]A", 0),
        ("<think>\nThe answer is B", 0),  # a thought that did not end is no answer
    ],
)
def test_a_thought_before_an_answer_does_not_count(text, right):
    figures = score_utils.score_answer(text, "B", "choice")
    assert (figures["accuracy"], figures["exact_match"]) == (right, right)
    assert score_utils.choose_check("auto", ["<think>12?</think>\nA", "B"]) == "choice"
    answer = figures | {"text": text, "ended": True, "tokens": 9}
    assert score_utils.summarize_answers([answer], ["<think>Hm.</think>B"])["length_ratio"] <= 1


@pytest.mark.parametrize(
    ("expected", "check"),
    [
        (["... = 5\n#### 5", "#### 1,000"], "number"),
        (["A", "(C)", "The answer is B."], "choice"),
        (['{"a": 1}', '{"b": {}}'], "json"),
        (["Hello there.", "We open at nine."], None),
        (["A dog ran home.", "I think so."], None),
        (["$12", "-$3", "12 %", "5 \u20ac", r"So $x = 7$.", r"\boxed{-3}"], "number"),
        (["10:30", "2024-01-05", "+49 30 1234", "1 234", "1, 2, 3", "1.234,56", "3,5", "1/2", "1.2.3"], None),
        (["a", "(b)", "**C**", "d."], "choice"),
        (["Yes.", "no", "True", "No, it is not."], "choice"),
        (["The answer is a good one.", "The best choice is a dog.", "No one knows."], None),
        (["[1, 2]", '```json\n{"a": 1}\n```'], "json"),
        (["42"] * 9 + ["Nobody knows"], "number"),
        (["42"] * 8 + ["Nobody knows"], None),
        ([], None),
    ],
)
def test_the_kind_of_answer_is_seen_from_nine_rows_in_ten(expected, check):
    assert score_utils.choose_check("auto", expected) == check
    assert score_utils.choose_check("off", expected) is None
    assert score_utils.choose_check("json", expected) == "json"


def test_hostile_answers_are_scored_in_no_time():
    for text in ("1" * 50_000 + ":5", "-$" * 20_000, "[" * 50_000, " " * 50_000, "(" * 50_000, "```\n" * 20_000):
        for check in score_utils.CHECKS:
            started = time.process_time()
            assert not score_utils.is_right(text, {"number": "5", "choice": "B", "json": "{}"}[check], check)
            assert time.process_time() - started < 1, (text[:9], check)
    assert not score_utils.is_right("9e" + "9" * 50, "9", "number")


def test_answers_are_summarized_and_compared_in_pairs():
    def answer(text, ended, tokens):
        return {"text": text, "ended": ended, "tokens": tokens} | score_utils.score_answer(text, "12", "number")

    base, tuned = [answer("7 " * 9, False, 20)] * 3, [answer("12", True, 2)] * 2 + [answer("13", True, 2)]
    figures = score_utils.summarize_answers(tuned, ["12"] * 3)
    assert (figures["answers"], figures["ended"], figures["mean_tokens"]) == (3, 1, 2)
    assert figures["accuracy"] == figures["exact_match"] == pytest.approx(2 / 3)
    assert figures["length_ratio"] == 1
    assert score_utils.summarize_answers(base, ["12"] * 3)["length_ratio"] == 9
    difference = score_utils.compare_answers(base, tuned)
    assert difference["mean_tokens"] == pytest.approx({"mean": -18, "low": -18, "high": -18})
    assert difference["ended"]["mean"] == 1
    assert difference["ended"]["low"] < 0.9
    assert score_utils.summarize_answers([], []) == {"answers": 0}
    assert score_utils.compare_answers([], []) == {}


@pytest.mark.parametrize(
    ("share", "plain", "signed"),
    [(0.684, "68", "+68"), (0.0151, "1.5", "+1.5"), (0.03, "3", "+3"), (-0.0823, "-8.2", "-8.2"), (-0.0001, "0", "+0")],
)
def test_a_small_share_keeps_its_decimal(share, plain, signed):
    assert (percent(share), percent(share, "+")) == (plain, signed)
    assert shown_as(share, "%", "+") == f"{signed}%"
    assert show_figure(share, "%") == f"{plain} %".replace("-", "\u2212")
