"""Worker processes: a long job of many parts, shared out among the cores, its results in the order of the parts."""

import gc
import multiprocessing
import os
import signal
import sys
import warnings
from contextlib import contextmanager

from run_utils import UserError, say

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
