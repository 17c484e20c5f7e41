"""A file of prompts: every shape of a row, order, a killed run that goes on, and what is refused before it starts."""

import errno
import json
import os
from argparse import Namespace
from types import SimpleNamespace

import pytest

import batch_utils
import inference
from batch_utils import answer_file, read_prompts
from conftest import refusal
from generation_utils import Reply
from settings_utils import DEFAULTS, Settings

SETTINGS = Settings(**DEFAULTS)._replace(max_new_tokens=40)
CONFIG = SimpleNamespace(max_position_embeddings=200)
MODEL = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: CONFIG))
TOOLS = [{"type": "function", "function": {"name": "search"}}]
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "é?"},
]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search", "arguments": {}}}]}
ROWS = [
    {"instruction": "one", "id": 7},
    {"prompt": "two", "response": "an answer", "note": "\u001b[31m 你好"},
    {"question": "three", "input": "more", "answer": None},
    {"messages": TALK},
    {"messages": [*TALK, {"role": "assistant", "content": "Yes."}]},
    {"conversations": [{"from": "human", "value": "six"}], "system": "Be kind."},
    {"prompt": "seven", "chosen": "good", "rejected": "bad"},
    {"messages": [TALK[0], CALL, {"role": "tool", "content": "found"}, TALK[1]], "tools": TOOLS},
    {"instruction": "one", "id": 8},
    {"input": "ten"},
]
ASKED = [
    ["one"],
    ["two"],
    ["three\n\nmore"],
    ["Hi", "Hello.", "é?"],
    ["Hi", "Hello.", "é?"],
    ["Be kind.", "six"],
    ["seven"],
    ["Hi", "", "found"],
    ["one"],
    ["ten"],
]


class FakeModel:
    """Answers the last prompt first, and is killed after some answers."""

    def __init__(self, monkeypatch):
        self.asked, self.kill_after = [], None
        monkeypatch.setattr(batch_utils, "generate_replies", self.generate)
        monkeypatch.setattr(batch_utils, "encode_prompt", lambda tokenizer, prompt: range(len(str(prompt)) // 4))

    def generate(self, model, tokenizer, prompts, generation, on_replies, numbers):
        for index in reversed(range(len(prompts))):
            if self.kill_after == 0:
                raise KeyboardInterrupt
            self.kill_after = self.kill_after and self.kill_after - 1
            self.asked.append(prompts[index])
            text = "; ".join(message["content"] for message in prompts[index])
            on_replies({index: Reply(f"re {text}", "two" not in text, len(text))})


@pytest.fixture
def fake(monkeypatch):
    return FakeModel(monkeypatch)


@pytest.fixture
def answer(fake, tokenizer, tmp_path):
    """Answer rows; returns what was written, or raises as answer_file does."""

    def answer(rows=ROWS, name="prompts.jsonl", settings=SETTINGS, adapter_path=None):
        if rows is not None:
            lines = [json.dumps(row) for row in rows]
            (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        target = tmp_path / "answers.jsonl"
        prompts = read_prompts(str(tmp_path / name), settings.dataset_columns, tmp_path / "cache")
        answer_file(MODEL, tokenizer, settings, adapter_path, prompts, target)
        return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]

    return answer


def test_every_row_is_answered_beside_what_was_given_in_its_order(answer, fake, tmp_path, capsys):
    written = answer()
    assert [[message["content"] for message in prompt] for prompt in reversed(fake.asked)] == ASKED
    assert fake.asked[2][0]["tools"] == TOOLS
    for row, found, asked in zip(ROWS, written, ASKED, strict=True):
        text = "; ".join(asked)
        assert found == row | {"reply": f"re {text}", "ended": "two" not in text, "tokens": len(text)}
    assert "你好" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} >= {"prompts.jsonl", "answers.jsonl"}
    assert not (tmp_path / "answers.jsonl.unfinished").exists()
    assert "10 answers, 9 ended by the model, 1 cut at 40 tokens. Written to " in capsys.readouterr().err


@pytest.mark.parametrize("torn", [b"", b'{"index": 0, "rep', b'{"index": 0, "reply": "x", "ended": true, "tokens": 1}'])
def test_a_killed_run_goes_on_where_it_was(answer, fake, tmp_path, torn, capsys):
    fake.kill_after = 4
    with pytest.raises(KeyboardInterrupt):
        answer()
    assert not (tmp_path / "answers.jsonl").exists()
    journal = tmp_path / "answers.jsonl.unfinished"
    with open(journal, "ab") as file:
        file.write(torn)
    fake.kill_after = None
    expected = [row | {"reply": f"re {'; '.join(asked)}"} for row, asked in zip(ROWS, ASKED, strict=True)]
    assert [{key: row[key] for key in row if key not in ("ended", "tokens")} for row in answer()] == expected
    assert len(fake.asked) == len(ROWS)  # none was asked twice
    assert not journal.exists()
    shown = capsys.readouterr().err
    assert "4 of 10 answers kept; the same command goes on" in shown
    assert "Going on: 4 of 10 answers found" in shown


def test_a_disk_that_is_full_at_the_end_keeps_all_answers(answer, fake, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("file_utils.sync_file", full_disk)
        message = refusal(answer)
    found = f"the file of answers could not be saved: No space left on device: {tmp_path}/answers.jsonl"
    assert message == f"{found}; all answers are kept; mend that, and the same command writes them there"
    assert len(answer()) == len(fake.asked) == len(ROWS)  # none was asked twice


def full_disk(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": SETTINGS._replace(temperature=0.25)}, "which had temperature 0.7 and not 0.25; give the same"),
        ({"rows": ROWS[:-1]}, "which had another input; give the same again, or remove that file to begin anew"),
        ({"adapter_path": "adapter"}, "which had another adapter; give the same again"),
    ],
)
def test_another_input_other_settings_or_another_adapter_do_not_go_on(answer, fake, tmp_path, changes, said):
    fake.kill_after = 4
    with pytest.raises(KeyboardInterrupt):
        answer()
    if "adapter_path" in changes:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        changes = {"adapter_path": tmp_path / "adapter"}
    message = refusal(lambda: answer(**changes))
    assert message.startswith(f"{tmp_path}/answers.jsonl.unfinished holds answers of an unfinished run")
    assert said in message
    assert len(fake.asked) == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": " "}, "row 2: no question, or an empty text"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "row 2: no question, or an empty text"),
        ({"messages": []}, "row 2: no question, or an empty text"),
        ({"body": "one"}, "row 2: columns found: body; expected instruction (or prompt, question, input), messages"),
        ({"text": "one"}, 'name yours, if this is meant: --dataset_columns \'{"instruction": "text"}\''),
        ({"response": "one"}, "row 2: columns found: response; expected instruction (or prompt, question, input)"),
        ({"instruction": "one", "instances": []}, "row 2, column 'instances': [], expected a list of objects"),
        ("one", 'row 2: "one", expected rows with an instruction: {"instruction": "Hi"}'),
        ({"instruction": "Hi", "reply": "x"}, "row 2: a column 'reply', where the answer is to be written; rename it"),
        ({"instruction": "word " * 200}, "the model's context has room for 160 beside the answer; shorten it"),
        ({"instruction": "Hi", "images": ["a.png"]}, "row 2: images beside the text"),
    ],
)
def test_a_row_that_cannot_be_answered_is_refused_before_any_is(answer, fake, tmp_path, row, said):
    assert said in refusal(lambda: answer([{"instruction": "fine"}, row, {"instruction": "fine"}]))
    assert not fake.asked
    assert not (tmp_path / "answers.jsonl.unfinished").exists()


EMPTY = {"none.jsonl": b"", "none.csv": b"", "blanks.json": b" \n", "none.parquet": b""}
NO_ROWS = {"rows.json": b"[]", "rows.csv": b"instruction,response\n"}


@pytest.mark.parametrize("name", [*EMPTY, *NO_ROWS])
def test_a_file_without_a_prompt_is_told_what_prompts_need(answer, tmp_path, name):
    (tmp_path / name).write_bytes((EMPTY | NO_ROWS)[name])
    found = "is empty" if name in EMPTY else "holds no rows"
    expected = f'{name} {found}, expected rows with an instruction: {{"instruction": "Hi"}}'
    assert refusal(lambda: answer(None, name)).endswith(expected)


def test_a_file_of_prompts_that_is_no_text_is_named(answer, tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(b"%PDF-1.4 \0")
    assert "found a PDF, expected a file of rows" in refusal(lambda: answer(None))


@pytest.mark.parametrize("mapping", [{"instruction": "q"}, {"instruction": "q", "response": "a"}])
def test_columns_are_mapped_without_a_response_or_have_the_usual_names(answer, fake, mapping):
    mapped = SETTINGS._replace(dataset_columns=mapping)
    assert [row["reply"] for row in answer([{"q": "one"}, {"prompt": "three"}], settings=mapped)] == [
        "re one",
        "re three",
    ]


def test_a_mapping_of_whole_texts_names_no_prompt(answer, fake):
    mapped = SETTINGS._replace(dataset_columns={"text": "body"})
    assert "expected the key instruction, perhaps" in refusal(lambda: answer([{"body": "one"}], settings=mapped))


def test_the_adapters_system_text_begins_the_prompts_that_have_none(answer, fake):
    answer([ROWS[0], ROWS[5], ROWS[7]], settings=SETTINGS._replace(system_prompt="Be brief."))
    assert [prompt[0]["content"] for prompt in reversed(fake.asked)] == ["Be brief.", "Be kind.", "Be brief."]
    assert fake.asked[0][0]["tools"] == TOOLS


def test_half_a_surrogate_pair_beside_a_prompt_is_written_as_it_was(answer):
    assert answer([{"instruction": "one", "note": "\ud800"}])[0]["note"] == "\ud800"


# ---- The command line ------------------------------------------------------------------------------------------------
def options(**given):
    return Namespace(**{"instruction": None, "demo": False, "input_file": None, "output_file": None} | given)


def test_the_flags_of_a_file_belong_together(tmp_path):
    assert inference.find_output_file(options()) is None
    target = str(tmp_path / "answers.jsonl")
    assert str(inference.find_output_file(options(input_file="a.csv", output_file=target))) == target
    for given, said in [
        ({"input_file": "a.csv"}, "belong together"),
        ({"output_file": target}, "belong together"),
        ({"input_file": "a.csv", "output_file": target, "demo": True}, "answered alone"),
        ({"input_file": "a.csv", "output_file": "answers.csv"}, "a name that ends in .jsonl"),
    ]:
        assert said in refusal(inference.find_output_file, options(**given))
    (tmp_path / "answers.jsonl").touch()
    assert "exists already" in refusal(inference.find_output_file, options(input_file="a.csv", output_file=target))


def test_a_dash_takes_all_of_stdin_as_one_instruction(monkeypatch, tmp_path):
    for text, instruction in [("two\nlines\n", "two\nlines"), ("\ufeffé\n\n", "é"), (" kept ", " kept ")]:
        (tmp_path / "stdin").write_text(text, encoding="utf-8")
        with open(tmp_path / "stdin", encoding="utf-8") as file:
            monkeypatch.setattr("sys.stdin", file)
            assert inference.find_instruction("-") == instruction
    assert inference.find_instruction("Hi") == "Hi"
    assert inference.find_instruction(None) is None
    for raw, said in [
        (b" \n", "the input is empty, expected an instruction; give one in quotes"),
        (b"\xff\xfe", "not UTF-8 text"),
    ]:
        (tmp_path / "stdin").write_bytes(raw)
        with open(tmp_path / "stdin", encoding="utf-8") as file:
            monkeypatch.setattr("sys.stdin", file)
            assert said in refusal(inference.find_instruction, "-")


def test_an_instruction_without_quotes_or_not_in_utf_8_is_one_line():
    message = refusal(inference.main, ["Tell", "me", "more"])
    assert message.startswith("'me' stands behind the instruction, expected one text; put all of it in quotes")
    assert "the instruction is not UTF-8 text; save it" in refusal(inference.find_instruction, "caf\udce9")


def test_without_stdout_nothing_is_answered_to_nobody(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert refusal(inference.main, ["Hi"]).startswith("stdout is closed, so no answer could be seen")


def test_a_mistake_in_the_file_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "load", None)
    (tmp_path / "prompts.jsonl").write_text('{"body": "one"}', encoding="utf-8")
    files = ["--input_file", str(tmp_path / "prompts.jsonl"), "--output_file", str(tmp_path / "answers.jsonl")]
    flags = ["--base_only", "--base_model_name", "models/tiny-base", "--output_dir", str(tmp_path)]
    assert "row 1: columns found: body" in refusal(inference.main, [*files, *flags])


def test_two_processes_do_not_write_one_file_of_answers(tmp_path):
    path = tmp_path / "answers.jsonl.unfinished"
    with batch_utils.Journal(path, {"input": "a"}):
        message = refusal(batch_utils.Journal, path, {"input": "a"})
        assert message.startswith("another process is writing ")
    with batch_utils.Journal(path, {"input": "a"}) as journal:
        journal.remove()
    refusal(answer_file_of_another_input, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def answer_file_of_another_input(path):
    with batch_utils.Journal(path, {"input": "a"}):
        pass
    batch_utils.Journal(path, {"input": "b"})
