"""Processes: what the first one does for all, and signals."""

import contextlib
import os
import signal
import sys
import threading
import time

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from message_utils import Stopped, UserError, say

# ---- Ranks -----------------------------------------------------------------------------------------------------------


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
