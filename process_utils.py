"""Processes: what the first one does for all, errors that they share, signals, and worker processes."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from message_utils import Stopped, UserError, is_first_process, say

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
    """Context manager for the time before the training: SIGTERM and SIGHUP raise Stopped, since nothing needs saving.

    Only in the first process, which has a lock to release. The others have nothing to clean up and end by the signal.
    """

    def __init__(self):
        super().__init__(("SIGTERM", "SIGHUP") if is_first_process() else (), self.stop)

    def stop(self, number, frame):
        detach_from_closed_terminal(number)
        raise Stopped(number, f"{signal.Signals(number).name}: stopped before the training; the same command starts it")


class StopSignals(SignalHandlers):
    """Context manager for the training: the first SIGTERM, SIGINT or SIGHUP is noted and the step goes on to its end.

    The trainer looks at `requested`, the number of that signal or 0. A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self):
        super().__init__(("SIGTERM", "SIGINT", "SIGHUP"), self.note)
        self.requested = 0
        self.first_at = 0.0  # seconds of time.monotonic()

    def note(self, number, frame):
        # A launcher passes Ctrl-C on to processes that have had it from the terminal already
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.first_at < 2
        if number == signal.SIGINT and self.requested == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        detach_from_closed_terminal(number)
        if not self.requested:
            self.requested, self.first_at = int(number), time.monotonic()
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            say(f"\n{signal.Signals(number).name}: finishing this step and saving{again}")


def detach_from_closed_terminal(number):
    """After SIGHUP, send to nowhere what is printed on a terminal: it is closed, and printing would raise an error."""
    if number != getattr(signal, "SIGHUP", None):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream.isatty():
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- Workers ---------------------------------------------------------------------------------------------------------


MAX_PROCESSES = 16  # each takes some 85 MiB of its own when it tokenizes


def count_processes():
    """How many processes can work at once: one for each core that is ours; 1 where forking is not safe."""
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES) if sys.platform == "linux" else 1


def run_in_processes(make, parts, processes):
    """Yield what the generator make(parts) yields, one result for each part, made by forked processes.

    Each of n processes makes every n-th part, and holds one finished result at most. The part at which one of them
    raises an exception is made again here, where it is raised anew: the first in the order of the parts, if make yields
    what comes before a fault. Close the generator to end the processes early. Raises UserError where one was killed.
    """
    workers = []
    try:
        if processes == 1 or not start_workers(workers, make, parts, processes):
            yield from make(parts)
        else:
            for number, part in enumerate(parts):
                yield take_result(*workers[number % processes], make, part)
    finally:
        stop_workers(workers)


def start_workers(workers, make, parts, processes):
    """Fork the processes and append (process, reader of its results) to workers; False where the system refuses."""
    context = multiprocessing.get_context("fork")
    try:
        with quiet_fork():
            for first in range(processes):
                reader, writer = context.Pipe(duplex=False)
                readers = [reader, *(reader for _, reader in workers)]
                work = (make, parts[first::processes], writer, readers)
                process = context.Process(target=send_results, args=work, daemon=True)
                process.start()
                workers.append((process, reader))
                writer.close()
    except OSError as error:
        say(f"Notice: working on one core, since no more processes can be started: {error.strerror}")
        stop_workers(workers)
        return False
    return True


@contextmanager
def quiet_fork():
    """Fork in here. The new processes ignore Ctrl-C, which the first one handles, and encode in one thread.

    Other threads are not forked; those of torch and tokenizers are idle by then, of which Python 3.12 cannot know.
    """
    name, mask = "TOKENIZERS_PARALLELISM", signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def send_results(make, parts, writer, readers):
    """What a worker does. Its exceptions end it without a word: the first process meets them again, or is no more."""
    try:
        gc.freeze()  # collecting would copy the memory that is shared with the first process
        for reader in readers:
            reader.close()  # the pipe breaks when the first process ends, however that happens
        for result in make(parts):
            writer.send(result)
    finally:
        os._exit(0)


def take_result(process, reader, make, part):
    """The next result of a process. Where an exception ended it, the part is made here to raise it."""
    try:
        return reader.recv()
    except (EOFError, OSError):  # nothing more, or half a result
        process.join()
    if process.exitcode == 0:
        next(make([part]))
    end = signal.Signals(-process.exitcode).name if process.exitcode else "an exception that does not recur"
    raise UserError(
        f"a worker process was ended by {end}, as happens where memory runs out; free some memory and start again"
    )


def stop_workers(workers):
    while workers:
        process, reader = workers.pop()
        process.kill()
        process.join()
        reader.close()
