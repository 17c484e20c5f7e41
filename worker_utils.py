"""Worker processes: one generator's work on many parts, shared by forked processes, its results in order."""

import gc
import multiprocessing
import os
import signal
import sys
import warnings
from contextlib import contextmanager

from message_utils import UserError, say

MAX_PROCESSES = 16  # a worker takes some 85 MiB of its own when it tokenizes


def count_processes():
    """How many processes can work at once: one for each core that is ours; 1 where forking is not safe."""
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES) if sys.platform == "linux" else 1


def run_in_processes(make, parts, processes):
    """Yield what the generator make(parts) yields, one result for each part, made by forked processes.

    Each of n processes makes every n-th part, and holds one finished result at most. If a process raises an exception,
    its part is made again in this process, which raises it anew: the first in the order of the parts. Close the
    generator to end the processes early. Raises UserError if a process was killed.
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
    """Fork the processes and append (process, reader of its results) to workers; False if the system refuses."""
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
        say(f"Notice: the system starts no more processes ({error.strerror}), so one core does all the work")
        stop_workers(workers)
        return False
    return True


@contextmanager
def quiet_fork():
    """Let processes be forked inside: they ignore Ctrl-C, which this process handles, and encode in one thread each.

    A fork does not copy threads. Those of torch and tokenizers are idle at that time, which Python 3.12 cannot know, so
    its warning is silenced.
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
    """Do a worker's parts. An exception ends the worker without a word: the first process meets it again."""
    try:
        gc.freeze()  # a collection would copy the memory that is shared with the first process
        for reader in readers:
            reader.close()  # so that the pipe breaks, and the worker ends, however the first process ends
        for result in make(parts):
            writer.send(result)
    finally:
        os._exit(0)


def take_result(process, reader, make, part):
    """The next result of a process. If an exception ended the process, the part is made here, which raises it."""
    try:
        return reader.recv()
    except (EOFError, OSError):  # the worker sent nothing more, or half a result
        process.join()
    if process.exitcode == 0:
        next(make([part]))
    end = signal.Signals(-process.exitcode).name if process.exitcode else "an exception that does not recur"
    raise UserError(
        f"a worker process was ended by {end}, as happens when memory runs out; free some memory and start again"
    )


def stop_workers(workers):
    """Kill all workers and empty the list."""
    while workers:
        process, reader = workers.pop()
        process.kill()
        process.join()
        reader.close()
