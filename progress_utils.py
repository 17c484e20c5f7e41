"""Progress: how far a long job is and how long it will still take, as a bar on a terminal and as rare lines elsewhere.

with progress("Tokenizing", total=len(rows), unit="rows") as bar:
    for part in parts:
        ...
        bar.update(len(part))
"""

import contextlib
import io
import os
import sys
import threading
import time

from tqdm import tqdm

from message_utils import VOICE, is_first_process, say

FIRST_LINE, NEXT_LINE = 5, 30  # seconds of silence after which a job says, where there is no terminal, how far it is
BAR_DELAY, BAR_PAUSE = 1, 0.25  # seconds before a bar is drawn, and between two drawings
RUNNING = []  # the jobs that are being shown, the innermost last: it is the one that speaks


def progress(what, total=None, unit="steps", done=0, left=None):
    """Context manager of a long job; its update(count) is cheap enough to be called for every row.

    what: the job's name, as a line begins with it: "Tokenizing". total: of so many units, None where nobody knows.
    unit: in the plural; "bytes" are shown as MiB. done: units that were done before, and tell nothing of the speed.
    left: a function that knows the seconds left, or None, better than the speed so far does.

    A job that ends within seconds shows nothing. Only the first process shows anything.
    """
    return Progress(what, total, unit, done, left)


class Progress:
    """A running job: a thread of its own looks at it, so that a single long call is not silent either."""

    def __init__(self, what, total, unit, done, left):
        self.what, self.total, self.unit, self.before, self.done = what, total, unit, done, done
        self.left, self.started = left, time.monotonic()
        self.bar, self.lines = None, 0
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="progress", daemon=True)

    def update(self, count=1):
        """So many units more are done."""
        self.done += count

    def seconds_left(self):
        """Seconds that the rest will take, by the speed so far unless something knows better; None if nothing tells."""
        if self.left:
            return self.left()
        new = self.done - self.before
        return self.elapsed() / new * max(self.total - self.done, 0) if self.total and new > 0 else None

    def elapsed(self):
        return time.monotonic() - self.started

    def __enter__(self):
        self.started = time.monotonic()
        if is_first_process():
            RUNNING.append(self)
            self.watcher.start()
        return self

    def __exit__(self, kind, *exception):
        self.ended.set()
        if self in RUNNING:
            self.watcher.join()
            RUNNING.remove(self)
        if self.bar is not None:
            with contextlib.suppress(OSError, ValueError):  # the terminal was closed
                self.bar.close()
        if self.lines and kind is None:
            say(f"{self.what}: {self._amount(self.done) or 'done'} in {format_duration(self.elapsed())}")

    # ---- What is shown ----
    def _watch(self):
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more, which the main thread will see
            terminal = is_terminal()
            while not self.ended.wait(BAR_PAUSE):
                if terminal:
                    self._draw()
                elif RUNNING[-1:] == [self]:
                    self._speak()

    def _draw(self):
        if self.bar is None:
            if self.elapsed() < BAR_DELAY:
                return
            self.bar = Bar(
                desc=self.what,
                total=self.total,
                initial=self.before,
                unit="B" if self.unit == "bytes" else f" {self.unit}",
                unit_scale=self.unit == "bytes",
                unit_divisor=1024,
                leave=False,
                file=sys.stderr,
                nrows=20,
            )
            self.bar.start_t -= self.elapsed()
        self.bar.n, self.bar.total = self.done, self.total
        left = self.seconds_left()
        times = f"[{{elapsed}}, {format_duration(left)} left]" if left is not None else "[{elapsed}]"
        amount = "{l_bar}{bar}| {n_fmt}/{total_fmt}" if self.total else "{desc}: {n_fmt}" if self.done else "{desc}"
        self.bar.bar_format = f"{amount}{{unit}} {times}" if self.total or self.done else f"{amount} {times}"
        self.bar.ncols = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
        self.bar.refresh()

    def _speak(self):
        silence = time.monotonic() - max(VOICE.spoken_at, self.started)
        if silence >= (NEXT_LINE if self.lines else FIRST_LINE):
            self.lines += 1
            say(self.line())

    def line(self):
        """'Tokenizing: 12,000 of 200,000 rows (6%), 30 s so far, about 7 min 50 s left'."""
        parts = [f"{format_duration(self.elapsed())} so far"]
        if amount := self._amount(self.done, self.total):
            share = f" ({min(self.done / self.total, 1):.0%})" if self.total else ""
            parts.insert(0, f"{amount}{share}")
        if (left := self.seconds_left()) is not None:
            parts.append(f"about {format_duration(left)} left")
        return f"{self.what}: {', '.join(parts)}"

    def _amount(self, done, total=None):
        """'12,000 of 200,000 rows', '3 rows', or '' where nothing is counted."""
        if not (done or total):
            return ""
        size, unit = (2**20, "MiB") if self.unit == "bytes" else (1, self.unit)
        return f"{done / size:,.0f}{f' of {total / size:,.0f}' if total else ''} {unit}"


class Bar(tqdm):
    """tqdm's bar without its own thread, since a Progress has one."""

    monitor_interval = 0


def silent_bar(job):
    """A class for libraries that show bytes on a bar of tqdm: it draws nothing, and tells the job instead."""

    class SilentBar(tqdm):
        monitor_interval = 0

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"file": io.StringIO(), "disable": False})

        def display(self, *arguments, **options):
            if self.unit == "B" and self.total:
                job.total, job.done = self.total, max(job.done, self.n)

    return SilentBar


def is_terminal():
    """Whether stderr is a terminal on which a bar can be drawn."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


Bar.set_lock(threading.RLock())  # tqdm's own is shared among processes, which on some systems starts one more
VOICE.aside = lambda: Bar.external_write_mode(file=sys.stderr)


def format_duration(seconds):
    """90 -> '1 min 30 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    shown = [f"{hours} h" if hours else "", f"{minutes} min" if minutes else "", "" if hours else f"{seconds} s"]
    return " ".join(filter(None, shown))
