"""Processes: what the first one does for all, errors that they share, and the signals that end a training."""

import contextlib
import os
import signal
import time

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from message_utils import UserError, say
from script_utils import ECHO, STOPPING, SignalHandlers, detach_from_closed_terminal


# ---- The processes of a launcher -------------------------------------------------------------------------------------
def from_first_process(function, *arguments):
    """Call the function in the first process only; every process returns its result or raises its UserError."""
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
    """Let the first process execute the block before the others, which then find in the cache what it made."""
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_main_process:
            state.wait_for_everyone()


@contextlib.contextmanager
def shared_errors():
    """If the block raises a UserError in any process, all of them raise the first one. All must execute the block."""
    met = None
    try:
        yield
    except UserError as error:
        met = error
    for error in gather_object([met]):
        if error is not None:
            raise error


# ---- Signals ---------------------------------------------------------------------------------------------------------
class StopSignals(SignalHandlers):
    """Context manager for the training: the first SIGTERM, SIGINT or SIGHUP is noted and the step goes on to its end.

    The trainer looks at `requested`, the number of that signal or 0. A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self):
        super().__init__(STOPPING, self.note)
        self.requested = 0
        self.first_at = 0.0  # seconds of time.monotonic()

    def note(self, number, frame):
        # A launcher passes Ctrl-C on to processes that have had it from the terminal already
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.first_at < ECHO
        if number == signal.SIGINT and self.requested == signal.SIGINT and not echo:
            signal.signal(number, signal.SIG_IGN)  # more of them must not disturb the cleaning up
            self.previous.pop(number, None)
            raise KeyboardInterrupt
        detach_from_closed_terminal(number)
        if not self.requested:
            self.requested, self.first_at = int(number), time.monotonic()
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            say(f"\n{signal.Signals(number).name}: finishing this step and saving{again}")
