"""Measure an adapter against its base model on rows that it was not trained on.

    python evaluate.py                                           # output/lora-adapter on its own validation rows
    python evaluate.py --adapter_path output/checkpoints/checkpoint-40
    python evaluate.py --validation_dataset_path data/other.json
    python evaluate.py --compare output/lora-adapter output/previous/20261128-101500/lora-adapter
    python evaluate.py --benchmarks arc_easy --benchmark_limit 200

Writes metrics.json, samples.jsonl, samples.csv, rows.csv and report.html to output/evaluation/<run>-<rows>.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_script: Ctrl-C in the imports below leaves no traceback

import csv
import gc
import json
import platform
import re
import sys
import time
from collections import Counter, namedtuple
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from file_utils import check_writable, display_path, resolve_path, staged_folder, storage_errors, write_json
from message_utils import LateImport, UserError, printable, quiet_libraries, run_script, say, start_garbage_collection
from progress_utils import progress
from run_utils import CACHE, EVALUATION, VALIDATION_ROWS, find_adapter, find_run_folder, read_run_name
from settings_utils import USED_SETTINGS, build_parser, make_settings, parse_command_line

# These rooms import torch or other libraries, which takes seconds: --help and a mistyped flag are answered before.
benchmark_utils = LateImport("benchmark_utils")
data_utils = LateImport("data_utils")
engine_passes = LateImport("engine_passes")
engine_runner = LateImport("engine_runner")
evidence_utils = LateImport("evidence_utils")
fit_utils = LateImport("fit_utils")
generation_utils = LateImport("generation_utils")
model_utils = LateImport("model_utils")
numpy = LateImport("numpy")
page_utils = LateImport("page_utils")
pandas = LateImport("pandas")
plan_utils = LateImport("plan_utils")
report_utils = LateImport("report_utils")
score_utils = LateImport("score_utils")
token_utils = LateImport("token_utils")

MEASURED_BY = ("torch", "transformers", "peft", "bitsandbytes", "sacrebleu", "rouge-score")

# The rows to measure, without those that are left out: Conversations; the name of the rows, which becomes that of a
# folder, and where they come from; and how many of them the adapter was trained on, of how many it was trained on the
# prompt with another answer, and how many its run was validated with: None where nobody knows.
Measured = namedtuple("Measured", "conversations name path trained prompt_trained validated left_out")


def main(argv):
    parser = build_parser("evaluate.py", __doc__)
    parser.add_argument("--adapter_path", help="adapter to measure (default: OUTPUT_DIR/lora-adapter)")
    parser.add_argument(
        "--include_trained_rows", action="store_true", help="measure on rows that it was trained on too, and say so"
    )
    parser.add_argument(
        "--benchmarks", nargs="+", metavar="TASK", default=(), help="tasks of lm-evaluation-harness, or a task's file"
    )
    parser.add_argument("--benchmark_limit", type=int, metavar="ROWS", help="rows of each task (default: all)")
    parser.add_argument("--compare", nargs="+", metavar="ADAPTER", help="measure two or more adapters on the same rows")
    options, given = parse_command_line(parser, argv)
    if options.benchmark_limit is not None and (not options.benchmarks or options.benchmark_limit < 1):
        raise UserError("--benchmark_limit takes the number of rows of each of the --benchmarks; give both, or neither")
    quiet_libraries()
    adapter_path, output_dir = find_adapter(options, given)
    if options.compare is None:
        evaluate(adapter_path, output_dir, given, options)
    else:
        compare_adapters(check_compared(options), output_dir, given, options)


def evaluate(adapter_path, output_dir, given, options):
    """The phases: settings, rows, model, losses, answers and benchmarks of base and tuned, report."""
    settings = make_settings(given, model_utils.read_recorded_settings(adapter_path), "evaluate.py")
    # the figures of a run lie beside its adapter, unless another folder is asked for
    home = output_dir if "output_dir" in given else find_run_folder(adapter_path) or output_dir
    check_writable(home / EVALUATION, "--output_dir")
    tasks = find_benchmarks(options.benchmarks)
    measured = choose_rows(settings, [adapter_path], output_dir, home / CACHE, options.include_trained_rows)
    model, tokenizer = model_utils.load_trained_model(adapter_path, settings)
    start_garbage_collection()
    rows = tokenize_rows(tokenizer, measured.conversations, settings, home / CACHE)
    fit_utils.check_rows(model, tokenizer, rows, "validation data")
    scores = measure_losses(model, settings, rows)
    samples, check = choose_samples(measured.conversations, settings)
    tuned = measure_answers(model, tokenizer, samples, check, settings, "the tuned model")
    with model.disable_adapter():
        base = measure_answers(model, tokenizer, samples, check, settings, "the base model")
    samples = [sample | {"base": b, "tuned": t} for sample, b, t in zip(samples, base, tuned, strict=True)]
    metrics = describe(adapter_path, settings, measured) | compare(scores, samples) | {"answer_check": check}
    if tasks:
        metrics["benchmarks"] = benchmark_utils.measure(
            model, tokenizer, tasks, options.benchmark_limit, settings.batch_size
        )
    folder = write_results(home / EVALUATION, metrics, samples, ("row", "tokens", "base", "tuned"), scores)
    print_report(folder, metrics, samples)


def find_benchmarks(names):
    """What benchmark_utils.find_tasks makes of the names, or None where there are none."""
    if names and find_spec("lm_eval") is None:
        raise UserError("--benchmarks needs lm-evaluation-harness: pip install -r requirements-benchmarks.txt")
    return benchmark_utils.find_tasks(names) if names else None


# ---- Rows ------------------------------------------------------------------------------------------------------------
def choose_rows(settings, adapter_paths, output_dir, cache_dir, include_trained):
    """The rows to measure, after saying how many of them the adapters were trained on; returns Measured.

    They are those of VALIDATION_DATASET_PATH, or else those that the first adapter's run held out. Rows that one of
    them was trained on are left out unless include_trained is true.
    """
    seen = [evidence_utils.read_seen_rows(path) for path in adapter_paths]
    if settings.validation_dataset_path is not None:
        path, columns = settings.validation_dataset_path, settings.dataset_columns
        found = data_utils.load_announced("Validation data", path, columns, cache_dir, settings.chosen_only)[0]
        name = re.sub(r"[^\w.-]+", "-", Path(path).stem)[:60].strip("-.") or "rows"
    else:
        path = find_own_rows(adapter_paths[0], output_dir, seen[0], cache_dir)
        found, name, path = load_own_rows(path, cache_dir), "validation", display_path(path)
    who = "the adapter was" if len(adapter_paths) == 1 else "these adapters were"
    if None in seen:
        unknown = display_path(adapter_paths[seen.index(None)])
        say(
            f"Whether {who} trained on these {len(found):,} rows is unknown: {unknown} carries no"
            f" {evidence_utils.SEEN_ROWS}"
        )
        return Measured(found, name, path, None, None, None, 0)
    overlaps = [evidence_utils.find_overlap(each, found) for each in seen]
    overlap = evidence_utils.Overlap(*map(numpy.logical_or.reduce, zip(*overlaps, strict=True)))
    trained = int(overlap.trained.sum())
    say_overlap(len(found), overlap, include_trained, who)
    if trained == len(found) and not include_trained:
        raise UserError(
            f"{who} trained on all {len(found):,} rows of {path}, so they tell nothing of new ones; give"
            " others by --validation_dataset_path, or measure these by --include_trained_rows"
        )
    kept = numpy.ones(len(found), dtype=bool) if include_trained else ~overlap.trained
    counts = [int(mask[kept].sum()) for mask in overlap]
    return Measured(found.select(kept), name, path, *counts, 0 if include_trained else trained)


def say_overlap(rows, overlap, include_trained, who):
    """Say how many of the rows an adapter was trained on, and what becomes of them."""
    trained, prompt_trained = int(overlap.trained.sum()), int(overlap.prompt_trained.sum())
    what = f"{who} trained on {trained or 'none':{',' if trained else ''}} of them"
    if trained:
        fate = "measured too" if include_trained else "left out (--include_trained_rows measures them too)"
        what += f", which {'is' if trained == 1 else 'are'} {fate}"
    if prompt_trained:
        what += f"; on {prompt_trained:,} more of the prompts with another answer"
    say(f"{rows:,} rows: {what}")


def find_own_rows(adapter_path, output_dir, seen, cache_dir):
    """The file of the rows that the adapter's run held out: beside the adapter, or in OUTPUT_DIR.

    The adapter's digests prove that they are its own. One without digests is believed about what lies beside it.
    """
    remedy = "give rows by --validation_dataset_path"
    folders = [*adapter_path.parents[:2], *([output_dir] if seen else [])]
    files = [folder / VALIDATION_ROWS for folder in dict.fromkeys(folders) if (folder / VALIDATION_ROWS).is_file()]
    if seen is None and files:
        return files[0]
    if seen is not None and not len(seen.validated):
        raise UserError(f"the adapter was trained without validation rows; {remedy}")
    for path in files if seen is not None else ():
        if evidence_utils.is_own_validation(seen, load_own_rows(path, cache_dir)):
            return path
    if files:
        raise UserError(f"{display_path(files[0])} does not hold the rows that this adapter's run held out; {remedy}")
    raise UserError(
        f"no {VALIDATION_ROWS} lies beside {display_path(adapter_path)}, so the rows that its run held out are unknown;"
        f" {remedy}"
    )


def load_own_rows(path, cache_dir):
    """The Conversations of a run's validation.jsonl, with the numbers that they had in the user's file."""
    return data_utils.load_conversations(path, cache_dir=cache_dir, number_column="row")[0]


def tokenize_rows(tokenizer, conversations, settings, cache_dir):
    """Tokenize the rows as training did, and say what it did to them."""

    rows = token_utils.tokenize_conversations(
        tokenizer, conversations, settings.max_seq_length, "validation data", cache_dir
    )
    if not len(rows):
        raise UserError(f"--max_seq_length {settings.max_seq_length} leaves no token of an answer; raise it")
    for line in report_utils.token_lines("validation", report_utils.describe_tokens(rows), settings.max_seq_length):
        say(line)
    return rows


# ---- Losses ----------------------------------------------------------------------------------------------------------
def measure_losses(model, settings, rows):
    """The scores of base and tuned on the same answers, [{"row", "tokens", "base", "tuned"}] in nats, one a row.

    A conversation that was tokenized as several sequences is one row: what its answers share would count twice.
    """
    with engine_runner.StepRunner(model, plan_utils.plan_scores(model, settings, rows)) as runner:
        tuned = score_with_progress(runner, rows, "the tuned model")
        with model.disable_adapter():
            base = score_with_progress(runner, rows, "the base model")
    scores = {}
    for number, (base_nll, tokens), (tuned_nll, _) in zip(rows.index["row"].tolist(), base, tuned, strict=True):
        score = scores.setdefault(number, {"row": number, "tokens": 0, "base": 0.0, "tuned": 0.0})
        score["tokens"] += tokens
        score["base"] += base_nll
        score["tuned"] += tuned_nll
    return list(scores.values())


def score_with_progress(runner, rows, name):
    passes = len(engine_passes.pack_rows(rows.index["length"].tolist(), runner.plan.max_pass_tokens))
    with progress(f"Measuring {name}", total=passes, unit="passes") as bar:
        return runner.score(rows, before_pass=bar.update)


# ---- Answers ---------------------------------------------------------------------------------------------------------
def choose_samples(conversations, settings):
    """EVAL_SAMPLES rows from all parts of the file, and by what their answers are right: (samples, check).

    A sample is {"row", "prompt", "messages", "expected"}: the last question's text, the whole prompt, the answer. The
    check is a key of score_utils.CHECKS, or None.
    """
    number = min(settings.eval_samples, len(conversations))
    samples = []
    for position in numpy.linspace(0, len(conversations) - 1, number).round():
        row, messages = conversations[int(position)]
        end = data_utils.last_answer(messages)
        expected = data_utils.words_of(messages[end]).strip()
        prompt = messages[:end]
        samples.append({"row": row, "prompt": prompt[-1]["content"], "messages": prompt, "expected": expected})
    check = score_utils.choose_check(settings.answer_check, [sample["expected"] for sample in samples])
    if check:
        say(f"Accuracy: the expected answers {score_utils.CHECKS[check][2]} (ANSWER_CHECK = {settings.answer_check!r})")
    return samples, check


def measure_answers(model, tokenizer, samples, check, settings, name):
    """The model's likeliest answer to each sample: a dict of text, ended, tokens and what score_answer gives."""
    generation = generation_utils.build_generation_config(tokenizer, settings._replace(do_sample=False))
    with progress(f"Answers of {name}", total=len(samples), unit="answers") as bar:
        replies = generation_utils.generate_replies(
            model,
            tokenizer,
            [sample["messages"] for sample in samples],
            generation,
            max_prompt_tokens=settings.max_seq_length,
            on_reply=lambda index, reply: bar.update(),
        )
    return [
        reply._asdict() | score_utils.score_answer(reply.text, sample["expected"], check)
        for sample, reply in zip(samples, replies, strict=True)
    ]


# ---- Figures ---------------------------------------------------------------------------------------------------------
def describe(adapter_path, settings, measured):
    """What was measured with what: the part of metrics.json that names things."""
    return name_adapter(adapter_path, settings) | describe_measured(settings, measured)


def name_adapter(adapter_path, settings):
    return {
        "run": read_run_name(adapter_path),
        "adapter": display_path(adapter_path),
        "base_model": settings.base_model_name,
    }


def describe_measured(settings, measured):
    """The rows that were measured and how, of one adapter or of several."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "data": {
            "name": measured.name,
            "path": str(measured.path),
            "rows": len(measured.conversations),
            "sha256": measured.conversations.fingerprint(),
        },
        "held_out": measured.trained == 0,
        "trained_rows_seen": None if measured.trained is None else measured.trained + measured.left_out,
        "trained_rows_left_out": measured.left_out,
        "trained_prompts_seen": measured.prompt_trained,
        "validation_rows_of_the_run": measured.validated,
        "settings": {name: value for name, value in settings._asdict().items() if name in USED_SETTINGS["evaluate.py"]},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in MEASURED_BY},
    }


def compare(scores, samples):
    """The figures of base and tuned, their differences with 95 % intervals, and the verdict on the loss.

    scores: measure_losses'; samples: measure_answers'.
    """
    tokens, base, tuned = (numpy.array([score[name] for score in scores]) for name in ("tokens", "base", "tuned"))
    metrics = {"rows": len(scores), "answer_tokens": int(tokens.sum())}
    expected = [sample["expected"] for sample in samples]
    for name, sums in (("base", base), ("tuned", tuned)):
        loss = float(sums.sum() / tokens.sum())
        perplexity = engine_passes.perplexity(loss)
        metrics[name] = {"loss": loss, "perplexity": perplexity, "band": score_utils.band(perplexity)}
        metrics[name] |= score_utils.summarize_answers([sample[name] for sample in samples], expected)
    change = score_utils.ratio_interval(tuned - base, tokens)
    metrics["difference"] = score_utils.as_figures(change, "loss") | score_utils.compare_answers(
        [sample["base"] for sample in samples], [sample["tuned"] for sample in samples]
    )
    return metrics | {"verdict": score_utils.verdict(len(scores), *change[1:])}


# ---- Several adapters ------------------------------------------------------------------------------------------------
def check_compared(options):
    """The adapters of --compare as paths; UserError unless there are two or more different ones."""
    paths = [resolve_path(path) for path in options.compare]
    if len(paths) < 2 or options.adapter_path is not None or options.benchmarks:
        raise UserError("--compare takes two or more adapters, without --adapter_path and --benchmarks")
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--compare names {display_path(path)} twice; give different adapters")
    return paths


def compare_adapters(paths, output_dir, given, options):
    """The phases of a comparison: settings, rows, the losses and answers of one adapter after the other, report."""
    settings = [make_settings(given, model_utils.read_recorded_settings(path), "evaluate.py") for path in paths]
    # one limit for all: cut at different places, the same rows would be different ones
    longest = max(each.max_seq_length for each in settings)
    settings = [each._replace(max_seq_length=longest) for each in settings]
    check_writable(output_dir / EVALUATION, "--output_dir")
    measured = choose_rows(settings[0], paths, output_dir, output_dir / CACHE, options.include_trained_rows)
    samples, check = choose_samples(measured.conversations, settings[0])
    adapters = name_adapters(paths, settings)
    found = []
    for path, each, adapter in zip(paths, settings, adapters, strict=True):
        say(f"Adapter {adapter['run']}: {adapter['adapter']}")
        found.append(measure_adapter(path, each, measured.conversations, samples, check, output_dir / CACHE))
        gc.collect()  # its model goes before the next one is loaded
    metrics, columns, rows = compare_scores(adapters, [scores for scores, _ in found], measured.conversations)
    expected = [sample["expected"] for sample in samples]
    for adapter, (_, answers) in zip(metrics["adapters"], found, strict=True):
        adapter |= score_utils.summarize_answers(answers, expected)
    answers = [
        dict(zip(columns[2:], each, strict=True)) for each in zip(*(answers for _, answers in found), strict=True)
    ]
    samples = [sample | {"answers": each} for sample, each in zip(samples, answers, strict=True)]
    metrics = {"run": "comparison"} | describe_measured(settings[0], measured) | metrics | {"answer_check": check}
    folder = write_results(output_dir / EVALUATION, metrics, samples, columns, rows)
    print_comparison(folder, metrics)


def name_adapters(paths, settings):
    """What names each adapter in a comparison; of those of one run the folder is told too."""
    adapters = [name_adapter(path, each) for path, each in zip(paths, settings, strict=True)]
    names = [adapter["run"] for adapter in adapters]
    for adapter in adapters:
        if names.count(adapter["run"]) > 1:
            adapter["run"] = f"{adapter['run']} in {adapter['adapter']}"
    return adapters


def measure_adapter(adapter_path, settings, conversations, samples, check, cache_dir):
    """(the scores of base and tuned on all rows, the tuned model's answers to the samples) of one adapter."""
    model, tokenizer = model_utils.load_trained_model(adapter_path, settings)
    start_garbage_collection()
    rows = tokenize_rows(tokenizer, conversations, settings, cache_dir)
    fit_utils.check_rows(model, tokenizer, rows, "validation data")
    scores = measure_losses(model, settings, rows)
    return scores, measure_answers(model, tokenizer, samples, check, settings, "the tuned model")


def compare_scores(adapters, scores, conversations):
    """(the figures of a comparison, the columns of rows.csv, its rows) of the scores of each adapter.

    Compared are the rows that all could be measured on, by the loss a token; where adapters cut the answers into
    different tokens, by the loss a character. Each is compared with the first.
    """
    found = [{score["row"]: score for score in each} for each in scores]
    rows = [row for row in found[0] if all(row in each for each in found)]
    if not rows:
        raise UserError("these adapters have no row in common that all of them can be measured on; give other rows")
    tokens = numpy.array([[each[row]["tokens"] for row in rows] for each in found])
    unit, sizes = "token", tokens[0]
    if (tokens != tokens[0]).any():
        unit = "character"
        lengths = Counter()
        for row, messages in conversations:
            lengths[row] += sum(map(len, trained_texts(messages)))
        sizes = numpy.array([max(lengths[row], 1) for row in rows])
    sums = {name: numpy.array([[each[row][name] for row in rows] for each in found]) for name in ("base", "tuned")}
    described = []
    for adapter, base, tuned in zip(adapters, sums["base"], sums["tuned"], strict=True):
        figures = {"loss": float(tuned.sum() / sizes.sum()), "base_loss": float(base.sum() / sizes.sum())}
        if unit == "token":
            perplexity = engine_passes.perplexity(figures["loss"])
            figures |= {"perplexity": perplexity, "band": score_utils.band(perplexity)}
        figures |= {"difference": None, "verdict": None}
        if described:
            change = score_utils.ratio_interval(tuned - sums["tuned"][0], sizes)
            figures["difference"] = score_utils.as_figures(change)
            figures["verdict"] = score_utils.verdict(len(rows), *change[1:])
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
    return [data_utils.words_of(message) for message in messages if data_utils.is_trained(message)]


def comparison_verdict(adapters):
    """What the intervals of several adapters, each against the first one, say in one sentence."""
    first, *others = adapters
    verdicts = {adapter["verdict"] for adapter in others}
    if score_utils.TOO_FEW in verdicts:
        return "Too few rows for a verdict."
    if better := [adapter for adapter in others if adapter["verdict"] == "better"]:
        return f"{min(better, key=lambda adapter: adapter['loss'])['run']} is better than {first['run']}."
    if verdicts == {"worse"}:
        return f"{first['run']} is better than {'all others' if len(others) > 1 else others[0]['run']}."
    return f"None is clearly better than {first['run']}."


def print_comparison(folder, metrics):
    """Print the table of a comparison and its verdict on stdout."""
    adapters = metrics["adapters"]
    width = max(len(adapter["run"]) for adapter in adapters)
    shown = [name for name in ("ended", "chrf", "accuracy") if name in adapters[0]]
    titles = "".join(f"  {FIGURES[name][0]:>15}" for name in shown)
    print(f"\n{describe_rows(metrics)}, compared with {adapters[0]['run']} by the loss a {metrics['unit']}")
    print(f"{'':<{width}}    loss{titles}  difference in loss, 95 % interval")
    for adapter in adapters:
        cells = "".join(f"  {FIGURES[name][1].format(adapter[name]):>15}" for name in shown)
        change = ""
        if adapter["difference"] and adapter["difference"]["low"] is not None:
            change = "  {mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**adapter["difference"])
        print(f"{printable(adapter['run']):<{width}}  {adapter['loss']:.4f}{cells}{change}")
    print(f"Verdict: {metrics['verdict']}")
    print(f"Written to {display_path(folder)}: {', '.join(sorted(path.name for path in folder.iterdir()))}", flush=True)


# ---- Report ----------------------------------------------------------------------------------------------------------
def write_results(evaluations, metrics, samples, columns, scores):
    """Write what was measured to a folder of its own in `evaluations`, <run>-<rows>, and return it.

    An earlier one of that name stays, and this one gets a number. Nothing of it is there until all of it is. `scores`
    are a dict of the columns for each row: its number, its size, and the loss of each model, in nats in all.
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
        page_utils.write_report(staged)
    return folder


ANSWER_COLUMNS = ("ended", "tokens", "exact_match", "chrf", "rouge_l", "repetition", "accuracy")


def flatten(sample, models):
    """A row of samples.csv; a figure that was not taken is an empty cell."""
    answers = [sample.get("answers", sample)[model] for model in models]
    texts = [sample["row"], sample["prompt"], sample["expected"], *(answer["text"] for answer in answers)]
    return texts + [answer.get(column, "") for answer in answers for column in ANSWER_COLUMNS]


# What a spreadsheet would run as a formula, also behind characters that it does not show
FORMULA = re.compile(r"[\s\x00-\x1f\x7f-\xa0\u00ad\u200b-\u200f\u2060\ufeff]*[-=+@\uff1d\uff0b\uff0d\uff20]|[\t\r]")


def write_table(path, columns, rows):
    """Write a CSV file for spreadsheets; a text that one would run as a formula gets an apostrophe before it."""
    table = pandas.DataFrame(rows, columns=columns)
    table = table.map(lambda cell: f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell)
    # with all cells in quotes a carriage return alone ends no row either
    table.to_csv(path, index=False, encoding="utf-8-sig", quoting=csv.QUOTE_ALL)


def print_report(folder, metrics, samples):
    """Print three answers, the figures and the verdict on stdout."""
    for sample in samples[:3]:
        print(f"\nPrompt:   {printable(sample['prompt'])}")
        for name in ("base", "tuned"):
            cut = "" if sample[name]["ended"] else " [cut]"
            print(f"{name.capitalize() + ':':<10}{printable(sample[name]['text'])}{cut}")
        print(f"Expected: {printable(sample['expected'])}")
    print(f"\n{describe_rows(metrics)}, {metrics['answer_tokens']:,} answer tokens")
    print("        loss   perplexity")
    for name in ("base", "tuned"):
        figures = f"{metrics[name]['loss']:.4f}  {metrics[name]['perplexity']:10.2f}"
        print(f"{name:<6}{figures}  {metrics[name]['band']}")
    for line in answer_lines(metrics):
        print(line)
    print(verdict_line(metrics))
    for line in benchmark_lines(metrics.get("benchmarks", {})):
        print(line)
    print(f"Written to {display_path(folder)}: {', '.join(sorted(path.name for path in folder.iterdir()))}", flush=True)


def describe_rows(metrics):
    """'20 held-out rows', and nothing better of rows that the adapter has seen or may have seen."""
    rows = f"{metrics['rows']:,}"
    if metrics["held_out"]:
        return f"{rows} held-out rows"
    if metrics["trained_rows_seen"] is None:
        return f"{rows} rows, which may have been trained on"
    return f"{rows} rows, {metrics['trained_rows_seen']:,} of them trained on"


# Each figure of answers as it is printed: its name, and the format of a value
FIGURES = {
    "ended": ("ended by itself", "{:.0%}"),
    "mean_tokens": ("tokens", "{:.1f}"),
    "length_ratio": ("length / expected", "{:.2f}"),
    "repetition": ("repeated words", "{:.0%}"),
    "exact_match": ("exact match", "{:.0%}"),
    "chrf": ("chrF", "{:.1f}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "accuracy": ("accuracy", "{:.0%}"),
}


def answer_lines(metrics):
    """The figures of the answers as a table of lines; none where nothing was answered."""
    base, tuned = metrics["base"], metrics["tuned"]
    if base.get("answers"):
        yield f"{base['answers']:,} answers".ljust(18) + "  base  tuned  difference, 95 % interval"
    for name, (title, shown) in FIGURES.items():
        if name in base:
            difference = metrics["difference"].get(name)
            signed = shown.replace(":", ":+")
            change = ""
            if difference and difference["low"] is not None:
                mean, low, high = (signed.format(difference[key]) for key in ("mean", "low", "high"))
                change = f"  {mean} ({low} to {high})"
            yield f"{title:<18}{shown.format(base[name]):>6} {shown.format(tuned[name]):>6}{change}"


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
            rows = f", {found['rows']:,} rows"
            yield f"{f'{task} {name}':<{width}}  {figures['base']:.4f}  {figures['tuned']:.4f}{change}{rows}"


def verdict_line(metrics):
    """What the loss says of the tuned model, in one line; it claims nothing beyond the loss on these answers."""
    difference, rows = metrics["difference"], metrics["rows"]
    if metrics["verdict"] == score_utils.TOO_FEW:
        return f"Verdict: none, {rows} rows are too few; give {score_utils.FEWEST_ROWS} or more"
    word = {"better": "lower", "worse": "higher"}.get(metrics["verdict"])
    found = f"the tuned model's loss on these answers is {word}" if word else "no clear difference in the loss"
    interval = f"{difference['low']:+.3f} to {difference['high']:+.3f}"
    kind = metrics["verdict"] if word else "open"
    return f"Verdict: {kind}; {found}, by {difference['loss']:+.3f} nats a token (95 % interval {interval})"


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
