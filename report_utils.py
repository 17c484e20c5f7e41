"""The data report: what became of every row, lengths, what is trained, and what looks wrong with the answers."""

import sys

import numpy as np

from call_utils import ID_FORMS
from data_utils import last_answer, list_rows
from message_utils import UserError, counted, say
from prompt_utils import id_form, uses_reasoning
from token_utils import ANSWER_CUT, DROPPED, KEPT, SHORTENED

QUANTILES = {"min": 0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1}
BARS, PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"  # the second for terminals that are not UTF-8
BUCKETS = 16
COMMON_ANSWER, COMMON_PART = 0.2, 0.5  # shares of the rows from which a repeated answer, or its words, are worth a line


# ---- Figures ---------------------------------------------------------------------------------------------------------
def build_report(read, train, validation, train_rows, validation_rows, max_seq_length, tokenizer):
    """The report as one JSON object.

    `read` is a list of DataReport, `train` and `validation` are Conversations, the rows TokenizedRows of them by the
    `tokenizer`.
    """
    reasoning, calls = (sum(getattr(report, name) for report in read) for name in ("reasoning", "calls"))
    form = id_form(tokenizer) if calls else None
    prompts = validation.index["prompt"]
    leaked = np.isin(prompts, train.index["prompt"]) & (prompts != 0)  # whole texts have none
    return {
        "files": [vars(report) for report in read],
        "max_seq_length": max_seq_length,
        "training": describe_tokens(train_rows),
        "validation": describe_tokens(validation_rows) if len(validation) else None,
        "validation_prompts_also_trained": tally(validation.index["number"][leaked]),
        "answers": describe_answers(train),
        "reasoning_not_used": reasoning if reasoning and not uses_reasoning(tokenizer) else 0,
        "ids_made": {
            "form": form,
            "count": calls - sum(report.ids_taken.get(form, 0) for report in read) if form else 0,
        },
    }


def tally(numbers):
    """{"count": 7, "rows": [the first five row numbers]}."""
    return {"count": len(numbers), "rows": sorted(numbers.tolist())[:5]}


def describe_tokens(rows):
    """Counts, lengths in tokens and the trained share of TokenizedRows; lengths are those before cutting."""
    found = rows.all_rows
    full, status, numbers = found["full_length"], found["status"], found["row"]
    counts, edges = np.histogram(full, bins=BUCKETS, range=(0, max(int(np.quantile(full, 0.99)), 1)))
    return {
        "rows": len(status),
        "whole": int((status == KEPT).sum()),
        "shortened": tally(numbers[status == SHORTENED]),
        "answer_cut": tally(numbers[status == ANSWER_CUT]),
        "no_trainable_token": tally(numbers[status == DROPPED]),
        "tokens": int(rows.index["length"].sum()),
        "trained_tokens": int(rows.index["trained"].sum()),
        "length_quantiles": {name: int(np.quantile(full, share)) for name, share in QUANTILES.items()},
        "histogram": {"counts": counts.tolist(), "up_to": int(edges[-1]), "longer": int((full > edges[-1]).sum())},
        "length_that_cuts_none": int(full.max()),
        "further_sequences": tally(numbers[found["further"] == 1]),
        "answers_with_control_tokens": tally(numbers[found["control"] == 1]),
        "prompts_with_control_tokens": tally(numbers[found["other_control"] == 1]),
    }


def describe_answers(conversations):
    """The most common last answer, and the most common first and last four words of longer ones, with their shares."""
    found = {}
    for part in ("answer", "opening", "closing"):
        values, first, counts = np.unique(conversations.index[part], return_index=True, return_counts=True)
        counts[values == 0] = 0
        most = int(counts.argmax())
        messages = conversations[int(first[most])][1]
        text = messages[last_answer(messages)]["content"].split()
        words = {"answer": text[:12], "opening": text[:4], "closing": text[-4:]}[part]
        share = float(counts[most]) / len(conversations)
        found[part] = {"text": " ".join(words)[:80], "share": round(share, 4), "count": int(counts[most])}
    return found


# ---- Lines -----------------------------------------------------------------------------------------------------------
def print_report(report):
    """Say the report: a dense line for each set of rows, and a notice where something looks wrong."""
    for name in ("training", "validation"):
        if report[name]:
            for line in token_lines(name, report[name], report["max_seq_length"]):
                say(line)
    for line in notices(report):
        say(f"Notice: {line}")


def token_lines(name, found, max_seq_length):
    lengths = found["length_quantiles"]
    yield (
        f"{name.capitalize()}: {counted(found['rows'], 'row')}, {counted(found['tokens'], 'token')},"
        f" {found['trained_tokens'] / max(found['tokens'], 1):.0%} trained; tokens a row: {lengths['min']:,} to"
        f" {lengths['max']:,}, median {lengths['median']:,}, 90 % within {lengths['90 %']:,}, 99 % within"
        f" {lengths['99 %']:,}"
    )
    histogram = found["histogram"]
    longer = f", {histogram['longer']:,} longer" if histogram["longer"] else ""
    yield f"  rows by length |{draw_bars(histogram['counts'])}| 0 to {histogram['up_to']:,} tokens{longer}"
    fates = (
        ("shortened", "with the prompt's start cut off, answer whole"),
        ("answer_cut", "with the answer's end cut off"),
        ("no_trainable_token", "dropped: no trainable token"),
    )
    cut = [
        f"{found[fate]['count']:,} {what} ({list_rows(**found[fate])})" for fate, what in fates if found[fate]["count"]
    ]
    if cut:
        yield (
            f"  --max_seq_length {max_seq_length}: {counted(found['whole'], 'row')} whole, {', '.join(cut)};"
            f" {found['length_that_cuts_none']:,} would cut none"
        )


def draw_bars(counts):
    """A histogram in one line. A bucket that holds any row shows a bar."""
    try:
        bars = BARS
        bars.encode(sys.stderr.encoding or "ascii")
    except UnicodeEncodeError:
        bars = PLAIN_BARS
    highest = max([*counts, 1])
    return "".join(bars[-(-count * (len(bars) - 1) // highest)] for count in counts)


def notices(report):
    """Lines on what a user should look at. It may well be meant that way."""
    leaked, answers, made = (report[name] for name in ("validation_prompts_also_trained", "answers", "ids_made"))
    if leaked["count"]:
        yield (
            f"{counted(leaked['count'], 'validation prompt')} with a twin in the training rows ({list_rows(**leaked)});"
            " the validation loss flatters"
        )
    further = report["training"]["further_sequences"]
    if further["count"]:
        yield (
            f"the model's template or tokenizer writes earlier answers otherwise than the last one, so"
            f" conversations with several answers become several rows: {counted(further['count'], 'further row')}"
            f" ({list_rows(**further)})"
        )
    control = report["training"]["answers_with_control_tokens"]
    if control["count"]:
        found = counted(control["count"], "answer")
        yield f"{found} with control tokens, trained as plain text ({list_rows(**control)})"
    prompted = report["training"]["prompts_with_control_tokens"]
    if prompted["count"]:
        yield (
            f"{counted(prompted['count'], 'prompt')} with control tokens or other marks of a chat template, read as"
            f" plain text ({list_rows(**prompted)}); if the rows were templated already, give the bare texts"
        )
    if report["reasoning_not_used"]:
        yield (
            f"{counted(report['reasoning_not_used'], 'answer')} with reasoning_content, which is not used: the model's"
            " template, at its defaults, has no place for it"
        )
    if made["count"]:
        yield (
            f"the model's template wants {ID_FORMS[made['form']].description}, which are made for"
            f" {counted(made['count'], 'call')} without one, and for their results"
        )
    if answers["answer"]["share"] >= COMMON_ANSWER:
        yield f"{answers['answer']['share']:.0%} of the training rows have one answer: {answers['answer']['text']!r}"
    for part, what in (("opening", "begin"), ("closing", "end")):
        if answers[part]["share"] >= COMMON_PART:
            yield f"{answers[part]['share']:.0%} of the answers {what} with {answers[part]['text']!r}"


def check_cut_limit(report, limit):
    """Raise UserError if more than `limit` of all rows lost the end of their answer or were dropped.

    Rows that say themselves that they are not to be learned do not count.
    """
    sets = [found for found in (report["training"], report["validation"]) if found]
    left_out = sum(file["left_out"] for file in report["files"])
    read = sum(file["rows"] for file in report["files"]) - left_out
    dropped = sum(count["count"] for file in report["files"] for count in file["dropped"].values()) - left_out
    used = sum(found["rows"] for found in sets)  # with --max_train_rows fewer than were read
    cut = sum(found["answer_cut"]["count"] + found["no_trainable_token"]["count"] for found in sets)
    if dropped / read + (1 - dropped / read) * cut / used > limit:
        longest = max(found["length_that_cuts_none"] for found in sets)
        raise UserError(
            f"{dropped:,} of {counted(read, 'row')} dropped, {cut:,} of {used:,} without the end of their answer,"
            f" together more than {limit:.0%}; mend the data, raise --max_seq_length ({longest:,} cuts none), or accept"
            " it by --answers_cut_limit 1"
        )
