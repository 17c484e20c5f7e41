"""What can happen to a run costs the steps since its last save at most, and each fault has its one line."""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import checkpoint_utils
import engine_runner
import plan_utils
import training_utils
from checkpoint_utils import find_newest
from conftest import PROJECT, TINY_BASE, adapter_bytes, refusal, small_base, small_run
from file_utils import storage_errors, write_json
from model_utils import load_trained_model, merge_and_save_model
from process_utils import StopSignals
from run_utils import LOCK, OWNER, OutputLock
from settings_utils import DEFAULTS, Settings


# ---- SIGKILL ---------------------------------------------------------------------------------------------------------
def harass(kills, events, seed):
    """The figures of so many kills at random moments, and of each command that was killed at so many events."""
    command = [sys.executable, PROJECT / "tests/kill_harness.py", "--kills", str(kills), "--seed", str(seed)]
    command += ["--events", str(events)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    figures, *of_events = map(json.loads, done.stdout.splitlines())
    assert figures["kills"] == kills
    assert figures["other_bytes"] == 0
    assert sum(found["kills"] for found in of_events) == events
    assert not any(found["otherwise"] for found in of_events)
    assert all(found["changes"] >= 10 and found["compared"] > 1 for found in of_events)  # the check can tell
    return figures


def test_commands_that_are_killed_at_any_moment_end_in_the_same_bytes_when_they_are_typed_again():
    assert harass(kills=4, events=6, seed=1)["inside_saves"] >= 1


@pytest.mark.faults
def test_thirty_kills_many_of_them_inside_saves_and_a_hundred_at_events_change_no_byte():
    assert harass(kills=30, events=100, seed=0)["inside_saves"] >= 10


# ---- Signals, as a user sends them -----------------------------------------------------------------------------------
FLAGS = ("--eval_steps", 3, "--sample_prompts", 0, "--lora_dropout", 0.1)
LONG, SHORT = ("--num_epochs", 40), ("--max_steps", 7)


@contextlib.contextmanager
def running(folder, *flags, launcher=()):
    """A real run in the background, once it has saved a checkpoint."""
    flags = map(str, (*FLAGS, *flags, "--output_dir", folder / "out", "--logs_dir", folder / "logs"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher, PROJECT / "train.py", *flags],
            stderr=log,
            stdout=log,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None and not list(folder.glob("out/checkpoints/checkpoint-*")):
                time.sleep(0.05)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_running_folder_is_refused_and_sigterm_saves_and_exits_with_143(run, tmp_path):
    with running(tmp_path, *LONG) as process:
        second = run("train.py", "--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert second.returncode == 2
    last = second.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert f"is in use by process {process.pid} on {socket.gethostname()}" in last
    lines = (tmp_path / "log").read_text().strip().splitlines()
    assert lines[-1].startswith(("Stopped at step ", "Stopped in the evaluation of step "))
    assert "same command" in lines[-1]
    assert "Traceback" not in "".join(lines)


# what `accelerate launch --num_processes 2` is on a machine with several GPUs; --cpu would start one process
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


def test_two_processes_stop_together_and_go_on_to_the_same_bytes(run_two, tmp_path):
    flags = ("--device", "cpu", *SHORT)
    with running(tmp_path, *flags, launcher=ACCELERATE) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and both processes
        process.wait(60)
    log = (tmp_path / "log").read_text()
    assert log.count("Stopped at step ") + log.count("Stopped in the evaluation of step ") == 1, log
    (_, manifest), skipped = find_newest(tmp_path / "out/checkpoints")
    assert skipped == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= manifest["files"].keys()
    for name in ("out", "whole"):
        folders = ("--output_dir", tmp_path / name, "--logs_dir", tmp_path / "logs")
        first, second = run_two("train.py", *FLAGS, *flags, *folders)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        assert ("Going on" in first.stderr) == (name == "out")
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_launchers_echo_of_ctrl_c_is_not_a_second_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        signals.first_at -= 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- One run in a folder ---------------------------------------------------------------------------------------------
@contextlib.contextmanager
def holder(folder):
    """A process that holds the lock of a folder until it is killed; yields its number."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with OutputLock(folder):
            os.write(writer, b"!")
            time.sleep(60)
        os._exit(0)
    assert os.read(reader, 1) == b"!"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_lock_that_a_process_holds_is_refused_and_taken_over_when_it_was_killed(tmp_path, capsys):
    with holder(tmp_path) as pid:
        for take in (OutputLock(tmp_path).check, OutputLock(tmp_path).__enter__):
            message = refusal(take)
            assert f"is in use by process {pid} on {socket.gethostname()} since 2" in message
            assert message.endswith("wait for it, or give another folder with --output_dir")
    OutputLock(tmp_path).check()
    assert capsys.readouterr().err == ""
    with OutputLock(tmp_path):
        said = capsys.readouterr().err
        assert f"The run of process {pid} on {socket.gethostname()} since 2" in said
        assert said.endswith(f"ended without saying so; taking over {tmp_path}\n")
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_a_run_that_ends_leaves_an_empty_lock_and_nothing_to_say(tmp_path, capsys):
    for _ in range(2):
        with OutputLock(tmp_path):
            pass
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {".lock": b""}
    assert capsys.readouterr().err == ""


def test_looking_for_a_lock_makes_nothing(tmp_path):
    OutputLock(tmp_path).check()
    OutputLock(tmp_path / "none").check()
    assert list(tmp_path.iterdir()) == []


def test_the_other_processes_of_a_launcher_take_no_lock(tmp_path, monkeypatch):
    with holder(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with OutputLock(tmp_path):
            pass


def test_a_lock_without_a_holder_is_taken_over_whatever_host_it_names(tmp_path, capsys):
    """A container has another host's name each time."""
    (tmp_path / LOCK).touch()
    write_json(tmp_path / OWNER, {"pid": 4711, "host": "elsewhere", "since": "2026-01-01 00:00:00"})
    OutputLock(tmp_path).check()
    with OutputLock(tmp_path):
        said = capsys.readouterr().err
        assert "The run of process 4711 on elsewhere since 2026-01-01 00:00:00 ended without saying so" in said


STRANGE_LOCKS = {
    "a link to a file": lambda path: path.symlink_to(path.parent / "victim"),
    "a link to nothing": lambda path: path.symlink_to(path.parent / "none"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("what", STRANGE_LOCKS)
def test_what_is_no_file_is_no_lock_and_is_not_followed(what, tmp_path):
    (tmp_path / "victim").write_text("precious")
    STRANGE_LOCKS[what](tmp_path / LOCK)
    for take in (OutputLock(tmp_path).check, OutputLock(tmp_path).__enter__):
        message = refusal(take)
        assert message.startswith(f"{tmp_path / LOCK} cannot be used as a lock (")
        assert "move away what lies there" in message
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "none").exists()


def test_a_link_in_the_place_of_a_record_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in (OWNER, f"{OWNER}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    with OutputLock(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
        assert not (tmp_path / OWNER).is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


START_AT_ONCE = """
import sys, time
from pathlib import Path
from script_utils import run_script
from run_utils import OutputLock
def main(argv):
    print("ready", flush=True)
    sys.stdin.readline()
    lock = OutputLock(Path(argv[0]))
    lock.check()
    with lock:
        print("won", flush=True)
        sys.stdin.readline()
sys.exit(run_script(main, sys.argv[1:]))
"""


def test_of_runs_that_start_at_once_one_wins_eight_times(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for number in range(8):
        folder = str(tmp_path / f"out{number % 4}")  # new ones, then ones with an old lock
        command = [sys.executable, "-c", START_AT_ONCE, folder]
        runs = [subprocess.Popen(command, cwd=PROJECT, **pipes) for _ in range(2)]
        for process in runs:
            assert process.stdout.readline() == "ready\n"
        for process in runs:
            process.stdin.write("\n")
            process.stdin.flush()
        lost = [process for process in runs if process.stdout.readline() != "won\n"]
        assert len(lost) == 1
        (won,) = set(runs) - set(lost)
        assert lost[0].wait(30) == 2
        message = lost[0].communicate()[1]
        assert message.startswith(f"error: {folder} is in use by ")
        assert message.count("\n") == 1
        won.communicate("\n")
        assert won.returncode == 0


def test_a_torn_record_of_a_lock_that_nobody_holds_is_free(tmp_path):
    (tmp_path / OWNER).write_text('{"pid": 47')
    with OutputLock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_the_owners_record_has_to_do(number, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)  # no such file system can be mounted here
    with OutputLock(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()
    write_json(tmp_path / OWNER, {"pid": 4711, "host": "elsewhere", "since": "2026-01-01 00:00:00"})
    message = refusal(OutputLock(tmp_path).check)
    assert "may be in use by process 4711 on elsewhere" in message
    assert message.endswith(f"make sure that it has ended, then remove {tmp_path / OWNER}")
    write_json(tmp_path / OWNER, {"pid": os.getppid(), "host": socket.gethostname(), "since": "2026-01-01 00:00:00"})
    assert f"is in use by process {os.getppid()}" in refusal(OutputLock(tmp_path).check)
    write_json(tmp_path / OWNER, {"pid": 2**22 + 1, "host": socket.gethostname(), "since": "2026-01-01 00:00:00"})
    OutputLock(tmp_path).check()


# ---- Numbers that are not finite -------------------------------------------------------------------------------------
def poison(monkeypatch, step, fault):
    """From a step on, spoil the model before the rows are computed."""
    original = training_utils.LoraTrainer.training_step

    def training_step(self, model, inputs, *args):
        if self.state.global_step == step:
            fault(self, inputs)
        return original(self, model, inputs, *args)

    monkeypatch.setattr(training_utils.LoraTrainer, "training_step", training_step)


def test_a_loss_that_is_not_finite_names_its_step_its_row_and_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    """What the model makes of a token that one row alone has is nan."""
    spoiled = []

    def fault(trainer, inputs):
        others = {token for row in inputs for token in row["input_ids"]}
        unique = inputs[1]["input_ids"][0] = next(token for token in range(3, 4000) if token not in others)
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda module, ids, out: out.masked_fill((ids[0] == unique).unsqueeze(-1), math.nan)
        )
        spoiled.append(inputs[1]["row"])

    poison(monkeypatch, 2, fault)
    message = refusal(lambda: small_run(dataset, tmp_path))
    assert "the loss of step 3 is not finite" in message
    assert f"rows of the training data: {spoiled[0]};" in message
    assert "checkpoint-2" in message
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_adapter_as_it_was(dataset, tmp_path, monkeypatch):
    weights = []

    def fault(trainer, inputs):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * math.inf)
        weights.extend([parameter, parameter.detach().clone(), sorted(row["row"] for row in inputs)])

    poison(monkeypatch, 2, fault)
    message = refusal(lambda: small_run(dataset, tmp_path))
    assert "the gradient of step 3 is not finite" in message
    assert f"rows of the training data: {', '.join(map(str, weights[2]))};" in message
    assert torch.equal(weights[0], weights[1])


def test_a_signal_in_a_step_that_is_not_finite_saves_nothing_of_it(dataset, tmp_path, monkeypatch):
    def fault(trainer, inputs):
        trainer.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: out * math.nan)
        os.kill(os.getpid(), signal.SIGTERM)

    poison(monkeypatch, 2, fault)
    message = refusal(lambda: small_run(dataset, tmp_path, logging_steps=100, eval_steps=2))
    assert "the loss of step 3 is not finite" in message
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_validation_loss_that_is_not_finite_ends_the_run_too(dataset, tmp_path, monkeypatch):
    original = engine_runner.score_rows
    monkeypatch.setattr(engine_runner, "score_rows", lambda *args: [(math.nan, n) for _, n in original(*args)])
    message = refusal(lambda: small_run(dataset, tmp_path))
    assert "the validation loss of step 2 is not finite" in message
    assert "none yet" in message


def test_the_overflow_that_fp16_scaling_answers_is_not_a_fault():
    assert not training_utils.answers_overflow(None)
    assert training_utils.answers_overflow(torch.amp.GradScaler("cpu"))
    assert not training_utils.answers_overflow(torch.amp.GradScaler("cpu", init_scale=1.0))  # it cannot get smaller


# ---- A real full disk ------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MiB: room for two checkpoints of the bundled model, not for a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False
    ).returncode
    if mounted != 0:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # its rows may still be mapped into memory


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_is_full_keeps_the_last_checkpoint(foreseen, small_disk, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_utils.Checkpoints, "check_space", lambda self: None)
    if not foreseen:
        monkeypatch.setattr(checkpoint_utils, "check_space", lambda *args: None)
    changes = {"logs_dir": str(tmp_path / "logs"), "base_model_name": TINY_BASE}
    changes["lora_target_modules"] = "all-linear"  # the adapter must not fit
    message = refusal(lambda: small_run(dataset, small_disk, **changes))
    assert ("needs" if foreseen else "could not be saved: No space left on device") in message
    assert "last good checkpoint" in message
    (newest, _), skipped = find_newest(small_disk / "out/checkpoints")
    assert (newest.name, skipped) == ("checkpoint-4", [])
    assert not (small_disk / "out/checkpoints/incomplete").exists()


WRITERS = {
    "torch": lambda path, tensor: torch.save(tensor, path),
    "safetensors": lambda path, tensor: save_file({"weight": tensor}, path),
    "python": lambda path, tensor: path.write_bytes(tensor.numpy().tobytes()),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_each_writer_says_of_a_full_disk_is_understood(writer, small_disk):
    def save():
        with storage_errors("the adapter", "mend that"):
            WRITERS[writer](small_disk / "weights", torch.zeros(2**23))  # 32 MiB

    assert refusal(save).startswith("the adapter could not be saved: ")


# ---- The plan's warnings ---------------------------------------------------------------------------------------------
class PlannedRows(list):
    """What the plan asks of forty tokenized rows."""

    index: ClassVar = {"length": np.full(40, 2), "trained": np.full(40, 1)}


@pytest.mark.parametrize(("changes", "said"), [({}, True), ({"warmup_ratio": 0.0}, False), ({"max_steps": 2}, False)])
def test_a_run_of_one_step_says_that_it_trains_nothing(changes, said, capsys):
    settings = Settings(**DEFAULTS)._replace(**({"max_steps": 1} | changes))
    rows = PlannedRows(range(40))
    base = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, shapes=torch.nn.Linear(9, 10))
    plan_utils.print_plan(settings, base, rows, [], [])
    assert ("trains nothing" in capsys.readouterr().err) == said


# ---- Adapters --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The adapter of a finished small run."""
    folder = tmp_path_factory.mktemp("adapter")
    (folder / "rows.json").write_text(json.dumps([{"instruction": f"Say {n}", "response": "yes"} for n in range(12)]))
    return small_run(folder / "rows.json", folder) / "lora-adapter"


def copied(source, target):
    return Path(shutil.copytree(source, target))


def test_an_adapter_whose_base_was_moved_still_loads(adapter, tmp_path, capsys):
    folder = copied(adapter, tmp_path / "adapter")
    base = copied(small_base(), tmp_path / "moved")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load_trained_model(folder)
    assert f"Base model: {base}" in capsys.readouterr().err


def test_a_disk_for_the_logs_that_is_full_costs_the_logs_and_not_the_run(
    small_disk, dataset, tmp_path, undisturbed, capsys
):
    (small_disk / "logs").mkdir()
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(2**25))
    capsys.readouterr()
    out = small_run(dataset, tmp_path, logs_dir=str(small_disk / "logs"))
    assert capsys.readouterr().err.count("TensorBoard logs end here") == 1
    assert adapter_bytes(out) == adapter_bytes(undisturbed())


def test_a_file_where_the_logs_folder_belongs_costs_the_logs_and_not_the_run(dataset, tmp_path, undisturbed, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/run").write_text("a file")
    out = small_run(dataset, tmp_path)
    assert capsys.readouterr().err.count("TensorBoard logs end here") == 1
    assert adapter_bytes(out) == adapter_bytes(undisturbed())


def at_step(monkeypatch, step, action):
    """Do something before a step of the next run."""
    original = training_utils.LoraTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training_utils.LoraTrainer, "training_step", training_step)


def test_an_output_folder_that_is_deleted_under_a_run_is_said_at_once(dataset, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "out"))
    message = refusal(lambda: small_run(dataset, tmp_path))
    assert message.startswith(f"{tmp_path / 'out'} was deleted or moved while the run was writing to it")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("put", [lambda folder: None, Path.mkdir, Path.touch], ids=["nothing", "a folder", "a file"])
def test_an_output_folder_that_is_moved_before_a_save_is_said_at_once(put, dataset, tmp_path, monkeypatch):
    out, prepare = tmp_path / "out", checkpoint_utils.Checkpoints.prepare

    def moving(self, step, staged):
        if step == 4:
            out.rename(tmp_path / "moved")
            put(out)
        prepare(self, step, staged)

    monkeypatch.setattr(checkpoint_utils.Checkpoints, "prepare", moving)
    message = refusal(lambda: small_run(dataset, tmp_path))
    assert message.startswith(f"{out} was deleted or moved while the run was writing to it")
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("content", [b"", b'{"row": 4, "mess', bytes(200)])
def test_a_torn_file_of_validation_rows_is_written_anew_when_the_run_goes_on(content, dataset, tmp_path, undisturbed):
    whole = undisturbed()
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/lora-adapter")
    (tmp_path / "out/validation.jsonl").write_bytes(content)
    out = small_run(dataset, tmp_path)
    assert (out / "validation.jsonl").read_bytes() == (whole / "validation.jsonl").read_bytes()
    assert not list(out.glob("*.tmp"))


def test_a_merge_that_the_disk_has_no_room_for_is_one_line_and_leaves_nothing(small_disk, undisturbed):
    (small_disk / "other").write_bytes(bytes(4 * 2**20))
    model, tokenizer = load_trained_model(undisturbed(base_model_name=TINY_BASE) / "lora-adapter")
    message = refusal(merge_and_save_model, model, tokenizer, small_disk / "merged")
    assert "the merged model needs 15" in message
    assert "or merge into a folder on another disk" in message
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_a_disk_that_fills_up_in_a_merge_is_one_line_and_leaves_nothing(small_disk, undisturbed, monkeypatch):
    (small_disk / "other").write_bytes(bytes(4 * 2**20))
    monkeypatch.setattr("model_utils.check_space", lambda *args: None)
    model, tokenizer = load_trained_model(undisturbed(base_model_name=TINY_BASE) / "lora-adapter")
    message = refusal(merge_and_save_model, model, tokenizer, small_disk / "merged")
    assert message.startswith("the merged model could not be saved: ")
    assert [path.name for path in small_disk.iterdir()] == ["other"]
