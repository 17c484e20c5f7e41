"""Chat: a conversation in a terminal, its commands, and how answers are shown as they are written."""

import json
import os
import re
import shlex
import sys
import time
from bisect import bisect_left
from collections import namedtuple
from contextlib import closing, contextmanager, nullcontext, suppress
from difflib import get_close_matches
from pathlib import Path

import torch
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal
from rich.console import Console
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from data_utils import read_unanswered, require_text, unanswered, with_tools
from file_utils import display_path, expand_home, whole_file
from generation_utils import build_generation_config, prompt_limit, stream_reply
from message_utils import UserError, printable, say
from prompt_utils import encode_prompt
from settings_utils import DEFAULTS, check_value, parse_value

try:
    import termios
except ImportError:  # Windows
    termios = None

# What /set changes
ANSWERING = ("do_sample", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "seed")
SAMPLING = ("temperature", "top_p", "seed")  # they change nothing where do_sample is False
COMMANDS = {
    "/help": ("", "this list"),
    "/system": ("[TEXT]", "show the system text, or begin the conversation with another; /system none: with none"),
    "/clear": ("", "forget the conversation"),
    "/undo": ("", "forget the last question and its answer"),
    "/retry": ("", "answer the last question again"),
    "/edit": ("[TEXT]", "change the last question and ask it instead"),
    "/tuned": ("", "the tuned model answers"),
    "/base": ("", "the base model answers"),
    "/compare": ("", "both answer, side by side"),
    "/history": ("", "keep the earlier turns, or let each question stand alone"),
    "/set": ("[NAME VALUE]", f"show or change {', '.join(ANSWERING)}"),
    "/save": ("FILE", "write the conversation as rows that train.py reads, .jsonl or .json"),
    "/load": ("FILE", "go on with the last conversation of a file"),
    "/stats": ("", "speed, lengths, and how full the context is"),
    "/exit": ("", "leave; Ctrl-D does it too"),
}
COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)
FLAG = re.compile(f"--({'|'.join(ANSWERING)})")  # which messages of other rooms name
KEYS = "Enter sends, Alt-Enter begins a new line. Ctrl-C stops an answer, or clears what you are typing."
COLUMNS_FROM = 80  # characters of width from which two answers stand side by side
LABEL = 7  # characters before a question and an answer
DRAWINGS = 15  # of two columns in a second, at most

# An answer: its text, whether it ended by itself, its tokens, whether Ctrl-C stopped it, and the seconds that its first
# words (None if there are none) and all of it took
Answer = namedtuple("Answer", "text ended tokens stopped first seconds")


# ---- Answers ---------------------------------------------------------------------------------------------------------
def stream_answer(model, tokenizer, messages, settings, show):
    """Let the model answer, and hand the text to show() in chunks as it comes. Ctrl-C ends the answer, nothing else."""
    started, first, chunks, stopped = time.monotonic(), None, [], False
    with closing(stream_reply(model, tokenizer, messages, build_generation_config(tokenizer, settings))) as stream:
        try:
            for chunk in stream:
                chunk = chunk if chunks else chunk.lstrip()
                if chunk:
                    first = first or time.monotonic() - started
                    chunks.append(chunk)
                    show(chunk)
        except KeyboardInterrupt:
            stopped = True
    ended, tokens = (stream.reply.ended, stream.reply.tokens) if stream.reply else (False, 0)
    text = "".join(chunks).strip()
    return Answer(text, ended and not stopped, tokens, stopped, first, time.monotonic() - started)


def print_chunk(chunk):
    print(chunk, end="", flush=True)


def print_answer(model, tokenizer, messages, settings):
    """Stream an answer to stdout; where it did not end by itself, stderr says so."""
    answer = stream_answer(model, tokenizer, messages, settings, print_chunk)
    print(flush=True)
    if answer.stopped:
        say("[stopped]")
    elif not answer.ended:
        say(f"[cut at {answer.tokens} tokens; --max_new_tokens {2 * settings.max_new_tokens} gives it more room]")
    return answer


def is_styled(stream):
    """Whether colours and moving lines are welcome on a stream."""
    return stream.isatty() and not is_dumb() and not os.environ.get("NO_COLOR")


def is_dumb():
    return is_dumb_terminal() or not (os.environ.get("TERM") or os.name == "nt")


def note(text):
    """Say something that is not of the conversation, dimmed where the terminal can."""
    if is_styled(sys.stderr):
        say(f"\x1b[2m{printable(text)}\x1b[0m", styled=True)
    else:
        say(text)


# ---- Two answers side by side ----------------------------------------------------------------------------------------
class SideBySide:
    """Texts in columns that grow as they are written. While they do, only as many last lines show as there is room."""

    def __init__(self, console, names):
        self.console = console
        self.texts = {name: Text() for name in names}
        self.live = Live(self, console=console, auto_refresh=False, transient=True)
        self.drawn_at = 0.0  # seconds of time.monotonic()

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, kind, *exception):
        self.live.stop()
        self.console.print(self.table())

    def add(self, name, chunk):
        """A chunk more of a text."""
        self.texts[name].append(chunk)
        if time.monotonic() - self.drawn_at > 1 / DRAWINGS:
            self.live.refresh()
            self.drawn_at = time.monotonic()

    def table(self):
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
        for name in self.texts:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*self.texts.values())
        return table

    def __rich_console__(self, console, options):
        lines = console.render_lines(self.table(), options.update(height=None))
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line
            yield Segment.line()


# ---- The keyboard ----------------------------------------------------------------------------------------------------
class CommandCompleter(Completer):
    """Completes commands, names of settings and of files, by Tab."""

    def __init__(self):
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document, event):
        command, blank, argument = document.text_before_cursor.partition(" ")
        if not blank:
            names, typed = COMMANDS if command.startswith("/") else (), command
        elif command in ("/save", "/load"):
            yield from self.paths.get_completions(Document(argument, len(argument)), event)
            return
        else:
            names, typed = ANSWERING if command == "/set" and " " not in argument else (), argument
        for name in names:
            if name.startswith(typed):
                yield Completion(name, start_position=-len(typed))


class InputHistory(FileHistory):
    """What was typed, in a file; a disk that refuses to write costs the history, not the chat."""

    def store_string(self, string):
        with suppress(OSError):
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
    """Enter sends, Alt-Enter (or Ctrl-J) begins a new line, Ctrl-C clears what was typed."""
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

    return keys


class Keyboard:
    """Input with editing, history and pastes of several lines, in a terminal that can do it."""

    def __init__(self, history_file):
        self.session = PromptSession(
            history=open_history(history_file),
            key_bindings=build_keys(),
            multiline=True,
            prompt_continuation=" " * LABEL,
            completer=CommandCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            enable_suspend=True,
        )

    def read(self, default=""):
        """What is typed next; EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C on an empty line."""
        print(flush=True)
        return self.session.prompt([("bold", "You:".ljust(LABEL))], default=printable(default))


class Lines:
    """Input line by line: from a pipe or a file, or from a terminal that can do no more."""

    def __init__(self):
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 must not end the chat

    def read(self, default=""):
        if sys.stdin.isatty():
            print(f"\n{'You:'.ljust(LABEL)}", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")


@contextmanager
def unseen_typing():
    """What is typed while an answer is written is kept for the next input, and not shown in the middle of it."""
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


# ---- The conversation ------------------------------------------------------------------------------------------------
class Chat:
    """A conversation, and what the commands do to it.

    turns: the finished ones, each a list of messages that begins with the user's question. open: (question, the turns
    before it) where the last answer was cut or stopped, else None: what is open is no part of what the model is told
    next, and leaves the turns as they were.
    """

    def __init__(self, model, tokenizer, settings, system="", keeps_turns=True, history_file=None):
        """system: the text that conversations begin with. keeps_turns: whether the model is told the earlier turns.
        history_file: where what is typed is kept, or None.
        """
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.system, self.keeps_turns, self.tools = system, keeps_turns, None
        self.turns, self.open = [], None
        self.has_adapter = hasattr(model, "disable_adapter")
        self.speaker = "tuned" if self.has_adapter else "base"  # or "compare"
        self.left_out = 0  # of the oldest turns, for want of room; what was said last
        self.answers, self.asked_tokens = [], 0
        self.written = set()  # files of this chat, which /save may replace
        self.plain = not sys.stdin.isatty() or not sys.stdout.isatty() or is_dumb()
        self.keyboard = Lines() if self.plain or history_file is None else Keyboard(history_file)
        self.history_file = history_file

    # ---- Reading ----
    def run(self):
        """Read, answer, repeat, until /exit or the end of the input."""
        with suppress(EOFError):
            while True:
                try:
                    self.take(self.keyboard.read())
                except KeyboardInterrupt:
                    if not sys.stdin.isatty():
                        raise
                    note("Ctrl-D or /exit leaves the chat.")
        if sys.stdin.isatty() and self.plain:
            say("")

    def take(self, text):
        """Do what a line says: a command, or a question."""
        command = COMMAND.fullmatch(text.rstrip())
        try:
            if command and command[1] in COMMANDS:
                getattr(self, command[1].replace("/", "do_"))((command[2] or "").strip())
            elif command:
                near = get_close_matches(command[1], COMMANDS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                note(f"Unknown command {command[1]}; {hint}/help lists them. A blank before it makes it a question.")
            elif text.strip():
                self.ask([{"role": "user", "content": require_text(text.strip(), "the question")}], self.turns)
        except UserError as error:
            say(FLAG.sub(r"/set \1", f"error: {error}"))

    # ---- Asking ----
    def ask(self, question, earlier):
        """Let the model answer a question, a list of messages, after the earlier turns; a whole answer becomes a turn."""
        messages = self.fit(question, earlier)
        self.open = question, earlier
        with unseen_typing():
            answers = self.answer_both(messages) if self.speaker == "compare" else [self.answer(messages)]
        print(flush=True)
        self.answers += answers
        if answers[-1].ended and answers[-1].text:
            self.turns = [*earlier, [*question, {"role": "assistant", "content": answers[-1].text}]]
            self.open = None
        for answer in answers:
            self.mark(answer)

    def messages(self, question, earlier):
        """What the model is told: the system text, the turns, and the question."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return with_tools([*system, *(message for turn in earlier for message in turn), *question], self.tools)

    def fit(self, question, earlier):
        """The messages of a question and of as many turns before it, whole ones, as the context has room for."""
        limit = prompt_limit(self.model, self.settings.max_new_tokens)
        earlier = earlier if self.keeps_turns else []

        def tokens(left_out):
            return len(encode_prompt(self.tokenizer, self.messages(question, earlier[left_out:])))

        left_out = bisect_left(range(len(earlier)), True, key=lambda left_out: tokens(left_out) <= limit)
        self.asked_tokens = tokens(left_out)
        if left_out and left_out != self.left_out:
            turns = "turn is" if left_out == 1 else f"{left_out} turns are"
            note(f"[the oldest {turns} left out: the prompt has room for {limit:,} tokens beside the answer]")
        self.left_out = left_out
        return self.messages(question, earlier[left_out:])

    def answer(self, messages):
        """Stream one answer to stdout, behind the name of who gives it where somebody watches."""
        if sys.stdin.isatty() and sys.stdout.isatty():
            self.print_label(self.speaker)
        with self.as_speaker(self.speaker):
            return stream_answer(self.model, self.tokenizer, messages, self.settings, print_chunk)

    def answer_both(self, messages):
        """Stream the answers of base and tuned, one after the other, in columns where the terminal is wide enough."""
        console = None if self.plain else Console(highlight=False)
        columns = console and console.width >= COLUMNS_FROM
        answers = []
        with SideBySide(console, ("Base", "Tuned")) if columns else nullcontext() as table:
            for name in ("base", "tuned"):
                if not columns:
                    print("\n" if answers else "", end="")
                    self.print_label(name)
                show = print_chunk if not columns else lambda chunk, name=name: table.add(name.capitalize(), chunk)
                with self.as_speaker(name):
                    answers.append(stream_answer(self.model, self.tokenizer, messages, self.settings, show))
                if answers[-1].stopped:
                    break
        return answers

    def print_label(self, name):
        label = f"{name.capitalize()}:".ljust(LABEL)
        print(f"\x1b[1m{label}\x1b[0m" if is_styled(sys.stdout) else label, end="", flush=True)

    def as_speaker(self, name):
        return self.model.disable_adapter() if name == "base" and self.has_adapter else nullcontext()

    def mark(self, answer):
        """Say of an answer that did not end by itself why, and what can be done."""
        kept = ", so it is not kept in the conversation" if self.open else ""
        if answer.stopped:
            note(f"[stopped{kept}; /retry answers again]")
        elif not answer.ended:
            note(f"[cut at {answer.tokens} tokens{kept}; /set max_new_tokens {2 * answer.tokens}, then /retry]")
        elif not answer.text:
            note(f"[an empty answer{kept}; /retry answers again]")

    def last(self):
        """(the last question, the turns before it); UserError where there is none."""
        if self.open:
            return self.open
        if not self.turns:
            raise UserError("there is no question yet; ask one")
        return unanswered(self.turns[-1]), self.turns[:-1]

    # ---- Commands ----
    def do_help(self, argument):
        rows = [(f"{name} {arguments}".strip(), text) for name, (arguments, text) in COMMANDS.items()]
        width = max(len(usage) for usage, _ in rows)
        say("\n".join(f"{usage:<{width}}  {text}" for usage, text in rows))
        if not self.plain:
            say(KEYS)
            say(f"What you type is kept in {display_path(self.history_file)}, for the arrow keys and Ctrl-R.")

    def do_system(self, argument):
        if argument:
            self.system = "" if argument == "none" else require_text(argument, "the system text")
        note(f"The conversation begins with: {self.system}" if self.system else "There is no system text.")

    def do_clear(self, argument):
        self.turns, self.open, self.left_out, self.tools = [], None, 0, None
        note("The conversation is forgotten.")

    def do_undo(self, argument):
        question, earlier = self.last()
        self.turns, self.open = self.turns if self.open else earlier, None
        note(f"Forgotten: {shortened(question[-1]['content'])}")

    def do_retry(self, argument):
        self.ask(*self.last())

    def do_edit(self, argument):
        question, earlier = self.last()
        if not argument and isinstance(self.keyboard, Lines):
            raise UserError("give the changed question behind /edit")
        text = argument or self.keyboard.read(default=question[-1]["content"]).strip()
        if text:
            self.ask([*question[:-1], {"role": "user", "content": require_text(text, "the question")}], earlier)

    def do_tuned(self, argument):
        self.switch("tuned", "The tuned model answers from now on.")

    def do_base(self, argument):
        self.switch("base", "The base model answers from now on.")

    def do_compare(self, argument):
        self.switch("compare", "Both answer from now on, the base first; the tuned model's answer is kept.")

    def switch(self, speaker, text):
        if speaker != "base" and not self.has_adapter:
            raise UserError("there is only the base model here; leave out --base_only to load the adapter")
        self.speaker = speaker
        note(text + (" /retry asks the last question again." if self.turns or self.open else ""))

    def do_history(self, argument):
        self.keeps_turns = not self.keeps_turns
        note("Earlier turns are kept from now on." if self.keeps_turns else "Each question stands alone from now on.")

    def do_set(self, argument):
        if not argument:
            say("\n".join(f"{name:<19}{getattr(self.settings, name)}" for name in ANSWERING))
            return
        name, _, value = argument.replace("=", " ").partition(" ")
        if name not in ANSWERING or not value.strip():
            raise UserError(f"/set {argument}: expected one of {', '.join(ANSWERING)}, and its value")
        value = parse_value(name, value.strip(), DEFAULTS[name])
        check_value(name, value, f"--{name}")
        self.settings = self.settings._replace(**{name: value})
        if name == "seed":
            torch.manual_seed(value)
        unused = name in SAMPLING and not self.settings.do_sample
        note(f"{name} is {value} from now on{', but do_sample is False, so it changes nothing' if unused else ''}.")

    def do_save(self, argument):
        path = chosen_file(argument)
        if path.exists() and path not in self.written:
            raise UserError(f"{argument} exists already; give another name")
        if not self.turns:
            raise UserError("there is no whole answer to save yet; ask a question first")
        whole = [self.messages([], self.turns)] if self.keeps_turns else [self.messages([], [t]) for t in self.turns]
        rows = [to_row(messages) for messages in whole]
        with whole_file(path) as file:
            if path.suffix == ".json":
                file.write(json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.written.add(path)
        note(f"{len(self.turns)} turn(s) in {len(rows)} row(s) written to {path}")

    def do_load(self, argument):
        path = chosen_file(argument)
        if not path.is_file():
            raise UserError(f"{argument} does not exist; give a file that /save wrote, or data of yours")
        rows = list(read_unanswered(str(path), {}, path.parent))
        messages = [dict(message) for message in rows[-1][2]]
        self.tools = messages[0].pop("tools", None)
        self.system = messages.pop(0)["content"] if messages[0]["role"] == "system" else self.system
        starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
        turns = [messages[start:end] for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)]
        self.open = (turns.pop(), turns) if turns[-1][-1]["role"] != "assistant" else None
        self.turns, self.left_out = turns, 0
        several = f", row {rows[-1][0]}, the last one" if len(rows) > 1 else ""
        note(f"{len(turns)} turn(s) loaded from {path}{several}. The last question: {shortened(self.last()[0][-1]['content'])}")

    def do_stats(self, argument):
        if not self.answers:
            raise UserError("there is no answer yet; ask something")
        last = self.answers[-1]
        limit = prompt_limit(self.model, self.settings.max_new_tokens)
        tokens, seconds = sum(answer.tokens for answer in self.answers), sum(answer.seconds for answer in self.answers)
        first = f"first words after {last.first:.2f} s, " if last.first is not None else ""
        say(
            f"Last answer: {last.tokens:,} tokens in {last.seconds:.1f} s, {first}"
            f"{last.tokens / last.seconds:,.0f} tokens/s\n"
            f"All {len(self.answers)} answers: {tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f} tokens/s\n"
            f"Last prompt: {self.asked_tokens:,} tokens of {limit:,} that fit beside an answer; {len(self.turns)} turn(s)"
            " in the conversation"
        )

    def do_exit(self, argument):
        raise EOFError


def chosen_file(argument):
    """The path of a file that was named behind /save or /load, relative to where the user stands."""
    names = shlex.split(argument, posix=os.name != "nt") if argument.startswith(("'", '"')) else [argument]
    if len(names) != 1 or not names[0].endswith((".jsonl", ".json")):
        raise UserError("give a file whose name ends in .jsonl or .json")
    return Path(expand_home(names[0])).absolute()


def to_row(messages):
    """Messages as a row of data: the tools that belong to a conversation stand beside its messages."""
    tools = messages[0].get("tools")
    messages = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    return {"messages": messages} | ({"tools": tools} if tools else {})


def shortened(text):
    """The beginning of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
