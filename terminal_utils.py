"""The terminal of a chat: input with editing, words that are not broken, answers in columns; plain where it must be."""

import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from shutil import get_terminal_size

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from message_utils import printable, say
from script_utils import BEGUN, SignalHandlers

try:
    import termios
except ImportError:  # Windows
    termios = None

FILES = None  # in place of the words that may stand behind a command: names of files
YOU = "You:   "  # before what is typed; names of models before their answers are as wide
COLUMNS_FROM = 80  # characters of width from which two answers stand side by side
SHOW_CURSOR = b"\x1b[?25h"
DRAWINGS = 15  # of columns that grow, in a second, at most


def is_plain():
    """Whether a chat must do with lines: in a pipe, and in a terminal that cannot move its cursor."""
    return not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout)) or is_dumb()


def is_dumb():
    return is_dumb_terminal() or not (os.environ.get("TERM") or os.name == "nt")


def is_styled(stream):
    """Whether bold and dim letters are welcome on a stream."""
    return stream.isatty() and not is_dumb() and not os.environ.get("NO_COLOR")


# ---- Output ----------------------------------------------------------------------------------------------------------
def note(text, dim=True):
    """Say something that is not of the conversation, broken between words, and dimmed, where the terminal can."""
    if not sys.stderr.isatty() or is_dumb():
        say(text)
        return
    width = get_terminal_size().columns - 1
    lines = [line.plain.rstrip() for line in Text(printable(text)).wrap(Console(width=width), width)]
    if dim and is_styled(sys.stderr):
        lines = [f"\x1b[2m{line}\x1b[0m" for line in lines]
    say("\n".join(lines), styled=True)


def print_chunk(chunk):
    print(chunk, end="", flush=True)


def print_name(name):
    """Print who says what follows in the line."""
    label = f"{name}:".ljust(len(YOU))
    print_chunk(f"\x1b[1m{label}\x1b[0m" if is_styled(sys.stdout) else label)


class WordWrap:
    """Prints the chunks of a text so that its lines break between words, at the width that the terminal has by now."""

    HELD = 30  # characters of a word that are waited for until its end is known; some languages write no blanks

    def __init__(self, column):
        self.column, self.held = column, ""  # where the cursor stands; what is not printed yet

    def add(self, chunk):
        *pieces, self.held = re.split(r"(?<=\s)(?=\S)", self.held + chunk)  # words, each with the blanks behind it
        for piece in pieces:
            self.print(piece)
        if len(self.held) > self.HELD or self.held.endswith("\n"):
            self.end()

    def end(self):
        """Print what is held."""
        self.print(self.held)
        self.held = ""

    def print(self, piece):
        width, needed = get_terminal_size().columns, cell_len(piece.rstrip())
        if self.column and self.column + needed > width >= needed:
            print_chunk("\n")
            self.column = 0
        print_chunk(piece)
        _, line_break, last = piece.rpartition("\n")
        self.column = (0 if line_break else self.column) + cell_len(last.expandtabs())


class SideBySide:
    """Texts in columns that grow as they are written. While they do, only as many last lines show as there is room."""

    def __init__(self, names):
        self.texts = {name: Text() for name in names}
        self.console = Console(highlight=False)
        self.live = Live(self, console=self.console, auto_refresh=False, transient=True)
        self.drawn_at = 0.0  # seconds of time.monotonic()

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *exception):
        self.live.stop()
        for text in self.texts.values():
            text.rstrip()
        self.console.print(self.table())

    def add(self, name, chunk):
        """A chunk more of the text under a name."""
        self.texts[name].append(chunk)
        if time.monotonic() - self.drawn_at > 1 / DRAWINGS:
            self.live.refresh()
            self.drawn_at = time.monotonic()

    def table(self):
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
        for name in self.texts:
            table.add_column(f"{name}:", ratio=1, overflow="fold")
        table.add_row(*self.texts.values())
        return table

    def __rich_console__(self, console, options):
        lines = console.render_lines(self.table(), options.update(height=None))
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()


def columns_for(names):
    """A SideBySide where the terminal is wide enough, else None."""
    wide = not is_plain() and get_terminal_size().columns >= COLUMNS_FROM
    return SideBySide(names) if wide else None


# ---- Input -----------------------------------------------------------------------------------------------------------
class CommandCompleter(Completer):
    """Completes commands and what may stand behind them, {command: words or FILES}, by Tab."""

    def __init__(self, commands):
        self.commands, self.paths = commands, PathCompleter(expanduser=True)

    def get_completions(self, document, event):
        command, blank, typed = document.text_before_cursor.partition(" ")
        if not command.startswith("/"):
            return
        words = self.commands.get(command, ()) if blank else self.commands
        if words is FILES:
            yield from self.paths.get_completions(Document(typed, len(typed)), event)
            return
        typed = typed if blank else command
        for word in words:
            if word.startswith(typed):
                yield Completion(word, start_position=-len(typed))


class InputHistory(FileHistory):
    """What was typed, in a file; a disk that refuses to write costs the history, not the chat."""

    def store_string(self, string):
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def open_history(path):
    """The InputHistory in a file that only its owner can read, or one in memory where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return InputHistory(str(path))


def build_keys():
    """Enter sends, Alt-Enter or Ctrl-J begins a new line, Ctrl-C clears what was typed."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event):
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def begin_line(event):
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def clear(event):
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @keys.add(Keys.Vt100MouseEvent, eager=True)
    def leave_out(event):  # what is read as a mouse's report is a pasted color, ESC [31m, as no mouse is asked for
        pass

    return keys


class Keyboard:
    """Input with editing, history, completion and pastes of several lines."""

    def __init__(self, history_file, commands):
        """commands: {command: the words that may stand behind it, or FILES}."""
        history = open_history(history_file)
        self.keeps = isinstance(history, InputHistory)  # what is typed, beyond the end of the chat
        self.session = PromptSession(
            history=history,
            key_bindings=build_keys(),
            multiline=True,
            prompt_continuation=" " * len(YOU),
            completer=CommandCompleter(commands),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            enable_suspend=True,
        )

    def read(self, default=""):
        """What is typed next; EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C on an empty line."""
        print(flush=True)
        shown = [("bold" if is_styled(sys.stdout) else "", YOU)]
        return as_utf_8(self.session.prompt(shown, default=printable(default)))


class Lines:
    """Input line by line: from a pipe or a file, or from a terminal that can do no more."""

    def __init__(self):
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 must not end the chat

    def read(self):
        """The next line; EOFError at the end."""
        if sys.stdin.isatty():
            print(f"\n{YOU}", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return as_utf_8(line.rstrip("\n"))


def as_utf_8(typed):
    """A text that was typed in UTF-8, though the locale may say ASCII; a byte that is none stays half a surrogate pair,
    so that it is refused where the text is used."""
    return typed.encode(errors="surrogateescape").decode(errors="surrogateescape")


@contextmanager
def unseen_typing():
    """What is typed while a model loads or answers is kept, as it is, for the next input, and not shown in between.

    After Ctrl-Z the shell has its terminal as it was, until it lets the process go on in the foreground. As ever, what
    was typed before a Ctrl-Z and not read yet is dropped by the terminal; the shell would take it for commands.
    """
    if termios is None or is_plain():
        yield
        return
    before = None  # how the shell has its terminal

    def hide():
        nonlocal before
        if in_foreground():
            before = termios.tcgetattr(sys.stdin)
            echo = termios.ECHO | termios.ICANON
            quiet = [before[0] & ~termios.ICRNL, *before[1:3], before[3] & ~echo, *before[4:]]
            termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)

    def restore():
        with suppress(termios.error):  # the terminal was closed
            if before and in_foreground():
                termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def pause(number, frame):
        restore()
        with suppress(OSError):
            os.write(sys.stdout.fileno(), SHOW_CURSOR)  # columns that grow hide it; print() may be what was interrupted
        handler = signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # the process stops here, and goes on here
        signal.signal(number, handler)
        hide()

    hide()
    BEGUN.append(restore)
    try:
        with SignalHandlers(("SIGTSTP",), pause):
            yield
    finally:
        restore()
        BEGUN.remove(restore)


def in_foreground():
    """Whether the terminal is this process's to set: the system stops one that sets it from a shell's background."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:  # it was closed
        return False
