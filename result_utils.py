"""Results of an evaluation: figures from scores and answers, the files that hold them, and the lines that show them."""

import csv
import json
import re
from collections import Counter
from itertools import count

import numpy as np
import pandas

from data_utils import words_of
from engine_passes import perplexity
from evidence_utils import describe_rows
from file_utils import display_path, staged_folder, storage_errors, write_json
from message_utils import UserError, counted, printable, shown_as
from page_utils import write_report
from row_utils import is_trained
from score_utils import (
    FEWEST_ROWS,
    TOO_FEW,
    as_figures,
    band,
    compare_answers,
    ratio_interval,
    speaks_against,
    summarize_answers,
    verdict,
)


# ---- Figures ---------------------------------------------------------------------------------------------------------
def compare(scores, samples, check):
    """The figures of base and tuned, their differences with 95 % intervals, and the verdict on the loss.

    scores: [{"row", "tokens", "base", "tuned"}], the last two in nats of all tokens. samples: dicts with "expected",
    "base" and "tuned", the last two as score_utils.score_answer gives them beside text, ended and tokens. check: by
    what the answers were right, or None.
    """
    tokens, base, tuned = (np.array([score[name] for score in scores]) for name in ("tokens", "base", "tuned"))
    metrics = {"rows": len(scores), "answer_tokens": int(tokens.sum()), "answer_check": check}
    expected = [sample["expected"] for sample in samples]
    for name, sums in (("base", base), ("tuned", tuned)):
        loss = float(sums.sum() / tokens.sum())
        metrics[name] = describe_loss(loss) | summarize_answers([sample[name] for sample in samples], expected)
    change = ratio_interval(tuned - base, tokens)
    metrics["difference"] = as_figures(change, "loss") | compare_answers(
        [sample["base"] for sample in samples], [sample["tuned"] for sample in samples]
    )
    return metrics | {"verdict": verdict(len(scores), *change[1:])}


def describe_loss(loss):
    """A loss in nats a token with its perplexity, and the customary name of that."""
    return {"loss": loss, "perplexity": perplexity(loss), "band": band(perplexity(loss))}


def compare_scores(adapters, scores, conversations):
    """(the figures of a comparison, the columns of rows.csv, its rows) of the scores of each adapter.

    Compared are the rows that all could be measured on, by the loss a token; where adapters cut the answers into
    different tokens, by the loss a character. Each is compared with the first.
    """
    found = [{score["row"]: score for score in each} for each in scores]
    rows = [row for row in found[0] if all(row in each for each in found)]
    if not rows:
        raise UserError("these adapters have no row in common that all of them can be measured on; give other rows")
    tokens = np.array([[each[row]["tokens"] for row in rows] for each in found])
    unit, sizes = "token", tokens[0]
    if (tokens != tokens[0]).any():
        unit = "character"
        lengths = Counter()
        for row, messages in conversations:
            lengths[row] += sum(map(len, trained_texts(messages)))
        sizes = np.array([max(lengths[row], 1) for row in rows])
    sums = {name: np.array([[each[row][name] for row in rows] for each in found]) for name in ("base", "tuned")}
    described = []
    for adapter, base, tuned in zip(adapters, sums["base"], sums["tuned"], strict=True):
        figures = {"loss": float(tuned.sum() / sizes.sum()), "base_loss": float(base.sum() / sizes.sum())}
        if unit == "token":
            figures |= describe_loss(figures["loss"])
        figures |= {"difference": None, "verdict": None}
        if described:
            change = ratio_interval(tuned - sums["tuned"][0], sizes)
            figures["difference"] = as_figures(change)
            figures["verdict"] = verdict(len(rows), *change[1:])
        described.append(adapter | figures)
    metrics = {
        "rows": len(rows),
        "answer_tokens": int(tokens[0].sum()),
        "unit": unit,
        "adapters": described,
        "verdict": comparison_verdict(described),
    }
    names = [adapter["run"] for adapter in adapters]
    table = [
        {"row": row, f"{unit}s": int(size)} | dict(zip(names, losses, strict=True))
        for row, size, losses in zip(rows, sizes, sums["tuned"].T.tolist(), strict=True)
    ]
    return metrics, ("row", f"{unit}s", *names), table


def trained_texts(messages):
    """The texts of a conversation's trained answers."""
    return [words_of(message) for message in messages if is_trained(message)]


def comparison_verdict(adapters):
    """What the intervals of several adapters, each against the first one, say in one sentence."""
    first, *others = adapters
    verdicts = {adapter["verdict"] for adapter in others}
    if TOO_FEW in verdicts:
        return "Too few rows for a verdict."
    if better := [adapter for adapter in others if adapter["verdict"] == "better"]:
        best = min(better, key=lambda adapter: adapter["loss"])["run"]
        return f"By the loss on these answers {best} is better than {first['run']}."
    if verdicts == {"worse"}:
        beaten = "all others" if len(others) > 1 else others[0]["run"]
        return f"By the loss on these answers {first['run']} is better than {beaten}."
    return f"By the loss on these answers none is clearly better than {first['run']}."


# ---- Files -----------------------------------------------------------------------------------------------------------
CARD = "model-card.md"


def write_results(evaluations, metrics, samples, columns, scores, write_card=lambda *found: None):
    """Write what was measured to a folder of its own in `evaluations`, <run>-<rows>, and return it.

    An earlier one of that name stays, and this one gets a number. Nothing of it is there until all of it is. `scores`
    are a dict of the columns for each row: its number, its size, and the loss of each model, in nats in all.
    write_card: a function of the folder, the metrics and the samples that adds a file of its own.
    """
    name = f"{metrics['run']}-{metrics['data']['name']}"
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    folder = next(evaluations / name for name in names if not (evaluations / name).exists())
    row, size, *models = columns
    with storage_errors("the evaluation", "mend that and evaluate again"), staged_folder(folder) as staged:
        write_json(staged / "metrics.json", metrics)
        with open(staged / "samples.jsonl", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        answers = [f"{model}_{column}" for model in models for column in ANSWER_COLUMNS]
        titles = ("row", "prompt", "expected", *models, *answers)
        write_table(staged / "samples.csv", titles, [flatten(sample, models) for sample in samples])
        losses = ([score[row], score[size], *(score[model] / score[size] for model in models)] for score in scores)
        write_table(staged / "rows.csv", (row, size, *(f"{model}_loss" for model in models)), losses)
        write_report(staged)
        write_card(staged, metrics, samples)
    return folder


ANSWER_COLUMNS = ("ended", "tokens", "exact_match", "chrf", "rouge_l", "repetition", "accuracy")


def flatten(sample, models):
    """A row of samples.csv; a figure that was not taken is an empty cell."""
    answers = [sample.get("answers", sample)[model] for model in models]
    texts = [sample["row"], sample["prompt"], sample["expected"], *(answer["text"] for answer in answers)]
    return texts + [answer.get(column, "") for answer in answers for column in ANSWER_COLUMNS]


# What a spreadsheet would run as a formula, also behind characters that it does not show
FORMULA = re.compile(
    r"[\s\x00-\x1f\x7f-\xa0\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]*[-=+@\uff1d\uff0b\uff0d\uff20]"
    r"|[\t\r]"
)


def write_table(path, columns, rows):
    """Write a CSV file for spreadsheets; a text that one would run as a formula gets an apostrophe before it."""

    def defused(cell):
        return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell

    table = pandas.DataFrame(rows, columns=list(map(defused, columns))).map(defused)  # names of runs are columns too
    # with all cells in quotes a carriage return alone ends no row either
    table.to_csv(path, index=False, encoding="utf-8-sig", quoting=csv.QUOTE_ALL)


# ---- Lines -----------------------------------------------------------------------------------------------------------
def show(line):
    """Print a line; texts of models, data and files in it steer no terminal."""
    print(printable(line), flush=True)


def print_report(folder, metrics, samples):
    """Print three answers, the figures and the verdict on stdout."""
    for sample in samples[:3]:
        show(f"\nPrompt:   {sample['prompt']}")
        for name in ("base", "tuned"):
            cut = "" if sample[name]["ended"] else " [cut]"
            show(f"{name.capitalize() + ':':<10}{sample[name]['text']}{cut}")
        show(f"Expected: {sample['expected']}")
    show(f"\n{describe_rows(metrics)}, {counted(metrics['answer_tokens'], 'answer token')}")
    show("        loss   perplexity")
    for name in ("base", "tuned"):
        figures = f"{metrics[name]['loss']:.4f}  {metrics[name]['perplexity']:10.2f}"
        show(f"{name:<6}{figures}  {metrics[name]['band']}")
    for line in answer_lines(metrics):
        show(line)
    show(verdict_line(metrics))
    if against := speaks_against(metrics["verdict"], metrics["difference"]):
        names = ", ".join(FIGURES[name][0] for name in against)
        show(f"But the answers themselves are {OPPOSITE[metrics['verdict']]} by {names}: read them")
    for line in benchmark_lines(metrics.get("benchmarks", {})):
        show(line)
    show(f"Written to {display_path(folder)}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


# Each figure of answers as it is printed: its name, and its form for shown_as()
FIGURES = {
    "ended": ("ended by itself", "%"),
    "mean_tokens": ("tokens", ".1f"),
    "length_ratio": ("length / expected", ".2f"),
    "repetition": ("repeated words", "%"),
    "exact_match": ("exact match", "%"),
    "chrf": ("chrF", ".1f"),
    "rouge_l": ("ROUGE-L", ".3f"),
    "accuracy": ("accuracy", "%"),
}


OPPOSITE = {"better": "worse", "worse": "better"}


def answer_lines(metrics):
    """The figures of the answers as a table of lines; none where nothing was answered."""
    base, tuned = metrics["base"], metrics["tuned"]
    if base.get("answers"):
        yield counted(base["answers"], "answer").ljust(18) + "  base  tuned  difference, 95 % interval"
    for name, (title, form) in FIGURES.items():
        if name in base:
            difference = metrics["difference"].get(name)
            change = ""
            if difference and difference["low"] is not None:
                mean, low, high = (shown_as(difference[key], form, "+") for key in ("mean", "low", "high"))
                change = f"  {mean} ({low} to {high})"
            yield f"{title:<18}{shown_as(base[name], form):>6} {shown_as(tuned[name], form):>6}{change}"


def verdict_line(metrics):
    """What the loss says of the tuned model, in one line; it claims nothing beyond the loss on these answers."""
    difference, rows = metrics["difference"], metrics["rows"]
    if metrics["verdict"] == TOO_FEW:
        return f"Verdict: none, of {counted(rows, 'row')}; give {FEWEST_ROWS} or more"
    low, high = sorted(abs(difference[end]) for end in ("low", "high"))
    for found, word in (("better", "lower"), ("worse", "higher")):
        if metrics["verdict"] == found:
            return (
                f"Verdict: {found}. The tuned model's loss on these answers is {word} by"
                f" {abs(difference['loss']):.3f} nats a token (95 % interval {low:.3f} to {high:.3f})"
            )
    return (
        f"Verdict: open. The loss on these answers shows no clear difference: {difference['loss']:+.3f} nats a token"
        f" (95 % interval {difference['low']:+.3f} to {difference['high']:+.3f})"
    )


def benchmark_lines(benchmarks):
    """The figures of benchmark_utils.measure as a table of lines; none where there are no benchmarks."""
    width = max([len(f"{task} {name}") for task, found in benchmarks.items() for name in found["metrics"]], default=0)
    if benchmarks:
        yield "Benchmarks".ljust(width) + "    base   tuned  difference, 95 % interval"
    for task, found in benchmarks.items():
        for name, figures in found["metrics"].items():
            change = ""
            if figures["low"] is not None:
                change = f"  {figures['mean']:+.4f} ({figures['low']:+.4f} to {figures['high']:+.4f})"
            rows = f", {counted(found['rows'], 'row')}"
            yield f"{f'{task} {name}':<{width}}  {figures['base']:.4f}  {figures['tuned']:.4f}{change}{rows}"


def print_comparison(folder, metrics):
    """Print the table of a comparison and its verdict on stdout."""
    adapters = metrics["adapters"]
    width = max(len(adapter["run"]) for adapter in adapters)
    shown = [name for name in ("ended", "chrf", "accuracy") if name in adapters[0]]
    titles = "".join(f"  {FIGURES[name][0]:>15}" for name in shown)
    show(f"\n{describe_rows(metrics)}, compared with {adapters[0]['run']} by the loss a {metrics['unit']}")
    show(f"{'':<{width}}    loss{titles}  difference in loss, 95 % interval")
    for adapter in adapters:
        cells = "".join(f"  {shown_as(adapter[name], FIGURES[name][1]):>15}" for name in shown)
        change = ""
        if adapter["difference"] and adapter["difference"]["low"] is not None:
            change = "  {mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**adapter["difference"])
        show(f"{adapter['run']:<{width}}  {adapter['loss']:.4f}{cells}{change}")
    show(f"Verdict: {metrics['verdict']}")
    show(f"Written to {display_path(folder)}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
