"""The output folder of a run of train.py: the names in it, its lock, and what earlier runs left."""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import socket
import sys
import time

from filelock import FileLock, Timeout

from file_utils import display_path, read_json, resolve_path, write_json
from message_utils import VOICE, UserError, is_first_process, printable, say
from settings_utils import DEFAULTS, is_folder_name

# What train.py writes to OUTPUT_DIR
ADAPTER, CHECKPOINTS, VALIDATION_ROWS = "lora-adapter", "checkpoints", "validation.jsonl"


DATA_REPORT, CACHE, RUN_LOG, EVALUATION = "data_report.json", "cache", "train.log", "evaluation"
RUN_RECORD, MANIFEST = "run.json", "manifest.json"  # in an adapter's folder and in a checkpoint's; both name the run
TRAINER_STATE, MERGE_RECORD = "trainer_state.json", "merge.json"  # beside an adapter; in a merged model's folder


# What belongs to one run of train.py and is moved to OUTPUT_DIR/previous before the next one. The adapter is moved
# last: as long as it is there, the run counts as finished, even if the moving is interrupted.
RUN_OUTPUTS = (CHECKPOINTS, VALIDATION_ROWS, DATA_REPORT, RUN_LOG, EVALUATION, "merged-model", ADAPTER)


def find_adapter(options, given):
    """Return (the folder that --adapter_path names, or else OUTPUT_DIR/lora-adapter; OUTPUT_DIR)."""
    output_dir = resolve_path(given.get("output_dir", DEFAULTS["output_dir"]))
    if options.adapter_path is not None and not options.adapter_path.strip():
        raise UserError("--adapter_path is empty; give an adapter's folder, or leave it out")
    return resolve_path(options.adapter_path or output_dir / ADAPTER), output_dir


def find_run_folder(adapter_path):
    """The output folder of the run that an adapter or a checkpoint lies in, or None where it was moved out of it."""
    outputs = (DATA_REPORT, VALIDATION_ROWS)
    folders = [path for path in adapter_path.parents[:2] if any((path / name).is_file() for name in outputs)]
    return folders[0] if folders else None


def read_run_name(adapter_path):
    """The name of the run that an adapter or a merged model is of, with its step for a checkpoint; fit for a folder."""
    checkpoint = (adapter_path / MANIFEST).is_file()
    path = adapter_path / (MANIFEST if checkpoint else RUN_RECORD)
    record = read_json(path, "the record of the run") if path.is_file() else {}
    name = record.get("run_name" if checkpoint else "run")
    if not isinstance(name, str) or not is_folder_name(name):
        name = printable(adapter_path.name) or "adapter"
    elif checkpoint:
        name = f"{name}-{adapter_path.name}"
    elif (adapter_path / MERGE_RECORD).is_file():
        name = f"{name}-merged"
    return name


def set_aside(output_dir, names, kept=()):
    """Move what lies in output_dir under these names to output_dir/previous/<time>, so that nothing is overwritten.

    What holds one of the `kept` paths, which a run reads, stays. Returns that folder, or None where there was nothing
    to move.
    """
    found = [output_dir / name for name in names if os.path.lexists(output_dir / name)]
    found = [path for path in found if not any(kept_path.is_relative_to(path) for kept_path in kept)]
    if not found:
        return None
    target = output_dir / "previous" / time.strftime("%Y%m%d-%H%M%S")
    while target.exists():
        target = target.with_name(target.name + "-2")
    target.mkdir(parents=True)
    for path in found:
        if path.is_mount():  # a disk of its own stays where it is mounted, and what it holds moves
            (target / path.name).mkdir()
            for inner in path.iterdir():
                move(inner, target / path.name / inner.name)
        else:
            move(path, target / path.name)
    return target


def move(path, target):
    """Rename a file or folder, or copy it where the target lies on another disk.

    shutil.move alone would begin to copy also where the system does not let a folder be moved, and leave two halves.
    """
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.move(path, target)


# ---- The log ---------------------------------------------------------------------------------------------------------
class RunLog:
    """Keeps what a run says, each line with its time, in a file beside the adapter; a run that goes on appends to it.

    Until it is opened, when the run's folder is ready, the lines wait. A disk that refuses costs the log, not the run.
    """

    def __init__(self):
        self.waiting, self.path, self.file = [], None, None
        VOICE.note = self.note

    def open(self, path):
        """From here on the lines go into this file, those that waited first."""
        waiting, self.waiting, self.path = self.waiting, None, path
        command = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
        try:
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise OSError("expected a file there")
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run; a killed one loses no line
        except OSError as error:
            self.give_up(error)
        self.write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')}  {command}\n")
        for text in waiting:
            self.write(text)

    def note(self, message):
        """Keep a message without its colours."""
        text = f"{time.strftime('%H:%M:%S')}  {re.sub(chr(27) + r'.[0-9;]*m', '', message).strip()}\n"
        if self.waiting is not None:
            self.waiting.append(text)
        else:
            self.write(text)

    def write(self, text):
        if self.file is not None:
            try:
                self.file.write(text.encode(errors="replace"))
            except OSError as error:
                self.give_up(error)

    def give_up(self, error):
        self.file = None
        say(f"The run's log ends here: {display_path(self.path)} cannot be written ({error})")


# ---- The lock --------------------------------------------------------------------------------------------------------
LOCK, OWNER = ".lock", ".lock-owner.json"


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a file system without locks answers


class OutputLock:
    """Context manager that lets only one run of train.py write to an output folder.

    It holds a lock of the operating system (filelock) on OUTPUT_DIR/.lock, which the system releases when the process
    ends, even by SIGKILL. OUTPUT_DIR/.lock-owner.json beside it says which process holds the lock. It is removed at the
    end, so that one without a lock tells of a run that was killed. The lock file itself always stays, and is empty: if
    it were removed, two processes could hold locks on two files of this name.

    Of a launcher's processes only the first one takes the lock.
    """

    def __init__(self, output_dir):
        self.folder = output_dir
        self.owner_file = output_dir / OWNER
        # a file system without locks is left to the owner's record, not to filelock's own substitute for a lock
        self.lock = FileLock(output_dir / LOCK, blocking=False, fallback_to_soft=False)

    def check(self):
        """Raise UserError if another run holds the lock now. Nothing is kept, and no file or folder is made."""
        if is_first_process() and os.path.lexists(self.folder / LOCK):
            try:
                self.take()
            finally:
                self.lock.release()

    def __enter__(self):
        if is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            if killed := self.take():
                say(f"The run of {killed} ended without saying so; taking over {display_path(self.folder)}")
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(self.owner_file, {"pid": os.getpid(), "host": socket.gethostname(), "since": started})
        return self

    def __exit__(self, *exception):
        if is_first_process():
            with contextlib.suppress(OSError):  # what has become of the folder is said by who writes to it
                self.owner_file.unlink()
            self.lock.release()

    def take(self):
        """Take the lock, or raise UserError; returns the name of the run that was killed while it held the lock."""
        taken = self.acquire()
        owner, folder = self.read_owner(), display_path(self.folder)
        who = "process {pid} on {host} since {since}".format(**owner) if owner else "another process"
        if taken is False or (taken is None and owner and runs_here(owner)):
            raise UserError(f"{folder} is in use by {who}; wait for it, or give another folder with --output_dir")
        if taken is None and owner and owner["host"] != socket.gethostname():
            remedy = f"make sure that it has ended, then remove {display_path(self.owner_file)}"
            raise UserError(f"{folder} may be in use by {who}; {remedy}")
        return who if owner else None

    def acquire(self):
        """Take the operating system's lock: True, or False if a process holds it, or None if the disk knows no locks.

        A lock that could be taken has no holder any more, whatever host the owner's record names: that of a container
        changes each time.
        """
        try:
            self.lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            if error.errno in NO_LOCKS:
                return None
            raise UserError(
                f"{display_path(self.folder / LOCK)} cannot be used as a lock ({error.strerror or error}); expected an"
                " empty file: move away what lies there, or give another folder with --output_dir"
            ) from None
        return True

    def read_owner(self):
        """What the owner's record says, or None where there is none or it was torn."""
        try:
            owner = json.loads(self.owner_file.read_text(encoding="utf-8"))
            return {name: owner[name] for name in ("pid", "host", "since")}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None


def runs_here(owner):
    """Whether the process of an owner's record is one of this machine that runs."""
    if owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
        return False
    try:
        os.kill(int(owner["pid"]), 0)  # sends nothing
    except PermissionError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return True
