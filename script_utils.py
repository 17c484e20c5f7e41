"""How a script runs and ends: signals, exit codes, what it is started with."""

import contextlib
import gc
import importlib
import math
import os
import re
import signal
import sys
import threading
import time
import traceback

from message_utils import (
    Stopped,
    UserError,
    is_first_on_machine,
    is_first_process,
    let_libraries_print_safely,
    say,
    say_error,
    system_problem,
    tell_launcher,
)

BEGUN = []  # functions that undo what was begun and is not ended yet, for an end that runs no `except` or `finally`
STOPPING = ("SIGTERM", "SIGHUP", "SIGINT")  # the signals that ask a process to end
CTRL_C = "\nStopped by Ctrl-C."
ECHO = 2  # seconds after a signal in which one more is taken for the same: `timeout` and launchers send it twice


# ---- Signals ---------------------------------------------------------------------------------------------------------
class SignalHandlers:
    """Context manager that handles signals, named as in the module signal, by handle(number, frame).

    A signal that is ignored stays ignored, as nohup does with SIGHUP. Outside the main thread, where Python allows no
    handlers, nothing is done.
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


class StopAtOnce(SignalHandlers):
    """Context manager of a script: SIGTERM and SIGHUP raise Stopped, so that what was begun is removed on the way out.

    Only in the first process, which holds locks and writes files. The others, and forks of the first, have nothing to
    clean up and end by the signal.
    """

    def __init__(self):
        super().__init__(("SIGTERM", "SIGHUP") if is_first_process() else (), self.stop)
        self.process, self.stopped_at = os.getpid(), -math.inf  # seconds of time.monotonic()

    def stop(self, number, frame):
        if os.getpid() != self.process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif time.monotonic() - self.stopped_at > ECHO:
            self.stopped_at = time.monotonic()
            detach_from_closed_terminal(number)
            raise Stopped(number, f"Stopped by {signal.Signals(number).name}.")


def detach_from_closed_terminal(number):
    """After SIGHUP, send to nowhere what is printed on a terminal: it is closed, and printing would raise an error."""
    if number != getattr(signal, "SIGHUP", None):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream.isatty():
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def signals_leave_at_once():
    """End the process at a signal while libraries are imported, or a user's file is executed: in C code an exception
    would be lost, or come out as another error. What has BEGUN is undone. A training's handlers stay.
    """
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in STOPPING if hasattr(signal, name)}
    ours = [
        name
        for name, handler in handlers.items()
        if handler is signal.default_int_handler or isinstance(getattr(handler, "__self__", None), StopAtOnce)
    ]
    with SignalHandlers(ours, leave_at_once):
        yield


def leave_at_once(number, frame):
    if is_first_process():
        line = CTRL_C if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}."
        with contextlib.suppress(OSError):  # the terminal was closed
            os.write(2, f"{line}\n".encode())
    for undo in BEGUN:
        undo()
    os._exit(128 + number)


# ---- Scripts ---------------------------------------------------------------------------------------------------------
class LateImport:
    """A module that is imported when one of its names is first used: model_utils = LateImport("model_utils").

    It lets the entry scripts name all their modules at the top and still answer --help, a mistyped flag and a faulty
    row at once: importing torch and the libraries that build on it takes seconds. importlib's LazyLoader does not work
    here, because torch looks through sys.modules during its own import and would load all of them in the wrong order.
    """

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if self._name not in sys.modules:
            progress = importlib.import_module("progress_utils").progress  # it builds on this room
            with progress("Loading the libraries"), signals_leave_at_once():
                importlib.import_module(self._name)
        return getattr(importlib.import_module(self._name), attribute)


def start_garbage_collection():
    """Switch on the garbage collector, which run_script switches off, and let it skip all objects that exist by now.

    Importing the libraries makes a million objects that stay, and each look through them would take a second.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def run_script(main, argv):
    """Call the main(argv) of an entry script and return the script's exit code.

    0: main returned. 1: the reader of our output left. 2: a UserError, or a file, a folder or memory that the system
    refuses, which is printed as one line (--debug prints its traceback too). 130: Ctrl-C. 128 and its number: another
    signal. Any other exception is a bug of ours and is raised with its traceback.
    """
    try:
        # a launcher's processes may wait for each other in C code, where no handler is called: there they just end
        with contextlib.nullcontext() if "LOCAL_RANK" in os.environ else StopAtOnce():
            return run_main(main, argv)
    except (KeyboardInterrupt, Stopped) as stop:  # one more, while the first was dealt with
        return end_by(stop)
    finally:
        drop_unwritten()


def run_main(main, argv):
    """The work of run_script."""
    gc.disable()  # until start_garbage_collection()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the entry scripts leave it while they are imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_streams()
    let_libraries_print_safely()
    try:
        check_start()
        main(argv)
        if sys.stdout:
            sys.stdout.flush()
        leave_process_group()
        return 0
    except BrokenPipeError:  # `head`, for example, leaves after its last line
        for stream in filter(None, (sys.stdout, sys.stderr)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 1
    except (KeyboardInterrupt, Stopped) as stop:
        return end_by(stop)
    except SystemExit:
        raise
    except BaseException as error:  # also what libraries in Rust raise when the system starts no more threads
        if stop := stop_behind(error):
            return end_by(stop)
        mistake = error if isinstance(error, UserError) else system_problem(error)
        if mistake is None:
            raise
        if "--debug" in argv:
            say(traceback.format_exc().rstrip())
        say_error(mistake)
        if not mistake.each_process:  # all processes end here
            leave_process_group()
        return 2


def check_start():
    """Raise UserError for a start that cannot go well: without docstrings, or as one of several that nobody started."""
    if sys.flags.optimize > 1:
        raise UserError("python -OO leaves out docstrings, which transformers reads; leave -OO out, or give -O")
    if not is_first_process() and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"RANK is set to {os.environ['RANK']!r}, as a launcher sets it, and LOCAL_RANK is not; start this by"
            " accelerate launch, or unset RANK",
            each_process=True,
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if not re.fullmatch(r"-1|[0-9]{1,9}", number := os.environ.get(name, "0")):
            raise UserError(f"{name} is set to {number!r}, expected the number that a launcher sets; unset it")
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if lacking and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # as left over from a script for a cluster
        raise UserError(
            f"WORLD_SIZE is set to {os.environ['WORLD_SIZE']!r}, as a launcher sets it, and {lacking[0]} is not; start"
            " this by accelerate launch, or unset WORLD_SIZE"
        )


def drop_unwritten():
    """Let go of what stdout or stderr did not take, because a disk is full: at its end Python would try once more."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:  # it was closed
            pass


def prepare_streams():
    """Let files and pipes be UTF-8 whatever the locale. A terminal keeps its encoding; what that lacks is escaped."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test or a notebook may have put another object there
            if not stream.isatty():
                stream.reconfigure(encoding="utf-8")
            stream.reconfigure(errors="strict" if stream is sys.stdin else "backslashreplace")


def stop_behind(error):
    """The KeyboardInterrupt or Stopped while, or because of which, an exception was raised, or None.

    Libraries turn them into others.
    """
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            return error
        error = error.__cause__ or error.__context__
    return None


def end_by(stop):
    """Say that a signal ended the script, and let no further Ctrl-C disturb its end; returns the exit code."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isinstance(stop, Stopped):
        leave_process_group()
        say(str(stop), each_process=is_first_on_machine())
        tell_launcher(str(stop))
        return stop.exit_code
    say(CTRL_C)
    return 130


def leave_process_group():
    """Close the connection between processes that all end now; without this NCCL warns, and Gloo sometimes aborts."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
