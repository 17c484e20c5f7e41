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

import gc
import platform
import re
import sys
import time
from collections import namedtuple
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from file_utils import check_writable, display_path, resolve_path
from message_utils import UserError, counted, quiet_libraries, say, say_once
from progress_utils import progress
from run_utils import CACHE, EVALUATION, find_adapter, find_run_folder, read_run_name
from script_utils import LateImport, run_script, start_garbage_collection
from settings_utils import USED_SETTINGS, build_parser, make_settings, parse_command_line

# These rooms import torch or other libraries, which takes seconds: --help and a mistyped flag are answered before.
benchmark_utils = LateImport("benchmark_utils")
data_utils = LateImport("data_utils")
engine_passes = LateImport("engine_passes")
engine_runner = LateImport("engine_runner")
evidence_utils = LateImport("evidence_utils")
export_utils = LateImport("export_utils")
fit_utils = LateImport("fit_utils")
generation_utils = LateImport("generation_utils")
model_utils = LateImport("model_utils")
numpy = LateImport("numpy")
plan_utils = LateImport("plan_utils")
report_utils = LateImport("report_utils")
result_utils = LateImport("result_utils")
score_utils = LateImport("score_utils")
token_utils = LateImport("token_utils")

MEASURED_BY = ("torch", "transformers", "peft", "bitsandbytes", "sacrebleu", "rouge-score")

# The rows to measure, without those that are left out: Conversations; the name of the rows, which becomes that of a
# folder, and where they come from; and how many of them the adapter was trained on, on some answers of how many, on
# a prompt of how many with another answer, and how many its run was validated with: None where nobody knows.
Measured = namedtuple("Measured", "conversations name path trained partly prompt_trained validated left_out")


def main(argv):
    parser = build_parser("evaluate.py", __doc__)
    parser.add_argument("--adapter_path", help="adapter or merged model to measure (default: OUTPUT_DIR/lora-adapter)")
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
    settings = make_settings(given, model_utils.read_settings(adapter_path), "evaluate.py")
    # the figures of a run lie beside its adapter, unless another folder is asked for
    home = output_dir if "output_dir" in given else find_run_folder(adapter_path) or output_dir
    check_writable(home / EVALUATION, "--output_dir")
    tasks = find_benchmarks(options.benchmarks)
    measured = choose_rows(settings, [adapter_path], output_dir, home / CACHE, options.include_trained_rows)
    samples, check = choose_samples(measured.conversations, settings)
    rows, losses, answers, benchmarks = None, {}, {}, {}
    for name, model, tokenizer in model_utils.tuned_and_base(adapter_path, settings):
        start_garbage_collection()
        if rows is None:
            rows = tokenize_rows(tokenizer, measured.conversations, settings, home / CACHE)
        fit_utils.check_rows(model, tokenizer, rows, "validation data")
        losses[name] = measure_losses(model, settings, rows, name)
        answers[name] = measure_answers(model, tokenizer, samples, check, settings, name)
        if tasks:
            limits = options.benchmark_limit, settings.batch_size
            benchmarks[name] = benchmark_utils.answer_tasks(model, tokenizer, f"the {name} model", tasks, *limits)
        del model  # a merged one goes before its base is loaded
    scores = join_scores(**losses)
    pairs = zip(answers["base"], answers["tuned"], strict=True)
    samples = [sample | {"base": b, "tuned": t} for sample, (b, t) in zip(samples, pairs, strict=True)]
    metrics = describe(adapter_path, settings, measured) | result_utils.compare(scores, samples, check)
    if tasks:
        metrics["benchmarks"] = benchmark_utils.compare_tasks(**benchmarks)
    columns = ("row", "tokens", "base", "tuned")
    folder = result_utils.write_results(
        home / EVALUATION, metrics, samples, columns, scores, partial(write_card, adapter_path, tokenizer)
    )
    result_utils.print_report(folder, metrics, samples)


def write_card(adapter_path, tokenizer, folder, metrics, samples):
    """Write the model card of an adapter of this project, with these figures, into the folder of the evaluation.

    The card in the adapter's own folder stays as it is: nothing that was read is changed.
    """
    trained, record = model_utils.read_training(adapter_path)
    if trained is None or model_utils.is_merged(adapter_path):
        return
    sample = next(((sample["prompt"], sample["tuned"]) for sample in samples if sample["prompt"]), None)
    if sample:
        sample = sample[0], sample[1]["text"] if sample[1]["ended"] else f"{sample[1]['text']} ..."
    base = metrics["base_model"]
    export_utils.write_adapter_card(folder, tokenizer, base, trained, record, metrics, sample, result_utils.CARD)


def find_benchmarks(names):
    """What benchmark_utils.find_tasks makes of the names, or None where there are none."""
    if names and find_spec("lm_eval") is None:
        raise UserError("--benchmarks needs lm-evaluation-harness: pip install -r requirements-benchmarks.txt")
    return benchmark_utils.find_tasks(names) if names else None


# ---- Rows ------------------------------------------------------------------------------------------------------------
def choose_rows(settings, adapter_paths, output_dir, cache_dir, include_trained):
    """The rows to measure, after saying how many of them the adapters were trained on; returns Measured.

    They are those of VALIDATION_DATASET_PATH, or else those that the first adapter's run held out. Rows that one of
    them was trained on are left out unless include_trained is true, and so are single answers of longer conversations.
    """
    seen = [evidence_utils.read_seen_rows(path) for path in adapter_paths]
    found, path = evidence_utils.load_rows(settings, adapter_paths[0], output_dir, seen[0], cache_dir)
    name = "validation"
    if settings.validation_dataset_path is not None:
        name = re.sub(r"[^\w.-]+", "-", Path(path).stem)[:60].strip("-.") or "rows"
    who = "the adapter was" if len(adapter_paths) == 1 else "these adapters were"
    if None in seen:
        unknown = display_path(adapter_paths[seen.index(None)])
        say(
            f"Whether {who} trained on the {counted(len(found), 'row')} is unknown: {unknown} carries no"
            f" {evidence_utils.SEEN_ROWS}"
        )
        return Measured(found, name, path, None, None, None, None, 0)
    seen = evidence_utils.join_seen_rows(seen)
    overlap = evidence_utils.find_overlap(seen, found)
    trained = int(overlap.trained.sum())
    say_overlap(len(found), overlap, include_trained, who)
    if trained == len(found) and not include_trained:
        raise UserError(
            f"{who} trained on all of {path} ({counted(len(found), 'row')}), which tells nothing of new rows; give"
            " others by --validation_dataset_path, or measure these by --include_trained_rows"
        )
    if include_trained:
        overlap = overlap._replace(trained=overlap.trained | overlap.partly)
    elif overlap.partly.any():
        found = evidence_utils.without_seen_answers(found, seen)
    kept = numpy.ones(len(found), dtype=bool) if include_trained else ~overlap.trained
    counts = [int(mask[kept].sum()) for mask in overlap]
    return Measured(found.select(kept), name, path, *counts, 0 if include_trained else trained)


def say_overlap(rows, overlap, include_trained, who):
    """Say how many of the rows an adapter was trained on, and what becomes of them."""
    trained, partly, prompt_trained = (
        int(mask.sum()) for mask in (overlap.trained, overlap.partly, overlap.prompt_trained)
    )
    what = f"{who} trained on {trained or 'none':{',' if trained else ''}} of them"
    if trained:
        fate = "measured too" if include_trained else "left out (--include_trained_rows measures them too)"
        what += f", which {'is' if trained == 1 else 'are'} {fate}"
    if partly:
        fate = "measured too" if include_trained else "not measured"
        what += f"; on some answers of {counted(partly, 'more conversation')}, which are {fate}"
    if prompt_trained:
        what += f"; on {counted(prompt_trained, 'more prompt')} with another answer"
    say(f"{counted(rows, 'row')}: {what}")


def tokenize_rows(tokenizer, conversations, settings, cache_dir):
    """Tokenize the rows as training did, and say what it did to them."""

    rows = token_utils.tokenize_conversations(
        tokenizer, conversations, settings.max_seq_length, "validation data", cache_dir
    )
    if not len(rows):
        raise UserError(f"--max_seq_length {settings.max_seq_length} leaves no token of an answer; raise it")
    for line in report_utils.token_lines("validation", report_utils.describe_tokens(rows), settings.max_seq_length):
        say_once(line)
    return rows


# ---- Losses ----------------------------------------------------------------------------------------------------------
def measure_losses(model, settings, rows, name):
    """{row: [nats of all its answers' tokens, tokens]} of the model, "tuned" or "base", which the bar names.

    A conversation that was tokenized as several sequences is one row: what its answers share would count twice.
    """
    sums = {}
    with engine_runner.StepRunner(model, plan_utils.plan_scores(model, settings, rows)) as runner:
        for number, found in zip(rows.index["row"].tolist(), score_with_progress(runner, rows, name), strict=True):
            sums[number] = [total + more for total, more in zip(sums.get(number, (0.0, 0)), found, strict=True)]
    return sums


def join_scores(base, tuned):
    """[{"row", "tokens", "base", "tuned"}], the last two in nats, of what measure_losses gave of both."""
    return [{"row": row, "tokens": tokens, "base": nll, "tuned": tuned[row][0]} for row, (nll, tokens) in base.items()]


def score_with_progress(runner, rows, name):
    passes = len(engine_passes.pack_rows(rows.index["length"].tolist(), runner.plan.max_pass_tokens))
    with progress(f"Measuring the {name} model", total=passes, unit="passes") as bar:
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
        if messages[0]["role"] == "text":  # a whole text has no question
            continue
        end = data_utils.last_answer(messages)
        expected = data_utils.words_of(messages[end]).strip()
        prompt = messages[:end]
        samples.append({"row": row, "prompt": prompt[-1]["content"], "messages": prompt, "expected": expected})
    expected = [sample["expected"] for sample in samples]
    check = score_utils.choose_check(settings.answer_check, expected)
    if check:
        say(f"Accuracy: the expected answers {score_utils.CHECKS[check][2]} (ANSWER_CHECK = {settings.answer_check!r})")
    elif settings.answer_check == "auto":
        name, share = score_utils.commonest_kind(expected)
        if share >= 0.5:
            kind, _, _ = score_utils.CHECKS[name][2].partition(";")
            say(
                f"Accuracy is not measured: {share:.0%} of the expected answers {kind}, and it takes"
                f" {score_utils.CERTAIN_SHARE:.0%}; --answer_check {name} compares them all"
            )
    return samples, check


def measure_answers(model, tokenizer, samples, check, settings, name):
    """The model's likeliest answer to each sample: a dict of text, ended, tokens and what score_answer gives."""
    generation = generation_utils.build_generation_config(tokenizer, settings._replace(do_sample=False))
    with progress(f"Answers of the {name} model", total=len(samples), unit="answers") as bar:
        replies = generation_utils.generate_replies(
            model,
            tokenizer,
            [sample["messages"] for sample in samples],
            generation,
            max_prompt_tokens=settings.max_seq_length,
            on_replies=lambda replies: bar.update(len(replies)),
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
        "partly_trained_rows": measured.partly,
        "trained_prompts_seen": measured.prompt_trained,
        "validation_rows_of_the_run": measured.validated,
        "settings": {name: value for name, value in settings._asdict().items() if name in USED_SETTINGS["evaluate.py"]},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in MEASURED_BY},
    }


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
    settings = [make_settings(given, model_utils.read_settings(path), "evaluate.py") for path in paths]
    settings = ask_alike(settings)
    check_writable(output_dir / EVALUATION, "--output_dir")
    measured = choose_rows(settings[0], paths, output_dir, output_dir / CACHE, options.include_trained_rows)
    samples, check = choose_samples(measured.conversations, settings[0])
    adapters = name_adapters(paths, settings)
    found = []
    for number, (path, each, adapter) in enumerate(zip(paths, settings, adapters, strict=True), 1):
        say(f"Adapter {number} of {len(paths)}: {adapter['run']}")
        found.append(measure_adapter(path, each, measured.conversations, samples, check, output_dir / CACHE))
        gc.collect()  # its model goes before the next one is loaded
    metrics, columns, rows = result_utils.compare_scores(
        adapters, [scores for scores, _ in found], measured.conversations
    )
    expected = [sample["expected"] for sample in samples]
    for adapter, (_, answers) in zip(metrics["adapters"], found, strict=True):
        adapter |= score_utils.summarize_answers(answers, expected)
    answers = [
        dict(zip(columns[2:], each, strict=True)) for each in zip(*(answers for _, answers in found), strict=True)
    ]
    samples = [sample | {"answers": each} for sample, each in zip(samples, answers, strict=True)]
    metrics = {"run": "comparison"} | describe_measured(settings[0], measured) | metrics | {"answer_check": check}
    folder = result_utils.write_results(output_dir / EVALUATION, metrics, samples, columns, rows)
    result_utils.print_comparison(folder, metrics)


def ask_alike(settings):
    """The settings of several adapters with the same way to ask each of them, which is said where their own differ.

    Rows that are cut at different places are different rows, and so are answers.
    """
    first = settings[0]
    alike = {name: max(getattr(each, name) for each in settings) for name in ("max_seq_length", "max_new_tokens")}
    alike |= {"repetition_penalty": first.repetition_penalty, "system_prompt": first.system_prompt}
    for name, value in alike.items():
        if any(getattr(each, name) != value for each in settings):
            value = repr(value)[:60]
            say(f"All are measured with {name} = {value}, though not all would be by themselves; --{name} sets it")
    return [each._replace(**alike) for each in settings]


def name_adapters(paths, settings):
    """What names each adapter in a comparison; those of one name are numbered, since their folders are told beside."""
    adapters = [name_adapter(path, each) for path, each in zip(paths, settings, strict=True)]
    names = [adapter["run"] for adapter in adapters]
    for position, (adapter, name) in enumerate(zip(adapters, names, strict=True)):
        if names.count(name) > 1:
            adapter["run"] = f"{name} ({names[: position + 1].count(name)})"
    return adapters


def measure_adapter(adapter_path, settings, conversations, samples, check, cache_dir):
    """(the scores of base and tuned on all rows, the tuned model's answers to the samples) of one adapter."""
    rows, losses, answers = None, {}, None
    for name, model, tokenizer in model_utils.tuned_and_base(adapter_path, settings):
        start_garbage_collection()
        if rows is None:
            rows = tokenize_rows(tokenizer, conversations, settings, cache_dir)
            answers = measure_answers(model, tokenizer, samples, check, settings, name)
        fit_utils.check_rows(model, tokenizer, rows, "validation data")
        losses[name] = measure_losses(model, settings, rows, name)
        del model  # a merged one goes before its base is loaded
    return join_scores(**losses), answers


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
