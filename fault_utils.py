"""What can happen to a run: two in one folder, signals, a full disk. Each ends in one line and loses nothing."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from run_utils import STORAGE_ERRORS, Stopped, UserError, display_path, say

LOCK = ".lock"
MARGIN = 2**20  # bytes beside the weights: tokenizer, settings and manifest of a tiny model


def from_first_process(function, *arguments):
    """Call the function in the first process and give its result to all, or to all the UserError that it raised."""
    outcome = None
    if PartialState().is_main_process:
        try:
            outcome = (function(*arguments), None)
        except UserError as error:
            outcome = (None, error)
    result, error = broadcast_object_list([outcome])[0]
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def first_process_first():
    """Run what is inside in the first process, then in the others, which find in the cache what it made."""
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_main_process:
            state.wait_for_everyone()


@contextlib.contextmanager
def together():
    """Run what is inside in all processes, and end in all of them with the first UserError that any met there."""
    met = None
    try:
        yield
    except UserError as error:
        met = error
    for error in gather_object([met]):
        if error is not None:
            raise error


# ---- One run in an output folder -------------------------------------------------------------------------------------
class RunLock:
    """Context manager that keeps an output folder to one run, by a lock of the operating system on OUTPUT_DIR/.lock.

    The system drops it when the process ends, however that happens; what is left in the file then tells of a run that
    was killed. The file stays, empty: removing it could take it from under a run that has just opened it. SIGTERM and
    SIGHUP raise Stopped inside, as Ctrl-C raises KeyboardInterrupt, so that they leave it empty too.
    """

    def __init__(self, output_dir, held_by_us=True):
        self.path = output_dir / LOCK
        self.held_by_us = held_by_us  # only the first process of a run holds it
        self.signals = SignalHandlers(("SIGTERM", "SIGHUP"), stop_at_once)

    def check(self):
        """Raise UserError if another run holds the lock now; takes nothing and makes no folder."""
        if self.held_by_us and self.path.is_file():
            with self:
                pass

    def __enter__(self):
        if not self.held_by_us:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+", encoding="utf-8")
        taken = lock_file(self.file)
        self.file.seek(0)
        owner = read_owner(self.file.read())
        try:
            self.judge(taken, owner)
        except UserError:
            self.file.close()
            raise
        self.signals.__enter__()
        self.write({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        return self

    def judge(self, taken, owner):
        """Refuse a folder that is in use. Another host's lock may be held without our system knowing of it."""
        where, folder = display_path(self.path), display_path(self.path.parent)
        who = "process {pid} on {host} since {since}".format(**owner) if owner else "another process"
        if not taken:
            raise UserError(f"{folder} is in use by {who}; wait for it, or give another folder with --output_dir")
        if owner and owner["host"] != socket.gethostname():
            raise UserError(f"{folder} may be in use by {who}; make sure that it has ended, then remove {where}")
        if owner:
            say(f"The run of {who} ended without saying so; taking over {folder}")

    def write(self, owner):
        self.file.truncate(0)
        if owner:
            self.file.write(json.dumps(owner))
        self.file.flush()

    def __exit__(self, *exception):
        if self.held_by_us:
            self.write(None)
            self.file.close()
            self.signals.__exit__()


def lock_file(file):
    """Take the operating system's exclusive lock on an open file; False if another process has it."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**30)  # beyond the text, which others must be able to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # a file system without locks: what the file says has to do
    return True


def read_owner(text):
    """The owner that a lock names, or None where it is empty or was torn."""
    try:
        owner = json.loads(text)
        return {name: owner[name] for name in ("pid", "host", "since")}
    except (ValueError, KeyError, TypeError):
        return None


def set_aside_previous_run(output_dir, names):
    """Move what an earlier run left in output_dir under these names to output_dir/previous/<time>; nothing is lost.

    Returns the folder that they were moved to, or None where there was nothing to move.
    """
    found = [output_dir / name for name in names if (output_dir / name).exists()]
    if not found:
        return None
    target = output_dir / "previous" / time.strftime("%Y%m%d-%H%M%S")
    while target.exists():
        target = target.with_name(target.name + "-2")
    target.mkdir(parents=True)
    for path in found:
        shutil.move(path, target / path.name)
    return target


# ---- Signals ---------------------------------------------------------------------------------------------------------
class SignalHandlers:
    """Context manager that handles signals, named as in the module signal, by handle(number, frame).

    A signal that is ignored stays so, as SIGHUP under nohup; outside the main thread nothing is done.
    """

    def __init__(self, names, handle):
        self.names = names
        self.handle = handle
        self.previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in self.names:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def stop_at_once(number, frame):
    """End the run where nothing needs saving: before its training."""
    if getattr(signal, "SIGHUP", None) == number:
        detach_from_terminal()
    raise Stopped(number, f"{signal.Signals(number).name}: stopped before the training; the same command starts it")


class StopSignals(SignalHandlers):
    """Context manager that turns the first SIGTERM, SIGINT or SIGHUP into a request to stop after the step.

    A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self):
        super().__init__(("SIGTERM", "SIGINT", "SIGHUP"), self.note)
        self.requested = 0  # the number of the signal
        self.first_at = 0.0

    def note(self, number, frame):
        # a launcher passes Ctrl-C on to processes that the terminal has told already
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.first_at < 2
        if number == signal.SIGINT and self.requested == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        if getattr(signal, "SIGHUP", None) == number:
            detach_from_terminal()
        if not self.requested:
            self.requested, self.first_at = int(number), time.monotonic()
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            say(f"\n{signal.Signals(number).name}: finishing this step and saving{again}")


def detach_from_terminal():
    """Send output nowhere if it went to a terminal, which is gone: writing to it would fail, and end the run."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream.isatty():
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- Disk ------------------------------------------------------------------------------------------------------------
def checkpoint_bytes(trainable):
    """Disk space of a checkpoint: the adapter in float32 and the two moments of AdamW, and a margin."""
    return trainable * 4 * 3 + MARGIN


def run_bytes(trainable, save_total_limit, existing=0):
    """Disk space that a run takes at most: the adapter, the kept checkpoints, and the one that is being written."""
    return trainable * 4 + max(1, save_total_limit + 1 - existing) * checkpoint_bytes(trainable)


def check_space(folder, needed, what, consequence):
    """Raise UserError unless the disk of a folder, or of the nearest above it that exists, has the needed bytes."""
    nearest = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"{free / 2**20:,.0f} MiB free on the disk of {display_path(folder)}, {what} needs"
            f" {needed / 2**20:,.0f} MiB; {consequence}"
        )


def storage_problem(error):
    """Say what the disk refused, if that is what an exception tells of, else None.

    The libraries' writers in C++ and Rust raise exceptions of other types that quote the system's words.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in STORAGE_ERRORS else None
    for number in STORAGE_ERRORS:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return "it could not be written" if "PytorchStreamWriter" in str(error) else None


@contextlib.contextmanager
def saving(what, consequence):
    """Turn a disk's refusal while something is saved into one line; other errors are ours and stay as they are."""
    try:
        yield
    except Exception as error:
        problem = storage_problem(error)
        if problem is None:
            raise
        raise UserError(f"{what} could not be saved: {problem}; {consequence}") from error
