"""Measure an adapter against its base model on the rows that it was not trained on.

    python evaluate.py                                           # output/lora-adapter on its own validation rows
    python evaluate.py --adapter_path output/checkpoints/checkpoint-40
    python evaluate.py --validation_dataset_path data/other.json

Writes metrics.json, samples.json and samples.csv to output/evaluation.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_script: Ctrl-C in the imports below leaves no traceback

import random
import sys

from file_utils import check_writable, display_path, write_json
from message_utils import LateImport, UserError, printable, quiet_libraries, run_script, say, start_garbage_collection
from run_utils import CACHE, VALIDATION_ROWS, find_adapter
from settings_utils import build_parser, make_settings, parse_command_line

# These rooms import torch or other libraries, which takes seconds: --help and a mistyped flag are answered before.
data_utils = LateImport("data_utils")
engine_passes = LateImport("engine_passes")
engine_runner = LateImport("engine_runner")
fit_utils = LateImport("fit_utils")
plan_utils = LateImport("plan_utils")
generation_utils = LateImport("generation_utils")
model_utils = LateImport("model_utils")
pandas = LateImport("pandas")
report_utils = LateImport("report_utils")
token_utils = LateImport("token_utils")

BANDS = ((10, "excellent"), (20, "good"), (30, "acceptable"), (float("inf"), "needs improvement"))


def main(argv):
    parser = build_parser("evaluate.py", __doc__)
    parser.add_argument("--adapter_path", help="adapter to measure (default: OUTPUT_DIR/lora-adapter)")
    options, given = parse_command_line(parser, argv)
    quiet_libraries()
    adapter_path, output_dir = find_adapter(options, given)
    # an adapter is measured on the rows that its own run held out: they lie beside it, or beside its checkpoints
    runs = [folder for folder in adapter_path.parents[:2] if (folder / VALIDATION_ROWS).is_file()]
    run_dir = runs[0] if runs else output_dir
    evaluate(adapter_path, given, run_dir, target=output_dir if "output_dir" in given else run_dir)


def evaluate(adapter_path, given, run_dir, target):
    """The phases: settings, data, model, rows, figures and answers of base and tuned, report."""
    settings = make_settings(given, model_utils.read_recorded_settings(adapter_path), "evaluate.py")
    cache_dir, target = target / CACHE, target / "evaluation"
    check_writable(target, "--output_dir")
    conversations = load_validation_rows(settings, run_dir, cache_dir)
    model, tokenizer = model_utils.load_trained_model(adapter_path, settings)
    start_garbage_collection()
    rows = tokenize_rows(tokenizer, conversations, settings, cache_dir)
    fit_utils.check_rows(model, tokenizer, rows, "validation data")
    say(f"Measuring base and tuned model on {len(rows)} rows")
    with engine_runner.StepRunner(model, plan_utils.plan_scores(model, settings, rows)) as runner:
        metrics = measure(model, runner, rows)
    samples = answer_side_by_side(
        model, tokenizer, data_utils.with_questions(conversations, settings.eval_samples), settings
    )
    metrics |= {"adapter": display_path(adapter_path), "base_model": settings.base_model_name}
    write_report(target, metrics, samples)
    print_report(target, metrics, samples)


def load_validation_rows(settings, run_dir, cache_dir):
    """The Conversations that the adapter's run held out, or those of VALIDATION_DATASET_PATH."""

    if settings.validation_dataset_path is not None:
        path, columns = settings.validation_dataset_path, settings.dataset_columns
        return data_utils.load_announced(
            "Validation data",
            path,
            columns,
            cache_dir,
            settings.chosen_only,
            system_prompt=settings.system_prompt,
            or_usual_names=True,
        )[0]
    path = run_dir / VALIDATION_ROWS
    if not path.exists():
        raise UserError(
            f"{display_path(path)} does not exist, so the held-out rows are unknown; train with a validation split, or"
            " give rows of your own by --validation_dataset_path"
        )
    return data_utils.load_conversations(
        path, cache_dir=cache_dir, number_column="row", system_prompt=settings.system_prompt
    )[0]


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


# ---- Figures ---------------------------------------------------------------------------------------------------------
def measure(model, runner, rows):
    """Token-weighted loss and perplexity of base and tuned over the same answers, and a verdict."""
    tuned = runner.score(rows)
    with model.disable_adapter():
        base = runner.score(rows)
    return compare(base, tuned)


def compare(base, tuned):
    """The figures of two models' scores, [(negative log-likelihood in nats, tokens) of each row], and a verdict."""
    metrics = {"rows": len(base), "answer_tokens": sum(tokens for _, tokens in base)}
    for name, scores in (("base", base), ("tuned", tuned)):
        loss = engine_passes.mean_loss(scores)
        metrics[f"{name}_loss"] = loss
        metrics[f"{name}_perplexity"] = engine_passes.perplexity(loss)
        metrics[f"{name}_band"] = band(metrics[f"{name}_perplexity"])
    low, high = bootstrap_interval(base, tuned)
    metrics |= {"loss_change_low": low, "loss_change_high": high}
    metrics["verdict"] = "better" if high < 0 else "worse" if low > 0 else "no different"
    if len(base) < 5:
        metrics["verdict"] = "not told apart by so few rows"
    return metrics


def band(perplexity):
    """The customary name of a perplexity: below 10 excellent, 20 good, 30 acceptable, else needs improvement."""
    return next(name for limit, name in BANDS if perplexity < limit or limit == float("inf"))


def bootstrap_interval(base, tuned, resamples=2000, seed=0):
    """95 % interval of (tuned loss - base loss) in nats a token, over rows drawn again with replacement."""
    draw = random.Random(seed)
    pairs = [(t[0] - b[0], b[1]) for b, t in zip(base, tuned, strict=True)]
    changes = []
    for _ in range(resamples):
        chosen = draw.choices(pairs, k=len(pairs))
        changes.append(sum(change for change, _ in chosen) / sum(tokens for _, tokens in chosen))
    changes.sort()
    return changes[int(0.025 * resamples)], changes[int(0.975 * resamples) - 1]


# ---- Answers ---------------------------------------------------------------------------------------------------------
def answer_side_by_side(model, tokenizer, conversations, settings):
    """Let base and tuned answer the last question of each conversation; returns one dict a row."""
    if not conversations:
        return []
    ends = [data_utils.last_answer(messages) for _, messages in conversations]
    prompts = [messages[:end] for (_, messages), end in zip(conversations, ends, strict=True)]
    say(f"Letting both answer {len(prompts)} of them")
    generation = generation_utils.build_generation_config(tokenizer, settings._replace(do_sample=False))
    limit = {"max_prompt_tokens": settings.max_seq_length}
    tuned = generation_utils.generate_replies(model, tokenizer, prompts, generation, **limit)
    with model.disable_adapter():
        base = generation_utils.generate_replies(model, tokenizer, prompts, generation, **limit)
    return [
        {
            "row": number,
            "prompt": messages[end - 1]["content"],
            "expected": messages[end]["content"],
            "base": base_reply.text,
            "tuned": tuned_reply.text,
        }
        for (number, messages), end, base_reply, tuned_reply in zip(conversations, ends, base, tuned, strict=True)
    ]


# ---- Report ----------------------------------------------------------------------------------------------------------
def write_report(target, metrics, samples):
    """Write metrics.json, samples.json and samples.csv; cells that a spreadsheet would run as formulas are defused."""

    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "metrics.json", metrics)
    write_json(target / "samples.json", samples)
    table = pandas.DataFrame(samples, columns=["row", "prompt", "expected", "base", "tuned"])
    texts = table.columns.drop("row")
    table[texts] = table[texts].map(lambda cell: "'" + cell if cell.startswith(("=", "+", "-", "@", "\t")) else cell)
    table.to_csv(target / "samples.csv", index=False, encoding="utf-8-sig")


def print_report(target, metrics, samples):
    for sample in samples[:3]:
        print(f"\nPrompt:   {printable(sample['prompt'])}")
        print(f"Base:     {printable(sample['base'])}")
        print(f"Tuned:    {printable(sample['tuned'])}")
        print(f"Expected: {printable(sample['expected'])}")
    print(f"\n{metrics['rows']} held-out rows, {metrics['answer_tokens']:,} answer tokens")
    print("        loss   perplexity")
    for name in ("base", "tuned"):
        figures = f"{metrics[f'{name}_loss']:.4f}  {metrics[f'{name}_perplexity']:10.2f}"
        print(f"{name:<6}{figures}  {metrics[f'{name}_band']}")
    low, high = metrics["loss_change_low"], metrics["loss_change_high"]
    print(f"Verdict: the tuned model is {metrics['verdict']} (loss {low:+.3f} to {high:+.3f}, 95 % of resampled rows)")
    print(f"Written to {display_path(target)}: metrics.json, samples.json, samples.csv", flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
