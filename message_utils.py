"""What a user is told: one line for each message, mistakes with their remedy, what this machine lacks or refuses."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import traceback
import warnings

# A disk refuses to write with one of these: full, over quota, a file too large for it, read-only, no permission, broken
STORAGE_ERROR_NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EIO),
)
# How libraries that raise errors of their own say that the system gives no more memory, or no more threads
NO_MEMORY = (os.strerror(errno.ENOMEM), "can't allocate memory")
NO_THREADS = (os.strerror(errno.EAGAIN), "can't start new thread")


LONGEST_LINE = 2000  # characters of a message


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: what was found, what was expected, what to do.

    Where several processes work on one command, all of them usually raise the same error. With each_process=True a
    process may be alone with it, and the others still wait for it. Either way it is printed once on a machine.
    """

    def __init__(self, message, each_process=False):
        # names from a user's file can contain line breaks and control characters
        line = printable(" ".join(message.split()))
        # they may also be megabytes long; the remedy stands at the end
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:1000]} ... {line[-500:]}")
        self.each_process = each_process


class Stopped(BaseException):
    """A signal asked the script to end, and it has saved its work. The message is one line: where, and how to go on.

    Like KeyboardInterrupt it is no Exception, because a library might catch an Exception and carry on.
    """

    def __init__(self, signal_number, message):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the code that a shell reports for a signal


FORMAT_WARNING = warnings.formatwarning

# No foreign text may steer the terminal: C0 and C1 control characters except tab and newline, and what turns the
# direction of writing over, so that a text reads otherwise than it is
CONTROL_CHARACTERS = dict.fromkeys(c for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\t\n")
CONTROL_CHARACTERS |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x2070)])


def printable(text):
    """The text without what steers a terminal. Without ESC no escape sequence can form, not even across chunks."""
    return text.translate(CONTROL_CHARACTERS)


def counted(number, noun):
    """1 and "row" -> '1 row', 2000 -> '2,000 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share, sign=""):
    """0.684 -> '68', 0.0151 -> '1.5': a share in percent, with a decimal below ten. sign: as in a format."""
    text = f"{100 * share:{sign}.{1 if abs(share) < 0.0995 else 0}f}".removesuffix(".0")
    return text if re.search("[1-9]", text) else f"{sign}0"


def shown_as(value, form, sign=""):
    """A figure as text, by a format such as '.3f', or '%' for a share."""
    return f"{percent(value, sign)}%" if form == "%" else f"{value:{sign}{form}}"


def is_first_process():
    """Whether this is the only process or the first of those that a launcher started (it sets RANK in each)."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_machine():
    """Whether this is the first of the processes that a launcher started on this machine; is_first_process is one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def has_other_machines():
    """Whether a launcher started processes on other machines too, or does not say how many it started on this one."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) > 1 and os.environ.get("LOCAL_WORLD_SIZE") != number


class Voice:
    """What say() does beside printing; the rooms whose matter it is set `aside` and `note`."""

    def __init__(self):
        self.spoken_at = 0.0  # of the last line, in seconds of time.monotonic()
        self.aside = contextlib.nullcontext  # moves progress bars out of the way
        self.note = None  # note(line): keeps it in a run's log
        self.said = set()  # what say_once() has said


VOICE = Voice()
FIRST_SPEAKS = 10  # seconds that a machine's other processes give its first one to print an error of all and to end


def say(message, each_process=False, styled=False):
    """Print a message on stderr, its printable characters only. Results are printed on stdout by print().

    Only the first process prints it. With each_process=True every process that calls this prints it, and all but the
    first put their number before it. With styled=True the message holds control sequences of ours, such as colours:
    it is printed as it is, so what is foreign in it must be printable() already.
    """
    if is_first_process() or each_process:
        message = message if styled else printable(message)
        shown = message if is_first_process() else f"process {os.environ['RANK']}: {message}"
        VOICE.spoken_at = time.monotonic()
        with VOICE.aside():
            print_line(shown)
        note(shown)


def say_once(message):
    """say() what stays true to the end of a script, such as where it runs; the same message again is not repeated."""
    if message not in VOICE.said:
        VOICE.said.add(message)
        say(message)


def print_line(line):
    """Print a line on stderr. A full disk, where stderr is a file, costs the line and not the run."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in STORAGE_ERROR_NUMBERS:
            raise


def note(message):
    """Keep a message in the run's log, where there is one. What say() prints is kept."""
    if VOICE.note:
        VOICE.note(message)


# ---- What goes wrong -------------------------------------------------------------------------------------------------
def say_error(mistake):
    """Print a UserError once on each machine: its other processes let the first one do it.

    A launcher that sees a process fail ends the others, so that one that failed before the first would silence it, and
    one that lives on met the error alone.
    """
    if not is_first_on_machine():
        time.sleep(FIRST_SPEAKS)
    say(f"error: {mistake}", each_process=True)
    tell_launcher(f"error: {mistake}")


def tell_launcher(line):
    """Give a launcher the line as the cause of its report, which follows with a traceback of its own.

    In the form of torch.distributed.elastic's ErrorHandler, without importing torch.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    report = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(report, file)


class PrintableRecord(logging.LogRecord):
    """What a library logs, its printable characters only: it may quote configs, names and texts of files."""

    def getMessage(self):
        return printable(super().getMessage())


def print_uncaught_in_thread(found):
    """As print_uncaught, for a thread. TensorBoard's hands on what it met, and who waits for it says it."""
    if not isinstance(getattr(found.thread, "exception", None), OSError):
        print_uncaught(found.exc_type, found.exc_value, found.exc_traceback)


def format_printable_warning(*args, **options):
    return printable(FORMAT_WARNING(*args, **options))


def print_uncaught(kind, error, trace):
    """Print the traceback of a bug of ours, or of a library; of a package that is missing the line of any mistake."""
    if isinstance(error, ModuleNotFoundError):
        say_error(system_problem(error))
    else:
        say("".join(traceback.format_exception(kind, error, trace)).rstrip(), each_process=True)


sys.excepthook = print_uncaught  # from here on: the scripts import more than this room before they run


def let_libraries_print_safely():
    """Make printable what libraries log, warn of and raise."""
    logging.setLogRecordFactory(PrintableRecord)
    warnings.formatwarning = format_printable_warning
    threading.excepthook = print_uncaught_in_thread


def import_problem(error):
    """The UserError for a package that is missing or broken; transformers raises an error of its own about either."""
    while not getattr(error, "name", None) and error.__cause__:
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError) and error.name:
        problem = f"the package {error.name} is not installed for {sys.executable}"
        remedy = "start the script by the Python of your virtual environment, or run: pip install -r requirements.txt"
    elif not isinstance(error, ModuleNotFoundError) and (found := system_problem(error)):
        return found
    else:
        problem = f"a package cannot be imported ({type(error).__name__}: {error})"
        remedy = "try again; if it stays, run: pip install --force-reinstall -r requirements.txt"
    return UserError(f"{problem}; {remedy}", each_process=True)


def system_problem(error):
    """The UserError for what this machine lacks, or refuses: a package, a file, a folder, memory; else None."""
    if isinstance(error, ModuleNotFoundError):
        return import_problem(error)
    if isinstance(error, (ImportError, OSError)) and "shared object" in str(error):  # of the linker, without a number
        return UserError(
            f"a library cannot be loaded ({error}): give the process more memory (ulimit -v) if it lacks some, else"
            " install the libraries anew by pip install --force-reinstall -r requirements.txt",
            each_process=True,
        )
    if lost_process(error):
        return UserError(
            "another process of this run ended, or cannot be reached any more; its own line or the launcher's report"
            " says which and why; mend that, and the same command goes on from the last checkpoint",
            each_process=True,
        )
    if problem := memory_problem(error):
        return UserError(problem, each_process=True)
    if isinstance(error, FileNotFoundError) and error.errno and error.filename is None:  # what os.getcwd() raises
        return UserError("the folder in which this command was started is gone; go to another one", each_process=True)
    if isinstance(error, shutil.Error):  # of a folder's copy: a list of what failed, each with its words
        return UserError(f"not all could be copied: {error.args[0][0][-1]}; mend that and try again", each_process=True)
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in STORAGE_ERROR_NUMBERS):
        refused = error.filename2 or error.filename  # of a rename it is the new name that something is in the way of
        name = os.fsdecode(refused) if isinstance(refused, (str, bytes)) else "output"
        name = name if len(name) < 300 else f"{name[:300]}..."
        return UserError(f"{os.strerror(error.errno)}: {name}; mend that and try again", each_process=True)
    return None


def lost_process(error):
    """Whether an exception came of the connection to another process: one of PyTorch's own types, or Gloo's words."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def memory_problem(error):
    """What the system gives no more of, memory or threads, and what to do; None if an exception tells of neither."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return (
            "this machine's memory is used up; a file that is read, or the model, is too large for it: give a smaller"
            " one, or close other programs"
        )
    if any(words in str(error) for words in NO_THREADS):
        return "the system starts no more threads; close other programs, or raise its limits (ulimit -a lists them)"
    return None


# How the bars of a library are switched off
LIBRARY_BARS = {
    "huggingface_hub.utils": "disable_progress_bars",
    "transformers.utils.logging": "disable_progress_bar",
    "datasets.utils": "disable_progress_bars",
}


def quiet_libraries():
    """Silence notices of the libraries that need no action of the user; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # if it is not set, tokenizers warns at every fork
    # a connection that is lost is an exception too, which is told; PyTorch's warning of it has frames of its C++ code
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # the project has bars of its own, and none where nobody looks
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for module, switch in LIBRARY_BARS.items():  # of a library that is imported already
        if module in sys.modules:
            getattr(sys.modules[module], switch)()
    # bitsandbytes prints it where its optional CPU kernels are not installed; its built-in ones are correct
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # huggingface_hub prints it for datasets whose README has no header
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    # the Trainer causes it on a machine with several GPUs
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    # FSDP2 warns of operations in place, of which there are none
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # transformers 5.23 renames it to activation checkpointing, but peft and older releases know only the old name
    warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated")
