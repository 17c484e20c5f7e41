"""What a user meets whose run goes wrong other than by its data: for each cause, made for real, one plain line.

python -m pytest tests/test_fault_messages.py -q -rP     # prints all of them
"""

import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

import batch_utils
import checkpoint_utils
import engine_runner
import engine_shards
import evaluate
import export_utils
import file_utils
import inference
import merge
import message_utils
import model_utils
import result_utils
import run_utils
import token_utils
import train
import training_utils
from checkpoint_utils import find_newest, seal
from conftest import PROJECT, TINY_BASE, outside, small_base
from fake_hub import NO_SERVER, TOKEN, serve
from file_utils import write_json
from run_utils import ADAPTER, CHECKPOINTS, OutputLock
from script_utils import run_script
from warm import WarmProcess

# cause: a function of `place` that brings it about and returns more flags; main: the script's; code: its exit code;
# words: what the line says. With the codes 2, 130 and 143 that line is the last one.
Fault = namedtuple("Fault", "cause main code words")
FAULTS = {}
ROWS = [{"instruction": f"Say {word} {n} times", "response": word} for word in ("red", "blue") for n in range(12)]


def fault(*words, code=2, main=train.main):
    """Put the function below into the table under its name."""

    def add(cause):
        FAULTS[cause.__name__.replace("_", " ")] = Fault(cause, main, code, words)
        return cause

    return add


# ---- Where the faults happen -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A folder with `rows.json`; `flags(folder)` makes a run of four steps there that saves and evaluates in each."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    numbers = {"max_steps": 4, "eval_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "lora_r": 2}
    fixed = {"device": "cpu", "use_4bit_quantization": "false", "gradient_checkpointing": "false", "sample_prompts": 0}
    fixed |= numbers | {"base_model_name": small_base(), "custom_dataset_path": folder / "rows.json"}
    return SimpleNamespace(folder=folder, fixed=fixed)


def command_line(scratch, folder, **changes):
    settings = scratch.fixed | {"output_dir": folder / "out", "logs_dir": folder / "logs"} | changes
    return [f"--{name}" + (f"={value}" if value is not None else "") for name, value in settings.items()]


@pytest.fixture(scope="module")
def finished(scratch):
    """The output folder of a run that has ended."""
    assert run_script(train.main, command_line(scratch, scratch.folder / "finished")) == 0
    return scratch.folder / "finished/out"


@pytest.fixture(scope="module")
def halfway(finished):
    """The output folder of a run that was killed at its end: all its checkpoints and no adapter."""
    folder = finished.parent.parent / "halfway/out"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / ADAPTER)
    return folder


@pytest.fixture
def place(scratch, finished, halfway, tmp_path, monkeypatch):
    """Where one fault happens: folder, out, patch (a MonkeyPatch) and the runs to start from."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    monkeypatch.setattr(message_utils.VOICE, "note", None)  # the log of the run before
    yield SimpleNamespace(
        folder=tmp_path, out=tmp_path / "out", patch=monkeypatch, finished=finished, halfway=halfway, scratch=scratch
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for folder in (tmp_path / "disk", tmp_path / "out" / CHECKPOINTS):
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", folder], check=True)  # its rows may still be mapped into memory
    assert not (tmp_path / "exploded").exists()


def before(place, owner, name, action, when=lambda *args: True):
    """Do something for real right before a function of ours is called."""
    original = getattr(owner, name)

    def called(*args, **kwargs):
        if when(*args):
            action()
        return original(*args, **kwargs)

    place.patch.setattr(owner, name, called)


def in_step(number):
    return lambda trainer, *args: trainer.state.global_step == number - 1


def send(number):
    return lambda: os.kill(os.getpid(), number)


def disk(place, size="64m", name="disk"):
    """Mount a disk of its own at a new folder."""
    (place.folder / name).mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place.folder / name]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    return place.folder / name


def interrupted(place):
    shutil.copytree(place.halfway, place.out)
    return find_newest(place.out / CHECKPOINTS)[0][0]


def adapter(place):
    """A copy of the finished adapter, and the flag that names it."""
    return shutil.copytree(place.finished / ADAPTER, place.folder / "adapter")


def copied_base(place):
    return shutil.copytree(small_base(), place.folder / "base")


def edit_json(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def talk(argv):
    inference.main(["Hi", "--max_new_tokens=2", "--adapter_path", os.environ["ADAPTER"]])


def answer_rows(argv, name="rows.json"):
    folder = Path(os.environ["ADAPTER"]).parent
    (folder / "rows.json").write_text(json.dumps(ROWS))
    files = ["--input_file", f"{folder}/{name}", "--output_file", f"{folder}/answers.jsonl"]
    inference.main([*files, "--max_new_tokens=2", "--adapter_path", os.environ["ADAPTER"]])


def measure(argv):
    evaluate.main(["--adapter_path", os.environ["ADAPTER"]])


def flags_of_rows():
    """An adapter, the rows that it was trained on, and where to write."""
    folder = Path(os.environ["ADAPTER"]).parent
    (folder / "rows.json").write_text(json.dumps(ROWS))
    places = ["--validation_dataset_path", f"{folder}/rows.json", "--output_dir", f"{folder}/out"]
    return ["--adapter_path", os.environ["ADAPTER"], *places]


def measure_rows(argv):
    evaluate.main([*flags_of_rows(), "--eval_samples=0", "--include_trained_rows"])


def join(argv):
    merge.main(flags_of_rows())


def answer_here(argv):
    files = ["--input_file", __file__, "--output_file", "answers.jsonl"]
    inference.main([*files, "--adapter_path", os.environ["ADAPTER"]])


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB"],))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------
def plant(place, name, write):
    """Put a file into the newest checkpoint and seal it again, so that its manifest verifies."""
    folder = interrupted(place)
    manifest = json.loads((folder / "manifest.json").read_text())
    write(folder / name)
    facts = {name: manifest[name] for name in ("step", "best_step", "finished", "run_name")}
    seal(folder, manifest["identity"], **facts)


REFUSED = ("holds other things than numbers", "is not loaded; remove", "or add --fresh")


@fault("checkpoint-4/optimizer.pt", *REFUSED)
def code_in_the_optimizer_state(place):
    plant(place, "optimizer.pt", lambda path: torch.save({"state": Bomb()}, path))


@fault("checkpoint-4/scheduler.pt", *REFUSED)
def code_in_the_scheduler_state(place):
    plant(place, "scheduler.pt", lambda path: torch.save(Bomb(), path))


@fault("checkpoint-4/rng_state.pth", *REFUSED)
def code_in_the_random_state_as_a_bare_pickle(place):
    plant(place, "rng_state.pth", lambda path: path.write_bytes(pickle.dumps(Bomb())))


@fault("Skipped", "checkpoint-4: optimizer.pt is damaged: its content is not what was saved", code=0)
def a_damaged_checkpoint(place):
    path = interrupted(place) / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


KILL = """
import os, signal, sys
import checkpoint_utils, train
seal = checkpoint_utils.seal
def kill_at_step_2(folder, *args, **facts):
    if folder.name == "checkpoint-2":
        os.kill(os.getpid(), signal.SIGKILL)
    return seal(folder, *args, **facts)
checkpoint_utils.seal = kill_at_step_2
train.main(sys.argv[1:])
"""


@fault("Skipped", "checkpoints/incomplete: a checkpoint that was being saved when the run ended", code=0)
def kill_in_a_save(place):
    script, streams = place.folder / "kill.py", place.folder / "streams"
    script.write_text(KILL)
    streams.mkdir()
    flags = command_line(place.scratch, place.folder)
    killed = WarmProcess(streams, script, flags, PROJECT, outside({"PYTHONPATH": str(PROJECT)})).wait(600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@fault("interrupted run with other settings or data: learning_rate 0.0002 -> 0.01;", "--fresh", "another --output_dir")
def resuming_with_another_setting(place):
    interrupted(place)
    return {"learning_rate": 0.01}


@fault("interrupted run with other settings or data: training_data 22 rows", "-> 22 rows", "undo that")
def resuming_with_other_data(place):
    interrupted(place)
    rows = [row | {"response": row["response"].upper()} for row in ROWS]
    (place.folder / "rows.json").write_text(json.dumps(rows))
    return {"custom_dataset_path": place.folder / "rows.json"}


# ---- Disks and locks -------------------------------------------------------------------------------------------------
@fault("MiB free on the disk of", "the run needs", "free some, or give another folder with --output_dir")
def a_disk_with_too_little_room(place):
    return {"output_dir": disk(place, "3m") / "out", "lora_r": 64}


@fault(
    "the rows take more than",
    "/cache, of which",
    "MiB are left; give fewer or shorter rows, or a folder on a larger disk with --output_dir",
)
def a_small_file_whose_rows_share_a_long_text(place):
    rows = [{"instruction": f"Say {n}", "response": "red " * 500_000} for n in range(60)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place.folder / "rows.parquet", compression="zstd")
    assert (place.folder / "rows.parquet").stat().st_size < 2**17
    return {"custom_dataset_path": place.folder / "rows.parquet", "output_dir": disk(place, "40m") / "out"}


@fault("checkpoint-3 could not be saved: No space left on device; last good checkpoint", "the same command goes on")
def a_disk_that_fills_up_in_a_save(place):
    folder = disk(place)

    def fill():
        with open(folder / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))

    before(place, training_utils, "save_adapter", fill, lambda *args: Path(args[2]).name == "checkpoint-3")
    return {"output_dir": folder / "out"}


def let_files_grow(size):
    """Let the system refuse files of more bytes, as a disk does that knows no larger ones; place takes it back."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@fault("checkpoint-1 could not be saved: File too large; last good checkpoint: none yet; mend that")
def a_file_larger_than_the_disk_takes(place):
    before(place, training_utils, "save_adapter", lambda: let_files_grow(2000), lambda *args: True)


@fault("the merged model could not be saved: File too large; mend that and merge again", main=join)
def a_merged_model_larger_than_the_disk_takes(place):
    adapter(place)
    before(place, model_utils, "merged_folder", lambda: let_files_grow(20_000))


@fault("answers.jsonl.unfinished could not be saved: File too large; mend that, and the same", main=answer_rows)
def answers_more_than_the_disk_takes(place):
    adapter(place)
    before(place, batch_utils, "generate_replies", lambda: let_files_grow(1000))


@fault("answers.jsonl has come to exist meanwhile; move it away, and the same command writes all", main=answer_rows)
def an_answer_file_of_somebody_elses(place):
    adapter(place)
    before(place, batch_utils, "generate_replies", (place.folder / "answers.jsonl").touch)


@fault("TensorBoard logs end here:", "cannot be written (No such file or directory)", code=0)
def logs_that_are_deleted_under_a_run(place):
    logs = place.folder / "logs"
    before(place, training_utils.LoraTrainer, "training_step", lambda: shutil.rmtree(logs), in_step(2))


@fault("the folder in which this command was started is gone; go to another one", main=answer_here)
def a_shell_whose_folder_is_gone(place):
    adapter(place)
    (place.folder / "shell").mkdir()
    place.patch.chdir(place.folder / "shell")
    (place.folder / "shell").rmdir()


@fault("/out/previous/", "mend that and try again")
def an_earlier_run_that_may_not_be_moved(place):
    shutil.copytree(place.finished, place.out)
    refused = PermissionError(errno.EACCES, "denied", str(place.out), None, f"{place.out}/previous/x")
    place.patch.setattr(run_utils.os, "rename", lambda *paths: (_ for _ in ()).throw(refused))


@fault("is a file, expected an adapter's folder; give the folder that holds it", main=talk)
def a_file_as_an_adapter(place):
    place.patch.setenv("ADAPTER", str(place.finished / ADAPTER / "adapter_model.safetensors"))


@fault(
    "--device stands behind a lone --, where no flag is read; put it in front of that",
    main=lambda argv: merge.main(["--", "merged", "--device", "cpu"]),
)
def a_flag_behind_two_dashes(place):
    pass


@fault("cannot be written to; choose another folder with --output_dir")
def a_read_only_disk(place):
    folder = disk(place)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    return {"output_dir": folder / "out"}


@fault("/out is in use by process", "since", "wait for it, or give another folder with --output_dir")
def two_runs_in_one_folder(place):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with OutputLock(place.out):
            os.write(writer, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    place.child = pid


# ---- Names that no file has, files where folders belong, and the reverse ---------------------------------------------
LONG = "x" * 300
# setting -> what to do about a name that is too long
for name in ("output_dir", "logs_dir", "models_dir", "custom_dataset_path", "validation_dataset_path"):
    FAULTS[f"{name} of a user that is not there"] = Fault(
        lambda place, name=name: {name: "~nouser/x"},
        train.main,
        2,
        ("~nouser/x names the home of a user that this machine does not know; write it out",),
    )
for name in ("output_dir", "logs_dir", "custom_dataset_path", "validation_dataset_path"):
    FAULTS[f"{name} longer than a name may be"] = Fault(
        lambda place, name=name: {name: place.folder / LONG}, train.main, 2, ("File name too long: ",)
    )


for name in ("output_dir", "models_dir", "custom_dataset_path", "base_model_name"):
    FAULTS[f"{name} that is an address"] = Fault(
        lambda place, name=name: {name: "s3://bucket/x"},
        train.main,
        2,
        ("s3://bucket/x is an address, expected a file or folder of this machine; download it",),
    )
    FAULTS[f"{name} that is no UTF-8"] = Fault(
        lambda place, name=name: {name: f"{place.folder}/\udcff"},
        train.main,
        2,
        (f"--{name} is '", "which is no utf-8 text; rename what it names"),
    )


@fault("rows.json is a pipe or a device, expected one .json, .jsonl, .csv or .parquet file")
def a_pipe_as_data(place):
    os.mkfifo(place.folder / "rows.json")
    return {"custom_dataset_path": place.folder / "rows.json"}


@fault("--adapter_path is '", "which is no utf-8 text", main=talk)
def an_adapter_that_is_no_UTF_8(place):
    place.patch.setenv("ADAPTER", "\udcff")


@fault("~nouser/x names the home of a user that this machine does not know")
def a_base_of_a_user_that_is_not_there(place):
    return {"base_model_name": "~nouser/x"}


@fault("File name too long: ", "mend that and try again")
def a_base_longer_than_a_name_may_be(place):
    return {"base_model_name": f"models/{LONG}"}


@fault("File name too long: ", main=talk)
def an_adapter_longer_than_a_name_may_be(place):
    place.patch.setenv("ADAPTER", LONG)


@fault("~nouser/x names the home of a user that this machine does not know", main=talk)
def an_adapter_of_a_user_that_is_not_there(place):
    place.patch.setenv("ADAPTER", "~nouser/x")


@fault("--run_name is", "expected one folder's name, no slashes")
def a_run_name_that_is_too_long(place):
    return {"run_name": LONG}


@fault("--dataset_columns got", "expected JSON such as")
def json_deeper_than_python_reads_in_a_flag(place):
    return {"dataset_columns": '{"a":' * 100_000}


def lies_in(place, name, folder=True):
    """Put a folder, or else a file, of this name into the output folder."""
    path = place.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        (path / "mine").mkdir(parents=True)
    else:
        path.write_text("mine")


@fault(".lock cannot be used as a lock (", "expected an empty file: move away what lies there")
def a_folder_where_the_lock_belongs(place):
    lies_in(place, ".lock")


@fault("Is a directory: ", ".lock-owner.json")
def a_folder_where_the_locks_record_belongs(place):
    lies_in(place, ".lock-owner.json")


@fault("data_report.json; mend that and try again")
def a_folder_where_the_data_report_belongs(place):
    interrupted(place)
    (place.out / "data_report.json").unlink()
    (place.out / "data_report.json").mkdir()


@fault("data_report.json.tmp; mend that and try again")
def a_folder_where_an_unfinished_file_belongs(place):
    lies_in(place, "data_report.json.tmp")


@fault("Not a directory: ", "/cache")
def a_file_where_the_cache_belongs(place):
    lies_in(place, "cache", folder=False)


@fault("previous", "mend that and try again")
def a_file_where_earlier_runs_belong(place):
    shutil.copytree(place.finished, place.out)
    lies_in(place, "previous", folder=False)


@fault("An earlier run lies in", "moved to", code=0)
def a_file_where_the_checkpoints_belong(place):
    lies_in(place, "checkpoints", folder=False)


@fault("An earlier run lies in", "moved to", code=0)
def a_folder_where_the_validation_rows_belong(place):
    lies_in(place, "validation.jsonl")


@fault("An earlier run lies in", "moved to", code=0)
def a_file_where_the_adapter_belongs(place):
    lies_in(place, "lora-adapter", folder=False)


@fault("An earlier run lies in", "moved to", code=0)
def a_link_to_nowhere_where_the_adapter_belongs(place):
    interrupted(place)
    (place.out / ADAPTER).symlink_to(place.folder / "gone")


@fault("Going on with the interrupted run", code=0)
def a_link_where_an_unfinished_adapter_belongs(place):
    interrupted(place)
    (place.out / f"{ADAPTER}.incomplete").symlink_to("/etc")


@fault("Skipped", "checkpoint-9: it has no manifest.json", code=0)
def a_link_to_nowhere_among_the_checkpoints(place):
    (interrupted(place).parent / "checkpoint-9").symlink_to(place.folder / "gone")


@fault("An earlier run lies in", "moved to", code=0)
def checkpoints_on_a_disk_of_their_own(place):
    shutil.copytree(place.finished, place.out)
    shutil.rmtree(place.out / CHECKPOINTS)
    shutil.copytree(place.finished / CHECKPOINTS, disk(place, name=f"out/{CHECKPOINTS}"), dirs_exist_ok=True)


@fault("the adapter's settings", "cannot be read", main=talk)
def a_record_larger_than_the_memory(place):
    (adapter(place) / "settings.json").touch()
    os.truncate(place.folder / "adapter/settings.json", 2**42)


@fault("the adapter's settings", "cannot be read", main=talk)
def a_record_deeper_than_python_reads(place):
    (adapter(place) / "settings.json").write_text("[" * 100_000)


@fault("is a link that leads back to itself; correct it", main=talk)
def an_adapter_that_is_a_link_to_itself(place):
    (place.folder / "adapter").symlink_to(place.folder / "adapter")


@fault("is a link that leads back to itself; correct it")
def data_that_is_a_link_to_itself(place):
    (place.folder / "rows.json").symlink_to(place.folder / "rows.json")
    return {"custom_dataset_path": place.folder / "rows.json"}


@fault("is a link, expected a file of answers so far; move it away", main=answer_rows)
def a_link_where_unfinished_answers_belong(place):
    adapter(place)
    (place.folder / "answers.jsonl.unfinished").symlink_to(place.folder / "mine.txt")


@fault("is no file, expected a file of answers so far; move it away", main=answer_rows)
def a_pipe_where_unfinished_answers_belong(place):
    adapter(place)
    os.mkfifo(place.folder / "answers.jsonl.unfinished")


@fault("--demo answers its own examples; leave it out, or", main=lambda argv: inference.main(["Hi", "--demo"]))
def an_instruction_beside_the_examples(place):
    pass


@fault("holds a NUL character, which no name has; correct it", main=lambda argv: answer_rows(argv, "a\0b"))
def a_file_of_prompts_with_a_NUL_in_its_name(place):
    adapter(place)


@fault("holds no adapter_config.json; train again, or give the folder that holds it", main=talk)
def a_folder_where_a_record_belongs(place):
    folder = adapter(place)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


def beside_the_adapter(place, name, lay):
    """Put something else in the place of an adapter's file."""
    path = adapter(place) / name
    path.unlink()
    lay(path)


for name, lay in {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nowhere": lambda p: p.symlink_to("x"),
}.items():
    FAULTS[f"{name} where the adapters settings belong"] = Fault(
        lambda place, lay=lay: beside_the_adapter(place, "settings.json", lay),
        talk,
        2,
        ("the adapter's settings", "settings.json is no file; move away what lies there, and restore it"),
    )


@fault("the chat template writes nothing, expected a question's text; restore the tokenizer's files", main=talk)
def an_adapter_whose_template_writes_nothing(place):
    beside_the_adapter(place, "chat_template.jinja", Path.touch)


@fault("cannot be loaded: its weights have other shapes than its config.json says; restore both")
def a_base_whose_config_is_of_another_model(place):
    edit_json(copied_base(place) / "config.json", intermediate_size=72)
    return {"base_model_name": place.folder / "base"}


@fault("cannot be loaded: Validation error for field 'rms_norm_eps': TypeError: ", "restore the folder's files")
def a_base_whose_config_holds_a_text_for_a_number(place):
    edit_json(copied_base(place) / "config.json", rms_norm_eps="x")
    return {"base_model_name": place.folder / "base"}


# ---- Signals ---------------------------------------------------------------------------------------------------------
STOPPED = ("Stopped at step 3 of 4, saved in", "checkpoint-3; the same command goes on from the last checkpoint")


@fault(*STOPPED, code=143)
def sigterm(place):
    before(place, training_utils.LoraTrainer, "training_step", send(signal.SIGTERM), in_step(3))
    return {"validation_split": 0}


@fault(*STOPPED, code=130)
def ctrl_c(place):
    before(place, training_utils.LoraTrainer, "training_step", send(signal.SIGINT), in_step(3))
    return {"validation_split": 0}


@fault(*STOPPED, code=129)
def a_terminal_that_is_closed(place):
    before(place, training_utils.LoraTrainer, "training_step", send(signal.SIGHUP), in_step(3))
    return {"validation_split": 0}


@fault("Stopped at once, in step 3; last good checkpoint:", "checkpoint-2", code=130)
def ctrl_c_twice(place):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before(place, training_utils.LoraTrainer, "training_step", twice, in_step(3))


@fault("Stopped in the evaluation of step 1 of 4, saved in", "checkpoint-1; the same command goes on", code=143)
def sigterm_in_an_evaluation(place):
    before(place, engine_runner, "score_rows", send(signal.SIGTERM))


@fault("Stopped at step 1 of 4, saved in", "checkpoint-1; the same command goes on", code=143)
def sigterm_in_a_save(place):
    before(place, checkpoint_utils, "seal", send(signal.SIGTERM))
    return {"validation_split": 0}


@fault("Stopped by SIGTERM.", code=143)
def sigterm_while_the_model_loads(place):
    before(place, model_utils, "load_base_model", send(signal.SIGTERM))


@fault("Stopped by Ctrl-C.", code=130)
def ctrl_c_while_the_model_loads(place):
    before(place, model_utils, "load_base_model", send(signal.SIGINT))


def twice(number):
    """As `timeout` sends it, to a process and to its group."""

    def action():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)

    return action


@fault("Stopped by SIGTERM.", code=143)
def sigterm_twice_while_rows_are_tokenized(place):
    before(place, token_utils, "write_rows", twice(signal.SIGTERM))


@fault("Stopped by SIGTERM.", code=143, main=join)
def sigterm_in_a_merge(place):
    adapter(place)
    before(place, export_utils, "write_modelfile", twice(signal.SIGTERM))


@fault("Stopped by SIGHUP.", code=129, main=join)
def a_terminal_that_is_closed_in_a_merge(place):
    adapter(place)
    before(place, export_utils, "write_modelfile", send(signal.SIGHUP))


@fault("Stopped by Ctrl-C.", code=130, main=join)
def ctrl_c_in_a_merge(place):
    adapter(place)
    before(place, export_utils, "write_modelfile", send(signal.SIGINT))


@fault("Stopped by Ctrl-C.", code=130, main=join)
def ctrl_c_twice_in_a_merge(place):
    adapter(place)
    before(place, export_utils, "write_modelfile", send(signal.SIGINT))
    before(place, file_utils, "remove", send(signal.SIGINT), lambda path: path.exists())


@fault("Stopped by SIGTERM.", code=143, main=measure_rows)
def sigterm_while_an_evaluation_is_written(place):
    adapter(place)
    before(place, result_utils, "write_report", send(signal.SIGTERM))


@fault("Stopped by SIGTERM.", code=143, main=answer_rows)
def sigterm_while_prompts_are_answered(place):
    adapter(place)
    before(place, batch_utils, "generate_replies", send(signal.SIGTERM))


# ---- Numbers ---------------------------------------------------------------------------------------------------------
@fault("the loss of step 1 is not finite", "rows of the training data:", "none yet", "a lower --learning_rate")
def a_loss_that_is_nan(place):
    base = copied_base(place)
    token = model_utils.load_tokenizer(TINY_BASE)("Say", add_special_tokens=False)["input_ids"][-1]
    edit_weights(base / "model.safetensors", lambda w: w["model.embed_tokens.weight"][token].fill_(torch.nan))
    return {"base_model_name": base}


# ---- Adapters --------------------------------------------------------------------------------------------------------
@fault("adapter folder", "does not exist; train one first with python train.py", main=talk)
def no_adapter(place):
    place.patch.setenv("ADAPTER", str(place.folder / "none"))


@fault("holds no adapter_model.safetensors; train again, or give the folder that holds it", main=measure)
def missing_adapter_weights(place):
    (adapter(place) / "adapter_model.safetensors").unlink()


@fault("adapter_model.safetensors in", "changed since the adapter was trained; restore it or train again", main=talk)
def adapter_weights_with_one_other_bit(place):
    weights = adapter(place) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x01\x02")


@fault("adapter_config.json in", "changed since the adapter was trained; restore it or train again", main=talk)
def an_adapter_whose_alpha_was_changed(place):
    edit_json(adapter(place) / "adapter_config.json", lora_alpha=64)


@fault("adapter_model.safetensors is damaged", "train again or restore it", main=talk)
def corrupt_adapter_weights_of_another_tool(place):
    (adapter(place) / "identity.json").unlink()
    os.truncate(place.folder / "adapter/adapter_model.safetensors", 5000)


@fault("adapter_model.safetensors holds weights that are not finite, such as", "train again", main=talk)
def adapter_weights_of_another_tool_that_are_nan(place):
    weights = adapter(place) / "adapter_model.safetensors"
    weights.with_name("identity.json").unlink()
    edit_weights(weights, lambda tensors: tensors[min(tensors)].fill_(torch.nan))


@fault("does not fit its base model", "it was trained on", "give that model, or train again", main=talk)
def an_adapter_for_another_base_of_the_same_shape(place):
    base = copied_base(place)
    edit_weights(base / "model.safetensors", lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    edit_json(adapter(place) / "adapter_config.json", base_model_name_or_path=str(base))


@fault("chat_template.jinja in", "changed since the adapter was trained; restore it or train again", main=talk)
def an_adapter_whose_template_was_changed(place):
    (adapter(place) / "chat_template.jinja").write_text("{{ messages }}")


@fault("chat_template.jinja in", "changed since the adapter was trained; restore it or train again", main=talk)
def an_adapter_whose_template_is_gone(place):
    (adapter(place) / "chat_template.jinja").unlink()


@fault("the adapter's identity", "identity.json cannot be read", "train again or restore it", main=talk)
def an_adapter_with_a_torn_record(place):
    (adapter(place) / "identity.json").write_text("{")


@fault("does not fit its base model", "give that model, or train again", main=talk)
def an_adapter_with_a_strange_record(place):
    (adapter(place) / "identity.json").write_text('{"files": 3}')


@fault("cannot be loaded", "restore the folder's files or give another one", main=talk)
def no_tokenizer(place):
    for path in adapter(place).glob("tokenizer*"):
        path.unlink()


@fault("has no identity.json, so its base model and tokenizer are taken on trust", code=0, main=talk)
def an_adapter_of_another_tool(place):
    (adapter(place) / "identity.json").unlink()


# ---- Base models and the Hub -----------------------------------------------------------------------------------------
@fault("cannot be loaded:", "give a causal language model with safetensors weights")
def a_base_whose_weights_are_a_pickle(place):
    base = copied_base(place)
    (base / "model.safetensors").unlink()
    torch.save(Bomb(), base / "pytorch_model.bin")
    return {"base_model_name": base}


@fault("cannot be loaded:", "give a causal language model with safetensors weights")
def a_base_that_ships_code(place):
    base = copied_base(place)
    (base / "code.py").write_text("import os; os.mkdir(os.environ['BOMB'])")
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_json(base / "config.json", model_type="shipped", auto_map=code)
    return {"base_model_name": base}


@fault("base model folder models/tiny-bose does not exist; correct the path or give a Hub id")
def a_mistyped_local_path(place):
    return {"base_model_name": "models/tiny-bose"}


@fault("team/unseen is not in the cache and HF_HUB_OFFLINE is set; unset it or give a local folder")
def the_hub_switched_off(place):
    return {"base_model_name": "team/unseen", "models_dir": place.folder / "models"}


def ask_a_hub(place, name, url=None):
    """Let this process ask the fake Hub, or none."""
    place.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    place.patch.setattr(huggingface_hub.constants, "ENDPOINT", url or place.hub)
    template = (url or place.hub) + "/{repo_id}/resolve/{revision}/{filename}"
    place.patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    place.patch.setenv("HF_TOKEN", TOKEN)
    place.patch.setenv("NO_PROXY", "*")
    place.patch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
    return {"base_model_name": name, "models_dir": place.folder / "models"}


@fault("the Hub cannot be reached for team/unseen (no connection); check the network and try again", "models/tiny-base")
def no_connection(place):
    return ask_a_hub(place, "team/unseen", NO_SERVER)


@fault("the Hub refuses it (401)", "check the spelling", "https://huggingface.co/team/private", "HF_TOKEN")
def a_model_that_needs_a_token(place):
    return ask_a_hub(place, "team/private")


@fault("the Hub refuses it (403)", "accept its licence at https://huggingface.co/team/gated", "HF_TOKEN")
def a_gated_model(place):
    return ask_a_hub(place, "team/gated")


@fault("no local folder team/unknown, and the Hub knows no such model (404); check the spelling")
def a_model_that_the_hub_does_not_know(place):
    return ask_a_hub(place, "team/unknown")


@fault("the Hub cannot be reached for team/broken (it answered 500)", "try again", "models/tiny-base")
def a_hub_that_fails(place):
    return ask_a_hub(place, "team/broken")


# ---- Settings and devices --------------------------------------------------------------------------------------------
@fault("--num_epochs is 0, expected 1 to 10000; the default is 3")
def a_setting_out_of_its_range(place):
    return {"num_epochs": 0}


@fault("--num_epochs got 'two', expected a whole number; the default is 3")
def a_setting_of_the_wrong_type(place):
    return {"num_epochs": "two"}


@fault("unknown argument --lora_rr; did you mean --lora_r?")
def an_unknown_setting(place):
    return {"lora_rr": 8}


@fault("--lora_target_modules q_prj: the model has no linear layer q_prj that takes an adapter; it has", "q_proj")
def a_layer_that_the_model_has_not(place):
    return {"lora_target_modules": "q_prj"}


@fault("an adapter of this model's experts takes neither dropout nor DoRA; add --lora_dropout 0 --use_dora false, or")
def dropout_for_a_mixture_of_experts(place):
    shutil.copytree(TINY_BASE, place.folder / "experts")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    MixtralConfig(**shape, num_key_value_heads=2).save_pretrained(place.folder / "experts")
    return {"base_model_name": place.folder / "experts"}


@fault("4-bit on a CPU works, but much slower than on a GPU; --use_4bit_quantization false is faster here", code=143)
def four_bits_without_cuda(place):
    before(place, model_utils, "share_token_ids", send(signal.SIGTERM))  # the notice is all that matters
    return {"use_4bit_quantization": "true"}


@fault("2 GPUs are visible and one is used; to use them all: accelerate launch --num_processes 2 train.py", code=0)
def two_gpus_without_a_launcher(place):
    place.patch.setattr(training_utils.TrainingArguments, "n_gpu", property(lambda arguments: 2))
    return {"dry_run": None}


@fault("accelerate launch asks for FSDP in version 1, expected version 2; write fsdp_version: 2 into its configuration")
def a_launcher_that_shards_by_the_first_fsdp(place):
    place.patch.setenv("ACCELERATE_USE_FSDP", "true")


@fault(
    "accelerate launch is to keep the shards in the host's memory, which is not supported; write fsdp_offload_params"
)
def a_launcher_that_keeps_the_shards_on_the_host(place):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}.items():
        place.patch.setenv(name, value)


@fault(
    "accelerate launch asks for DeepSpeed, which is not installed; pip install -r requirements-deepspeed.txt, or run"
)
def a_launcher_that_shards_by_deepspeed_which_is_not_there(place):
    place.patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    place.patch.setattr(engine_shards, "find_spec", lambda name: None)


@fault("accelerate launch asks for DeepSpeed's ZeRO in stage 2, expected stage 3", "write zero_stage: 3 into")
def a_launcher_that_shards_the_optimizer_alone(place):
    place.patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    place.patch.setattr(engine_shards, "find_spec", lambda name: "there")
    config = {"zero_optimization": {"stage": 2}}
    place.patch.setattr(engine_shards, "DeepSpeedPlugin", lambda: SimpleNamespace(deepspeed_config=config))


@fault("One process was started, so that there is nothing to share out: it holds the whole model", code=0)
def a_single_process_that_is_to_share_a_model(place):
    place.patch.setenv("ACCELERATE_USE_FSDP", "true")
    place.patch.setenv("FSDP_VERSION", "2")
    return {"dry_run": None}


# ---- The test --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hub():
    with serve() as server:
        yield server.url


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_plain_line(name, place, hub, capsys):
    cause, main, code, words = FAULTS[name]
    place.hub = hub
    place.patch.setenv("ADAPTER", str(place.folder / "adapter"))
    for number in (signal.SIGTERM, signal.SIGHUP):  # their default would end the tests
        signal.signal(number, lambda *_: pytest.fail("the signal reached nobody"))
    changes = cause(place) or {}
    capsys.readouterr()
    try:
        found = run_script(main, command_line(place.scratch, place.folder, **changes))
    finally:
        if hasattr(place, "child"):
            os.kill(place.child, signal.SIGKILL)
            os.waitpid(place.child, 0)
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if all(word in line for word in words)]
    print(f"{name} -> {found}\n    {said[-1] if said else lines[-1]}")
    assert found == code
    assert len(said) == 1, lines
    assert "Traceback" not in "".join(lines)
    assert TOKEN not in "".join(lines)
    assert not [path for path in place.folder.rglob("*.incomplete") if path.is_dir()]
    if code == 2:
        assert lines[-1] == said[0]
        assert said[0].startswith("error: ")
    if name not in ("two runs in one folder", "a folder where the locks record belongs"):
        assert {path.name for path in place.out.glob(".lock*")} <= {".lock"}  # the owner's record is gone
