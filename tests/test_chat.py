"""The chat: what its commands do to a conversation, what the model is told, and what a terminal shows."""

import errno
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import chat_utils
import inference
import train
from chat_utils import Chat
from conftest import PROJECT, TINY_BASE
from data_utils import load_conversations
from encoding_utils import encode_prompt
from generation_utils import Reply, stream_reply
from model_utils import load_tokenizer
from script_utils import SignalHandlers, run_script
from settings_utils import DEFAULTS, Settings
from terminal_utils import Keyboard, Lines, WordWrap, is_plain, note, termios

SECONDS = 120  # that a test may take; one in a pseudo-terminal takes some
SETTINGS = Settings(**DEFAULTS)._replace(max_new_tokens=40)


class FakeConfig:
    max_position_embeddings = 200

    def get_text_config(self):
        return self


class FakeModel:
    """A model with an adapter that can be switched off, and a context of 200 tokens."""

    def __init__(self):
        self.name, self.config = "tuned", FakeConfig()

    def disable_adapter_layers(self):
        self.name = "base"

    def enable_adapter_layers(self):
        self.name = "tuned"


class FakeStream:
    """A reply that says whose it is and to which question; "long" ones are cut, "endless" ones stopped by Ctrl-C."""

    asked = ()  # the texts of each conversation that was to be answered
    can_wait = True

    def __init__(self, model, tokenizer, messages, generation, decoders):
        text = messages[-1]["content"]
        self.asked.append([message["content"] for message in messages])
        self.model, self.text, self.reply = model, text, None
        self.chunks = self.write()

    def write(self):
        answer = "" if "silent" in self.text else f"{self.model.name} says {self.text}"
        yield f" {answer[:5]}"
        while "endless" in self.text:
            if not sys.stdin.isatty():
                raise KeyboardInterrupt
            yield "word "
            time.sleep(0.02)
        yield answer[5:]
        self.reply = Reply(answer, "long" not in self.text, 7)

    def __iter__(self):
        return self.chunks

    def close(self):
        self.chunks.close()


def fake_chat(tokenizer, model=None, settings=SETTINGS, **options):
    FakeStream.asked = []
    return Chat(model or FakeModel(), tokenizer, settings, **options)


def chat_in_two_terminals(argv):
    """What the tests with a pseudo-terminal start: a chat in a dumb terminal, and after its end one in another."""
    chat_utils.stream_reply = FakeStream
    for os.environ["TERM"] in ("dumb", "xterm"):
        fake_chat(load_tokenizer(TINY_BASE), history_file=Path(argv[0])).run()


if __name__ == "__main__":
    sys.exit(run_script(chat_in_two_terminals, sys.argv[1:]))


@pytest.fixture(autouse=True)
def fake_replies(monkeypatch):
    monkeypatch.setattr(chat_utils, "stream_reply", FakeStream)


@pytest.fixture(autouse=True)
def impatient():
    """Fails a test that waits for ever, as prompt_toolkit waits for Enter where a key makes an error."""

    def fail(number, frame):
        pytest.fail(f"still waiting after {SECONDS} seconds")

    if os.name == "nt":  # which has no alarms
        yield
        return
    with SignalHandlers(("SIGALRM",), fail):
        signal.alarm(SECONDS)
        yield
        signal.alarm(0)


@pytest.fixture
def chat(tokenizer):
    return fake_chat(tokenizer)


def type_lines(chat, *lines):
    """Type lines; returns the conversations that the model was told since."""
    before = len(FakeStream.asked)
    for line in lines:
        chat.take(line)
    return FakeStream.asked[before:]


# ---- Turns -----------------------------------------------------------------------------------------------------------
def test_earlier_turns_are_told_again_until_they_are_cleared(chat):
    assert type_lines(chat, "one", "two", "/clear", "three") == [["one"], ["one", "tuned says one", "two"], ["three"]]


def test_without_history_each_question_stands_alone_until_it_is_switched_on(tokenizer):
    chat = fake_chat(tokenizer, keeps_turns=False)
    asked = type_lines(chat, "one", "two", "/history", "three")
    assert asked == [["one"], ["two"], ["one", "tuned says one", "two", "tuned says two", "three"]]


def test_undo_forgets_a_turn_retry_asks_again_and_edit_asks_otherwise(chat, capsys):
    assert type_lines(chat, "one", "two", "/undo", "three")[-1] == ["one", "tuned says one", "three"]
    assert type_lines(chat, "/retry") == [["one", "tuned says one", "three"]]
    assert type_lines(chat, "/edit four", "five")[-1] == ["one", "tuned says one", "four", "tuned says four", "five"]
    type_lines(chat, "/undo", "/undo", "/undo", "/undo")
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "Forgotten: one",
        "error: there is no question yet; ask one",
    ]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("a long one", "[cut at 7 tokens, so it is not kept in the conversation; /set max_new_tokens 14, then /retry]"),
        ("an endless one", "[stopped, so it is not kept in the conversation; /retry answers again]"),
        ("a silent one", "[answer empty, so it is not kept in the conversation; /retry answers again]"),
    ],
)
def test_an_answer_that_did_not_end_is_marked_and_not_told_again(chat, question, said, capsys):
    assert type_lines(chat, "one", question, "two")[-1] == ["one", "tuned says one", "two"]
    assert capsys.readouterr().err.splitlines() == [said]
    assert type_lines(chat, question, "/retry")[-1][-1] == question
    type_lines(chat, "/undo")
    assert [turn[0]["content"] for turn in chat.turns] == ["one", "two"]


def test_an_answer_stays_while_another_try_is_cut_or_stopped(chat):
    type_lines(chat, "one", "/edit an endless one", "/retry")
    assert chat.turns[-1][-1]["content"] == "tuned says one"
    assert type_lines(chat, "two") == [["one", "tuned says one", "two"]]


def test_the_oldest_turns_make_room_whole_and_it_is_said(chat, capsys):
    question = "word " * 30
    asked = type_lines(chat, "/system Be kind.", *[f"{number} {question}" for number in range(4)])
    assert [text[0] for text in asked[-1][1::2]] != ["0", "1", "2", "3"]
    assert asked[-1][0] == "Be kind."
    assert len(asked[-1]) % 2 == 0  # the system text, whole turns, the question
    assert asked[-1][-1].startswith("3 word")
    shown = capsys.readouterr().err
    assert "left out: the prompt has room for 160 tokens beside the answer]" in shown
    for texts in asked:
        messages = [{"role": "user", "content": text} for text in texts]
        assert len(encode_prompt(chat.tokenizer, messages)) <= 200
    assert len(chat.turns) == 4  # nothing is forgotten


def test_a_question_longer_than_the_context_is_refused_and_not_cut(chat, capsys, monkeypatch):
    monkeypatch.setattr(chat_utils, "stream_reply", stream_reply)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    type_lines(chat, "word " * 300)
    shown = capsys.readouterr()
    assert shown.out == ""  # nobody's name stands before it
    (line,) = shown.err.splitlines()
    assert line.startswith("error: the prompt has 3")
    assert "/set max_new_tokens" in line
    assert not chat.turns


def test_the_system_text_is_shown_changed_and_removed(tokenizer, capsys):
    chat = fake_chat(tokenizer, settings=SETTINGS._replace(system_prompt="You are kind."))
    asked = type_lines(chat, "/system", "one", "/system Be\x1b[2J brief.", "/retry", "/system none", "/retry")
    assert asked == [["You are kind.", "one"], ["Be\x1b[2J brief.", "one"], ["one"]]
    shown = capsys.readouterr().err
    assert "begins with: You are kind." in shown
    assert "There is no system text." in shown
    assert "\x1b" not in shown


# ---- Other commands --------------------------------------------------------------------------------------------------
def test_what_is_no_command_is_a_question(chat, capsys):
    asked = type_lines(chat, "", "  ", "/help", "/undu", "/etc/passwd is what?", " /undo?", "/* a comment */")
    assert [conversation[-1] for conversation in asked] == ["/etc/passwd is what?", "/undo?", "/* a comment */"]
    shown = capsys.readouterr().err
    for command in chat_utils.COMMANDS:
        assert f"\n{command} " in f"\n{shown}"
        assert hasattr(chat, command.replace("/", "do_"))
    assert "Unknown command /undu; did you mean /undo?" in shown


def test_set_changes_what_the_next_answer_is_made_with(chat, capsys):
    type_lines(chat, "/set temperature 0.3", "/set max_new_tokens=64", "/set do_sample false", "/set top_p 0.5", "/set")
    assert (chat.settings.temperature, chat.settings.max_new_tokens) == (0.3, 64)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "temperature is 0.3 from now on."
    assert shown[3] == "top_p is 0.5 from now on, but do_sample is False, so it changes nothing."
    assert [line.split() for line in shown[4:6]] == [["do_sample", "False"], ["temperature", "0.3"]]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("temperature hot", "error: /set temperature got 'hot', expected a number; the default is 0.7"),
        ("temperature 100", "error: /set temperature is 100.0, expected 0.001 to 10; the default is 0.7"),
        ("top_p", "error: /set top_p: expected one of do_sample, temperature, top_p,"),
        ("lora_r 3", "error: /set lora_r 3: expected one of do_sample, temperature, top_p,"),
    ],
)
def test_a_value_that_cannot_be_set_is_one_line(chat, typed, said, capsys):
    type_lines(chat, f"/set {typed}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert chat.settings == SETTINGS


@pytest.mark.parametrize("name", ["chat.jsonl", "chat.json", '"two words.jsonl"'])
def test_what_save_writes_is_data_to_train_on_and_load_goes_on_with_it(chat, tokenizer, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    type_lines(chat, "/system Be kind.", "é 你好", "two", f"/save {name}", "a long one", "three", f"/save {name}")
    conversations, report = load_conversations(tmp_path / name.strip('"'))
    assert (report.rows, report.kept, report.several_turns) == (1, 1, 1)
    assert [message["content"] for message in conversations[0][1]][:3] == ["Be kind.", "é 你好", "tuned says é 你好"]
    assert "a long one" not in str(conversations[0])
    other = fake_chat(tokenizer)
    assert type_lines(other, f"/load {name}", "/undo", "four") == [
        ["Be kind.", "é 你好", "tuned says é 你好", "two", "tuned says two", "four"]
    ]


def test_where_questions_stand_alone_each_is_saved_as_a_row_of_its_own(tokenizer, tmp_path):
    chat = fake_chat(tokenizer, keeps_turns=False)
    type_lines(chat, "one", "two", f"/save {tmp_path}/chat.jsonl")
    assert len(load_conversations(tmp_path / "chat.jsonl")[0]) == 2


def test_a_conversation_with_tools_goes_on_with_them(chat, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(chat_utils, "encode_prompt", lambda tokenizer, messages: told.append(messages) or [])
    tools = [{"type": "function", "function": {"name": "search"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search", "arguments": {}}}]}
    messages = [{"role": "user", "content": "Find it"}, call, {"role": "tool", "content": "found"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}), encoding="utf-8")
    type_lines(chat, f"/load {tmp_path}/rows.jsonl", "/retry", f"/save {tmp_path}/more.jsonl")
    assert told[-1][0]["tools"] == tools
    assert [message["role"] for message in told[-1]] == ["user", "assistant", "tool"]
    assert load_conversations(tmp_path / "more.jsonl")[0][0][1][0]["tools"] == tools


def test_what_cannot_be_saved_or_loaded_is_one_line(chat, tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text("{}", encoding="utf-8")
    type_lines(chat, f"/save {tmp_path}/new.jsonl", "one", f"/save {tmp_path}/mine.jsonl", "/save chat.txt", "/save")
    type_lines(chat, f"/load {tmp_path}/none.jsonl", f"/load {tmp_path}/mine.jsonl", '/load "a.json')
    type_lines(chat, f"/save {tmp_path}/none/chat.jsonl", f"/load {tmp_path}/{'x' * 300}.json")
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 9
    assert all(line.startswith("error: ") for line in shown)
    assert "exists already" in shown[1]
    assert (tmp_path / "mine.jsonl").read_text(encoding="utf-8") == "{}"


def test_rows_of_other_columns_are_loaded_by_the_command_that_is_pasted(chat, tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"frage": "Hi"}', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["inference.py", "--top_p", "0.5"])
    type_lines(chat, f"/load {tmp_path}/rows.jsonl")
    pasted = """python inference.py --top_p 0.5 --dataset_columns '{"instruction": "frage"}'\n"""
    assert capsys.readouterr().err.endswith(f"; name yours, if this is meant: {pasted}")
    mapped = fake_chat(tokenizer, settings=SETTINGS._replace(dataset_columns={"instruction": "frage"}))
    assert type_lines(mapped, f"/load {tmp_path}/rows.jsonl", "/retry") == [["Hi"]]


def test_a_conversation_outlives_a_full_disk(chat, tmp_path, capsys, monkeypatch):
    def full_disk(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("file_utils.sync_file", full_disk)
    type_lines(chat, "one", f"/save {tmp_path}/chat.jsonl")
    line = f"error: No space left on device: {tmp_path}/chat.jsonl; mend that and try again\n"
    assert capsys.readouterr().err == line
    assert len(chat.turns) == 1
    assert list(tmp_path.iterdir()) == []


def test_base_and_tuned_answer_by_turns_or_side_by_side(chat, capsys):
    asked = type_lines(chat, "/base", "one", "/tuned", "two", "/compare", "three", "four")
    answered = ("one", "base says one", "two", "tuned says two", "three", "tuned says three")
    assert asked[-1] == [*answered, "four"]
    assert len(asked) == 6
    assert "Base:  base says four\nTuned: tuned says four\n" in capsys.readouterr().out
    type_lines(chat, "a long one")
    assert capsys.readouterr().err.splitlines() == [
        f"[{name} answer cut at 7 tokens, so it is not kept in the conversation; /set max_new_tokens 14, then /retry]"
        for name in ("base", "tuned")
    ]


def test_an_interrupt_leaves_the_adapter_on_wherever_it_comes(chat, monkeypatch):
    def interrupt():
        chat.model.name = "base"
        raise KeyboardInterrupt

    type_lines(chat, "/base")
    monkeypatch.setattr(chat.model, "disable_adapter_layers", interrupt)
    type_lines(chat, "one", "/tuned", "two")
    assert [answer.stopped for answer in chat.answers] == [True, False]
    assert chat.turns[-1][-1]["content"] == "tuned says two"


def test_a_base_model_alone_says_that_there_is_no_adapter(tokenizer, capsys):
    alone = SimpleNamespace(name="base", config=FakeModel().config)
    chat = fake_chat(tokenizer, model=alone)
    assert type_lines(chat, "/tuned", "/compare", "/base", "one") == [["one"]]
    shown = capsys.readouterr()
    assert shown.err.count("there is only the base model here; leave out --base_only to load the adapter") == 2
    assert shown.out == "base says one\n"


def test_stats_tell_speed_and_how_full_the_context_is(chat, capsys):
    type_lines(chat, "/stats", "one", "two", "/stats")
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "error: there is no answer yet; ask something"
    assert re.match(r"Last answer:   7 tokens in \d\.\d s, first words after \d\.\d\d s, [\d,]+ tokens/s$", shown[1])
    assert "160 fit beside an answer" in shown[2]
    assert shown[3] == "Conversation:  2 turns"
    assert "2 answers, 14 tokens" in shown[4]


# ---- What the adapter was trained on ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "kept"), [(0.5, True), (0.01, False), (None, False), ("all", False)])
def test_turns_are_kept_with_our_template_where_the_adapter_learned_some(tokenizer, share, kept, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"several_turns": share}), encoding="utf-8")
    assert inference.knows_turns(tokenizer, tmp_path) is kept
    assert inference.knows_turns(tokenizer, None) is False
    tokenizer.chat_template = "{{ messages }}"
    assert inference.knows_turns(tokenizer, None) is True


def test_a_run_records_how_many_of_its_rows_hold_several_questions(tmp_path):
    talk = [{"role": role, "content": "Hi"} for role in ("user", "assistant")]
    rows = [{"messages": [*talk, {"role": "user", "content": f"{n}?"}, talk[1]][2 * (n > 0) :]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert train.several_turns(vars(load_conversations(tmp_path / "rows.jsonl")[1])) == 0.25


def test_words_behind_a_command_that_takes_none_are_not_lost_in_silence(chat, capsys):
    type_lines(chat, "one", "/clear what I said before")
    assert "/clear takes nothing behind it; a blank before it makes it a question" in capsys.readouterr().err
    assert len(chat.turns) == 1


def test_out_of_memory_ends_the_answer_and_not_the_chat(chat, capsys, monkeypatch):
    def no_room(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    type_lines(chat, "one")
    monkeypatch.setattr(chat_utils, "stream_reply", no_room)
    type_lines(chat, "two")
    assert capsys.readouterr().err.startswith("error: this prompt uses up the GPU's memory; /clear")
    assert len(chat.turns) == 1


# ---- A pipe and a pseudo-terminal ------------------------------------------------------------------------------------
def test_words_are_not_broken_at_the_edge_and_nothing_else_is_changed(capsys, monkeypatch):
    monkeypatch.setattr("terminal_utils.get_terminal_size", lambda: os.terminal_size((20, 24)))
    text = "The quick brown fox\njumps over  the dog. " + "x" * 45 + "\n\n    return 1\n你好 end"
    words = WordWrap(column=7)
    for chunk in [text[start : start + 3] for start in range(0, len(text), 3)]:
        words.add(chunk)
    words.end()
    shown = capsys.readouterr().out
    assert "".join(shown.split()) == "".join(text.split())
    assert shown.startswith("The quick \nbrown fox\njumps over  the dog. ")
    assert shown.endswith("\n\n    return 1\n你好 end")


def test_what_is_said_beside_a_conversation_breaks_between_words_by_their_width(capsys, monkeypatch):
    monkeypatch.setattr("terminal_utils.get_terminal_size", lambda: os.terminal_size((21, 24)))
    monkeypatch.setenv("TERM", "xterm")
    text = "error: it is found\nin no file: \x1b[31m你好你好你好你好 你好"
    note(text)
    assert capsys.readouterr().err.count("\n") == 2  # no terminal: as it is
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    note(text, dim=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: it is found", "in no file:", "[31m你好你好你好你好", "你好"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    note("Forgotten: all of it")
    assert capsys.readouterr().err == "\x1b[2mForgotten: all of it\x1b[0m\n"


def test_a_color_that_is_pasted_is_left_out_of_the_input(tmp_path):
    commands = {"/exit": ()}
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("a \x1b[31mred\x1b[0m word\x1b[1;31m\r")
        assert Keyboard(tmp_path / "inputs", commands).read() == "a red word"


def test_a_file_that_cannot_be_made_is_named_as_it_was_given(chat, tmp_path, capsys):
    type_lines(chat, "one", f"/save {tmp_path}/none/chat.jsonl")
    line = f"error: No such file or directory: {tmp_path}/none/chat.jsonl; mend that and try again\n"
    assert capsys.readouterr().err == line


def test_where_what_is_typed_cannot_be_kept_it_is_said(tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chat_utils, "is_plain", lambda: False)
    (tmp_path / "inputs").mkdir()
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        for name, said in [("new", "What you type is kept in"), ("new", ""), ("inputs", "cannot be written, so what")]:
            chat = fake_chat(tokenizer, history_file=tmp_path / name)
            assert said in (shown := capsys.readouterr().err)
            assert bool(shown) is bool(said)
    type_lines(chat, "/help")
    assert "cannot be written, so what you type is forgotten at the end" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bytes_that_are_no_text_are_refused_and_no_other_text_is_asked(chat, encoding, capsys, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO("é 你好\n".encode() + b"caf\xe9\ntwo\n"), encoding=encoding)
    monkeypatch.setattr(sys, "stdin", typed)
    chat.keyboard = Lines()
    chat.run()
    assert [asked[-1] for asked in FakeStream.asked] == ["é 你好", "two"]
    assert capsys.readouterr().err.startswith("error: the question: half of a surrogate pair or a byte that is not UTF")


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_stream_that_is_closed_makes_a_chat_plain(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)
    assert is_plain()


def open_terminal(*command, **variables):
    """A Python script in a pseudo-terminal of 100 columns."""
    environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", **variables}
    known = {"dimensions": (30, 100), "encoding": "utf-8", "timeout": 60}
    return pexpect.spawn(sys.executable, list(map(str, command)), env=environment, **known)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    """A chat in a pseudo-terminal."""
    history_file = tmp_path_factory.mktemp("chat") / "inputs"
    opened = open_terminal(__file__, history_file, PYTHONPATH=f"{PROJECT}:{PROJECT / 'tests'}")
    opened.history_file = history_file
    yield opened
    opened.close(force=True)


def type_and_see(terminal, keys, *patterns):
    terminal.send(keys)
    for pattern in patterns:
        terminal.expect(pattern)


needs_pty = pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals of this kind")


@needs_pty
def test_a_dumb_terminal_gets_lines_and_no_control_sequences(terminal):
    terminal.expect("You:   ")
    type_and_see(terminal, "hello\n", "Tuned: tuned says hello", "You:   ")
    type_and_see(terminal, "an endless one\n", "word word")
    type_and_see(terminal, "\x03", "stopped", "You:   ")
    type_and_see(terminal, "half\x03", "Ctrl-D or /exit", "You:   ")
    type_and_see(terminal, "/compare\nboth\n", "Base:  base says both\r\nTuned: tuned says both\r\n")
    assert "\x1b" not in terminal.before + terminal.after
    terminal.send("\x04")
    assert not terminal.history_file.exists()


@needs_pty
def test_a_terminal_gets_editing_history_pastes_columns_and_typing_ahead(terminal):
    terminal.expect("\x1b.*You:")
    type_and_see(terminal, "helo\x1b[Dl\r", "tuned says hello", "You:")  # an arrow key
    type_and_see(terminal, "\x1b[200~two\nlines\x1b[201~ pasted\r", "tuned says two\r\nlines pasted", "You:")
    type_and_see(terminal, "by\x1b\rhand\r", "tuned says by\r\nhand", "You:")  # Alt-Enter
    type_and_see(terminal, "thrown away\x03kept\r", "tuned says kept", "You:")
    type_and_see(terminal, "\x03", "Ctrl-D or /exit leaves the chat", "You:")
    type_and_see(terminal, "\x1b[A\r", "tuned says kept", "You:")  # the arrow up
    type_and_see(terminal, "an endless one\r", "word word word")
    type_and_see(terminal, "\x03", r"\[stopped, so it is not kept", "You:")
    type_and_see(terminal, "/edi\t\r", "an endless one")
    type_and_see(terminal, "\x03short\r", "tuned says short", "You:")
    type_and_see(terminal, "/compare\rahead\r", "Base:.*Tuned:", "base says ahead.* +tuned says ahead", "You:")
    type_and_see(terminal, "an endless one\r", "Base:.*Tuned:.*base word.* tunedword word")
    type_and_see(terminal, "\x03", r"\[base answer stopped", r"\[tuned answer stopped", "You:")
    type_and_see(terminal, "/help\r", "Alt-Enter begins a new line", r"inputs,\s+for\s+the\s+arrow\s+keys", "You:")
    type_and_see(terminal, "\x04", pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0
    assert terminal.history_file.stat().st_mode & 0o777 == 0o600
    assert "+two\n+lines pasted\n" in terminal.history_file.read_text(encoding="utf-8")


@pytest.fixture
def loading(tmp_path):
    """The chat of inference.py in a pseudo-terminal, while it loads the bundled base."""
    base = ("--base_only", "--base_model_name", TINY_BASE, "--device", "cpu")
    rest = ("--max_new_tokens", 4, "--output_dir", tmp_path)
    opened = open_terminal(PROJECT / "inference.py", *base, *rest, TERM="xterm", HF_HUB_OFFLINE="1")
    opened.before_start = termios.tcgetattr(opened.child_fd)
    opened.expect("no adapter")
    yield opened
    opened.close(force=True)


@needs_pty
def test_what_is_typed_while_the_model_loads_is_the_first_input(loading):
    type_and_see(loading, "asked early\r", "You:.*asked early", "Base:", "You:")
    type_and_see(loading, "\x04", pexpect.EOF)
    assert termios.tcgetattr(loading.child_fd) == loading.before_start


@needs_pty
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_leaves_the_terminal_as_it_was(loading, number):
    loading.kill(number)
    loading.expect("Stopped by")
    loading.expect(pexpect.EOF)
    assert termios.tcgetattr(loading.child_fd) == loading.before_start


READS_UNSEEN = """
import os
from terminal_utils import unseen_typing
with unseen_typing():
    print("re" "ady", flush=True)
    typed = b""
    while not typed.endswith(b"."):
        typed += os.read(0, 100)
print("read", typed)
"""


@needs_pty
def test_ctrl_z_gives_the_shell_its_terminal_and_typing_is_unseen_again_behind_it(tmp_path):
    (tmp_path / "program.py").write_text(READS_UNSEEN, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "TERM": "xterm", "PS1": "> ", "ENV": ""}
    shell = pexpect.spawn("/bin/sh", ["-i"], env=environment, encoding="utf-8", timeout=60)

    def modes():
        shell.sendline("stty -g | sed s/^/modes=/")
        shell.expect(r"modes=([\w:=]+)")
        return shell.match[1]

    before = modes()
    type_and_see(shell, f"{sys.executable} {tmp_path}/program.py\n", "ready")
    type_and_see(shell, "\x1a", "(?i)stopped|suspended")
    assert modes() == before
    shell.sendline("fg")
    while termios.tcgetattr(shell.child_fd)[3] & termios.ECHO:
        time.sleep(0.01)
    type_and_see(shell, "abc.", r"read b'abc\.'")
    assert "abc" not in shell.before
    assert modes() == before
    shell.close(force=True)
