"""What is printed: UTF-8 in files and pipes whatever the locale, nothing that steers a terminal, quiet ends."""

import logging
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest

from conftest import PROJECT
from message_utils import UserError, format_printable_warning, let_libraries_print_safely, say, system_problem
from script_utils import run_script

FOREIGN = "é 你好 \x1b[31mred\x07 \u202eturned\u2066"
SHOWN = "é 你好 [31mred turned"
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "asked for ASCII": {"PYTHONIOENCODING": "ascii"},
    "a Windows code page": {"PYTHONIOENCODING": "cp1252:strict"},
}


def run_main(main, stdin="", argv="[]", **environment):
    """Run a main function, given as source, as the entry scripts do; returns (exit code, stdout, stderr) as UTF-8."""
    program = (
        "import sys, logging, warnings\nfrom message_utils import UserError, say\nfrom script_utils import run_script\n"
    )
    program += f"{main}\nsys.exit(run_script(main, {argv}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=stdin.encode(),
        capture_output=True,
        cwd=PROJECT,
        env=os.environ | environment,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("locale", LOCALES)
def test_pipes_are_utf_8_whatever_the_locale(locale):
    echo = "def main(argv):\n    text = sys.stdin.read()\n    print(text)\n    say(text)"
    assert run_main(echo, "é 你好 🙂", **LOCALES[locale]) == (0, "é 你好 🙂\n", "é 你好 🙂\n")


def test_no_message_steers_a_terminal(capsys):
    say(FOREIGN)
    assert capsys.readouterr().err == f"{SHOWN}\n"


def test_what_libraries_log_and_warn_of_is_printable(caplog, monkeypatch):
    for target, name in [(warnings, "formatwarning"), (sys, "excepthook"), (threading, "excepthook")]:
        monkeypatch.setattr(target, name, getattr(target, name))
    factory = logging.getLogRecordFactory()
    try:
        let_libraries_print_safely()
        logging.getLogger("library").warning("a config says %s", FOREIGN)
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == [f"a config says {SHOWN}"]
    assert f"UserWarning: {SHOWN}" in format_printable_warning(FOREIGN, UserWarning, "x.py", 1)


@pytest.mark.parametrize("argv", ["[]", "['--debug']"])
@pytest.mark.parametrize("error", ["UserError", "ValueError"])
def test_no_error_and_no_traceback_steers_a_terminal(error, argv):
    code, _, shown = run_main(f"def main(argv):\n    raise {error}({FOREIGN!r})", argv=argv)
    assert code == (2 if error == "UserError" else 1)
    assert SHOWN in shown
    assert ("Traceback" in shown) is (error == "ValueError" or "--debug" in argv)
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
@pytest.mark.parametrize("pipe", ["|", "2>&1 |"])
def test_a_pipe_that_is_closed_early_is_quiet(pipe):
    program = (
        "import sys; from message_utils import say\nfrom script_utils import run_script\n"
        "def main(argv):\n    for _ in range(100_000):\n        print(7)\n        say('note') if argv else 0\n"
        f"sys.exit(run_script(main, {['x'] if '&' in pipe else []}))"
    )
    command = f'"{sys.executable}" -c "$PROGRAM" {pipe} head -n 1'
    environment = os.environ | {"PROGRAM": program}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=PROJECT, env=environment, check=False
    )
    assert done.stdout.strip() in ("7", "note")
    assert done.stderr == ""


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "inference.py", "merge.py"])
def test_a_python_without_the_packages_is_told_which_in_one_line(script):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", PROJECT / script]  # -S: without the packages of this environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    [line] = done.stderr.splitlines()
    assert done.returncode != 0
    assert line.startswith("error: the package ")
    assert "pip install -r requirements.txt" in line


def test_a_library_that_the_system_cannot_link_is_one_line():
    words = "libtorch_cpu.so: failed to map segment from shared object"
    code, _, error = run_main(f"def main(argv):\n    raise ImportError({words!r})")
    assert (code, len(error.splitlines())) == (2, 1)
    assert error.startswith(f"error: a library cannot be loaded ({words}): give the process more memory")


def test_a_package_that_is_missed_later_is_a_line_too():
    code, _, error = run_main("def main(argv):\n    import no_such_package")
    assert (code, len(error.splitlines())) == (2, 1)
    assert error.startswith("error: the package no_such_package is not installed for ")


@pytest.mark.parametrize(
    ("cause", "line"),
    [
        (ModuleNotFoundError("No module named 'regex'", name="regex"), "the package regex is not installed for "),
        (RuntimeError("no C compiler"), "a package cannot be imported (RuntimeError: no C compiler); try again"),
        (MemoryError(), "memory is used up"),
        (None, "a package cannot be imported (ModuleNotFoundError: Could not import module 'Trainer'"),
    ],
)
def test_a_package_that_fails_inside_transformers_is_told_by_its_cause(cause, line):
    error = ModuleNotFoundError("Could not import module 'Trainer'. Are its requirements defined correctly?")
    error.__cause__ = cause
    assert line in str(system_problem(error))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stderr_costs_the_lines_and_not_the_run():
    program = "import sys\nfrom message_utils import say\nfrom script_utils import run_script\n"
    program += "sys.exit(run_script(lambda argv: [say('hello'), print('done')], []))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, cwd=PROJECT, check=False
        )
    assert (done.returncode, done.stdout) == (0, b"done\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line():
    program = "import sys\nfrom script_utils import run_script\nsys.exit(run_script(lambda argv: print('done'), []))"
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, cwd=PROJECT, check=False
        )
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device: output; mend that and try again\n")


def test_python_without_docstrings_is_refused():
    program = "import sys\nfrom script_utils import run_script\nsys.exit(run_script(lambda argv: None, []))"
    done = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, cwd=PROJECT, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"leave -OO out, or give -O" in done.stderr


class RustPanic(BaseException):
    """As pyo3 raises it: no Exception."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("can't start new thread"), "the system starts no more threads; close other programs, or raise"),
        (RustPanic("ThreadPoolBuildError: Resource temporarily unavailable"), "the system starts no more threads"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "this machine's memory is used up"),
    ],
)
def test_a_system_that_gives_no_more_threads_or_memory_is_one_line(error, words, capsys):
    def main(argv):
        raise error

    assert run_script(main, []) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({"WORLD_SIZE": "y"}, "WORLD_SIZE is set to 'y', expected the number that a launcher sets"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is set to '', expected the number"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE is set to '2', as a launcher sets it, and RANK is not; start this by accelerate",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
            "and MASTER_ADDR is not; start this by accelerate launch",
        ),
    ],
)
def test_what_a_launcher_left_behind_is_named(left, words, capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert run_script(lambda argv: None, []) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


def test_a_line_that_quotes_a_long_text_is_cut_in_its_middle_and_keeps_its_remedy():
    assert re.fullmatch(r"--x a{996} \.\.\. a+; correct it", line := str(UserError(f"--x {'a' * 10**6}; correct it")))
    assert len(line) == 1505


def test_a_rank_that_no_launcher_set_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run_script(lambda argv: None, []) == 2
    assert "RANK is set to 'x', as a launcher sets it, and LOCAL_RANK is not;" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")
def test_a_signal_while_a_library_is_imported_leaves_nothing_half_made(tmp_path):
    program = "import os, pathlib, signal, sys\nfrom file_utils import staged_folder\n"
    program += "from script_utils import run_script, signals_leave_at_once\n"
    program += "def main(argv):\n with staged_folder(pathlib.Path(argv[0]) / 'model') as made:\n"
    program += "  with signals_leave_at_once():\n"
    program += "   (made / 'weights').touch()\n   os.kill(os.getpid(), signal.SIGTERM)\n"
    command = [sys.executable, "-c", f"{program}sys.exit(run_script(main, sys.argv[1:]))", tmp_path]
    done = subprocess.run(command, capture_output=True, cwd=PROJECT, check=False)
    assert (done.returncode, done.stderr) == (143, b"Stopped by SIGTERM.\n")
    assert list(tmp_path.iterdir()) == []
