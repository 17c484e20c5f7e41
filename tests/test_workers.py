"""Worker processes: results in order, few at a time; faults, signals and killed processes end in one line or none."""

import contextlib
import json
import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

import worker_utils
from conftest import PROJECT, outside, refusal
from message_utils import UserError
from warm import WarmProcess
from worker_utils import run_in_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")


def squares(parts):
    for part in parts:
        yield part * part


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_results_are_in_the_order_of_the_parts_however_many_processes_make_them(processes):
    assert list(run_in_processes(squares, list(range(7)), processes)) == [part * part for part in range(7)]


def test_each_process_makes_its_share_and_the_first_one_nothing():
    found = list(run_in_processes(lambda parts: (os.getpid() for _ in parts), list(range(6)), 2))
    assert len(set(found)) == 2
    assert os.getpid() not in found
    assert found[::2] == found[:1] * 3


def test_the_first_fault_in_order_is_raised_after_the_results_before_it_also_if_a_later_one_is_sooner(tmp_path):
    def make(parts):
        for part in parts:
            if part == 4:
                while not (tmp_path / "later").exists():
                    time.sleep(0.01)
            if part in (4, 5):
                (tmp_path / "later").touch()
                raise UserError(f"row {part} is wrong")
            yield part

    taken = []
    with pytest.raises(UserError, match="row 4 is wrong"):
        taken.extend(run_in_processes(make, list(range(8)), 2))
    assert taken == [0, 1, 2, 3]


def test_our_own_bugs_keep_their_type_and_traceback():
    def make(parts):
        for part in parts:
            yield 1 // part

    with pytest.raises(ZeroDivisionError) as caught:
        list(run_in_processes(make, [1, 0], 2))
    assert caught.traceback[-1].name == "make"


def test_processes_wait_until_their_results_are_taken(tmp_path):
    def make(parts):
        for part in parts:
            (tmp_path / str(part)).touch()
            yield bytes(10**6)  # more than a pipe holds

    results = run_in_processes(make, list(range(50)), 2)
    assert len(list(islice(results, 4))) == 4
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) <= 6
    results.close()


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()


def test_closing_the_results_ends_the_processes():
    before = children()
    results = run_in_processes(lambda parts: (bytes(10**6) for _ in parts), list(range(9)), 3)
    next(results)
    assert len(children()) == len(before) + 3
    results.close()
    assert children() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_is_one_line(number):
    def make(parts):
        for part in parts:
            if part == 3:
                os.kill(os.getpid(), number)
            yield part

    message = refusal(list, run_in_processes(make, list(range(6)), 2))
    assert signal.Signals(number).name in message
    assert "memory" in message


def test_an_exception_that_only_a_worker_meets_is_no_silent_loss():
    def make(parts):
        for part in parts:
            if part == 3 and os.getpid() != first:
                raise MemoryError
            yield part

    first = os.getpid()
    message = refusal(list, run_in_processes(make, list(range(6)), 2))
    assert "an exception that does not recur" in message
    assert "memory" in message


def test_where_no_process_can_be_started_the_work_is_done_here_and_that_is_said(monkeypatch, capsys):
    fork, before = os.fork, children()
    answers = [fork, lambda: (_ for _ in ()).throw(BlockingIOError(11, "Resource temporarily unavailable"))]
    monkeypatch.setattr(os, "fork", lambda: answers.pop(0)())
    assert list(run_in_processes(squares, [1, 2, 3], 2)) == [1, 4, 9]
    assert "one core" in capsys.readouterr().err
    assert children() == before


@pytest.mark.parametrize("setting", [None, "true"])
def test_settings_and_signals_are_afterwards_as_they_were(monkeypatch, setting):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    if setting:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", setting)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def make(parts):
        yield from ((os.environ["TOKENIZERS_PARALLELISM"], signal.pthread_sigmask(signal.SIG_BLOCK, [])) for _ in parts)

    assert list(run_in_processes(make, [1, 2], 2)) == [("false", mask | {signal.SIGINT})] * 2
    assert os.environ.get("TOKENIZERS_PARALLELISM") == setting
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_processes_are_as_many_as_our_cores_and_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert worker_utils.count_processes() == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)))
    assert worker_utils.count_processes() == worker_utils.MAX_PROCESSES
    monkeypatch.setattr(sys, "platform", "darwin")
    assert worker_utils.count_processes() == 1


# ---- A user's own command, on two processes whatever the machine has -------------------------------------------------
TRAIN = """
import os, sys, warnings
os.setsid()
warnings.filterwarnings("always", "This process")
import train
os.sched_getaffinity = lambda pid: {0, 1}
sys.exit(train.run_script(train.main, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "rows.jsonl"
    question, answer = "shop " * 100, "bell " * 100
    rows = (json.dumps({"instruction": f"{number} {question}", "response": answer}) + "\n" for number in range(15_000))
    path.write_text("".join(rows))
    return path


@contextlib.contextmanager
def tokenizing(folder, path):
    """(process, pids of its workers) of a dry run in a session of its own, once its workers are there.

    Python 3.12 warns of forks ("This process ... is multi-threaded"), by default where nobody sees it.
    """
    (folder / "train_on_two.py").write_text(TRAIN, encoding="utf-8")
    flags = ("--dry_run", "--custom_dataset_path", path, "--output_dir", folder / "out", "--logs_dir", folder / "logs")
    settings = outside({"PYTHONPATH": str(PROJECT)})
    process = WarmProcess(folder, folder / "train_on_two.py", flags, PROJECT, settings)
    try:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = []
        while len(workers) < 2 and is_running(process.pid):
            time.sleep(0.01)
            with contextlib.suppress(FileNotFoundError):
                workers = [int(pid) for pid in found.read_text(encoding="utf-8").split()]
        assert len(workers) == 2, (folder / "stderr").read_text(encoding="utf-8")
        time.sleep(0.3)
        yield process, workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def is_running(pid):
    """Whether a process does more than wait to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lines_about_tokenizing(folder):
    """What a run says from there on, with what libraries and Python say."""
    lines = (
        (folder / "stdout").read_text(encoding="utf-8") + (folder / "stderr").read_text(encoding="utf-8")
    ).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("Running on "))
    return [line for line in lines[first + 1 :] if line]


ENDS = {
    "Ctrl-C": (signal.SIGINT, os.killpg, 130, ["Stopped by Ctrl-C."]),
    "Ctrl-C of a launcher": (signal.SIGINT, os.kill, 130, ["Stopped by Ctrl-C."]),
    "SIGTERM": (signal.SIGTERM, os.kill, 143, ["Stopped by SIGTERM."]),
    "SIGTERM to all": (signal.SIGTERM, os.killpg, 143, ["Stopped by SIGTERM."]),
    "kill -9": (signal.SIGKILL, os.kill, -signal.SIGKILL, []),
}


@pytest.mark.parametrize("end", ENDS)
def test_however_a_run_ends_while_it_tokenizes_no_process_is_left_and_no_noise(end, many_rows, tmp_path):
    number, send, code, said = ENDS[end]
    with tokenizing(tmp_path, many_rows) as (process, workers):
        send(process.pid, number)
        assert process.wait(60).returncode == code
        patience = time.monotonic() + 60
        while any(map(is_running, workers)) and time.monotonic() < patience:
            time.sleep(0.05)
        assert not any(map(is_running, workers))
    assert lines_about_tokenizing(tmp_path) == said


def test_a_worker_that_the_system_kills_ends_the_run_with_one_line(many_rows, tmp_path):
    with tokenizing(tmp_path, many_rows) as (process, workers):
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(60).returncode == 2
        assert not any(map(is_running, workers))
    (line,) = lines_about_tokenizing(tmp_path)
    assert line.startswith("error: ")
    assert "SIGKILL" in line
    assert not list(tmp_path.glob("out/cache/tokens-*"))
