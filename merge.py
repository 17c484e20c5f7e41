"""Merge an adapter into its base model, for servers that take no adapters.

    python merge.py                                # output/lora-adapter -> output/merged-model
    python merge.py --adapter_path output/checkpoints/checkpoint-40 output/other-model
    python merge.py --into full                    # after 4-bit training: into the base as it is stored

The merged model is scored on held-out rows beside base and adapter before its folder gets its name. Beside the weights
lie a model card, merge.json with the figures, and a Modelfile for Ollama.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_script: Ctrl-C in the imports below leaves no traceback

import shutil
import sys

from file_utils import check_writable, display_path, read_json, resolve_path, write_json
from message_utils import UserError, counted, printable, quiet_libraries, say
from run_utils import CACHE, EVALUATION, RUN_RECORD, TRAINER_STATE, find_adapter, find_run_folder
from script_utils import LateImport, run_script, start_garbage_collection
from settings_utils import PLACES, build_parser, make_settings, parse_command_line

# These rooms import torch or other libraries, which takes seconds: --help and a mistyped flag are answered before.
data_utils = LateImport("data_utils")
engine_passes = LateImport("engine_passes")
evidence_utils = LateImport("evidence_utils")
export_utils = LateImport("export_utils")
generation_utils = LateImport("generation_utils")
model_utils = LateImport("model_utils")
plan_utils = LateImport("plan_utils")
progress_utils = LateImport("progress_utils")
prompt_utils = LateImport("prompt_utils")
token_utils = LateImport("token_utils")

SCORED_ROWS = {"cuda": 200, "mps": 50, "cpu": 20}  # rows that are scored, by where the whole model fits
SAMPLE_TOKENS = 64  # longest answer in the model card


def main(argv):
    parser = build_parser("merge.py", __doc__)
    parser.add_argument("folder", nargs="?", help="folder of the merged model (default: OUTPUT_DIR/merged-model)")
    parser.add_argument("--adapter_path", help="adapter to merge (default: OUTPUT_DIR/lora-adapter)")
    parser.add_argument(
        "--into",
        choices=("full", "dequantized"),
        help="after 4-bit training: merge into the base as it is stored, or into its 4-bit weights, dequantized"
        " (default: what scores better)",
    )
    options, given = parse_command_line(parser, argv)
    quiet_libraries()
    adapter_path, output_dir = find_adapter(options, given)
    target = resolve_path(options.folder or output_dir / "merged-model")
    if target.exists():
        raise UserError(f"{display_path(target)} exists already; remove it, or name another: python merge.py FOLDER")
    check_writable(target.parent, "python merge.py FOLDER")
    merge(adapter_path, output_dir, target, given, options.into)


def merge(adapter_path, output_dir, target, given, into):
    """The phases: settings, model, held-out rows, merged weights and their scores, what lies beside them, report."""
    settings = make_settings(given, model_utils.read_recorded_settings(adapter_path), "merge.py")
    trained, record = model_utils.read_training(adapter_path)
    model, tokenizer = model_utils.load_trained_model(adapter_path, settings)
    start_garbage_collection()
    conversations = load_held_out(adapter_path, output_dir, settings, output_dir / CACHE)
    score = RowScore(model, tokenizer, conversations, settings, output_dir / CACHE) if conversations else None
    sample = answer_one(model, tokenizer, conversations, settings)
    with model_utils.merged_folder(model, tokenizer, target, settings.models_dir, score, into) as (folder, merged):
        metrics = find_metrics(adapter_path)
        write_record(folder, adapter_path, trained)
        export_utils.write_merged_card(folder, tokenizer, merged, trained, record, metrics, sample)
        if not export_utils.write_modelfile(folder, tokenizer, settings, trained):
            say("The model's chat template cannot be written as an Ollama template, so the Modelfile has none")
    print_report(target, merged, score)


def write_record(folder, adapter_path, trained):
    """Write beside a merged model what evaluate.py wants to know of its training, and no path of this machine."""
    if trained is not None:
        left_out = (*PLACES, "custom_dataset_path", "validation_dataset_path")
        write_json(
            folder / model_utils.SETTINGS_FILE,
            {name: value for name, value in trained._asdict().items() if name not in left_out},
        )
    for name in (evidence_utils.SEEN_ROWS, RUN_RECORD, TRAINER_STATE):
        if (adapter_path / name).is_file():
            shutil.copyfile(adapter_path / name, folder / name)


def load_held_out(adapter_path, output_dir, settings, cache_dir):
    """The Conversations to score with, or None: evaluate.py's, less what the adapter was trained on."""
    seen = evidence_utils.read_seen_rows(adapter_path)
    try:
        found, path = evidence_utils.load_rows(settings, adapter_path, output_dir, seen, cache_dir)
    except UserError as error:
        if settings.validation_dataset_path is not None:
            raise
        say(f"Nothing is scored: {error}")
        return None
    if seen is None:
        say(f"Whether the adapter was trained on these rows is unknown: it carries no {evidence_utils.SEEN_ROWS}")
        return found
    trained = evidence_utils.find_overlap(seen, found).trained
    if trained.all():
        say(f"Nothing is scored: the adapter was trained on all rows of {path}; --validation_dataset_path names others")
        return None
    if trained.any():
        say(f"{int(trained.sum()):,} of {counted(len(found), 'row')} left out: the adapter was trained on them")
    return found.select(~trained)


class RowScore:
    """A function of a model: its loss on held-out rows, in nats a token. rows and tokens tell on how many."""

    def __init__(self, model, tokenizer, conversations, settings, cache_dir):
        device = model_utils.merging_device(model, model.get_base_model().name_or_path, settings.models_dir)
        rows = token_utils.tokenize_conversations(
            tokenizer, conversations, settings.max_seq_length, "validation data", cache_dir
        )
        if not len(rows):
            raise UserError(f"rows of at most {settings.max_seq_length} tokens hold no token of an answer; give others")
        self.rows = [rows[index] for index in range(min(len(rows), SCORED_ROWS[device.type]))]
        self.settings, self.tokens = settings, engine_passes.count_trained_tokens(self.rows)

    def __call__(self, model):
        plan = plan_utils.plan_scores(model, self.settings, self.rows)
        with progress_utils.progress("Scoring"):
            scores = engine_passes.score_rows(model, self.rows, plan.max_pass_tokens, plan.kernels)
        return engine_passes.mean_loss(scores)


def answer_one(model, tokenizer, conversations, settings):
    """(a question, the model's answer to it) for the model card: that of the first held-out row, if there is one."""
    question = export_utils.SAMPLE_QUESTION
    messages = prompt_utils.begin_with(settings.system_prompt, [{"role": "user", "content": question}])
    if conversations:
        _, row = conversations[0]
        messages = row[: data_utils.last_answer(row)]
        question = messages[-1]["content"]
    generation = generation_utils.build_generation_config(
        tokenizer, settings._replace(do_sample=False, max_new_tokens=SAMPLE_TOKENS)
    )
    limit = settings.max_seq_length
    [reply] = generation_utils.generate_replies(model, tokenizer, [messages], generation, max_prompt_tokens=limit)
    return (question, reply.text if reply.ended else f"{reply.text} ...") if isinstance(question, str) else None


def find_metrics(adapter_path):
    """What evaluate.py has measured of this adapter, the newest, or None."""
    home = find_run_folder(adapter_path)
    files = (home / EVALUATION).glob("**/metrics.json") if home else ()
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            metrics = read_json(file, "the figures of an evaluation")
        except UserError as error:
            say(f"Left out of the model card: {error}")
            continue
        if metrics.get("adapter") == display_path(adapter_path):
            return metrics
    return None


def print_report(target, merged, score):
    """Say on stdout what was made and how it scored."""
    if score:
        lines = [("base + adapter", merged.adapter_loss)]
        lines += [(f"merged into {export_utils.MERGED_INTO[kind]}", loss) for kind, loss in merged.losses.items()]
        print(f"{counted(len(score.rows), 'row')}, {counted(score.tokens, 'answer token')}")
        print(f"{'':<44}  loss   perplexity")
        for name, loss in lines:
            print(f"{name:<43}{loss:8.4f}  {engine_passes.perplexity(loss):10.2f}")
    into = export_utils.MERGED_INTO[merged.merged_into]
    print(printable(f"Merged model: {display_path(target)}, {merged.dtype}, merged into {into}"), flush=True)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
