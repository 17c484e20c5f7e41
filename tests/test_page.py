"""report.html: what it says, that it needs nothing else, and that no text in it can do harm."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import chart_utils
import page_utils
from conftest import refusal

NASTY = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)> & {{ 7 * 7 }} &lt;",
    "left \u202eright to left\u202c, \x1b[31mred\x1b[0m, \x00 and half a character \ud83d",
)
VOID = {"meta", "input", "br", "line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """A parsed page: its elements, its texts, and whether each element that was opened is closed."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.elements, self.text, self.style = html, [], [], "", ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += " " + " ".join(data.split())

    def all(self, tag, word=""):
        return [
            found
            for name, found in self.elements
            if name == tag and (not word or word in (found.get("class") or "").split())
        ]


def an_answer(text, chrf, ended=True, **figures):
    figures = {"exact_match": 0, "chrf": chrf, "rouge_l": 0.2, "repetition": 0.0} | figures
    return {"text": text, "ended": ended, "tokens": 12} | figures


def a_sample(row, base, tuned, prompt="Which tyre?", earlier=()):
    messages = [*earlier, {"role": "user", "content": prompt}]
    return {"row": row, "prompt": prompt, "messages": messages, "expected": "A wide one.", "base": base, "tuned": tuned}


SAMPLES = [
    a_sample(3, an_answer("Any.", 10.0), an_answer("A wide tyre.", 60.0)),
    a_sample(4, an_answer("A wide one", 80.0), an_answer("Tyre tyre", 20.0, ended=False)),
    a_sample(
        5, an_answer(NASTY[0], 1.0), an_answer(NASTY[1], 1.0), NASTY[2], [{"role": "system", "content": NASTY[0]}]
    ),
]


def some_metrics(**changes):
    figures = {"answers": 3, "ended": 0.25, "mean_tokens": 80.0, "repetition": 0.5, "exact_match": 0.0, "chrf": 16.25}
    base = {"loss": 5.146749, "perplexity": 171.87, "band": "needs improvement"} | figures
    tuned = base | {"loss": 2.807512, "perplexity": 16.57, "band": "good", "ended": 1.0, "chrf": 33.5}
    return {
        "rows": 20,
        "answer_tokens": 1210,
        "held_out": True,
        "trained_rows_seen": 0,
        "trained_rows_left_out": 0,
        "partly_trained_rows": 0,
        "validation_rows_of_the_run": 20,
        "run": "demo",
        "adapter": "/home/somebody/nowhere/lora-adapter",
        "base_model": "models/tiny-base",
        "date": "2026-11-28 10:40:02",
        "data": {"name": "validation", "path": "output/validation.jsonl", "rows": 20, "sha256": "9f2c" * 16},
        "settings": {"max_new_tokens": 96, "output_dir": "/home/somebody/output"},
        "versions": {"torch": "2.13.0"},
        "base": base,
        "tuned": tuned,
        "difference": {
            "loss": -2.339237,
            "low": -2.51,
            "high": -2.169,
            "ended": {"mean": 0.75, "low": 0.4, "high": 0.9},
            "chrf": {"mean": 17.25, "low": -1.0, "high": 35.5},
        },
        "verdict": "better",
    } | changes


WORSE_ANSWERS = some_metrics()["difference"] | {
    "chrf": {"mean": -4.2, "low": -7.8, "high": -0.6},
    "repetition": {"mean": 0.23, "low": 0.1, "high": 0.36},
    "rouge_l": {"mean": -0.03, "low": -0.07, "high": 0.005},
}


def write_page(folder, metrics, samples=SAMPLES):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page_utils.write_report(folder)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("evaluation"), some_metrics())


def test_the_verdict_comes_first_and_the_figures_have_their_intervals(page):
    assert page.open == []
    assert re.search(r"Evaluation of demo, 2026-11-28 10:40:02\s+Better, by the loss on these answers\.", page.text)
    assert page.text.index("Better, by the loss on these answers.") < page.text.index("5.147")
    for words in (
        "On 20 held-out rows",
        "5.147",
        "2.808",
        "171.87",
        "16.57",
        "\u22122.339",
        "\u22122.510 to \u22122.169",
    ):
        assert words in page.text, words
    assert "+75 points" in page.text  # a difference of shares is no percentage
    assert "+40 to +90" in page.text
    assert "What the figures do not say" in page.text
    assert "nowhere/lora-adapter" in page.text
    assert "/home/somebody" not in page.html  # nor any other place on this machine
    assert "chose its best step by the loss on 20 of these rows" in page.text


def test_an_interval_that_holds_no_difference_is_drawn_as_such(page):
    lines = [found["class"].split()[-1] for found in page.all("line", "line") if found["x1"] != "1"]
    assert lines == ["tuned", "base", "tuned"]  # loss, chrF whose interval holds zero, ended answers


def test_the_page_needs_no_network_and_runs_no_script_but_its_own(page):
    assert not re.search(r"https?:|url\(|@import", page.html)
    assert not [found for _, found in page.elements if {"src", "srcset", "onerror", "onclick"} & found.keys()]
    assert {found["href"][0] for found in page.all("a")} == {"#"}
    assert len(page.all("script")) == 1
    policy = next(found["content"] for found in page.all("meta") if found.get("http-equiv"))
    script = re.search(r"<script>(.*?)</script>", page.html, flags=re.S)[1]
    assert f"script-src '{page_utils.csp_hash(script)}'" in policy
    assert "default-src 'none'" in policy


def test_texts_are_escaped_and_characters_that_steer_are_shown(page):
    assert page.html.count("<script") == 1
    assert not page.all("img")
    assert NASTY[1] in page.text
    assert NASTY[0] in page.text
    assert "{{ 7 * 7 }}" in page.text
    shown = "left [U+202E]right to left[U+202C], [U+001B][31mred[U+001B][0m, [U+0000] and half a character [U+D83D]"
    assert shown in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page.html)
    assert all("dir" in found for found in page.all("p", "words"))


def test_rows_are_marked_as_better_worse_and_cut_and_the_filters_count_them(page):
    assert [found["class"].split()[1:] for found in page.all("article")] == [["better"], ["worse", "cut"], []]
    assert [found["value"] for found in page.all("input") if found["type"] == "radio"] == ["", "better", "worse", "cut"]
    for words in ("All 3", "Better 1", "Worse 1", "Cut 1", "Row 4 worse cut"):
        assert words in page.text, words


def test_a_right_answer_is_better_whatever_its_characters():
    answers = {"base": an_answer("12 apples", 90.0, accuracy=0), "tuned": an_answer("13", 5.0, accuracy=1)}
    assert list(page_utils.find_kinds(answers)) == ["better"]
    assert list(page_utils.find_kinds({name: answers["base"] for name in answers})) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": "worse"}, "Worse, by the loss on these answers."),
        ({"verdict": "no clear difference"}, "No clear difference in the loss on these answers."),
        ({"difference": WORSE_ANSWERS}, "the tuned model writes are worse by chrF and Repetition: read them"),
        ({"verdict": "too few rows"}, "Ten rows are the least for a verdict"),
        ({"held_out": False, "trained_rows_seen": None}, "may have been trained on"),
        ({"trained_rows_seen": 7, "trained_rows_left_out": 7}, "7 rows of the file had been trained on and left out"),
        ({"partly_trained_rows": 1}, "Some answers of 1 conversation had been trained on"),
        ({"trained_rows_seen": 7, "held_out": False}, "7 rows of these had been trained on, which flatters"),
    ],
)
def test_the_page_says_what_must_be_known_first(tmp_path, changes, words):
    page = write_page(tmp_path, some_metrics(**changes))
    assert words in page.text
    assert ("held-out" in page.text) == some_metrics(**changes)["held_out"]


def test_a_page_without_answers_and_with_a_single_row_is_whole(tmp_path):
    loss = {name: some_metrics()[name] | {} for name in ("base", "tuned")}
    loss = {name: {key: found[key] for key in ("loss", "perplexity", "band")} for name, found in loss.items()}
    unknown = {"loss": -2.0, "low": None, "high": None}
    page = write_page(tmp_path, some_metrics(rows=1, difference=unknown, verdict="too few rows", **loss), [])
    assert page.open == []
    assert "On 1 held-out row the loss" in page.text
    assert "Answers" not in page.text
    assert not page.all("svg", "interval")


def test_the_run_beside_the_adapter_is_shown_with_its_curve_and_settings(tmp_path):
    adapter = tmp_path / "lora-adapter"
    adapter.mkdir()
    losses = [{"step": step, "loss": 5 - step / 10} for step in range(1, 31)]
    validation = [{"step": step, "eval_loss": loss} for step, loss in ((10, 3.5), (20, 2.75), (30, 3.0))]
    record = {"best_step": 20, "finished": "2026-11-28", "seconds": 90.0, "steps": 30, "peak_memory_gib": 0.76}
    (adapter / "trainer_state.json").write_text(json.dumps({"log_history": losses + validation}))
    (adapter / "run.json").write_text(json.dumps(record))
    (adapter / "settings.json").write_text(json.dumps({"lora_dropout": 0.1, "logs_dir": "/home/somebody/logs"}))
    page = write_page(tmp_path, some_metrics(adapter=str(adapter)))
    for words in (
        "Training loss went from 4.900 to 2.000 in 30 steps. Validation loss was lowest at step 20, 2.750.",
        "At the end it was 3.000",
        "The adapter is that of step 20.",
        "lora_dropout 0.1",
        "1 min 30 s",
    ):
        assert words in page.text, words
    assert len(page.all("polyline")) == 4  # two lines, wide and narrow
    assert "/home/somebody" not in page.html


def test_a_comparison_has_a_row_for_each_adapter_and_says_which_is_nearest(tmp_path):
    figures = {"base_model": "a/base", "base_loss": 5.0, "perplexity": 16.0, "band": "good", "ended": 1.0, "chrf": 30.0}
    first = {"run": "first", "adapter": "output/previous/1/lora-adapter", "loss": 2.8, "difference": None} | figures
    better = {"mean": -0.2, "low": -0.3, "high": -0.1}
    second = {"run": "second <b>", "adapter": "output/lora-adapter", "loss": 2.6, "difference": better} | figures
    common = {key: value for key, value in some_metrics().items() if key not in ("base", "tuned", "difference")}
    metrics = common | {"adapters": [first, second], "unit": "token", "verdict": "second <b> is better than first."}
    samples = [
        {key: sample[key] for key in ("row", "prompt", "messages", "expected")}
        | {"answers": {"first": sample["base"], "second <b>": sample["tuned"]}}
        for sample in SAMPLES
    ]
    page = write_page(tmp_path, metrics, samples)
    assert page.open == []
    for words in (
        "second <b> is better than first.",
        "2 adapters on the same 20 held-out rows",
        "\u22120.200",
        "2.600",
    ):
        assert words in page.text, words
    kinds = [found["class"].split()[1:] for found in page.all("article")]
    assert kinds == [["nearest-1"], ["nearest-0", "cut"], []]
    assert "second <b> nearest 1" in page.text


def test_a_system_text_that_all_prompts_share_is_shown_once(tmp_path):
    system = {"role": "system", "content": "You are Wren."}
    samples = [sample | {"messages": [system, sample["messages"][-1]]} for sample in SAMPLES]
    page = write_page(tmp_path, some_metrics(), samples)
    assert page.text.count("You are Wren.") == 1
    assert "Earlier" not in page.text


@pytest.mark.parametrize("text", ["{", "[]", '{"training": {}, "steps": 3}'])
def test_a_record_that_is_damaged_or_of_another_version_costs_its_part_of_the_report_only(tmp_path, text):
    adapter = tmp_path / "lora-adapter"
    adapter.mkdir()
    for path in (adapter / "run.json", adapter / "trainer_state.json", tmp_path / "data_report.json"):
        path.write_text(text)
    page = write_page(tmp_path, some_metrics(adapter=str(adapter)))
    assert page.open == []
    assert "Better, by the loss on these answers." in page.text
    assert "Training loss" not in page.text


def test_benchmarks_stand_among_the_figures(tmp_path):
    accuracy = {"base": 0.25, "tuned": 0.75, "mean": 0.5, "low": 0.4, "high": 0.6}
    page = write_page(tmp_path, some_metrics(benchmarks={"arc_easy": {"rows": 200, "metrics": {"acc": accuracy}}}))
    for words in ("arc_easy: acc", "200 rows of a benchmark", "0.750", "+0.400 to +0.600"):
        assert words in page.text, words


def test_damaged_samples_end_in_one_line(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"row": 1')
    assert "evaluate again" in refusal(page_utils.read_samples, tmp_path / "samples.jsonl")


# ---- Charts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (2.06, 4.98, 5, [2, 3, 4, 5]),
        (0, 92, 8, [0, 20, 40, 60, 80, 100]),
        (0.0012, 0.0031, 4, [0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035]),
        (3.0, 3.0, 5, [3.0]),
        (0, 12_345, 8, [0, 2000, 4000, 6000, 8000, 10_000, 12_000, 14_000]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, most, ticks):
    assert chart_utils.nice_ticks(low, high, most) == pytest.approx(ticks)


def test_ticks_show_as_many_digits_as_their_step_needs():
    shown = [[chart_utils.show_tick(tick, ticks) for tick in ticks] for ticks in ([2, 3], [2.0, 2.5], [0, 10_000])]
    assert shown == [["2", "3"], ["2.0", "2.5"], ["0", "10,000"]]


def test_a_line_of_many_points_is_thinned_and_keeps_its_ends_and_its_mean():
    points = [(step, step % 7) for step in range(1, 20_001)]
    thinned = chart_utils.thin(points)
    assert len(thinned) <= chart_utils.MOST_POINTS
    assert (thinned[0], thinned[-1]) == (points[0], points[-1])
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(3, abs=0.05)


def test_a_loss_of_one_step_is_drawn():
    chart = chart_utils.draw_curves([chart_utils.Curve("base", [(1, 2.0)], True)], "step", "loss")
    assert "nan" not in chart
    assert chart.count("<circle") == 2  # a wide drawing and a narrow one


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium to open the page with")
def test_a_browser_filters_the_rows_and_prints_all_of_them(tmp_path):
    write_page(tmp_path, some_metrics())
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "worse.html").write_text(page.replace('value="worse"', 'value="worse" checked'))
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    chromium += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "worse.html").as_uri()]
    found = Page(subprocess.run(chromium, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert ["hidden" in row for row in found.all("article")] == [True, False, True]
    assert "1 of 3 rows" in found.text
    assert ".sample[hidden] { display: block;" in page[page.index("@media print") :]
