"""A run's output folder: what lies where, its lock, earlier runs."""

import errno
import json
import os
import shutil
import socket
import time

from file_utils import display_path, resolve_path
from message_utils import LateImport, UserError, say
from settings_utils import DEFAULTS

process_utils = LateImport("process_utils")

# What a run leaves in OUTPUT_DIR
ADAPTER, CHECKPOINTS, VALIDATION_ROWS = "lora-adapter", "checkpoints", "validation.jsonl"


DATA_REPORT, CACHE = "data_report.json", "cache"


# An earlier run's are moved to OUTPUT_DIR/previous. The adapter goes last: where it is, the run had finished, also if
# this is killed halfway.
RUN_FOLDERS = (CHECKPOINTS, VALIDATION_ROWS, DATA_REPORT, "evaluation", "merged-model", ADAPTER)


def find_adapter(options, given):
    """Return the adapter folder that --adapter_path names, or else OUTPUT_DIR/lora-adapter, and OUTPUT_DIR."""
    output_dir = resolve_path(given.get("output_dir", DEFAULTS["output_dir"]))
    if options.adapter_path is not None and not options.adapter_path.strip():
        raise UserError("--adapter_path is empty; give an adapter's folder, or leave it out")
    return resolve_path(options.adapter_path or output_dir / ADAPTER), output_dir


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


# ---- One run in an output folder -------------------------------------------------------------------------------------


LOCK = ".lock"


class RunLock:
    """Context manager that keeps an output folder to one run, by a lock of the operating system on OUTPUT_DIR/.lock.

    The system drops it when the process ends, however that happens; what is left in the file then tells of a run that
    was killed. The file stays, empty: removing it could take it from under a run that has just opened it. SIGTERM and
    SIGHUP raise Stopped inside, as Ctrl-C raises KeyboardInterrupt, so that they leave it empty too.
    """

    def __init__(self, output_dir, held_by_us=True):
        self.path = output_dir / LOCK
        self.held_by_us = held_by_us  # only the first process of a run holds it
        self.signals = process_utils.SignalHandlers(("SIGTERM", "SIGHUP"), process_utils.stop_at_once)

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
