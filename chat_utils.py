"""Chat: a conversation with a model, its commands, and what becomes of answers that were cut or stopped."""

import json
import os
import re
import shlex
import sys
import time
from bisect import bisect_left
from collections import deque, namedtuple
from contextlib import closing, suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch

from data_utils import read_unanswered, unanswered
from encoding_utils import encode_prompt
from file_utils import display_path, expand_home, whole_file
from generation_utils import Decoders, build_generation_config, prompt_limit, stream_reply
from message_utils import UserError, counted, say, system_problem
from prompt_utils import begin_with
from row_utils import require_text, with_tools
from settings_utils import DEFAULTS, check_value, parse_value
from terminal_utils import (
    FILES,
    YOU,
    Keyboard,
    Lines,
    WordWrap,
    columns_for,
    is_plain,
    note,
    print_chunk,
    print_name,
    unseen_typing,
)

# What /set changes, and which of them count only where answers are sampled
ANSWERING = ("do_sample", "temperature", "top_p", "repetition_penalty", "max_new_tokens", "seed")
SAMPLING = ("temperature", "top_p", "seed")
COMMANDS = {
    "/help": ("", "this list"),
    "/system": ("[TEXT]", "show or change the system text, the conversation's first; none removes it"),
    "/clear": ("", "forget the conversation"),
    "/undo": ("", "forget the last question and its answer"),
    "/retry": ("", "answer the last question again"),
    "/edit": ("[TEXT]", "change the last question and ask it instead"),
    "/tuned": ("", "the tuned model answers"),
    "/base": ("", "the base model answers"),
    "/compare": ("", "both answer, side by side"),
    "/history": ("", "keep the earlier turns, or let each question stand alone"),
    "/set": ("[NAME VALUE]", "show or change how answers are sampled and how long they may be"),
    "/save": ("FILE", "write the conversation as rows that train.py reads, .jsonl or .json"),
    "/load": ("FILE", "go on with the last conversation of a file"),
    "/stats": ("", "speed, lengths, and how full the context is"),
    "/exit": ("", "leave; Ctrl-D does it too"),
}
COMPLETIONS = dict.fromkeys(COMMANDS, ()) | {"/set": ANSWERING, "/save": FILES, "/load": FILES}
COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL)
SLICE = 4  # steps of the model that an answer takes while another one beside it waits
FLAG = re.compile(f"--({'|'.join(ANSWERING)})")
KEYS = "Enter sends, Alt-Enter begins a new line, Tab completes. Ctrl-C stops an answer, or clears what you type."

# An answer: its text, whether it ended by itself, its tokens, whether Ctrl-C stopped it, and the seconds that its first
# words (None if there are none) and all of it took
Answer = namedtuple("Answer", "text ended tokens stopped first seconds")


class Writing:
    """An answer that is being written; its text goes to show() in chunks. Several can be written by turns."""

    def __init__(self, model, tokenizer, messages, settings, show, decoders, use_adapter=True):
        self.model, self.show, self.use_adapter = model, show, use_adapter
        self.stream = stream_reply(model, tokenizer, messages, build_generation_config(tokenizer, settings), decoders)
        self.chunks, self.first, self.seconds = [], None, 0.0

    def go_on(self):
        """Write a slice more, or to the end where the model cannot be used otherwise before; False at the end."""
        switch_adapter(self.model, self.use_adapter)
        started = time.monotonic() - self.seconds
        try:
            for number, chunk in enumerate(self.stream, start=1):
                chunk = chunk if self.chunks else chunk.lstrip()
                if chunk:
                    self.first = self.first or time.monotonic() - started
                    self.chunks.append(chunk)
                    self.show(chunk)
                if number == SLICE and self.stream.can_wait:
                    return True
            return False
        finally:
            self.seconds = time.monotonic() - started

    def answer(self, stopped):
        """The Answer as far as it was written."""
        ended, tokens = (self.stream.reply.ended, self.stream.reply.tokens) if self.stream.reply else (False, 0)
        text = "".join(self.chunks).strip()
        return Answer(text, ended and not stopped, tokens, stopped, self.first, self.seconds)


def switch_adapter(model, on):
    """Switch a model's adapter on or off, if it has one; peft's disable_adapter() would look at all layers first."""
    if hasattr(model, "disable_adapter_layers"):
        model.enable_adapter_layers() if on else model.disable_adapter_layers()


def write_answers(writings, decoders):
    """Let answers be written by turns; returns the Answer of each. Ctrl-C ends what is not whole, nothing else."""
    left = deque(writings)
    try:
        while left:
            if left[0].go_on():
                left.rotate(-1)
            else:
                left.popleft()
    except KeyboardInterrupt:
        decoders.close()  # a step may have been broken off
    finally:
        for writing in writings:
            writing.stream.close()
            switch_adapter(writing.model, True)
    return [writing.answer(writing in left) for writing in writings]


def print_answer(model, tokenizer, messages, settings):
    """Stream an answer to stdout; where it did not end by itself, stderr says so."""
    with closing(Decoders()) as decoders:
        [answer] = write_answers([Writing(model, tokenizer, messages, settings, print_chunk, decoders)], decoders)
    print(flush=True)
    if answer.stopped:
        note("[stopped]")
    elif not answer.ended:
        note(f"[cut at {counted(answer.tokens, 'token')}; --max_new_tokens {2 * answer.tokens} gives it more room]")


class Chat:
    """A conversation, and what the commands do to it.

    turns: the finished ones, each a list of messages that begins with the user's question. open: (question, the turns
    before it) where the last answer was cut or stopped, else None: what is open is no part of what the model is told
    next, and leaves the turns as they were.
    """

    def __init__(self, model, tokenizer, settings, keeps_turns=True, history_file=None):
        """keeps_turns: whether the model is told the earlier turns. history_file: where what is typed is kept, or None
        for an input that is read line by line.
        """
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.system, self.keeps_turns, self.tools = settings.system_prompt or "", keeps_turns, None
        self.turns, self.open = [], None
        self.has_adapter = hasattr(model, "disable_adapter_layers")
        self.speaker = "tuned" if self.has_adapter else "base"  # or "compare"
        self.left_out = 0  # of the oldest turns, for want of room; what was said last
        self.answers, self.prompt_tokens = [], 0
        self.decoders = Decoders()
        self.written = set()  # files of this chat, which /save may replace
        self.history_file = None if is_plain() else history_file
        is_known = self.history_file and self.history_file.is_file()
        self.keyboard = Keyboard(history_file, COMPLETIONS) if self.history_file else Lines()
        if self.history_file and not (is_known and self.keyboard.keeps):
            note(self.where_inputs_are_kept())

    # ---- Reading ----
    def run(self):
        """Read, answer, repeat, until /exit or the end of the input."""
        with suppress(EOFError), unseen_typing(), closing(self.decoders):
            while True:
                try:
                    self.take(self.keyboard.read())
                except KeyboardInterrupt:
                    if not sys.stdin.isatty():
                        raise
                    note("Ctrl-D or /exit leaves the chat.")
        if sys.stdin.isatty() and is_plain():
            say("")

    def take(self, text):
        """Do what an input says: a command, or a question."""
        command = COMMAND.fullmatch(text.rstrip())
        try:
            if command and command[1] in (*COMMANDS, "/quit"):
                argument = (command[2] or "").strip()
                if argument and not COMMANDS.get(command[1], ("",))[0]:
                    raise UserError(f"{command[1]} takes nothing behind it; a blank before it makes it a question")
                getattr(self, command[1].replace("/", "do_"))(argument)
            elif command:
                near = get_close_matches(command[1], COMMANDS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                note(f"Unknown command {command[1]}; {hint}/help lists them. A blank before it makes it a question.")
            elif text.strip():
                self.ask([{"role": "user", "content": require_text(text.strip(), "the question")}], self.turns)
        except UserError as error:
            note(f"error: {in_chat(str(error))}", dim=False)
        except (OSError, MemoryError) as error:  # of a file behind /save or /load: the conversation goes on
            if isinstance(error, OSError) and not error.filename:
                raise
            note(f"error: {system_problem(error)}", dim=False)
        except torch.OutOfMemoryError:
            self.decoders.close()
            note(
                "error: this prompt uses up the GPU's memory; /clear the conversation, or /set a lower max_new_tokens",
                dim=False,
            )

    # ---- Asking ----
    def ask(self, question, earlier):
        """Let the model answer a question, a list of messages, behind earlier turns; a whole answer makes it a turn."""
        messages = self.fit(question, earlier)
        self.open = question, earlier
        answers = self.answer_both(messages) if self.speaker == "compare" else [self.answer(messages)]
        self.answers += answers
        if answers[-1].ended and answers[-1].text:
            self.turns = [*earlier, [*question, {"role": "assistant", "content": answers[-1].text}]]
            self.open = None
        for name, answer in zip(("base", "tuned"), answers, strict=False):
            self.mark(answer, f"{name} answer " if self.speaker == "compare" else "")

    def messages(self, question, earlier):
        """What the model is told: the system text, the turns, and the question."""
        messages = [*(message for turn in earlier for message in turn), *question]
        return begin_with(self.system, with_tools(messages, self.tools))

    def fit(self, question, earlier):
        """The messages of a question and of as many turns before it, whole ones, as the context has room for."""
        limit = prompt_limit(self.model, self.settings.max_new_tokens)
        earlier = earlier if self.keeps_turns else []

        def tokens(left_out):
            return len(encode_prompt(self.tokenizer, self.messages(question, earlier[left_out:])))

        left_out = bisect_left(range(len(earlier)), True, key=lambda left_out: tokens(left_out) <= limit)
        self.prompt_tokens = tokens(left_out)
        if left_out and left_out != self.left_out:
            turns = "turn is" if left_out == 1 else f"{left_out} turns are"
            note(f"[the oldest {turns} left out: the prompt has room for {limit:,} tokens beside the answer]")
        self.left_out = left_out
        return self.messages(question, earlier[left_out:])

    def answer(self, messages):
        """Stream one answer to stdout, behind the name of who gives it where somebody watches."""
        return self.print_answer(self.speaker, messages, named=sys.stdin.isatty() and sys.stdout.isatty())

    def answer_both(self, messages):
        """Stream the answers of base and tuned, in two columns at once, or below each other in a narrow terminal."""
        columns = columns_for(("Base", "Tuned"))
        if columns:
            writings = [
                self.writing(name, messages, partial(columns.add, name.capitalize())) for name in ("tuned", "base")
            ]
            with columns:
                tuned, base = write_answers(writings, self.decoders)
            return [base, tuned]
        answers = []
        for name in ("base", "tuned"):
            answers.append(self.print_answer(name, messages))
            if answers[-1].stopped:
                break
        return answers

    def print_answer(self, name, messages, named=True):
        """Stream the answer of base or tuned model to stdout."""
        words = None if is_plain() else WordWrap(column=len(YOU))
        writing = self.writing(name, messages, words.add if words else print_chunk)
        if named:
            print_name(name.capitalize())
        [answer] = write_answers([writing], self.decoders)
        if words:
            words.end()
        print(flush=True)
        return answer

    def writing(self, name, messages, show):
        return Writing(self.model, self.tokenizer, messages, self.settings, show, self.decoders, name != "base")

    def mark(self, answer, which):
        """Say of an answer that did not end by itself why, and what can be done."""
        kept = ", so it is not kept in the conversation" if self.open else ""
        if answer.stopped:
            note(f"[{which}stopped{kept}; /retry answers again]")
        elif not answer.ended:
            remedy = f"/set max_new_tokens {2 * answer.tokens}, then /retry"
            note(f"[{which}cut at {counted(answer.tokens, 'token')}{kept}; {remedy}]")
        elif not answer.text:
            note(f"[{which or 'answer '}empty{kept}; /retry answers again]")

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
        note("\n".join(f"{usage:<{width}}  {text}" for usage, text in rows), dim=False)
        if self.history_file:
            note(f"{KEYS}\n{self.where_inputs_are_kept()}", dim=False)

    def where_inputs_are_kept(self):
        shown = display_path(self.history_file)
        if not self.keyboard.keeps:
            return f"{shown} cannot be written, so what you type is forgotten at the end."
        return f"What you type is kept in {shown}, for the arrow keys and Ctrl-R."

    def do_system(self, argument):
        if argument:
            self.system = "" if argument == "none" else require_text(argument, "the system text")
        note(f"The conversation begins with: {self.system}" if self.system.strip() else "There is no system text.")

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
        self.switch("compare", "Both answer from now on; the tuned model's answer is kept.")

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
            note("\n".join(f"{name:<19}{getattr(self.settings, name)}" for name in ANSWERING), dim=False)
            return
        name, _, text = argument.replace("=", " ").partition(" ")
        if name not in ANSWERING or not text.strip():
            raise UserError(f"/set {argument}: expected one of {', '.join(ANSWERING)}, and a value")
        value = parse_value(name, text.strip(), DEFAULTS[name])
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
        conversations = [self.turns] if self.keeps_turns else [[turn] for turn in self.turns]
        rows = [to_row(self.messages([], turns)) for turns in conversations]
        with whole_file(path) as file:
            if path.suffix == ".json":
                file.write(json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
            else:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.written.add(path)
        note(f"{counted(len(self.turns), 'turn')} in {counted(len(rows), 'row')} written to {path}")

    def do_load(self, argument):
        path = chosen_file(argument)
        if not path.is_file():
            raise UserError(f"{argument} does not exist; give a file that /save wrote, or rows of yours")
        ((number, _, messages),) = deque(
            read_unanswered(str(path), self.settings.dataset_columns, path.parent), maxlen=1
        )
        first = dict(messages[0])
        self.tools = first.pop("tools", None)
        self.system = first["content"] if first["role"] == "system" else self.system
        messages = messages[1:] if first["role"] == "system" else [first, *messages[1:]]
        starts = [index for index, message in enumerate(messages) if message["role"] == "user"]
        turns = [messages[start:end] for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)]
        self.open = (turns.pop(), turns) if turns[-1][-1]["role"] != "assistant" else None
        self.turns, self.left_out = turns, 0
        note(f"Row {number} of {path}: {counted(len(turns), 'turn')}; last: {shortened(self.last()[0][-1]['content'])}")

    def do_stats(self, argument):
        if not self.answers:
            raise UserError("there is no answer yet; ask something")
        last = self.answers[-1]
        limit = prompt_limit(self.model, self.settings.max_new_tokens)
        tokens, seconds = (sum(getattr(answer, name) for answer in self.answers) for name in ("tokens", "seconds"))
        first = f"first words after {last.first:.2f} s, " if last.first is not None else ""
        note(
            f"Last answer:   {counted(last.tokens, 'token')} in {last.seconds:.1f} s,"
            f" {first}{rate(last.tokens, last.seconds)}\n"
            f"Last prompt:   {self.prompt_tokens:,} tokens; {limit:,} fit beside an answer\n"
            f"Conversation:  {counted(len(self.turns), 'turn')}"
            f"{'' if self.keeps_turns else ', each question by itself'}\n"
            f"Since start:   {counted(len(self.answers), 'answer')}, {counted(tokens, 'token')},"
            f" {rate(tokens, seconds)}",
            dim=False,
        )

    def do_exit(self, argument):
        raise EOFError

    do_quit = do_exit


def in_chat(message):
    """The message of another room with its flags as a chat changes them; a command line in it stays as it is."""
    message, *command = re.split(r"(?=python )", message, maxsplit=1)
    return "".join([FLAG.sub(r"/set \1", message), *command])


def chosen_file(argument):
    """The path of a file that was named behind /save or /load, relative to where the user stands."""
    try:
        names = shlex.split(argument, posix=os.name != "nt") if argument[:1] in ("'", '"') else [argument]
    except ValueError:  # a quote that is not closed
        names = []
    if len(names) != 1 or not names[0].endswith((".jsonl", ".json")):
        raise UserError("give a file whose name ends in .jsonl or .json")
    return Path(expand_home(names[0])).absolute()


def to_row(messages):
    """Messages as a row of data: the tools of a conversation stand beside its messages."""
    tools = messages[0].get("tools")
    messages = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    return {"messages": messages} | ({"tools": tools} if tools else {})


def rate(tokens, seconds):
    return f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"


def shortened(text):
    """The beginning of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
