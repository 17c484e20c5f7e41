"""The report of an evaluation: one HTML file that needs nothing else, to read, print or hand over.

    write_report("output/evaluation/demo-validation")     # metrics.json and samples.jsonl -> report.html

page.html.j2 lays it out and holds the words that are the same in each.
"""

import base64
import hashlib
import json
import math
import re
from collections import namedtuple
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chart_utils import Curve, draw_bars, draw_curves, draw_interval
from data_utils import DataReport
from file_utils import PROJECT_DIR, display_path, read_json, read_json_if_any, resolve_path, whole_file
from message_utils import UserError, counted, percent, say
from progress_utils import format_duration
from report_utils import notices
from run_utils import DATA_REPORT
from score_utils import speaks_against
from settings_utils import PLACES

REPORT, METRICS, SAMPLES = "report.html", "metrics.json", "samples.jsonl"
TEMPLATE = "page.html.j2"

# How a figure is called, shown and read. better: 1 where more is better, -1 where less is, 0 where neither
Figure = namedtuple("Figure", "key label better form meaning")
FIGURES = (
    Figure("loss", "Loss", -1, "{:.3f}", "how unlikely the expected answers are to the model, in nats a token"),
    Figure("perplexity", "Perplexity", -1, "{:,.2f}", "its exponential: how many tokens the model hesitates between"),
    Figure("accuracy", "Right answers", 1, "%", "the answer's number, choice or JSON is the expected one"),
    Figure("exact_match", "Exact match", 1, "%", "word for word the expected answer"),
    Figure("chrf", "chrF", 1, "{:.1f}", "characters in common with the expected answer, 0 to 100"),
    Figure("rouge_l", "ROUGE-L", 1, "{:.3f}", "words in common with it, in their order, 0 to 1"),
    Figure("ended", "Ended by itself", 1, "%", "the other answers were cut at the limit of tokens"),
    Figure("repetition", "Repetition", -1, "%", "sequences of four words that stood in the same answer before"),
    Figure("length_ratio", "Length", 0, "{:.2f}", "of all answers, that of the expected ones being 1"),
    Figure("mean_tokens", "Tokens", 0, "{:,.1f}", "of an answer, on average"),
)
LOSS = FIGURES[0]
BENCHMARK = Figure("benchmark", "", 0, "{:.3f}", "")  # of a benchmark it is not known whether more is better
COMPARED = ("loss", "perplexity", "accuracy", "chrf", "ended")  # the columns of a comparison

VERDICTS = {
    "better": "Better, by the loss on these answers.",
    "worse": "Worse, by the loss on these answers.",
    "no clear difference": "No clear difference in the loss on these answers.",
    "too few rows": "Too few rows for a verdict.",
}


def write_report(folder):
    """Write report.html from the metrics.json and samples.jsonl that lie in the folder of an evaluation."""
    folder = Path(folder)
    metrics, samples = read_json(folder / METRICS, "the evaluation"), read_samples(folder / SAMPLES)
    page = describe_comparison(metrics, samples) if "adapters" in metrics else describe_evaluation(metrics, samples)
    page |= {
        "metrics": metrics,
        "measured": list(describe_measured(metrics)),
        "shared_system": shared_system(samples),
        "kinds": count_kinds(page["samples"], page["kinds"]),
        "footer": f"Made from {METRICS} and {SAMPLES} of the same folder, which hold all figures in full.",
    }
    with whole_file(folder / REPORT) as file:
        file.write(render(page))


def describe_evaluation(metrics, samples):
    """What the page of base and tuned shows, as far as that of a comparison shows it otherwise."""
    run = read_run(metrics["adapter"])
    settings = run["settings"] | metrics["settings"]
    return {
        "title": f"Evaluation of {metrics['run']}",
        "headline": VERDICTS.get(metrics["verdict"], metrics["verdict"]),
        "lead": list(lead(metrics)),
        "warnings": list(warnings(metrics)),
        "tiles": list(tiles(metrics)),
        "figures": {"columns": ["base", "tuned"], "rows": list(figure_rows(metrics))},
        "curves": describe_curves(run["history"], run["record"].get("best_step")),
        "data": describe_data(run["data_report"]),
        "environment": list(describe_environment(metrics, run["record"])),
        "settings": [(name, show_setting(value)) for name, value in settings.items() if name not in PLACES],
        "differing": None,
        "kinds": {"better": "Better", "worse": "Worse", "cut": "Cut"},
        "samples": describe_samples(samples, {"base": "Base", "tuned": "Tuned"}),
    }


def describe_comparison(metrics, samples):
    """What the page of several adapters shows, as far as that of an evaluation shows it otherwise."""
    names = [adapter["run"] for adapter in metrics["adapters"]]
    labels = {f"answer-{number}": name for number, name in enumerate(names)}
    samples = [sample | dict(zip(labels, sample["answers"].values(), strict=True)) for sample in samples]
    return {
        "title": f"Comparison of {', '.join(names)}",
        "headline": metrics["verdict"],
        "lead": [
            f"{counted(len(names), 'adapter')} on the same {describe_rows(metrics)}. Compared is the loss of the"
            f" expected answers, in nats a {metrics['unit']}, with that of {names[0]}."
        ],
        "warnings": list(warnings(metrics)),
        "tiles": [],
        "figures": compare_figures(metrics),
        "curves": None,
        "data": None,
        "environment": [
            *((f"{adapter['run']}: base model, its loss", show_base(adapter)) for adapter in metrics["adapters"]),
            ("evaluated", metrics["date"]),
            *metrics["versions"].items(),
        ],
        "settings": [],
        "differing": compare_settings(metrics["adapters"]),
        "kinds": {f"nearest-{number}": f"{name} nearest" for number, name in enumerate(names)} | {"cut": "Cut"},
        "samples": describe_samples(samples, labels),
    }


def render(page):
    """The HTML of a page. All text in it is escaped; control characters and direction overrides are made visible."""
    environment = Environment(
        loader=FileSystemLoader(PROJECT_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"csp_hash": csp_hash, "figure": show_figure, "count": counted}
    return environment.get_template(TEMPLATE).render(page)


def csp_hash(script):
    """What a Content-Security-Policy calls a script that it allows; no other runs, whatever the page's texts hold."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


# ---- What is read ----------------------------------------------------------------------------------------------------
def read_samples(path):
    """The rows of a samples.jsonl; [] where there is none."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{display_path(path)} is damaged ({error}); evaluate again") from None


def read_run(adapter):
    """What an adapter's run left: its record, settings, history of losses and data report; empty what is not there."""
    adapter = resolve_path(adapter)
    files = {
        "record": adapter / "run.json",
        "settings": adapter / "settings.json",
        "state": adapter / "trainer_state.json",
        "data_report": adapter.parent / DATA_REPORT,
    }
    found = {name: read_part(path) for name, path in files.items()}
    return found | {"history": found["state"].get("log_history", [])}


def read_part(path):
    """The JSON object in a file, {} where there is none; a damaged one is named, and costs its part of the report."""
    try:
        return read_json_if_any(path, "the run's record")
    except UserError as error:
        say(f"Notice: the report goes without a part: {error}")
        return {}


# ---- In words --------------------------------------------------------------------------------------------------------
def describe_rows(metrics):
    """'20 held-out rows', or '20 rows' where the adapter has seen some of them or nobody knows."""
    return counted(metrics["rows"], "held-out row" if metrics["held_out"] else "row")


def lead(metrics):
    """The sentences below the verdict."""
    loss, perplexity, *_ = figure_rows(metrics)
    interval = f" (95 % interval {loss['interval']})" if loss["interval"] else ""
    yield (
        f"On {describe_rows(metrics)} the loss of the expected answers is {loss['cells'][0]} with the base model and"
        f" {loss['cells'][1]} with the tuned one: a difference of {loss['difference']}{interval}. As perplexity:"
        f" {' and '.join(perplexity['cells'])}, {metrics['tuned']['band']}."
    )
    if metrics["verdict"] == "too few rows":
        yield "Ten rows are the least for a verdict: of fewer, a few odd ones would decide."
    if against := speaks_against(metrics["verdict"], metrics["difference"]):
        names = " and ".join(figure.label for figure in FIGURES if figure.key in against)
        opposite = "worse" if metrics["verdict"] == "better" else "better"
        yield f"But the answers that the tuned model writes are {opposite} by {names}: read them before you decide."


def warnings(metrics):
    """What must be known before the figures are believed."""
    seen, left_out = metrics["trained_rows_seen"], metrics["trained_rows_left_out"]
    if seen is None:
        yield "These rows may have been trained on: the adapter carries no record of the rows that it has seen."
        return
    if left_out:
        yield f"{counted(left_out, 'row')} of the file had been trained on and left out of every figure here."
    if metrics["partly_trained_rows"] and metrics["held_out"]:
        yield (
            f"Some answers of {counted(metrics['partly_trained_rows'], 'conversation')} had been trained on. Here they"
            " are context, and in no figure."
        )
    if seen > left_out:
        yield f"{counted(seen - left_out, 'row')} of these had been trained on, which flatters the tuned model."


def describe_measured(metrics):
    """(name, value) of the rows that were measured."""
    data, seen = metrics["data"], metrics["trained_rows_seen"]
    yield "rows measured", f"{metrics['rows']:,}"
    yield "file", short_path(data["path"])
    yield "rows of it trained on", "unknown" if seen is None else f"{seen:,}"
    yield "left out of the figures", f"{metrics['trained_rows_left_out']:,}"
    if metrics["partly_trained_rows"]:
        yield "trained on in part", f"{metrics['partly_trained_rows']:,}"
    if metrics.get("trained_prompts_seen"):
        yield "prompts trained with another answer", f"{metrics['trained_prompts_seen']:,}"
    if metrics.get("validation_rows_of_the_run"):
        yield "also the run's validation rows", f"{metrics['validation_rows_of_the_run']:,}"
    yield "tokens of their answers", f"{metrics['answer_tokens']:,}"
    yield "sha256 of the rows", data["sha256"][:16]


def short_path(path):
    """A path inside the project as it is, and of others the end: who reads the page need not know this machine."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def describe_environment(metrics, record):
    """(name, value) of the models, of the run that made the adapter, and of the libraries."""
    yield "run", metrics["run"]
    yield "base model", short_path(metrics["base_model"])
    yield "adapter", short_path(metrics["adapter"])
    for name, key, show in (
        ("trained until", "finished", str),
        ("time of the training", "seconds", format_duration),
        ("steps", "steps", "{:,}".format),
        ("peak memory of the training", "peak_memory_gib", "{:.2f} GiB".format),
    ):
        if key in record:
            yield name, show(record[key])
    yield "evaluated", metrics["date"]
    yield from metrics["versions"].items()


# ---- Figures ---------------------------------------------------------------------------------------------------------
def show_figure(value, form, signed=False):
    """0.25 -> '25 %' for the form '%', else the form applied; a true minus, and a plus if `signed`; a dash for None.

    The form "points" is that of a difference of shares.
    """
    if value is None or not math.isfinite(value):
        return "\u2013"
    text = percent(abs(value)) if form in ("%", "points") else form.format(abs(value))
    text += " %" if form == "%" else ""
    is_zero = not re.search("[1-9]", text)
    return ("" if is_zero else "\u2212" if value < 0 else "+" if signed else "") + text


def figure_rows(metrics):
    """The table's rows of an evaluation: base, tuned, and their difference with its interval, where there is one."""
    loss = {"mean": metrics["difference"]["loss"]} | metrics["difference"]
    for figure in FIGURES:
        if metrics["tuned"].get(figure.key) is None:
            continue
        yield {
            "label": figure.label,
            "meaning": figure.meaning,
            "cells": [show_figure(metrics[name][figure.key], figure.form) for name in ("base", "tuned")],
            **describe_difference(loss if figure is LOSS else metrics["difference"].get(figure.key), figure),
        }
    for task, found in metrics.get("benchmarks", {}).items():
        for name, values in found["metrics"].items():
            yield {
                "label": f"{task}: {name}",
                "meaning": f"{counted(found['rows'], 'row')} of a benchmark, by lm-evaluation-harness",
                "cells": [show_figure(values[model], BENCHMARK.form) for model in ("base", "tuned")],
                **describe_difference(values, BENCHMARK),
            }


def describe_difference(difference, figure, reach=None):
    """A difference {"mean", "low", "high"}, or None, as words and as a drawing.

    Shares differ by points, since +70 % can be read as 1.7 times. reach: how far the drawing goes to both sides.
    """
    if difference is None:
        return {"difference": "", "interval": "", "plot": ""}
    form = "points" if figure.form == "%" else figure.form
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    known = low is not None
    return {
        "difference": show_figure(mean, form, signed=True) + (" points" if form == "points" else ""),
        "interval": f"{show_figure(low, form, signed=True)} to {show_figure(high, form, signed=True)}" if known else "",
        "plot": draw_interval(low, mean, high, figure.better, reach) if known and figure.better else "",
    }


def tiles(metrics):
    """The few figures that stand large at the top: loss, perplexity, right answers or chrF, ended answers."""
    chosen = ["loss", "perplexity", "accuracy" if "accuracy" in metrics["tuned"] else "chrf", "ended"]
    for figure in FIGURES:
        if figure.key in chosen and metrics["tuned"].get(figure.key) is not None:
            base, tuned = (show_figure(metrics[name][figure.key], figure.form) for name in ("base", "tuned"))
            direction = "higher" if figure.better > 0 else "lower"
            yield {"label": figure.label, "base": base, "tuned": tuned, "direction": direction}


def compare_figures(metrics):
    """The table of a comparison, a row for each adapter."""
    adapters = metrics["adapters"]
    figures = [figure for figure in FIGURES if figure.key in COMPARED and adapters[0].get(figure.key) is not None]
    ends = [abs(adapter["difference"][end] or 0) for adapter in adapters[1:] for end in ("low", "high")]
    rows = [
        {
            "label": adapter["run"],
            "meaning": short_path(adapter["adapter"]),
            "cells": [show_figure(adapter[figure.key], figure.form) for figure in figures],
            **describe_difference(adapter["difference"], LOSS, max(ends)),
        }
        for adapter in adapters
    ]
    return {"columns": [figure.label for figure in figures], "rows": rows}


def show_setting(value):
    return short_path(value) if isinstance(value, str) else value


def show_base(adapter):
    return f"{short_path(adapter['base_model'])}, {show_figure(adapter['base_loss'], LOSS.form)}"


def compare_settings(adapters):
    """The settings in which adapters differ: {"names": [...], "rows": [(setting, value of each)]}."""
    found = [
        read_run(adapter["adapter"])["settings"] | {"base_model_name": adapter["base_model"]} for adapter in adapters
    ]
    rows = []
    for name in dict.fromkeys(name for settings in found for name in settings if name not in PLACES):
        values = [settings.get(name, "unknown") for settings in found]
        if any(value != values[0] for value in values):
            rows.append((name, list(map(show_setting, values))))
    return {"names": [adapter["run"] for adapter in adapters], "rows": rows}


# ---- The run ---------------------------------------------------------------------------------------------------------
def describe_curves(history, best_step):
    """The chart of a run's losses and what it shows, in words; None where no loss is recorded."""
    training, validation = (
        [(entry["step"], entry[name]) for entry in history if math.isfinite(entry.get(name, math.nan))]
        for name in ("loss", "eval_loss")
    )
    if not training:
        return None
    curves = [
        Curve("base", training, False),
        Curve("tuned", validation, len(validation) <= 40),
    ]
    says = [
        f"Training loss went from {training[0][1]:.3f} to {training[-1][1]:.3f} in {counted(training[-1][0], 'step')}."
    ]
    if validation:
        step, lowest = min(validation, key=lambda point: point[1])
        says.append(f"Validation loss was lowest at step {step:,}, {lowest:.3f}.")
        if validation[-1][1] > lowest:
            says.append(f"At the end it was {validation[-1][1]:.3f}: a sign that rows were being learned by heart.")
    if best_step:
        says.append(f"The adapter is that of step {best_step:,}.")
    return {
        "chart": draw_curves(curves, "optimizer step", "loss, nats a token", best_step),
        "validation": bool(validation),
        "kept": bool(best_step),
        "says": " ".join(says),
    }


def describe_data(report):
    """The data report of the adapter's run, as lines, a table and a chart; None where there is none.

    report: what report_utils.build_report makes; one of an older version, which has other keys, is left out.
    """
    try:
        return show_data(report) if report else None
    except (KeyError, TypeError):
        return None


def show_data(report):
    histogram = report["training"]["histogram"]
    return {
        "files": [DataReport(**file | {"name": short_path(file["name"])}).line() for file in report["files"]],
        "sets": {name: report[name] for name in ("training", "validation") if report[name]},
        "notices": list(notices(report)),
        "chart": draw_bars(histogram["counts"], histogram["up_to"], "tokens of a training row", "rows"),
    }


# ---- Samples ---------------------------------------------------------------------------------------------------------
def describe_samples(samples, labels):
    """What the page shows of each row. labels: {key of an answer in the sample: how the page calls it}."""
    first = 1 if shared_system(samples) else 0
    return [describe_sample(sample, labels, sample["messages"][first:-1]) for sample in samples]


def describe_sample(sample, labels, earlier):
    """A row's prompt, the messages before it, the expected answer, and the answer of each model with its facts."""
    answers = {name: sample[name] for name in labels}
    return {
        "row": sample["row"],
        "prompt": sample["prompt"] or show_turn(sample["messages"][-1])["text"],
        "earlier": [turn for turn in map(show_turn, earlier) if turn["text"]],
        "expected": sample["expected"],
        "kinds": list(find_kinds(answers)),
        "answers": [
            {"name": name, "label": label, "text": answers[name]["text"], "facts": list(answer_facts(answers[name]))}
            for name, label in labels.items()
        ],
    }


def find_kinds(answers):
    """The classes of a row: which answer is nearest to the expected one, if one is, and whether one was cut."""
    nearness = {name: (answer.get("accuracy", 0), answer["chrf"]) for name, answer in answers.items()}
    nearest = [name for name, found in nearness.items() if found == max(nearness.values())]
    if len(nearest) == 1:
        yield {"tuned": "better", "base": "worse"}.get(nearest[0], nearest[0].replace("answer", "nearest"))
    if any(not answer["ended"] for name, answer in answers.items() if name != "base"):
        yield "cut"


def count_kinds(samples, labels):
    """The filters of the answers: [{"value": class of the rows or '', "label", "count"}]."""
    counts = {kind: sum(kind in sample["kinds"] for sample in samples) for kind in labels}
    every = {"value": "", "label": "All", "count": len(samples)}
    return [every, *({"value": kind, "label": labels[kind], "count": count} for kind, count in counts.items())]


def answer_facts(answer):
    """What stands below an answer: 'right', 'chrF 41.3', '57 tokens', 'cut'."""
    if "accuracy" in answer:
        yield "right" if answer["accuracy"] else "wrong"
    yield f"chrF {answer['chrf']:.1f}"
    yield counted(answer["tokens"], "token")
    if not answer["ended"]:
        yield "cut"


def show_turn(message):
    """A message as role and text; what it holds beside text, such as calls of tools, as JSON."""
    others = {key: value for key, value in message.items() if key not in ("role", "content", "weight") and value}
    parts = [message.get("content") or "", json.dumps(others, ensure_ascii=False) if others else ""]
    return {"role": message["role"], "text": "\n".join(filter(None, parts))}


def shared_system(samples):
    """The system text with which all prompts begin, or ''. It is shown once."""
    firsts = [sample["messages"][0] for sample in samples]
    found = {show_turn(first)["text"] if first["role"] == "system" else "" for first in firsts}
    return found.pop() if len(found) == 1 else ""


# ---- Characters ------------------------------------------------------------------------------------------------------
# No foreign text may turn others around or hide: control characters, direction overrides and isolates are named, and so
# are halves of characters (surrogates), which no file can hold
NAMED = [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
VISIBLE = {code: f"[U+{code:04X}]" for code in [*NAMED, *range(0xD800, 0xE000)]}


def visible(text):
    """The text with control characters and direction overrides shown instead of obeyed."""
    return text.replace("\r\n", "\n").translate(VISIBLE)
