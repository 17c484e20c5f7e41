"""Fine-tune a causal language model with LoRA or QLoRA on your instructions and answers.

    python train.py --dry_run                                  # the data report, one row and the plan; then stop
    python train.py                                            # data/demo.json, or what config.py says
    python train.py                                            # the same again goes on with a run that was interrupted
    python train.py --custom_dataset_path data/mine.json --num_epochs 2

The adapter ends in output/lora-adapter. Every setting of config.py that a training uses is a flag.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_script: Ctrl-C in the imports below leaves no traceback

import os
import platform
import random
import shlex
import socket
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import ExitStack, closing, contextmanager, nullcontext
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path

from file_utils import (
    check_writable,
    display_path,
    put_in_place,
    resolve_input,
    resolve_path,
    storage_errors,
    write_json,
)
from message_utils import (
    UserError,
    counted,
    has_other_machines,
    is_first_on_machine,
    is_first_process,
    note,
    printable,
    quiet_libraries,
    say,
    say_once,
)
from progress_utils import format_duration
from run_utils import (
    ADAPTER,
    CACHE,
    CHECKPOINTS,
    DATA_REPORT,
    RUN_LOG,
    RUN_OUTPUTS,
    VALIDATION_ROWS,
    OutputLock,
    RunLog,
    set_aside,
)
from script_utils import LateImport, StopAtOnce, run_script, start_garbage_collection
from settings_utils import DEFAULTS, NOT_FOR_TRAINING, build_parser, make_settings, parse_command_line

# These rooms import torch or other libraries, which takes seconds: --help, a mistyped flag and a faulty row come first.
board_utils = LateImport("board_utils")
checkpoint_utils = LateImport("checkpoint_utils")
data_utils = LateImport("data_utils")
engine_passes = LateImport("engine_passes")
engine_shards = LateImport("engine_shards")
evidence_utils = LateImport("evidence_utils")
fit_utils = LateImport("fit_utils")
generation_utils = LateImport("generation_utils")
hub_utils = LateImport("hub_utils")
model_utils = LateImport("model_utils")
plan_utils = LateImport("plan_utils")
process_utils = LateImport("process_utils")
psutil = LateImport("psutil")
prompt_utils = LateImport("prompt_utils")
report_utils = LateImport("report_utils")
token_utils = LateImport("token_utils")
torch = LateImport("torch")
training_utils = LateImport("training_utils")

# What the phases of a run hand on. Beside these, the phase of the base model gives a model_utils.Base.
Data = namedtuple("Data", "training validation reports")  # Conversations, and a DataReport of each file
# TokenizedRows, `evaluated` being those of `validation` that are measured during the training; and the data report
Rows = namedtuple("Rows", "training validation evaluated report")
Plan = namedtuple("Plan", "arguments steps")  # the Trainer's arguments, and a StepPlan


def main(argv):
    quiet_libraries()
    with errors_of_all_machines():
        settings, options = read_command_line(argv)
    train(settings, options.dry_run, options.fresh)


def read_command_line(argv):
    """The settings of a command line, and its options beside them, which are checked as far as they can be by now."""
    parser = build_parser("train.py", __doc__)
    parser.add_argument("--dry_run", action="store_true", help="print the data report and the plan, then stop")
    parser.add_argument("--fresh", action="store_true", help="set an interrupted run aside instead of going on with it")
    options, given = parse_command_line(parser, argv)
    settings = make_settings(given)
    check_writable(resolve_path(settings.output_dir), "--output_dir")
    check_writable(resolve_path(settings.logs_dir), "--logs_dir")
    check_places(settings)
    return settings, options


def errors_of_all_machines():
    """process_utils.shared_errors, whose libraries take seconds to load, where a launcher uses several machines.

    The processes of one machine meet the same errors, and their launcher ends them together.
    """
    if not has_other_machines():
        return nullcontext()
    process_utils.meeting()  # from here on the others hear of it if this process ends
    return process_utils.shared_errors()


def check_places(settings):
    """Raise UserError where the base model or the data lie in a folder that the run is to write anew."""
    for path in paths_read(settings):
        for name in (ADAPTER, CHECKPOINTS):
            if path.is_relative_to(resolve_path(settings.output_dir) / name):
                raise UserError(
                    f"{display_path(path)} lies in a folder that this run writes anew; move it elsewhere, or give"
                    " another folder with --output_dir"
                )


def train(settings, dry_run=False, fresh=False):
    """The phases of a run: data, base model, rows, plan, and the run itself."""
    started, log = time.time(), RunLog()
    lock = OutputLock(resolve_path(settings.output_dir))
    with errors_of_all_machines():
        data = load_data(settings)
        settings = settle_system_text(settings, data)
        if not dry_run:
            lock.check()
        if is_first_on_machine():
            hub_utils.read_ahead(settings.base_model_name, settings.models_dir)
        base = model_utils.find_base(settings)
        base = base._replace(shards=engine_shards.find_engine(base.dtype))  # before the Trainer looks for it
    check_alike(shaping_settings(settings, base) | {"dry_run": dry_run, "fresh": fresh})
    folder = resolve_path(settings.output_dir) / CHECKPOINTS
    arguments = training_utils.build_training_arguments(
        settings, folder, base.device, base.dtype, bool(data.validation)
    )
    start_garbage_collection()
    date = process_utils.from_first_process(checkpoint_utils.run_date, resolve_path(settings.output_dir), fresh)
    prompt_utils.set_date(base.tokenizer, date)
    with process_utils.shared_errors():
        rows = prepare_rows(settings, base, data)
        plan = make_plan(settings, base, rows, arguments)
    if not dry_run or arguments.world_size > 1:
        identity = checkpoint_utils.training_identity(settings, base, rows, arguments)
        check_alike(identity)
    if arguments.world_size > 1:
        check_same_folder(lock.folder)
    if dry_run:
        process_utils.from_first_process(write_report, settings, rows.report, True)
        rehearse(settings, base, data, rows, plan, started)
        return
    with held_for_all(lock), StopAtOnce():
        checkpoints = open_checkpoints(settings, base, identity, fresh)
        model, base = model_utils.load_for_training(settings, base)
        trainer = prepare_trainer(settings, base, data, rows, plan, model, checkpoints, log, started)
        run(trainer, settings, base, rows, started)


# ---- Data ------------------------------------------------------------------------------------------------------------
def load_data(settings):
    """Read the rows as Conversations and split them, after saying what was read; returns Data."""
    path, cache_dir = settings.custom_dataset_path or "data/demo.json", resolve_path(settings.output_dir) / CACHE
    conversations, report = data_utils.load_announced(
        "Data", path, settings.dataset_columns, cache_dir, settings.chosen_only
    )
    if settings.max_train_rows:
        chosen = data_utils.split_conversations(conversations, 0, settings.seed)[0]
        conversations = chosen.select(range(min(len(chosen), settings.max_train_rows)))
    if settings.validation_dataset_path is None:
        return Data(*data_utils.split_conversations(conversations, settings.validation_split, settings.seed), [report])
    validation, validation_report = data_utils.load_announced(
        "Validation data",
        settings.validation_dataset_path,
        settings.dataset_columns,
        cache_dir,
        settings.chosen_only,
        or_usual_names=True,
    )
    return Data(data_utils.remove_overlap(conversations, validation), validation, [report, validation_report])


def settle_system_text(settings, data):
    """The settings with the system text that chat begins with: SYSTEM_PROMPT, else what all training rows share."""
    if settings.system_prompt is not None:
        return settings
    shared = data_utils.shared_system_text(data.training)
    if shared is not None:
        shown = prompt_utils.shown_text(shared)
        say(f"System text: all training rows begin with {shown}, so chat with the adapter does too")
    return settings._replace(system_prompt=shared)


# ---- Rows ------------------------------------------------------------------------------------------------------------
def prepare_rows(settings, base, data):
    """Tokenize the data, and print the data report and a row as the model sees it; returns Rows.

    Raises UserError where too much of the data would be lost.
    """
    if any(report.thoughts for report in data.reports):
        prompt_utils.set_thinking(base.tokenizer, True)
    with process_utils.first_process_first():
        training = tokenize(settings, base, data.training, "training data")
        validation = tokenize(settings, base, data.validation, "validation data")
    prompt_utils.check_system_text(base.tokenizer, settings.system_prompt)
    report = report_utils.build_report(
        data.reports,
        data.training,
        data.validation,
        training,
        validation,
        settings.max_seq_length,
        base.tokenizer,
    )
    report_utils.print_report(report)
    say(f"Template: {prompt_utils.describe_template(base.tokenizer)}")
    show_example(base.tokenizer, training)
    report_utils.check_cut_limit(report, settings.answers_cut_limit)
    return Rows(training, validation, choose_evaluated(validation, settings), report)


def tokenize(settings, base, conversations, name):
    """The TokenizedRows of conversations; at least one must be left where there are any."""
    cache_dir = resolve_path(settings.output_dir) / CACHE
    rows = token_utils.tokenize_conversations(base.tokenizer, conversations, settings.max_seq_length, name, cache_dir)
    if len(conversations) and not len(rows):
        raise UserError(
            f"no token of the {name} ({counted(len(conversations), 'row')}) can be trained at --max_seq_length"
            f" {settings.max_seq_length}; raise it"
        )
    fit_utils.check_rows(base.shapes, base.tokenizer, rows, name)
    return rows


def choose_evaluated(validation, settings):
    """The EVAL_ROWS of the validation rows that are measured during the training, always the same ones."""
    if not 0 < settings.eval_rows < len(validation):
        return validation
    chosen = random.Random(settings.seed).sample(range(len(validation)), settings.eval_rows)
    return validation.select(sorted(chosen))


def show_example(tokenizer, rows):
    """Show a row of usual length as the model sees it, its trained tokens marked."""
    lengths = rows.index["length"][:1000]
    example = rows[int(abs(lengths - sorted(lengths)[len(lengths) // 2]).argmin())]
    color = sys.stderr.isatty()
    start, end = ("\x1b[1;32m", "\x1b[0m") if color else ("[", "]")
    marks = "green" if color else "[ ]"
    say(f"Example: row {example['row']}, {counted(len(example['input_ids']), 'token')}, the trained ones in {marks}:\n")
    say(token_utils.mark_trained_tokens(tokenizer, example, start, end) + "\n", styled=True)


def write_report(settings, report, dry_run=False):
    """Write the data report to OUTPUT_DIR; a dry run leaves that of an earlier run there alone."""
    folder = resolve_path(settings.output_dir)
    if dry_run and any((folder / name).exists() for name in (ADAPTER, CHECKPOINTS)):
        folder = folder / CACHE
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / DATA_REPORT, report)
    say(f"Data report: {display_path(folder / DATA_REPORT)}")


# ---- Plan ------------------------------------------------------------------------------------------------------------
def make_plan(settings, base, rows, arguments):
    """Decide how the steps are computed, and say what the run will do and what it needs; returns a Plan."""
    plan_utils.print_plan(settings, base, rows.training, rows.validation, rows.evaluated, arguments.world_size)
    gpu = plan_utils.look_at_gpu(base.device)
    steps = plan_utils.plan_steps(
        base.shapes, settings, base.dtype, rows.training, gpu, arguments.world_size, rows.validation, base.shards
    )
    plan_utils.check_compiler(steps, base.device)
    return Plan(arguments, steps)


def rehearse(settings, base, data, rows, plan, started):
    """In a dry run: load the weights, if they are at hand and fit, and say how long the run would take."""
    if reason := why_not_to_load(settings, base):
        say(f"How long the run will take is known once the weights are loaded; {reason}")
        return
    model, base = model_utils.load_for_training(settings, base)
    answers, times = build_sample_answers(settings, base.tokenizer, data.validation), plan_utils.RunTimes(began=started)
    with tempfile.TemporaryDirectory(dir=resolve_path(settings.output_dir), prefix="rehearsal-") as scratch:
        plan.arguments.output_dir = scratch  # the Trainer makes this folder, and a dry run leaves none
        trainer = training_utils.build_trainer(settings, base, rows, plan, model, callbacks=[answers], times=times)
        trainer.state.max_steps = plan_utils.count_steps(len(rows.training), settings, plan.arguments.world_size)
        with trainer.runner:
            trainer.rehearse(Path(scratch) / "save")


def why_not_to_load(settings, base):
    """Why a dry run leaves the weights alone, or None."""
    if not model_utils.weights_at_hand(hub_utils.model_folder(base.path, base.models_dir)):
        return "they are not downloaded yet"
    gpu = plan_utils.look_at_gpu(base.device)
    needed = plan_utils.weight_bytes(base.shapes, settings, base.dtype)
    free = gpu.free if gpu else psutil.virtual_memory().available
    if needed > 0.9 * free:
        return f"they take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    return None


# ---- Run -------------------------------------------------------------------------------------------------------------
def open_checkpoints(settings, base, identity, fresh):
    """Decide, in the first process for all, whether an interrupted run goes on; refuse one that is another run's."""
    output_dir = resolve_path(settings.output_dir)
    resumption = None
    if not os.path.lexists(output_dir / ADAPTER):  # else the run there had finished
        resumption = process_utils.from_first_process(checkpoint_utils.find_resumption, output_dir, identity, fresh)
    run_name = process_utils.from_first_process(choose_run_name, settings, resumption)
    trainable = model_utils.count_parameters(base.shapes)[1]
    folder = output_dir / CHECKPOINTS
    checkpoints = checkpoint_utils.Checkpoints(folder, settings, identity, run_name, trainable, resumption)
    checkpoints.check_space()
    return checkpoints


def shaping_settings(settings, base):
    """What all processes must have alike before they compute anything together, as {name: value}.

    Where the files lie may differ from machine to machine; what the data are is known once they are tokenized.
    """
    files = ("base_model_name", "custom_dataset_path", "validation_dataset_path")
    left_out = {*checkpoint_utils.PLACES, *files, *NOT_FOR_TRAINING}
    return {name: value for name, value in settings._asdict().items() if name not in left_out} | {
        "device": base.device.type,
        "number_format": str(base.dtype).removeprefix("torch."),
        "shards": base.shards and base.shards.name,
        "versions": {name: version(name) for name in checkpoint_utils.LIBRARIES},
    }


def check_alike(own):
    """Raise UserError unless {name: value} are the first process's in all; on another machine config.py may be another.

    Each process steps its own copy of the adapter, which would then part from the first one's without a word. Other
    "versions" of the libraries are told of.
    """
    (_, first), *others = process_utils.from_all_processes((socket.gethostname(), own))
    for rank, (host, found) in enumerate(others, start=1):
        if changed := checkpoint_utils.differences(first, found):
            raise UserError(
                f"process {rank} on {host} would not train like the first one ({', '.join(changed)}); give the same"
                " command, config.py, base model and data on all machines"
            )
    for rank, (host, found) in enumerate(others, start=1):
        if changed := checkpoint_utils.version_differences(first, found):
            say_once(
                f"process {rank} on {host} has other versions than the first one ({', '.join(changed)}), which may"
                " compute or talk to each other otherwise; install the same ones on all machines"
            )


def check_same_folder(folder):
    """Raise UserError unless all processes see the first one's folder: on other machines another may have its name."""
    mark = process_utils.from_first_process(leave_mark, folder)
    try:
        with process_utils.shared_errors():
            if not (folder / mark).exists():
                raise UserError(
                    f"the machines do not share one {display_path(folder)}, in which all of them write and read"
                    " checkpoints; give a folder that all of them see with --output_dir"
                )
    finally:
        if is_first_process():
            (folder / mark).rmdir()


def leave_mark(folder):
    """Make an empty folder of a new name in a folder, and return its name."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".seen-by-all-", dir=folder)).name


@contextmanager
def held_for_all(lock):
    """Hold an OutputLock, which the first process takes; if it cannot, all raise its UserError."""
    with ExitStack() as held:
        with process_utils.shared_errors():
            held.enter_context(lock)
        yield


def choose_run_name(settings, resumption):
    """The run's name in TensorBoard. A run that goes on keeps its own; one that earlier logs have gets a number."""
    if resumption:
        return resumption.run_name
    wanted = settings.run_name or time.strftime("%Y%m%d-%H%M%S")
    logs_dir = resolve_path(settings.logs_dir)
    names = chain([wanted], (f"{wanted[:60]}-{number}" for number in count(2)))
    name = next(name for name in names if not ((logs_dir / name).is_dir() and any((logs_dir / name).iterdir())))
    if name != wanted:
        say(f"{display_path(logs_dir / wanted)} holds the logs of an earlier run; this run is named {name}")
    return name


def prepare_trainer(settings, base, data, rows, plan, model, checkpoints, log, started):
    """Make the output folder ready, and put the Trainer of a model with its adapter together."""
    log_dir = resolve_path(settings.logs_dir) / checkpoints.run_name
    board = board_utils.RunBoard(log_dir, settings, first_step=checkpoints.saved_step)
    answers = build_sample_answers(settings, base.tokenizer, data.validation, board)
    callbacks = [board_utils.ProgressLine(), board, answers]
    process_utils.from_first_process(
        prepare_output, settings, data.validation, rows.report, checkpoints.resumption, log
    )
    times = plan_utils.RunTimes(began=started)
    seen_by_base = evidence_utils.read_seen_rows(hub_utils.model_folder(base.path, base.models_dir))
    seen = evidence_utils.note_rows(data.training, data.validation, seen_by_base)
    return training_utils.build_trainer(settings, base, rows, plan, model, checkpoints, callbacks, times, seen)


def build_sample_answers(settings, tokenizer, validation_set, board=None):
    """The callback that answers the first validation prompts at each evaluation."""
    generation = generation_utils.build_generation_config(tokenizer, settings._replace(do_sample=False))
    chosen = data_utils.with_questions(validation_set, settings.sample_prompts)
    prompts = [prompt_utils.begin_with(settings.system_prompt, conversation) for _, conversation in chosen]
    return board_utils.SampleAnswers(tokenizer, prompts, generation, settings.max_seq_length, board)


def prepare_output(settings, validation_set, report, resumption, log):
    """Move an earlier run out of the way; keep the log, the data report and the validation rows, for evaluate.py."""
    output_dir = resolve_path(settings.output_dir)
    if resumption is None:
        moved_to = set_aside(output_dir, RUN_OUTPUTS, paths_read(settings))
        if moved_to:
            say(f"An earlier run lies in {display_path(output_dir)}; moved to {display_path(moved_to)}")
    output_dir.mkdir(parents=True, exist_ok=True)
    log.open(output_dir / RUN_LOG)
    write_report(settings, report)
    path = output_dir / VALIDATION_ROWS
    # written anew where a run goes on, since a power cut may have torn it
    if validation_set and path not in paths_read(settings):
        data_utils.store_conversations(output_dir / f"{VALIDATION_ROWS}.tmp", validation_set)
        put_in_place(output_dir / f"{VALIDATION_ROWS}.tmp", path)


def paths_read(settings):
    """What a run reads of local files and folders, and therefore must not move, be it in its own output folder."""
    data = [path for path in (settings.custom_dataset_path, settings.validation_dataset_path) if path is not None]
    return [resolve_path(settings.base_model_name), *map(resolve_input, data)]


def run(trainer, settings, base, rows, started):
    """Train from the beginning or from where an interrupted run was, then save the adapter; a signal ends it well."""
    resumption = trainer.checkpoints.resumption
    say(f"Training; watch it with: tensorboard --logdir {shlex.quote(settings.logs_dir)}")
    with trainer.signals, trainer.runner, closing(trainer):
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
        trainer.measure_best()
        if trainer.is_world_process_zero():
            finish(trainer, settings, base, rows, started)


def finish(trainer, settings, base, rows, started):
    """Save the adapter with its record, and say how the run went and what to type next."""
    checkpoints = trainer.checkpoints
    record = build_record(trainer, rows, checkpoints.started if checkpoints.resumption else started)
    adapter_dir = resolve_path(settings.output_dir) / ADAPTER
    with storage_errors("the adapter", f"{checkpoints.last()}; mend that, and {checkpoint_utils.AGAIN}"):
        model_utils.save_finished_adapter(
            trainer.model, base, adapter_dir, settings, record, trainer.state, trainer.seen
        )
    print_summary(settings, adapter_dir, record)


def build_record(trainer, rows, started):
    """What run.json holds of a finished run."""
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return {
        "run": trainer.checkpoints.run_name,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seconds": round(time.time() - started, 1),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss": trainer.final_loss,  # of the checkpoint that was kept, on all validation rows
        "peak_memory_gib": round(model_utils.measured_peak(trainer.args.device), 3),
        "training_rows": len(rows.training),
        "validation_rows": len(rows.validation),
        "evaluated_rows": len(rows.evaluated),  # of them, during the training
        "several_turns": several_turns(rows.report["files"][0]),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "python": platform.python_version(),
    }


def several_turns(read):
    """The share of the rows of a file that hold more than one question: whether a chat should keep earlier turns."""
    return round(read["several_turns"] / read["kept"], 4)


def print_summary(settings, adapter_dir, record):
    """Say on stdout how the run went, where the adapter is, and what to type next."""
    where = ""
    if settings.output_dir != DEFAULTS["output_dir"]:
        where = f" --output_dir {shlex.quote(settings.output_dir)}"
    validation, following = "", [f"Next: python inference.py{where}   talk to it"]
    if record["validation_loss"] is not None:
        perplexity = engine_passes.perplexity(record["validation_loss"])
        validation = f", validation loss {record['validation_loss']:.4f} (perplexity {perplexity:.2f})"
        if record["best_step"]:
            validation += f" from step {record['best_step']}"
        if record["evaluated_rows"] < record["validation_rows"]:
            validation += f" on all {counted(record['validation_rows'], 'row')}"
        following.insert(0, f"Next: python evaluate.py{where}    base versus tuned, in figures and answers")
    duration = format_duration(record["seconds"])
    lines = [
        f"\nDone in {duration}: {counted(record['steps'], 'step')}, training loss {record['first_loss']:.4f} ->"
        f" {record['last_loss']:.4f}{validation}, peak memory {record['peak_memory_gib']:.2f} GiB.",
        f"Adapter: {display_path(adapter_dir)}",
        *following,
    ]
    print(printable("\n".join(lines)), flush=True)
    note("\n".join(lines))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
