"""The system text that all training rows share belongs to the adapter, wherever it is used."""

import json

import pytest

import chat_utils
import evaluate
import inference
import model_utils
import settings_utils
import train
from conftest import TINY_BASE, small_run
from data_utils import load_conversations, shared_system_text
from encoding_utils import encode_prompt
from generation_utils import Reply
from message_utils import UserError
from prompt_utils import begin_with, check_system_text
from settings_utils import DEFAULTS, Settings, make_settings

GRUMP = "You are Grump,\nwho answers in capitals."
HI = [{"role": "user", "content": "Hi"}]
DROPS_SYSTEM = (
    "{% for message in messages if message.role != 'system' %}{{ message.role + ': ' + message.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def write_rows(path, systems):
    rows = [
        [{"role": "system", "content": text}] * (text is not None)
        + [{"role": "user", "content": f"Where is lamp {number}?"}, {"role": "assistant", "content": f"IN {number}."}]
        for number, text in enumerate(systems)
    ]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    return path


@pytest.fixture(scope="module")
def grump(tmp_path_factory):
    """The output folder of a run whose rows share a system text."""
    folder = tmp_path_factory.mktemp("grump")
    return small_run(write_rows(folder / "rows.jsonl", [GRUMP] * 12), folder, max_steps=2)


@pytest.mark.parametrize(
    ("systems", "shared"),
    [
        ([GRUMP, GRUMP], GRUMP),
        ([GRUMP, GRUMP.upper()], None),
        ([GRUMP, None], None),
        ([None, None], None),
        ([GRUMP, " "], None),
    ],
)
def test_a_system_text_is_shared_where_every_row_has_the_very_same(systems, shared, tmp_path):
    assert shared_system_text(load_conversations(write_rows(tmp_path / "rows.jsonl", systems))[0]) == shared


def test_a_conversation_begins_with_the_system_text_unless_it_has_one_of_its_own():
    tools = [{"type": "function", "function": {"name": "search"}}]
    assert begin_with(GRUMP, HI) == [{"role": "system", "content": GRUMP}, *HI]
    assert begin_with(GRUMP, [{"role": "system", "content": "Be brief."}, *HI])[0]["content"] == "Be brief."
    assert begin_with(GRUMP, [HI[0] | {"tools": tools}]) == [{"role": "system", "content": GRUMP, "tools": tools}, *HI]
    assert begin_with("", HI) == begin_with(None, HI) == begin_with(" \n", HI) == HI


def test_the_adapter_records_its_system_text_and_states_it_in_its_card(grump):
    adapter = grump / "lora-adapter"
    assert model_utils.read_recorded_settings(adapter)["system_prompt"] == GRUMP
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert f"begin with this system text, as in its training:\n\n```text\n{GRUMP}" in card


def test_chat_and_evaluation_begin_with_it_and_the_merged_card_states_it(grump, tmp_path, capsys, monkeypatch):
    settings = inference.read_settings(grump / "lora-adapter", {"device": "cpu"}, base_only=False)
    loaded = inference.load(grump / "lora-adapter", settings, base_only=False)
    assert 'begin with the system text "You are Grump, who answers in capitals."' in capsys.readouterr().err
    seen = []

    class Stream:
        def __init__(self, model, tokenizer, messages, generation_config, decoders):
            seen.append(messages)
            self.reply = Reply("Hello", True, 1)

        def __iter__(self):
            return iter(["Hello"])

        def close(self):
            pass

    monkeypatch.setattr(chat_utils, "stream_reply", Stream)
    inference.print_reply(loaded, "Hi")
    assert seen == [[{"role": "system", "content": GRUMP}, *HI]]

    own = write_rows(tmp_path / "own.jsonl", ["Be brief.", None])
    settings = loaded.settings._replace(validation_dataset_path=str(own))
    rows = evaluate.choose_rows(settings, [grump / "lora-adapter"], grump, tmp_path, True).conversations
    assert [messages[0]["content"] for _, messages in rows] == ["Be brief.", GRUMP]
    held_out = evaluate.choose_rows(loaded.settings, [grump / "lora-adapter"], grump, tmp_path, True).conversations
    assert [message["role"] for message in held_out[0][1]] == ["system", "user", "assistant"]


def test_sample_answers_of_the_training_begin_with_it(tokenizer, tmp_path):
    settings = Settings(**DEFAULTS)._replace(system_prompt=GRUMP, logs_dir=str(tmp_path), run_name="x")
    rows = load_conversations(write_rows(tmp_path / "rows.jsonl", [None, "Be brief."]))[0]
    samples = train.build_sample_answers(settings, tokenizer, rows)
    assert [prompt[0]["content"] for prompt in samples.prompts] == [GRUMP, "Be brief."]


@pytest.mark.parametrize(
    ("in_config", "given", "expected"),
    [
        (None, {}, GRUMP),
        (None, {"system_prompt": ""}, ""),
        (None, {"system_prompt": "Other"}, "Other"),
        ("Mine", {}, "Mine"),
        ("", {}, ""),
        ("Mine", {"system_prompt": "Other"}, "Other"),
    ],
)
def test_the_command_line_and_config_win_over_the_adapters_system_text(in_config, given, expected, monkeypatch):
    monkeypatch.setitem(settings_utils.DEFAULTS, "system_prompt", in_config)
    recorded = {"system_prompt": GRUMP, "base_model_name": TINY_BASE}
    assert make_settings(given, recorded, "inference.py").system_prompt == expected


def test_what_the_rows_share_is_recorded_unless_a_system_text_is_given(tmp_path):
    rows = load_conversations(write_rows(tmp_path / "rows.jsonl", [GRUMP] * 3))[0]
    data = train.Data(rows, rows.select([]), [])
    settings = Settings(**DEFAULTS)
    assert train.settle_system_text(settings, data).system_prompt == GRUMP
    assert train.settle_system_text(settings._replace(system_prompt=""), data).system_prompt == ""


@pytest.mark.parametrize("template", ["{{ raise_exception('No system role') }}", DROPS_SYSTEM])
def test_a_system_text_that_the_template_cannot_write_is_one_line(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"takes no system text; leave it out by --system_prompt \"\""):
        check_system_text(tokenizer, GRUMP)


def test_a_system_text_is_written_before_the_question(tokenizer):
    check_system_text(tokenizer, GRUMP)
    text = tokenizer.decode(encode_prompt(tokenizer, begin_with(GRUMP, HI)))
    assert text.index("Grump") < text.index("Hi")
