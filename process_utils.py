"""Processes: what the first one does for all, errors that they share, and the signals that end a training."""

import atexit
import contextlib
import functools
import itertools
import os
import pickle
import re
import signal
import socket
import threading
import time
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from message_utils import UserError, has_other_machines, is_first_on_machine, say, system_problem
from script_utils import BEGUN, ECHO, STOPPING, SignalHandlers, detach_from_closed_terminal


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
    """If the block raises a UserError in any process, those without one of their own raise the first one.

    All must execute the block. What the machine of one process refuses, such as a folder, is shared like a UserError.
    In the block nothing may raise before a call in which all take part, where the other processes would wait for ever.
    """
    met = None
    try:
        yield
    except (UserError, OSError) as error:
        met = error if isinstance(error, UserError) else system_problem(error)
        if met is None:
            raise
        if met is not error:
            met.__cause__ = error
    told = from_all_processes(met and (socket.gethostname(), str(met)))
    if met:
        raise met
    for rank, error in enumerate(told):
        if error is not None:
            host, message = error
            raise UserError(f"on {host} (process {rank}): {message}")


def from_all_processes(item):
    """Each process's item in order of rank; all of them must call this.

    Before PyTorch's process group has formed, the processes of several machines have a Meeting. Those of one machine
    do without: their launcher ends them together, and each gets its own item alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return gather_object([item])
    return meeting().exchange(item) if has_other_machines() else [item]


# ---- Several machines, before PyTorch's process group forms ----------------------------------------------------------
SILENCE = 300  # seconds without a sign of life after which a process is taken for lost
SIGN = 10  # seconds between two signs of life
UNSAID = 5  # seconds of waiting until it is said


@functools.cache
def meeting():
    return Meeting()


def open_store(rank, of_launcher):
    """The TCPStore at MASTER_ADDR and MASTER_PORT, whose server is in the launcher or, where it has none, in rank 0."""
    host, port = os.environ["MASTER_ADDR"], os.environ.get("MASTER_PORT", "29500")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT is set to {port!r}, expected a number from 1 to 65535; correct it or unset it")
    is_server = not of_launcher and rank == 0
    if not is_server:
        # a launcher's server stood before this process was started, and is gone if it does not answer
        wait_for_server(host, int(port), 3 * SIGN if of_launcher else SILENCE)
    try:
        return torch.distributed.TCPStore(
            host,
            int(port),
            is_master=is_server,
            timeout=timedelta(seconds=30),  # it has answered already
            wait_for_workers=False,
            multi_tenant=True,
        )
    except torch.distributed.DistError as error:
        if is_server:
            problem = f"port {port} cannot be opened on this machine, where the others look for it"
        else:
            problem = f"what listens at {host}:{port} is not the first machine of this run"
        raise UserError(
            f"{problem} ({str(error).splitlines()[0]}); give all machines a free one (MASTER_PORT, or a launcher's"
            " --main_process_port)"
        ) from error


def wait_for_server(host, port, patience):
    """Wait until something listens there; UserError after so many seconds. In C code no Ctrl-C would end the wait."""
    began, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=SIGN).close()
            return
        except OSError as error:
            waited, problem = time.monotonic() - began, error.strerror or str(error)
        if waited > patience:
            raise UserError(
                f"no first machine answers at {host}:{port} ({problem}); see that it runs, that the address is its own"
                " (MASTER_ADDR and MASTER_PORT) and the port open, and start all machines again"
            )
        if not said and waited > UNSAID and is_first_on_machine():
            said = True
            say(f"Waiting for the first machine at {host}:{port} ({problem})", each_process=True)
        time.sleep(0.2)


class Meeting:
    """Where the processes of several machines tell each other how it went, before PyTorch's process group forms.

    Forming that group waits half an hour in C code for a process that has ended by an error of its machine alone. This
    uses the store by which the group will form: a server of the launcher, or of the first process where there is none.
    """

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.server = open_store(self.rank, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = torch.distributed.PrefixStore(f"meeting-{attempt}", self.server)
        if self.store.add(f"started/{self.rank}", 1) > 1:
            raise UserError(
                f"process {self.rank} was started already; give each machine a --machine_rank of its own, and start all"
                " machines again"
            )
        self.turns, self.ended = itertools.count(), threading.Event()
        threading.Thread(target=self.give_signs, name="signs of life", daemon=True).start()
        atexit.register(self.leave)
        BEGUN.append(self.leave)

    def give_signs(self):
        """Count up a number in the store until the group has formed, or the store is gone."""
        with contextlib.suppress(torch.distributed.DistError):
            while not (torch.distributed.is_initialized() or self.ended.is_set()):
                self.store.add(f"signs/{self.rank}", 1)
                self.ended.wait(SIGN)

    def leave(self):
        """Tell that this process ends."""
        self.ended.set()
        if not torch.distributed.is_initialized():
            with contextlib.suppress(torch.distributed.DistError):
                self.store.set(f"left/{self.rank}", "")

    def exchange(self, item):
        """Each process's item in order of rank. Raises UserError for a process that has ended or is lost."""
        turn = next(self.turns)
        self.store.set(f"{turn}/{self.rank}", pickle.dumps(item))
        self.wait_for_all(turn)
        items = [pickle.loads(self.store.get(f"{turn}/{rank}")) for rank in range(self.size)]
        with contextlib.suppress(torch.distributed.DistError):  # the first machine's processes may end with the store
            self.store.add(f"{turn}/read", 1)
            patience = time.monotonic() + SIGN
            while self.store.add(f"{turn}/read", 0) < self.size and time.monotonic() < patience:
                time.sleep(0.1)
        return items

    def wait_for_all(self, turn):
        """Wait until all processes have given their item of a turn, and say so where it takes long."""
        began, said, heard = time.monotonic(), False, {}  # {rank: (number of its signs, when it was a new one)}
        while missing := [rank for rank in range(self.size) if not self.store.check([f"{turn}/{rank}"])]:
            now = time.monotonic()
            for rank in missing:
                # asked in this order, since a process may give its item and end in between
                if self.store.check([f"left/{rank}"]) and not self.store.check([f"{turn}/{rank}"]):
                    raise UserError(
                        f"process {rank} has ended; mend what its machine says, and start all machines again"
                    )
                signs = self.store.add(f"signs/{rank}", 0)
                if signs != heard.setdefault(rank, (signs, now))[0]:
                    heard[rank] = signs, now
                if now - heard[rank][1] > SILENCE:
                    raise UserError(
                        f"process {rank} has given no sign of life for {SILENCE // 60} minutes; see what its machine"
                        " says and whether it can be reached, and start all machines again"
                    )
            if not said and now - began > UNSAID and is_first_on_machine():
                said = True
                names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
                say(
                    f"Waiting for the other machines: {self.size - len(missing)} of {self.size} processes are as far as"
                    f" this one, not yet {names}; one that is silent for {SILENCE // 60} minutes ends the run",
                    each_process=True,
                )
            time.sleep(0.2)


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
