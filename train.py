"""Fine-tune a causal language model with LoRA or QLoRA on your instructions and answers.

    python train.py --dry_run                                  # the data report, one row and the plan; then stop
    python train.py                                            # data/demo.json, or what config.py says
    python train.py                                            # the same again goes on with a run that was interrupted
    python train.py --custom_dataset_path data/mine.json --num_epochs 2

The adapter ends in output/lora-adapter. Every setting of config.py is a flag.
"""

import platform
import sys
import time
from importlib.metadata import version

from file_utils import check_writable, display_path, resolve_path, write_json
from message_utils import LateImport, UserError, quiet_libraries, run_script, say, start_garbage_collection
from run_utils import ADAPTER, CACHE, CHECKPOINTS, DATA_REPORT, RUN_OUTPUTS, VALIDATION_ROWS
from settings_utils import DEFAULTS, build_parser, make_settings, parse_command_line

# imported when they are first used: torch and what builds on it take seconds
checkpoint_utils = LateImport("checkpoint_utils")
data_utils = LateImport("data_utils")
engine_passes = LateImport("engine_passes")
file_utils = LateImport("file_utils")
generation_utils = LateImport("generation_utils")
hub_utils = LateImport("hub_utils")
model_utils = LateImport("model_utils")
plan_utils = LateImport("plan_utils")
process_utils = LateImport("process_utils")
progress_utils = LateImport("progress_utils")
prompt_utils = LateImport("prompt_utils")
report_utils = LateImport("report_utils")
run_utils = LateImport("run_utils")
token_utils = LateImport("token_utils")
torch = LateImport("torch")
training_utils = LateImport("training_utils")


def main(argv):
    parser = build_parser("train.py", __doc__)
    parser.add_argument("--dry_run", action="store_true", help="print the data report and the plan, then stop")
    parser.add_argument("--fresh", action="store_true", help="set an interrupted run aside instead of going on with it")
    options, given = parse_command_line(parser, argv)
    quiet_libraries()
    settings = make_settings(given)
    check_writable(resolve_path(settings.output_dir), "--output_dir")
    check_writable(resolve_path(settings.logs_dir), "--logs_dir")
    train(settings, options.dry_run, options.fresh)


def train(settings, dry_run=False, fresh=False):
    """The phases of a run: tokenizer, data, plan, model, trainer, training, saving."""
    started = time.time()
    train_set, validation_set, read = load_data(settings)

    start_garbage_collection()
    output_dir, models_dir = resolve_path(settings.output_dir), resolve_path(settings.models_dir)
    lock = run_utils.OutputLock(output_dir)
    if not dry_run:
        lock.check()
    device = model_utils.resolve_device(settings.device)
    model_utils.grow_gpu_memory(device)
    dtype = model_utils.choose_dtype(device, settings.use_fp16)
    base = hub_utils.locate_model(settings.base_model_name, models_dir)
    tokenizer = model_utils.load_tokenizer(base, models_dir)
    arguments = training_utils.build_training_arguments(
        settings, output_dir / CHECKPOINTS, device, dtype, bool(validation_set)
    )
    with process_utils.first_process_first():
        train_rows, validation_rows = tokenize_data(tokenizer, train_set, validation_set, settings)
    report = report_data(settings, tokenizer, read, train_set, validation_set, train_rows, validation_rows)
    shapes = model_utils.empty_model(base, settings, models_dir)
    parameters = model_utils.count_parameters(shapes)
    plan_utils.print_plan(
        settings, device, dtype, train_rows, validation_rows, parameters, processes=arguments.world_size
    )
    memory = plan_utils.plan_memory(shapes, settings, device, dtype, train_rows, arguments.world_size)
    plan_utils.check_compiler(settings, device)
    if dry_run:
        write_report(settings, report, dry_run=True)
        return
    identity = checkpoint_utils.training_identity(
        settings, base, tokenizer, train_rows, validation_rows, arguments, dtype, models_dir
    )
    with lock, process_utils.StopAtOnce():
        checkpoints = open_checkpoints(settings, identity, parameters[1], fresh)
        quantization = model_utils.build_quantization_config(settings, dtype)
        model = model_utils.load_base_model(base, device, dtype, quantization, models_dir)
        model_utils.share_token_ids(model, tokenizer)
        model = model_utils.attach_lora(model, settings)
        callbacks = build_callbacks(settings, tokenizer, validation_set, checkpoints)
        process_utils.from_first_process(prepare_output, settings, validation_set, report, checkpoints.resumption)
        trainer = training_utils.build_trainer(
            model, tokenizer, train_rows, validation_rows, settings, arguments, callbacks, checkpoints, memory
        )
        run(trainer, settings, validation_rows, started)


def run(trainer, settings, validation_rows, started):
    """Train from the beginning or from where an interrupted run was, then save the adapter; a signal ends it well."""

    resumption = trainer.checkpoints.resumption
    say(f"Training; watch it with: tensorboard --logdir {settings.logs_dir}")
    with trainer.signals:
        try:
            trainer.train(resume_from_checkpoint=resumption and str(resumption.folder))
        except KeyboardInterrupt:
            say(f"\nStopped at once, in step {trainer.state.global_step + 1}; {trainer.checkpoints.last()}")
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory beside the passes of step {trainer.state.global_step + 1}, in the optimizer or an"
                f" evaluation; {trainer.checkpoints.last()}; switch on --gradient_checkpointing, or train anew with"
                " --fresh, half the --batch_size and twice the --gradient_accumulation_steps",
                each_process=True,
            ) from error
        finish(trainer, settings, validation_rows, started)


# ---- Data ------------------------------------------------------------------------------------------------------------


def load_data(settings):
    """Return the training and validation Conversations and what was read, after saying it."""

    cache_dir = resolve_path(settings.output_dir) / CACHE
    path = settings.custom_dataset_path or "data/demo.json"
    conversations, report = data_utils.load_announced("Data", path, settings.dataset_columns, cache_dir)
    if settings.max_train_rows:
        chosen = data_utils.split_conversations(conversations, 0, settings.seed)[0]
        conversations = chosen.select(range(min(len(chosen), settings.max_train_rows)))
    if settings.validation_dataset_path is None:
        return *data_utils.split_conversations(conversations, settings.validation_split, settings.seed), [report]
    validation, validation_report = data_utils.load_announced(
        "Validation data", settings.validation_dataset_path, settings.dataset_columns, cache_dir
    )
    return data_utils.remove_overlap(conversations, validation), validation, [report, validation_report]


def tokenize_data(tokenizer, train_set, validation_set, settings):
    """Tokenize both sets; at least one row of each must be left."""

    cache_dir = resolve_path(settings.output_dir) / CACHE
    for name, conversations in (("training", train_set), ("validation", validation_set)):
        rows = token_utils.tokenize_conversations(
            tokenizer, conversations, settings.max_seq_length, f"{name} data", cache_dir
        )
        if len(conversations) and not len(rows):
            raise UserError(
                f"no token of the {name} data's {len(conversations)} rows can be trained at --max_seq_length"
                f" {settings.max_seq_length}; raise it"
            )
        yield rows


def report_data(settings, tokenizer, read, train_set, validation_set, train_rows, validation_rows):
    """Print the data report with one row as the model sees it, and return it; refuse data of which too much is lost."""

    report = report_utils.build_report(
        read, train_set, validation_set, train_rows, validation_rows, settings.max_seq_length
    )
    report_utils.print_report(report)
    say(f"Template: {prompt_utils.describe_template(tokenizer)}")
    show_example(tokenizer, train_rows)
    report_utils.check_cut_limit(report, settings.answers_cut_limit)
    return report


def write_report(settings, report, dry_run=False):
    """Write the report to OUTPUT_DIR; a dry run leaves that of an earlier run there alone."""
    folder = resolve_path(settings.output_dir)
    if dry_run and any((folder / name).exists() for name in (ADAPTER, CHECKPOINTS)):
        folder = folder / CACHE
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DATA_REPORT, report)
    say(f"Data report: {display_path(folder / DATA_REPORT)}")


def show_example(tokenizer, rows):
    """Show a row of usual length as the model sees it, its trained tokens marked."""

    lengths = rows.index["length"][:1000]
    example = rows[int(abs(lengths - sorted(lengths)[len(lengths) // 2]).argmin())]
    color = sys.stderr.isatty()
    start, end = ("\x1b[1;32m", "\x1b[0m") if color else ("[", "]")
    marks = "green" if color else "[ ]"
    say(f"Example: row {example['row']}, {len(example['input_ids'])} tokens, the trained ones in {marks}:\n")
    say(token_utils.mark_trained_tokens(tokenizer, example, start, end) + "\n")


# ---- Before and after training ---------------------------------------------------------------------------------------


def open_checkpoints(settings, identity, trainable, fresh):
    """Decide, in the first process for all, whether an interrupted run goes on; refuse one that is another run's."""

    output_dir = resolve_path(settings.output_dir)
    resumption = None
    if not (output_dir / ADAPTER).exists():  # else the run there had finished
        resumption = process_utils.from_first_process(checkpoint_utils.find_resumption, output_dir, identity, fresh)
    run_name = settings.run_name or (resumption and resumption.run_name) or time.strftime("%Y%m%d-%H%M%S")
    folder = output_dir / CHECKPOINTS
    checkpoints = checkpoint_utils.Checkpoints(folder, settings, identity, run_name, trainable, resumption)
    checkpoints.check_space()
    return checkpoints


def build_callbacks(settings, tokenizer, validation_set, checkpoints):

    log_dir = resolve_path(settings.logs_dir) / checkpoints.run_name
    board = progress_utils.RunBoard(log_dir, settings, first_step=checkpoints.saved_step)
    generation = generation_utils.build_generation_config(tokenizer, settings._replace(do_sample=False))
    prompts = [conversation for _, conversation in validation_set[: settings.sample_prompts]]
    return [
        progress_utils.ProgressLine(),
        board,
        progress_utils.SampleAnswers(tokenizer, prompts, generation, settings.max_seq_length, board),
    ]


def prepare_output(settings, validation_set, report, resumption):
    """Move an earlier run out of the way; keep the data report and the validation rows, which evaluate.py uses."""

    output_dir = resolve_path(settings.output_dir)
    if resumption is None:
        moved_to = run_utils.set_aside(output_dir, RUN_OUTPUTS)
        if moved_to:
            say(f"An earlier run lies in {display_path(output_dir)}; moved to {display_path(moved_to)}")
    write_report(settings, report)
    if validation_set and not (output_dir / VALIDATION_ROWS).exists():
        data_utils.store_conversations(output_dir / VALIDATION_ROWS, validation_set)


def finish(trainer, settings, validation_rows, started):
    """Save the adapter with its record, and say how the run went and what to type next."""

    if not trainer.is_world_process_zero():
        return
    state, resumption = trainer.state, trainer.checkpoints.resumption
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    record = {
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(time.time() - (trainer.checkpoints.started if resumption else started), 1),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss": state.best_metric,  # of the checkpoint that was kept
        "peak_memory_gib": round(model_utils.measured_peak(trainer.args.device), 3),
        "training_rows": len(trainer.train_dataset),
        "validation_rows": len(validation_rows),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "python": platform.python_version(),
    }
    adapter_dir = resolve_path(settings.output_dir) / ADAPTER
    with file_utils.storage_errors(
        "the adapter", f"{trainer.checkpoints.last()}; mend that, and {checkpoint_utils.AGAIN}"
    ):
        model_utils.save_finished_adapter(trainer.model, trainer.processing_class, adapter_dir, settings, record)
    print_summary(settings, adapter_dir, record)


def print_summary(settings, adapter_dir, record):

    validation, has_validation = "", record["validation_loss"] is not None
    if has_validation:
        perplexity = engine_passes.perplexity(record["validation_loss"])
        validation = f", validation loss {record['validation_loss']:.4f} (perplexity {perplexity:.2f})"
        if record["best_step"]:
            validation += f" from step {record['best_step']}"
    where = "" if settings.output_dir == DEFAULTS["output_dir"] else f" --output_dir {settings.output_dir}"
    print(
        f"\nDone in {progress_utils.format_duration(record['seconds'])}: {record['steps']} steps, training loss"
        f" {record['first_loss']:.4f} -> {record['last_loss']:.4f}{validation},"
        f" peak memory {record['peak_memory_gib']:.2f} GiB.\n"
        f"Adapter: {display_path(adapter_dir)}\n"
        + f"Next: python evaluate.py{where}    base versus tuned, in figures and answers\n" * has_validation
        + f"Next: python inference.py{where}   talk to it",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
