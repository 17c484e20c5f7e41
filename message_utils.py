"""What a user is told: one line a message, mistakes with their remedy, exit codes."""

import errno
import gc
import importlib
import logging
import os
import sys
import traceback
import warnings

# What a disk refuses with: full, over quota, read-only, no permission, broken
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: what was found, what was expected, what to do.

    Of several processes the first says it, unless each may meet it alone.
    """

    def __init__(self, message, alone=False):
        # names out of a user's file can hold line breaks and control characters
        super().__init__(printable(" ".join(message.split())))
        self.alone = alone


class Stopped(BaseException):
    """A signal asked the run to end, and it did after saving. Its message is one line: where, and how to go on.

    Like KeyboardInterrupt it is no Exception, which a library might catch and go on.
    """

    def __init__(self, signal_number, message):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as a shell reports it


# C0 and C1 control characters except tab and newline: no foreign text may steer the terminal
CONTROL_CHARACTERS = dict.fromkeys(c for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\t\n")


def printable(text):
    """The text without terminal control characters. Without ESC no escape sequence can form, also across chunks."""
    return text.translate(CONTROL_CHARACTERS)


def say(message, from_any=False):
    """Tell the user something, on stderr and from the first process only; results go to stdout by print().

    from_any: from the others too, which then give their number.
    """
    rank = os.environ.get("RANK", "0")
    if from_any or rank == "0":
        print(f"process {rank}: " * (rank != "0") + message, file=sys.stderr, flush=True)


# ---- Scripts ---------------------------------------------------------------------------------------------------------


class LateImport:
    """A module that is imported when something of it is first used: model_utils = LateImport("model_utils").

    With these the entry scripts name all their rooms on top, and still answer --help, a mistyped flag and a faulty row
    at once: torch and the libraries on top of it take seconds to import. (importlib's LazyLoader will not do: torch
    looks through sys.modules while it is imported, which would load everything, in the wrong order.)
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


def settle():
    """Collect garbage from here on, but not among what is there by now, which stays: the libraries above all."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def run_script(main, argv):
    """Run an entry script's main(argv) and return its exit code.

    A UserError ends in one line and code 2 (--debug shows its traceback), Ctrl-C in 130, another signal in 128 and its
    number; our own bugs in a traceback.
    """
    gc.disable()  # until settle(): imports make a million objects that stay, and looking through them takes a second
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a run
    try:
        main(argv)
        leave_process_group()
        return 0
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        say(f"error: {error}", from_any=error.alone)
        if not error.alone:
            leave_process_group()
        return 2
    except KeyboardInterrupt:
        say("\nStopped by Ctrl-C.")
        return 130
    except Stopped as stop:
        leave_process_group()
        say(str(stop))
        return stop.exit_code
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        say(f"error: {os.strerror(error.errno)}: {error.filename or 'output'}; mend that and try again")
        return 2


def leave_process_group():
    """End the connection of processes that all come to an end together; else NCCL warns, and Gloo aborts at times."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def quiet_libraries():
    """Silence notices of the libraries that ask nothing of the user; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset it warns at every fork
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # the first process's bar tells of all
    # printed where its optional CPU kernels are not installed; the built-in path is used and is right
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # of datasets on the Hub whose README has no header
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    # the Trainer's, beside several GPUs
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    # transformers 5.23 renames it to activation checkpointing; peft and older releases know the old name only
    warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated")
