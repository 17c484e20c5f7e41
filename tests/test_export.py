"""What lies beside the weights: model cards whose code works, Ollama's Modelfile; and merge.py, which writes them."""

import contextlib
import copy
import io
import json
import re
import shutil

import jinja2
import pytest

import evaluate
import merge
import model_utils
from conftest import PROJECT, TINY_BASE, refusal
from export_utils import hub_id, ollama_template, write_adapter_card, write_merged_card, write_modelfile
from message_utils import UserError
from model_utils import Merge, load_tokenizer, read_training, tuned_and_base
from prompt_utils import render
from settings_utils import USED_SETTINGS, Settings
from tiny import SETTINGS

RECORD = {"steps": 12, "training_rows": 1234, "validation_rows": 20, "validation_loss": 1.5}
METRICS = {
    "rows": 20,
    "held_out": True,
    "date": "2026-11-28 10:15:00",
    "base": {"loss": 3.0, "perplexity": 20.09, "chrf": 9.0, "answers": 7},
    "tuned": {"loss": 1.5, "perplexity": 4.48, "chrf": 27.0},
    "difference": {"loss": -1.5, "low": -2.0, "high": -1.0, "chrf": {"mean": 18.0, "low": 12.0, "high": 24.0}},
}
HUB = SETTINGS._replace(base_model_name="team/Model-7B", custom_dataset_path="/home/me/secret/rows.jsonl")
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are helpful.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: an answer that is followed by a question has no thought, the prompt closes an empty one
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
# As Mistral Nemo's: the system text moves to the last question as turns are added
MOVING = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
)
BRACES = "{% for message in messages %}{{ '{{' + message['role'] + '}}' + message['content'] + eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def loaded_tokenizer():
    return load_tokenizer(TINY_BASE)


@pytest.fixture
def tokenizer(loaded_tokenizer):
    return copy.deepcopy(loaded_tokenizer)


# ---- Model cards -----------------------------------------------------------------------------------------------------
def test_a_card_tells_data_settings_figures_sample_and_template_and_no_path_of_this_machine(tokenizer, tmp_path):
    sample = ("What is `x`?", "A ``` letter.")
    write_adapter_card(tmp_path, tokenizer, "team/Model-7B", HUB, RECORD, METRICS, sample)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: team/Model-7B\n")
    assert "1,234 rows of `rows.jsonl`, 12 steps" in card
    assert "/home" not in card
    for text in (
        "Loss 1.5000",
        "On 20 held-out rows; 7 were answered, measured on 2026-11-28:",
        "| loss, nats a token | 3.0000 | 1.5000 | -2.0000 to -1.0000 |",
        "| perplexity | 20.09 | 4.48 |  |",
        "| chrF | 9.0 | 27.0 | +12.0 to +24.0 |",
        "````text\nA ``` letter.\n````",
    ):
        assert text in card
    assert render(tokenizer, [{"role": "user", "content": "What does a good answer look like?"}], True) in card


@pytest.mark.parametrize(("seen", "told"), [(None, "which may have been trained on;"), (3, "3 of them trained on;")])
def test_a_card_calls_no_row_held_out_that_may_have_been_trained_on(tokenizer, tmp_path, seen, told):
    metrics = METRICS | {"held_out": False, "trained_rows_seen": seen}
    merged = Merge("team/Model-7B", "full", "bfloat16", 2.0, {"full": 2.2})
    write_merged_card(tmp_path, tokenizer, merged, metrics=metrics)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"On 20 rows, {told}" in card
    assert "held-out" not in card


def test_a_card_of_a_local_base_names_no_base_model_of_the_hub(tokenizer, tmp_path):
    write_adapter_card(tmp_path, tokenizer, SETTINGS.base_model_name, SETTINGS, RECORD)
    merged = Merge(TINY_BASE, "dequantized", "bfloat16", 2.0, {"full": 2.2, "dequantized": 2.1})
    write_merged_card(tmp_path, tokenizer, merged)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "base_model:" not in card
    assert str(PROJECT) not in card
    assert "its 4-bit weights, dequantized (this model) | 2.1000 |" in card
    assert "the base as it is stored | 2.2000 |" in card


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("models/tiny-base", None),
        ("/home/me/model", None),
        ("./me/model", None),
        ("../me", None),
        ("a/b: c", None),
    ],
)
def test_only_a_name_of_the_hub_is_given_as_base_model(name, found):
    assert hub_id(name) == found


# ---- merge.py --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def merged(undisturbed, tmp_path_factory):
    """(the adapter of a run, its merged model, what merge.py printed)."""
    adapter, target = undisturbed() / "lora-adapter", tmp_path_factory.mktemp("merge") / "merged"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        merge.main(
            [str(target), "--adapter_path", str(adapter), "--device", "cpu", "--output_dir", str(adapter.parent)]
        )
    return adapter, target, printed.getvalue()


def test_merge_py_scores_what_it_wrote_on_the_rows_that_the_run_held_out(merged):
    adapter, target, printed = merged
    record, run = (json.loads(path.read_text()) for path in (target / "merge.json", adapter / "run.json"))
    assert record["adapter_loss"] == pytest.approx(run["validation_loss"], rel=1e-5)
    assert record["losses"]["full"] == pytest.approx(run["validation_loss"], rel=0.01)
    assert re.search(rf"^base \+ adapter +{record['adapter_loss']:.4f} +", printed, flags=re.MULTILINE)
    assert "bfloat16, merged into the base as it is stored" in printed
    assert [path.name for path in target.parent.iterdir()] == ["merged"]  # nothing is left beside it
    assert {"README.md", "Modelfile", "merge.json", "model.safetensors", "chat_template.jinja"} <= {
        path.name for path in target.iterdir()
    }
    assert not target.with_name("merged.incomplete").exists()


def run_code(folder, capsys):
    """What the Python of a folder's model card prints, with its placeholders replaced by real folders."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    code = code.replace("path/to/this/folder", str(folder))
    if (folder / "settings.json").exists():  # an adapter's
        code = re.sub("path/to/[^\"']+", json.loads((folder / "settings.json").read_text())["base_model_name"], code)
    capsys.readouterr()
    exec(code.replace("max_new_tokens=256", "max_new_tokens=8"), {})
    return capsys.readouterr().out


def test_the_python_of_both_cards_works(merged, capsys):
    adapter, target, _ = merged
    assert run_code(adapter, capsys).strip()
    assert run_code(target, capsys).strip()


def test_evaluate_py_measures_a_merged_model_against_the_base_that_it_was_merged_into(merged, tmp_path):
    adapter, target, _ = merged
    rows = ("--validation_dataset_path", str(adapter.parent / "validation.jsonl"))
    quick = ("--device", "cpu", "--eval_samples", "2", "--max_new_tokens", "3", "--output_dir", str(tmp_path))
    before = {path: path.read_bytes() for folder in (adapter, target) for path in folder.iterdir() if path.is_file()}
    for path in (adapter, target):
        evaluate.main(["--adapter_path", str(path), *rows, *quick])
    folders = [tmp_path / "evaluation" / name for name in ("run-validation", "run-merged-validation")]
    tuned, whole = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert whole["run"] == f"{tuned['run']}-merged"
    assert whole["held_out"] is tuned["held_out"] is True
    record = json.loads((target / "merge.json").read_text())
    assert whole["tuned"]["loss"] == pytest.approx(record["losses"]["full"], rel=1e-4)
    assert whole["base"]["loss"] == pytest.approx(tuned["base"]["loss"], rel=1e-4)
    # the card with figures lies among the results: what was measured is left as it was
    assert all(path.read_bytes() == content for path, content in before.items())
    card = (folders[0] / "model-card.md").read_text(encoding="utf-8")
    assert f"| loss, nats a token | {tuned['base']['loss']:.4f} | {tuned['tuned']['loss']:.4f} |" in card
    assert not (folders[1] / "model-card.md").exists()


def test_a_merged_model_is_told_apart_from_an_adapter(merged, tmp_path):
    with pytest.raises(UserError, match=r"holds a merged model and no adapter; python inference\.py --base_only"):
        merge.main([str(tmp_path / "other"), "--adapter_path", str(merged[1])])
    with pytest.raises(UserError, match=r"was merged into .* and cannot be measured against other/model"):
        list(tuned_and_base(merged[1], SETTINGS._replace(base_model_name="other/model")))
    settings = (merged[1] / "settings.json").read_text(encoding="utf-8")
    assert str(merged[0].parent) not in settings


def test_merge_py_reads_the_settings_that_it_offers(undisturbed, tmp_path, monkeypatch):
    read = set()

    class ReadSettings(Settings):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    original = merge.make_settings
    monkeypatch.setattr(merge, "make_settings", lambda *sources: ReadSettings(*original(*sources)))
    rows = undisturbed() / "validation.jsonl"
    merge.main(
        [
            *(str(tmp_path / "merged"), "--adapter_path", str(undisturbed() / "lora-adapter"), "--device", "cpu"),
            *("--validation_dataset_path", str(rows)),
        ]
    )
    assert set(USED_SETTINGS["merge.py"]) <= read | {"output_dir"}


def test_what_an_earlier_version_recorded_is_read_and_what_no_version_did_is_named(tmp_path):
    (tmp_path / "settings.json").write_text('{"torch_compile": "auto", "lora_r": 4}')
    settings, _ = read_training(tmp_path)
    assert (settings.torch_compile, settings.lora_r) == (False, 4)
    (tmp_path / "settings.json").write_text('{"torch_compile": "maybe"}')
    assert "the adapter's settings.json: torch_compile is 'maybe'" in refusal(read_training, tmp_path)


def test_merge_py_scores_on_no_row_that_was_trained_on(undisturbed, tmp_path, capsys):
    adapter = undisturbed() / "lora-adapter"
    settings, record = read_training(adapter)
    settings = settings._replace(validation_dataset_path=settings.custom_dataset_path)
    rows = merge.load_held_out(adapter, tmp_path, settings, tmp_path)
    assert len(rows) == record["validation_rows"]
    assert f"{record['training_rows']} of " in capsys.readouterr().err


def test_merge_py_scores_on_no_rows_of_another_run(undisturbed, tmp_path, capsys):
    adapter = shutil.copytree(undisturbed() / "lora-adapter", tmp_path / "lora-adapter")
    (tmp_path / "validation.jsonl").write_text(
        '{"row": 1, "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}\n'
    )
    assert merge.load_held_out(adapter, tmp_path, model_utils.read_training(adapter)[0], tmp_path / "cache") is None
    said = capsys.readouterr().err
    assert "Nothing is scored: " in said
    assert "does not hold the rows that this adapter's run held out" in said
    # its own lie in OUTPUT_DIR
    assert merge.load_held_out(adapter, undisturbed(), model_utils.read_training(adapter)[0], tmp_path / "cache")


def test_merge_py_overwrites_nothing(undisturbed, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already; remove it, or name another"):
        merge.main([str(tmp_path), "--adapter_path", str(undisturbed() / "lora-adapter")])
    assert (tmp_path / "mine.txt").read_text() == "keep"


# ---- Ollama ----------------------------------------------------------------------------------------------------------
def run_ollama(template, messages):
    """What Ollama makes of its template: Go's text/template, as far as these use it."""
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    words = {
        "if .System": "{% if system %}",
        ".System": "{{ system }}",
        "range $i, $_ := .Messages": "{% for message in messages %}",
        'if eq .Role "user"': "{% if message.role == 'user' %}",
        'else if eq .Role "assistant"': "{% elif message.role == 'assistant' %}",
        "if eq (len (slice $.Messages $i)) 1": "{% if loop.last %}",
        ".Content": "{{ message.content }}",
        "else": "{% else %}",
        '"{{"': "{{ '{{' }}",
    }
    open_blocks, parts = [], []
    for text, action in re.findall(r'(.*?)(?:\{\{ ("\{\{"|.*?) \}\}|$)', template, flags=re.DOTALL):
        parts.append("{% raw %}" + text + "{% endraw %}")
        if action.startswith(("if", "range")):
            open_blocks.append("{% endfor %}" if action.startswith("range") else "{% endif %}")
        if action:
            parts.append(open_blocks.pop() if action == "end" else words[action])
    environment = jinja2.Environment(keep_trailing_newline=True)
    return environment.from_string("".join(parts)).render(system=system, messages=messages)


def conversation(roles):
    return [{"role": role, "content": f"{role} {{{{ {number} }}}}"} for number, role in enumerate(roles.split())]


@pytest.mark.parametrize("template", [None, CHATML, THINKING, NO_SYSTEM, BRACES])
@pytest.mark.parametrize("roles", ["user", "user assistant user", "system user", "system user assistant user"])
def test_ollamas_template_says_what_the_chat_template_says(template, roles, tokenizer):
    tokenizer.chat_template = template or tokenizer.chat_template
    try:
        expected = render(tokenizer, conversation(roles), True)
    except UserError:
        assert template == NO_SYSTEM
        return
    found = run_ollama(ollama_template(tokenizer), conversation(roles))
    assert found == expected.removeprefix("<s>")  # which llama.cpp writes by itself


def test_a_modelfile_without_a_template_says_so(tokenizer, tmp_path):
    tokenizer.chat_template = MOVING
    assert ollama_template(tokenizer) is None
    assert not write_modelfile(tmp_path, tokenizer, SETTINGS)
    modelfile = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert "TEMPLATE" not in modelfile
    assert "cannot be written as an Ollama template" in modelfile


def test_a_modelfile_stops_and_samples_as_the_settings_say(tokenizer, tmp_path):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    assert write_modelfile(tmp_path, tokenizer, SETTINGS._replace(temperature=0.5))
    lines = (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.5",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1",
    ]
