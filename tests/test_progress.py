"""Progress: bars on a terminal, rare lines elsewhere, and silence about what is quick."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

import progress_utils
from conftest import PROJECT
from message_utils import say
from progress_utils import progress


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    """What takes seconds and half minutes is tested in tenths of a second."""
    for name, seconds in {"FIRST_LINE": 0.05, "NEXT_LINE": 0.2, "BAR_DELAY": 0, "BAR_PAUSE": 0.01}.items():
        monkeypatch.setattr(progress_utils, name, seconds)


def test_a_job_that_ends_at_once_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress_utils, "FIRST_LINE", 5)
    with progress("Reading", 3, "rows") as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_without_a_terminal_rare_lines_say_how_far_a_job_is(capsys):
    with progress("Reading", 4, "rows") as bar:
        for _ in range(4):
            time.sleep(0.1)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert re.fullmatch(r"Reading: \d of 4 rows \(\d+%\), 0 s so far, about \d s left", lines[1])
    assert lines[-1] == "Reading: 4 rows in 0 s"


def test_a_single_long_call_is_not_silent(capsys):
    with progress("Merging"):
        time.sleep(0.1)
    assert capsys.readouterr().err.splitlines() == ["Merging: 0 s so far", "Merging: done in 0 s"]


def test_a_job_keeps_quiet_while_others_speak(capsys):
    with progress("Training", 100, "steps") as bar:
        for step in range(12):
            time.sleep(0.02)
            bar.update()
            say(f"step {step}")
    assert "Training" not in capsys.readouterr().err


def test_of_nested_jobs_the_innermost_speaks(capsys):
    with progress("Training", 100, "steps"), progress("Evaluating", 10, "rows"):
        time.sleep(0.1)
    assert capsys.readouterr().err.splitlines()[0].startswith("Evaluating: 0 of 10 rows")


def test_what_was_done_before_tells_nothing_of_the_speed():
    bar = progress("Training", 100, "steps", done=90)
    bar.started -= 10
    bar.update(5)
    assert 9.5 < bar.seconds_left() < 10.5


def test_an_exception_ends_a_job_without_a_word_and_without_a_thread(capsys):
    threads = threading.active_count()
    with contextlib.suppress(KeyboardInterrupt), progress("Reading", 10, "rows"):
        time.sleep(0.1)
        raise KeyboardInterrupt
    assert threading.active_count() == threads
    assert not progress_utils.RUNNING
    assert "Reading: done" not in capsys.readouterr().err


def test_other_processes_show_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with progress("Reading", 10, "rows") as bar:
        time.sleep(0.1)
        bar.update()
    assert capsys.readouterr().err == ""


JOB = """
import sys, time
sys.path.insert(0, sys.argv[1])
import progress_utils
from message_utils import say
progress_utils.BAR_DELAY, progress_utils.BAR_PAUSE = 0, 0.01
with progress_utils.progress("Reading", 10, "rows") as bar:
    bar.update(5)
    time.sleep(0.1)
    say("a line")
    time.sleep(0.1)
"""


def test_on_a_terminal_a_bar_steps_aside_for_lines_and_leaves_nothing():
    reader, writer = pty.openpty()
    done = subprocess.run([sys.executable, "-c", JOB, PROJECT], stderr=writer, env={**os.environ, "TERM": "xterm"})
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while block := os.read(reader, 65536):
            shown += block
    os.close(reader)
    assert done.returncode == 0
    pieces = re.split(r"[\r\n]+", shown.decode())
    assert any(re.match(r"Reading:  50%\|.*\| 5/10 rows \[", piece) for piece in pieces)
    assert "a line" in pieces  # on a line of its own
    assert pieces[-1].strip() == ""
