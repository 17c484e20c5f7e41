"""A user's mistake ends in one line that says what was found and what to do, with exit code 2, and writes nothing."""

import json
import os
from subprocess import CompletedProcess

import pytest

import evaluate
import inference
import train
from data_utils import load_conversations
from hub_utils import locate_model
from message_utils import UserError
from script_utils import run_script
from settings_utils import DEFAULTS, USED_SETTINGS, Settings

GOOD_ROWS = [{"instruction": f"Say {n}", "response": f"Here is {n}."} for n in range(4)]


def check_refusal(done, *words):
    """Check that a script ended in one "error: ..." line, its last, that holds all the words."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    for word in words:
        assert str(word) in lines[-1]


@pytest.fixture
def call(capsys):
    """As `run`, but in this process, where torch is loaded already: 6 seconds less each time."""

    def call_script(script, *arguments):
        main = {"train.py": train.main, "evaluate.py": evaluate.main, "inference.py": inference.main}[script]
        code = run_script(main, [str(argument) for argument in arguments])
        return CompletedProcess([script, *arguments], code, *capsys.readouterr())

    return call_script


@pytest.fixture
def output(tmp_path):
    """The flag of an output folder; nothing may have been written there when the test ends."""
    yield "--output_dir", tmp_path / "output"
    assert not (tmp_path / "output").exists()


@pytest.fixture
def folders(output, tmp_path):
    """The same with a logs folder, for train.py."""
    yield *output, "--logs_dir", tmp_path / "logs"
    assert not (tmp_path / "logs").exists()


def save_adapter_config(folder):
    """The folder of an adapter whose weights are missing."""
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "models/tiny-base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# ---- As a user meets them: real processes ----------------------------------------------------------------------------
def test_train_as_a_process_refuses_a_dataset_that_is_missing(run, folders, tmp_path):
    done = run("train.py", "--custom_dataset_path", tmp_path / "mine.json", *folders)
    check_refusal(done, tmp_path / "mine.json", "does not exist", ".jsonl")


def test_evaluate_as_a_process_refuses_an_adapter_that_is_missing(run, output, tmp_path):
    done = run("evaluate.py", "--adapter_path", tmp_path / "nothing", *output)
    check_refusal(done, tmp_path / "nothing", "does not exist", "python train.py")


def test_inference_as_a_process_looks_for_the_adapter_that_train_writes(run, output, tmp_path):
    check_refusal(run("inference.py", "Hi", *output), tmp_path / "output/lora-adapter", "python train.py")


# ---- Data ------------------------------------------------------------------------------------------------------------
# the text of a dataset -> words of the message
BAD_DATA = {
    "empty": ("", ["is empty", "instruction and a response"]),
    "invalid JSON": ('[\n{"instruction": "a", "response": "b"},\n{"instruction": "c" "response": "d"}\n]', ["line 3"]),
    "without the columns": ('[{"subject": "a", "body": "b"}]', ["subject, body", "instruction", "--dataset_columns"]),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_train_refuses_a_dataset_that_is(fault, call, folders, tmp_path):
    text, words = BAD_DATA[fault]
    path = tmp_path / "mine.json"
    path.write_text(text)
    check_refusal(call("train.py", "--custom_dataset_path", path, *folders), path, *words)


# ---- Settings and command line ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "inference.py"])
def test_an_unknown_flag_names_the_nearest_one(script, run, output):
    check_refusal(run(script, "--devise", "cpu", *output, cold=True), "--devise", "did you mean --device?")


def test_a_setting_that_the_script_does_not_use_is_refused_with_the_scripts_that_do(call, output):
    words = "--num_epochs is a setting of train.py; evaluate.py does not use it, so leave it out"
    check_refusal(call("evaluate.py", "--num-epochs=2", *output), words)
    check_refusal(
        call("inference.py", "--batch_size", "2", "Hi", *output), "of train.py, evaluate.py and merge.py; inference.py"
    )
    check_refusal(
        call("train.py", "--top_p", "0.5", *output),
        "--top_p is a setting of merge.py and inference.py; train.py does not",
    )


def test_a_value_of_the_wrong_type_says_what_was_expected(run, folders):
    done = run("train.py", "--num_epochs", "two", *folders)
    check_refusal(done, "--num_epochs", "'two'", "a whole number", "the default is 3")


def test_a_value_out_of_range_says_the_range(call, folders):
    check_refusal(call("train.py", "--lora_dropout", "1.5", *folders), "--lora_dropout", "1.5", "0.0 to 0.9")


def test_debug_shows_the_traceback_of_a_users_mistake_too(call, folders):
    done = call("train.py", "--lora_r", "0", "--debug", *folders)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert "check_value" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --lora_r is 0, expected 1 ")


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "inference.py"])
def test_help_shows_the_settings_that_the_script_uses_at_once(script, run):
    done = run(script, "--help", cold=True, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("import time:")] == []
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "pandas"}  # seconds of work
    assert {name for name in DEFAULTS if f"--{name} " in done.stdout} == set(USED_SETTINGS[script])
    assert f"(default: {DEFAULTS['base_model_name']!r})" in " ".join(done.stdout.split())


# ---- Adapters --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [("evaluate.py",), ("inference.py", "Hi")])
def test_an_adapter_folder_without_weights_is_refused(command, call, output, tmp_path):
    adapter = save_adapter_config(tmp_path / "adapter")
    done = call(*command, "--adapter_path", adapter, *output)
    check_refusal(done, adapter, "adapter_model.safetensors", "train again")


def test_evaluate_without_validation_rows_names_the_flag_that_gives_some(call, output, tmp_path):
    adapter = save_adapter_config(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").touch()  # the rows are looked for before the weights are read
    done = call("evaluate.py", "--adapter_path", adapter, *output)
    check_refusal(done, "no validation.jsonl lies beside", adapter, "--validation_dataset_path")


def test_inference_refuses_an_empty_instruction(call, output):
    check_refusal(call("inference.py", "  ", *output), "instruction is empty")


# ---- Base models -----------------------------------------------------------------------------------------------------
def test_train_refuses_a_mistyped_local_path_without_asking_the_hub(call, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(GOOD_ROWS))
    flags = ("--custom_dataset_path", tmp_path / "rows.json", "--base_model_name", "models/tiny-bose")
    done = call("train.py", *flags, "--output_dir", tmp_path / "output", "--logs_dir", tmp_path / "logs")
    check_refusal(done, "models/tiny-bose", "does not exist", "Hub id")
    assert "Looking up" not in done.stderr
    # the rows were read by then, and are read faster the next time
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "rows.json"]
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["cache"]


def test_inference_refuses_a_base_model_that_is_not_there_without_a_network(run, output, tmp_path):
    flags = ("--base_only", "--base_model_name", "team/unheard-of", "--models_dir", tmp_path / "models")
    # a process of its own: huggingface_hub reads HF_HUB_OFFLINE once, when it is imported
    check_refusal(run("inference.py", "Hi", *flags, *output), "team/unheard-of", "HF_HUB_OFFLINE", "local folder")


@pytest.mark.parametrize(
    "name",
    ["./no/such", "../no-such", "~/no-such-model", "/no/such", "models/tiny-bose", "output/a", "one/two/three"],
)
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(name, tmp_path, capsys):
    with pytest.raises(UserError) as caught:
        locate_model(name, tmp_path)
    assert "does not exist" in str(caught.value)
    assert name.rsplit("/", 1)[-1] in str(caught.value)
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["no such model", "team/mödel", "-x/y", "team/model.git", "a" * 100])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(UserError) as caught:
        locate_model(name, tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "mistralai/Mistral-7B-v0.1" in str(caught.value)


def test_a_folder_without_a_model_in_it_says_so(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        locate_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize("place", ["lora-adapter/rows.json", "checkpoints/rows.json"])
def test_data_in_a_folder_that_the_run_writes_anew_are_refused_before_anything_is_read(place, tmp_path):
    (tmp_path / place).parent.mkdir()
    (tmp_path / place).write_text("[]")
    settings = Settings(**DEFAULTS)._replace(output_dir=str(tmp_path), custom_dataset_path=str(tmp_path / place))
    with pytest.raises(UserError, match="lies in a folder that this run writes anew; move it elsewhere"):
        train.check_places(settings)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_huge_sparse_file_is_refused_at_once(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(UserError, match="line 1: a NUL byte, which no text holds"):
        load_conversations(path, cache_dir=tmp_path)


def test_a_nul_byte_far_inside_a_file_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"instruction,response\n" + b"Say it,Here it is.\n" * 20_000 + b"Say\0,Here\n")
    with pytest.raises(UserError, match="line 20002: a NUL byte, which no text holds"):
        load_conversations(path, cache_dir=tmp_path)
