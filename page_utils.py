"""The report of an evaluation: one HTML file that needs nothing else, to read, print or hand over.

    page_utils.write_report("output/evaluation/demo-validation")     # metrics.json and samples.jsonl -> report.html

Everything in it is drawn here: page.html.j2 lays it out, the charts are SVG, and no network is used.
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
from file_utils import PROJECT_DIR, read_json, resolve_path, whole_file
from message_utils import UserError
from progress_utils import format_duration
from report_utils import notices
from run_utils import DATA_REPORT

REPORT, METRICS, SAMPLES = "report.html", "metrics.json", "samples.jsonl"
TEMPLATE = "page.html.j2"

# How a figure is called, shown and read. better: 1 where more is better, -1 where less is, 0 where neither
Figure = namedtuple("Figure", "key label better form meaning")
FIGURES = (
    Figure("loss", "Loss", -1, "{:.3f}", "how unlikely the expected answers are to the model, in nats a token"),
    Figure("perplexity", "Perplexity", -1, "{:,.2f}", "its exponential: how many tokens the model hesitates between"),
    Figure("accuracy", "Right answers", 1, "%", "the answer's number, choice or JSON object is the expected one"),
    Figure("exact_match", "Exact match", 1, "%", "word for word the expected answer"),
    Figure("chrf", "chrF", 1, "{:.1f}", "characters in common with the expected answer, 0 to 100"),
    Figure("rouge_l", "ROUGE-L", 1, "{:.3f}", "words in common with it, in their order, 0 to 1"),
    Figure("ended", "Ended by itself", 1, "%", "the others were cut at the limit of tokens"),
    Figure("repetition", "Repetition", -1, "%", "sequences of four words that stood in the same answer before"),
    Figure("length_ratio", "Length", 0, "{:.2f}", "of all answers, that of the expected ones being 1"),
    Figure("mean_tokens", "Tokens", 0, "{:,.1f}", "of an answer, on average"),
)
VERDICTS = {
    "better": "The tuned model is better.",
    "worse": "The tuned model is worse.",
    "no clear difference": "No clear difference.",
    "too few rows": "Too few rows for a verdict.",
}
KINDS = {"": "All", "better": "Better", "worse": "Worse", "cut": "Cut"}
LEFT_OUT_SETTINGS = ("output_dir", "logs_dir", "models_dir")  # places on a machine, which say nothing of the model


def write_report(folder):
    """Write report.html from the metrics.json and samples.jsonl that lie in a folder of an evaluation."""
    folder = Path(folder)
    metrics, samples = read_json(folder / METRICS, "the evaluation"), read_samples(folder / SAMPLES)
    run = read_run(metrics)
    described = [describe_sample(sample, {"base": "Base", "tuned": "Tuned"}) for sample in samples]
    page = {
        "title": f"Evaluation of {metrics['run']}",
        "metrics": metrics,
        "headline": VERDICTS.get(metrics["verdict"], metrics["verdict"]),
        "lead": list(lead(metrics)),
        "warnings": list(warnings(metrics)),
        "tiles": list(tiles(metrics)),
        "figures": list(figure_rows(metrics)),
        "curves": describe_curves(run["history"], run["record"].get("best_step")),
        "measured": list(describe_measured(metrics)),
        "data": describe_data(run["data_report"]),
        "environment": list(describe_environment(metrics, run["record"])),
        "settings": [pair for pair in metrics["settings"].items() if pair[0] not in LEFT_OUT_SETTINGS],
        "shared_system": shared_system(samples),
        "kinds": count_kinds(described),
        "samples": described,
        "footer": f"Written {metrics['date']} from {METRICS} and {SAMPLES}, which lie beside this page.",
    }
    with whole_file(folder / REPORT) as file:
        file.write(render(page))


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
    environment.filters |= {"csp_hash": csp_hash, "figure": show_figure, "count": show_count}
    return environment.get_template(TEMPLATE).render(page)


def csp_hash(script):
    """What a Content-Security-Policy calls a script that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


# ---- What is read ----------------------------------------------------------------------------------------------------
def read_samples(path):
    """The rows of a samples.jsonl; [] where there is none."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); evaluate again") from None


def read_run(metrics):
    """What the adapter's run left: its record, the history of its losses, its data report; empty what is not there."""
    adapter = resolve_path(metrics["adapter"])
    found = {}
    for name, path in (
        ("record", adapter / "run.json"),
        ("state", adapter / "trainer_state.json"),
        ("data_report", adapter.parent / DATA_REPORT),
    ):
        found[name] = read_json(path, "the run's record") if path.is_file() else {}
    return found | {"history": found["state"].get("log_history", [])}


# ---- In words --------------------------------------------------------------------------------------------------------
def lead(metrics):
    """The sentences below the verdict."""
    base, tuned = metrics["base"], metrics["tuned"]
    loss, perplexity = (
        next(figure_rows(metrics)),
        (show_figure(each["perplexity"], "{:,.2f}") for each in (base, tuned)),
    )
    kind = "held-out row" if metrics["held_out"] else "row"
    interval = f" (95 % interval {loss['interval']})" if loss["interval"] else ""
    yield (
        f"On {show_count(metrics['rows'], kind)} the loss of the expected answers is {loss['base']} with the base model"
        f" and {loss['tuned']} with the tuned one: a difference of {loss['difference']}{interval}. As perplexity:"
        f" {' and '.join(perplexity)}, {tuned['band']}."
    )
    if metrics["verdict"] == "too few rows":
        yield "A few odd rows would decide between so few; ten are the least for a verdict."


def warnings(metrics):
    """What must be known before the figures are believed."""
    if not metrics["held_out"]:
        yield "These rows are not known to be held out: the adapter may have been trained on them."
    if seen := metrics["trained_rows_seen"]:
        yield f"{show_count(seen, 'row')} of the data had been trained on."


def describe_measured(metrics):
    """(name, value) of the rows that were measured."""
    data = metrics["data"]
    yield "measured on", data["name"]
    yield "file", data["path"]
    yield "rows in it", f"{data['rows']:,}"
    yield "rows measured", f"{metrics['rows']:,}"
    yield "of its rows trained on", f"{metrics['trained_rows_seen']:,}"
    yield "tokens of their answers", f"{metrics['answer_tokens']:,}"
    yield "sha256", data["sha"][:16]


def describe_environment(metrics, record):
    """(name, value) of the models, of the run that made the adapter, and of the libraries."""
    yield "run", metrics["run"]
    yield "base model", metrics["base_model"]
    yield "adapter", metrics["adapter"]
    if record:
        yield "trained until", record["finished"]
        yield "time of the training", format_duration(record["seconds"])
        yield "steps", f"{record['steps']:,}"
        yield "peak memory of the training", f"{record['peak_memory_gib']:.2f} GiB"
    yield "evaluated", metrics["date"]
    yield from metrics["versions"].items()


# ---- Figures ---------------------------------------------------------------------------------------------------------
def show_figure(value, form, signed=False):
    """0.25 -> '25 %' for the form '%', else the form applied; a true minus, and a plus if `signed`; a dash for None."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    text = f"{100 * abs(value):.0f} %" if form == "%" else form.format(abs(value))
    is_zero = not re.search("[1-9]", text)
    sign = "" if is_zero else "\u2212" if value < 0 else "+" if signed else ""
    return sign + text


def show_count(number, noun):
    """1 -> '1 row', 2,000 -> '2,000 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def figure_rows(metrics):
    """The rows of the table of figures: base, tuned, and their difference with its interval, where there is one."""
    loss = {"mean": metrics["difference"]["loss"]} | metrics["difference"]
    for figure in FIGURES:
        if metrics["tuned"].get(figure.key) is None:
            continue
        difference = loss if figure.key == "loss" else metrics["difference"].get(figure.key)
        yield {
            "figure": figure,
            "base": show_figure(metrics["base"][figure.key], figure.form),
            "tuned": show_figure(metrics["tuned"][figure.key], figure.form),
            **describe_difference(difference, figure),
        }


def describe_difference(difference, figure):
    """A difference {"mean", "low", "high"}, or None, as words and as a drawing.

    Shares differ by points, since +70 % can be read as 1.7 times.
    """
    if difference is None:
        return {"difference": "", "interval": "", "plot": ""}
    scale, form = (100, "{:.0f}") if figure.form == "%" else (1, figure.form)
    mean, low, high = (difference[key] and scale * difference[key] for key in ("mean", "low", "high"))
    known = low is not None
    return {
        "difference": show_figure(mean, form, signed=True) + (" points" if scale == 100 else ""),
        "interval": f"{show_figure(low, form, signed=True)} to {show_figure(high, form, signed=True)}" if known else "",
        "plot": draw_interval(low, mean, high, figure.better) if known and figure.better else "",
    }


def tiles(metrics):
    """The few figures that stand large at the top."""
    chosen = ["loss", "perplexity", "accuracy" if "accuracy" in metrics["tuned"] else "chrf", "ended"]
    for figure in FIGURES:
        if figure.key in chosen and metrics["tuned"].get(figure.key) is not None:
            yield {
                "label": figure.label,
                "base": show_figure(metrics["base"][figure.key], figure.form),
                "tuned": show_figure(metrics["tuned"][figure.key], figure.form),
            }


# ---- The run ---------------------------------------------------------------------------------------------------------
def describe_curves(history, best_step):
    """The chart of a run's losses and what it shows, in words; None where no loss is recorded."""
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if not training:
        return None
    curves = [
        Curve("training loss", "base", training, False),
        Curve("validation loss", "tuned", validation, len(validation) <= 40),
    ]
    says = [f"Training loss went from {training[0][1]:.3f} to {training[-1][1]:.3f} in {training[-1][0]:,} steps."]
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
    """The data report of the adapter's run, as lines, a table and a chart; None where there is none."""
    if not report:
        return None
    histogram = report["training"]["histogram"]
    return {
        "files": [DataReport(**file).line() for file in report["files"]],
        "sets": {name: report[name] for name in ("training", "validation") if report[name]},
        "notices": list(notices(report)),
        "chart": draw_bars(histogram["counts"], histogram["up_to"], "tokens of a training row", "rows"),
    }


# ---- Samples ---------------------------------------------------------------------------------------------------------
def describe_sample(sample, labels):
    """What the page shows of a row: its prompt, the expected answer, and the answer of each model with its facts.

    labels: {key of the answer in the sample: how the page calls it}; the last is the one that is judged.
    """
    base, *_, tuned = (sample[name] for name in labels)
    kinds = [compare_answers(base, tuned), "" if tuned["ended"] else "cut"]
    return {
        "row": sample["row"],
        "prompt": sample["prompt"],
        "earlier": [turn for turn in map(show_turn, sample["messages"][:-1]) if turn["text"]],
        "expected": sample["expected"],
        "kinds": list(filter(None, kinds)),
        "answers": [
            {"name": name, "label": label, "text": sample[name]["text"], "facts": list(answer_facts(sample[name]))}
            for name, label in labels.items()
        ],
    }


def count_kinds(samples):
    """The filters of the answers: [{"value": class of the rows or '', "label", "count"}]."""
    counts = {"": len(samples)} | {kind: sum(kind in sample["kinds"] for sample in samples) for kind in KINDS if kind}
    return [{"value": kind, "label": label, "count": counts[kind]} for kind, label in KINDS.items()]


def compare_answers(base, tuned):
    """'better', 'worse' or '': whether the tuned answer is nearer to the expected one; a right one always is."""
    for name in ("accuracy", "chrf"):
        if tuned.get(name) is not None and tuned[name] != base[name]:
            return "better" if tuned[name] > base[name] else "worse"
    return ""


def answer_facts(answer):
    """What stands below an answer: 'right', 'chrF 41.3', '57 tokens', 'cut'."""
    if answer.get("accuracy") is not None:
        yield "right" if answer["accuracy"] else "wrong"
    yield f"chrF {answer['chrf']:.1f}"
    yield show_count(answer["tokens"], "token")
    if not answer["ended"]:
        yield "cut"


def show_turn(message):
    """A message as role and text; what it holds beside text (calls of tools) as JSON."""
    others = {key: value for key, value in message.items() if key not in ("role", "content", "weight") and value}
    parts = [message.get("content") or "", json.dumps(others, ensure_ascii=False) if others else ""]
    return {"role": message["role"], "text": "\n".join(filter(None, parts))}


def shared_system(samples):
    """The system text with which all prompts begin, or ''. It is shown once."""
    found = {
        sample["messages"][0]["content"] if sample["messages"][0]["role"] == "system" else "" for sample in samples
    }
    return found.pop() if len(found) == 1 else ""


# ---- Characters ------------------------------------------------------------------------------------------------------
# No foreign text may turn others around or hide: control characters, direction overrides and isolates are named, and so
# are halves of characters (surrogates), which no file can hold
NAMED = [
    *range(0x09),
    0x0B,
    0x0C,
    *range(0x0D, 0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
VISIBLE = {code: f"[U+{code:04X}]" for code in [*NAMED, *range(0xD800, 0xE000)]}


def visible(text):
    """The text with control characters and direction overrides shown instead of obeyed."""
    return text.replace("\r\n", "\n").translate(VISIBLE)
