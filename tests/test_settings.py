"""config.py, its flags and limits, CPU_DEMO, paths, records on disk, and how a script ends."""

import ast
import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import config
import evaluate
import file_utils
import inference
import message_utils
import run_utils
import script_utils
import settings_utils
from conftest import refusal, small_run
from file_utils import PROJECT_DIR
from hub_utils import find_files
from message_utils import UserError
from progress_utils import format_duration
from settings_utils import AUTO_SWITCHES, CHOICES, DEFAULTS, RANGES, USED_SETTINGS, Settings

CONSTANTS = {name: value for name, value in vars(config).items() if name.isupper()}
# The user's own names and values; DESIGN.md keeps them to the letter
NAMED_VALUES = {
    "BASE_MODEL_NAME": "mistralai/Mistral-7B-v0.1",
    "LORA_R": 16,
    "LORA_ALPHA": 32,
    "LORA_DROPOUT": 0.05,
    "NUM_EPOCHS": 3,
    "BATCH_SIZE": 4,
    "LEARNING_RATE": 2e-4,
    "MAX_SEQ_LENGTH": 512,
    "USE_4BIT_QUANTIZATION": True,
    "GRADIENT_CHECKPOINTING": True,
    "USE_FP16": True,
    "DEVICE": "cuda",
    "CUSTOM_DATASET_PATH": None,
}
OTHER_NAMES = (
    "GRADIENT_ACCUMULATION_STEPS",
    "TEMPERATURE",
    "TOP_P",
    "DO_SAMPLE",
    "MAX_NEW_TOKENS",
    "SEED",
    "OUTPUT_DIR",
    "LOGS_DIR",
)
INTEGERS = sorted(name for name, value in DEFAULTS.items() if type(value) is int)
FLOATS = sorted(name for name, value in DEFAULTS.items() if type(value) is float)
BOOLEANS = sorted({name for name, value in DEFAULTS.items() if type(value) is bool} | set(AUTO_SWITCHES))
TEXTS = sorted(name for name, value in DEFAULTS.items() if type(value) is str and name not in AUTO_SWITCHES)
NONES = sorted(name for name, value in DEFAULTS.items() if value is None)
TINY_BASE = config.CPU_DEMO["BASE_MODEL_NAME"]


# build_generation_config looks at DO_SAMPLE also where the script has set it to False
NOT_SAMPLED = {"do_sample"}


def script_that_uses(name):
    return next(script for script, names in USED_SETTINGS.items() if name in names)


def given(*argv):
    """The settings that a command line gives to the script that uses the first of them, train.py if none does."""
    first = str(argv[0]).split("=")[0].removeprefix("--").replace("-", "_") if argv else ""
    script = script_that_uses(first) if first in DEFAULTS else "train.py"
    parser = settings_utils.build_parser(script, "about")
    return settings_utils.parse_command_line(parser, [str(item) for item in argv])[1]


def with_value(name, value):
    return Settings(**(DEFAULTS | {name: value}))


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


# ---- config.py -------------------------------------------------------------------------------------------------------
def test_config_holds_a_docstring_and_constants_only():
    docstring, *statements = ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value.value, str)
    names = []
    for statement in statements:
        assert isinstance(statement, ast.Assign), f"line {statement.lineno} is no assignment"
        ast.literal_eval(statement.value)  # raises on anything that would have to be executed
        names += [target.id for target in statement.targets]
    assert all(name.isupper() for name in names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", NAMED_VALUES)
def test_the_values_that_the_user_named_stand_to_the_letter(name):
    assert CONSTANTS[name] == NAMED_VALUES[name]
    assert type(CONSTANTS[name]) is type(NAMED_VALUES[name])


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_the_settings_that_the_user_named_exist(name):
    assert name in CONSTANTS


def test_every_constant_of_config_is_a_setting_and_cpu_demo_names_only_settings():
    assert set(Settings._fields) == {name.lower() for name in CONSTANTS} - {"cpu_demo"}
    assert set(config.CPU_DEMO) <= set(CONSTANTS)
    assert all(type(value) is type(CONSTANTS[name]) for name, value in config.CPU_DEMO.items())


def test_every_number_of_config_has_limits_and_the_limits_name_only_settings():
    assert set(RANGES) == {*INTEGERS, *FLOATS}
    assert set(CHOICES) <= set(TEXTS)


def test_config_as_it_ships_and_its_demo_keep_every_limit():
    settings_utils.check_settings(Settings(**DEFAULTS))
    demo = {name.lower(): value for name, value in config.CPU_DEMO.items()}
    settings_utils.check_settings(Settings(**(DEFAULTS | demo)))


# ---- Flags -----------------------------------------------------------------------------------------------------------
def test_every_setting_is_a_flag_of_a_script_and_the_table_names_only_settings():
    assert {name for names in USED_SETTINGS.values() for name in names} == set(DEFAULTS)


class ReadSettings(Settings):
    """Settings that note which of them are read, in ReadSettings.names."""

    names: ClassVar = set()

    def __getattribute__(self, name):
        if name in Settings._fields:
            ReadSettings.names.add(name)
        return super().__getattribute__(name)


@pytest.fixture
def read_by(monkeypatch):
    """read_by(script, *argv): the settings that a script reads when it is called so."""

    def call(script, *argv):
        original = settings_utils.make_settings
        monkeypatch.setattr(script, "make_settings", lambda *sources: ReadSettings(*original(*sources)))
        ReadSettings.names.clear()
        script.main([str(item) for item in argv])
        return set(ReadSettings.names)

    return call


# train.py, evaluate.py and inference.py take OUTPUT_DIR from the command line to find the adapter
def test_evaluate_reads_the_settings_that_it_offers_and_no_others(read_by, undisturbed, dataset, tmp_path):
    adapter = ("--adapter_path", undisturbed() / "lora-adapter", "--output_dir", tmp_path, "--device", "cpu")
    rows = ("--validation_dataset_path", dataset, "--eval_samples", 1, "--max_new_tokens", 2)
    assert read_by(evaluate, *adapter, *rows) | {"output_dir"} == set(USED_SETTINGS["evaluate.py"]) | NOT_SAMPLED


def test_inference_reads_the_settings_that_it_offers_and_no_others(read_by, undisturbed, tmp_path):
    flags = ("--adapter_path", undisturbed() / "lora-adapter", "--device", "cpu", "--max_new_tokens", 2)
    with_adapter = read_by(inference, "Hi", *flags)
    base_only = read_by(inference, "Hi", *flags, "--base_only")
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "Hi"}', encoding="utf-8")
    files = ("--input_file", tmp_path / "prompts.jsonl", "--output_file", tmp_path / "answers.jsonl")
    of_a_file = read_by(inference, *files, *flags)
    assert with_adapter | base_only | of_a_file | {"output_dir"} == set(USED_SETTINGS["inference.py"])


def test_train_reads_the_settings_that_it_offers_and_no_others(dataset, tmp_path):
    ReadSettings.names.clear()
    changes = {"max_train_rows": 10, "max_steps": 1, "optimizer": "paged_adamw_8bit", "lora_plus_ratio": 2.0}
    small_run(dataset, tmp_path, kind=ReadSettings, **changes)
    assert set(USED_SETTINGS["train.py"]) <= ReadSettings.names
    assert ReadSettings.names <= set(USED_SETTINGS["train.py"]) | NOT_SAMPLED


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_constant_has_a_flag_whose_help_shows_its_comment_and_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside the help of one flag
    line = next(
        line
        for line in Path(config.__file__).read_text(encoding="utf-8").splitlines()
        if line.startswith(f"{name.upper()} = ")
    )
    comment = line.split("  # ", 1)[1].strip()
    lines = settings_utils.build_parser(script_that_uses(name), "about").format_help().splitlines()
    start = next(index for index, line in enumerate(lines) if re.match(rf"  --{name}\b", line))
    assert len(comment) > 10
    shown = re.sub(r"^.*?VALUE\]?\s+", "", " ".join(lines[start : start + 2]))
    assert shown.startswith(f"{comment} (default: {DEFAULTS[name]!r})")


def test_every_setting_is_described_once_under_a_banner():
    described = [name for banner, constants in settings_utils.describe_settings() for name, _ in constants if banner]
    assert sorted(described) == sorted(DEFAULTS)


def test_nothing_given_changes_nothing():
    assert given() == {}


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_setting_takes_an_integer_and_nothing_else(name):
    value = given(f"--{name}", "7")[name]
    assert value == 7
    assert type(value) is int
    for wrong in ("7.5", "many", "", "1e3", "nan"):
        message = refusal(given, f"--{name}={wrong}")
        assert f"--{name}" in message
        assert repr(wrong) in message
        assert "whole number" in message
        assert str(DEFAULTS[name]) in message


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_setting_takes_any_number_and_nothing_else(name):
    for text, expected in (("0.25", 0.25), ("1e-3", 0.001), ("1", 1.0)):
        value = given(f"--{name}", text)[name]
        assert value == expected
        assert type(value) is float
    message = refusal(given, f"--{name}", "fast")
    assert f"--{name}" in message
    assert "a number" in message


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_boolean_setting_is_a_bare_flag_or_takes_true_and_false(name):
    assert given(f"--{name}") == {name: True}
    assert given(f"--{name}", "--output_dir", "out") == {name: True, "output_dir": "out"}
    for text, expected in (("true", True), ("True", True), ("false", False), ("False", False), ("0", False)):
        assert given(f"--{name}", text)[name] is expected
    auto = name in AUTO_SWITCHES
    assert ("true, false or auto" if auto else "true or false") in refusal(given, f"--{name}", "maybe")
    if auto:
        assert given(f"--{name}", "auto")[name] == "auto"
    else:
        assert f"--{name} got 'auto'" in refusal(given, f"--{name}", "auto")


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_setting_keeps_its_text(name):
    assert given(f"--{name}", "007")[name] == "007"
    assert given(f"--{name}", "None")[name] == "None"


@pytest.mark.parametrize("name", NONES)
def test_a_setting_without_a_default_takes_text_and_none_unsets_it(name):
    assert given(f"--{name}", "007")[name] == "007"
    assert given(f"--{name}", "None")[name] is None


def test_a_dict_setting_is_given_as_json():
    mapping = {"instruction": "q", "response": "a b"}
    assert given("--dataset_columns", json.dumps(mapping)) == {"dataset_columns": mapping}
    for wrong in ("q=a", "[1]", '"q"', "{", ""):
        assert "JSON" in refusal(given, "--dataset_columns", wrong)


@pytest.mark.parametrize("flag", ["--lora-r", "--lora_r"])
def test_flags_are_accepted_with_dashes_and_with_an_equals_sign(flag):
    assert given(flag, "8") == {"lora_r": 8}
    assert given(f"{flag}=8") == {"lora_r": 8}


def test_dashes_inside_a_value_are_kept():
    assert given("--run-name=my-run", "--output_dir", "out-put") == {"run_name": "my-run", "output_dir": "out-put"}


@pytest.mark.parametrize(
    ("mistyped", "nearest"),
    [
        ("--lora_rank", "--lora_r"),
        ("--learning_rat", "--learning_rate"),
        ("--batchsize", "--batch_size"),
        ("--epochs", "--num_epochs"),
        ("--max-seq-len", "--max_seq_length"),
    ],
)
def test_an_unknown_flag_is_refused_and_the_nearest_is_named(mistyped, nearest):
    for argv in ([mistyped, "8"], [f"{mistyped}=8"]):
        message = refusal(given, *argv)
        assert mistyped.replace("-", "_").strip("_") in message
        assert f"did you mean {nearest}?" in message


def test_a_flag_is_never_completed_from_its_beginning():
    assert "--lora_alpha" in refusal(given, "--lora_alp", "8")


def test_a_flag_like_no_other_points_to_the_help():
    assert "--help" in refusal(given, "--zzzzzz", "8")


def test_a_flag_without_its_value_is_one_line():
    assert "--lora_r" in refusal(given, "--lora_r")


# ---- Limits ----------------------------------------------------------------------------------------------------------
LOWER = [(name, low) for name, (low, _) in RANGES.items() if low is not None]
UPPER = [(name, high) for name, (_, high) in RANGES.items() if high is not None]


@pytest.mark.parametrize(("name", "low"), LOWER)
def test_the_lower_limit_is_inclusive_and_below_it_is_refused(name, low):
    settings_utils.check_settings(with_value(name, low))
    below = low - 1 if type(DEFAULTS[name]) is int else low - 1e-12
    message = refusal(settings_utils.check_settings, with_value(name, below))
    assert f"--{name} is {below}" in message
    assert str(low) in message
    assert str(DEFAULTS[name]) in message


@pytest.mark.parametrize(("name", "high"), UPPER)
def test_the_upper_limit_is_inclusive_and_above_it_is_refused(name, high):
    settings_utils.check_settings(with_value(name, high))
    message = refusal(settings_utils.check_settings, with_value(name, high + 1))
    assert f"--{name} is {high + 1}" in message
    assert f"{high}" in message


@pytest.mark.parametrize("name", RANGES)
def test_nan_is_out_of_every_range(name):
    assert "is nan" in refusal(settings_utils.check_settings, with_value(name, float("nan")))


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_4bit_quantization", "false"), ("batch_size", 4.0), ("batch_size", True), ("dataset_columns", "a")],
)
def test_an_edited_setting_of_another_type_is_refused(name, value):
    assert f"--{name} is {value!r}" in refusal(settings_utils.check_settings, with_value(name, value))


@pytest.mark.parametrize("name", AUTO_SWITCHES)
def test_a_switch_with_a_third_position_names_it_where_it_is_set_wrongly(name):
    message = refusal(settings_utils.check_settings, with_value(name, "yes"))
    assert message.startswith(f"--{name} is 'yes', expected True, False or \"auto\"")


def test_a_whole_number_in_config_does_not_change_the_type_of_a_decimal_flag():
    assert settings_utils.parse_value("temperature", "0.7", 1) == 0.7
    assert settings_utils.check_settings(with_value("temperature", 1)).temperature == 1


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_its_listed_values_only(name):
    for choice in CHOICES[name]:
        settings_utils.check_settings(with_value(name, choice))
    message = refusal(settings_utils.check_settings, with_value(name, "nonsense"))
    assert "'nonsense'" in message
    assert all(choice in message for choice in CHOICES[name])


@pytest.mark.parametrize("value", ["16", None])
def test_a_value_of_the_wrong_type_in_config_is_a_line_and_no_traceback(value):
    assert "--lora_r is" in refusal(settings_utils.check_settings, with_value("lora_r", value))


def test_make_settings_checks_what_it_merges(gpu):
    assert "--lora_r is 0" in refusal(settings_utils.make_settings, {"lora_r": 0})


# ---- make_settings and CPU_DEMO --------------------------------------------------------------------------------------
def test_settings_are_a_frozen_snapshot(gpu, monkeypatch):
    settings = settings_utils.make_settings({"lora_r": 8})
    assert settings.lora_r == 8
    with pytest.raises(AttributeError):
        settings.lora_r = 4
    monkeypatch.setattr(config, "SEED", 7)
    assert settings.seed == 42


def test_the_command_line_wins_over_config(gpu):
    assert settings_utils.make_settings({"lora_r": 8}) == Settings(**(DEFAULTS | {"lora_r": 8}))


def test_without_cuda_the_demo_settings_apply_to_the_letter(no_gpu):
    demo = {name.lower(): value for name, value in config.CPU_DEMO.items()}
    assert settings_utils.make_settings() == Settings(**(DEFAULTS | demo))


def test_the_demo_settings_are_announced_once_on_stderr_with_what_they_replace(no_gpu, capsys):
    settings_utils.make_settings({"num_epochs": 2})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "CPU_DEMO" in err
    assert f"base_model_name={TINY_BASE}" in err
    assert "learning_rate=" in err
    assert "num_epochs" not in err  # given by the user, so not replaced


def test_a_setting_on_the_command_line_wins_over_the_demo(no_gpu):
    settings = settings_utils.make_settings({"num_epochs": 2, "learning_rate": 1e-4})
    assert (settings.num_epochs, settings.learning_rate) == (2, 1e-4)
    assert settings.base_model_name == TINY_BASE


def test_another_base_model_switches_the_demo_off_entirely(no_gpu, capsys):
    settings = settings_utils.make_settings({"base_model_name": "some/model"})
    assert settings == Settings(**(DEFAULTS | {"base_model_name": "some/model"}))
    assert capsys.readouterr().err == ""


def test_naming_the_demo_base_keeps_the_demo(no_gpu):
    assert (
        settings_utils.make_settings({"base_model_name": TINY_BASE}).learning_rate == config.CPU_DEMO["LEARNING_RATE"]
    )


@pytest.mark.parametrize("chosen", [{}, {"base_model_name": TINY_BASE}, {"device": "cpu"}])
def test_the_demo_is_never_used_on_a_cuda_machine(gpu, capsys, chosen):
    assert settings_utils.make_settings(chosen) == Settings(**(DEFAULTS | chosen))
    assert capsys.readouterr().err == ""


def test_an_empty_cpu_demo_switches_it_off(no_gpu, monkeypatch):
    monkeypatch.setitem(settings_utils.CONFIG, "CPU_DEMO", {})
    assert settings_utils.make_settings() == Settings(**DEFAULTS)


def test_of_an_adapters_record_only_what_binds_it_counts(gpu):
    recorded = {
        "base_model_name": "some/model",
        "max_seq_length": 128,
        "use_4bit_quantization": False,
        "temperature": 0.1,
        "output_dir": "elsewhere",
        "gone_since": 1,
    }
    settings = settings_utils.make_settings({}, recorded)
    assert (settings.base_model_name, settings.max_seq_length, settings.use_4bit_quantization) == (
        "some/model",
        128,
        False,
    )
    assert (settings.temperature, settings.output_dir) == (DEFAULTS["temperature"], DEFAULTS["output_dir"])


def test_the_command_line_wins_over_an_adapters_record(gpu):
    settings = settings_utils.make_settings({"max_seq_length": 64}, {"max_seq_length": 128, "use_fp16": False})
    assert (settings.max_seq_length, settings.use_fp16) == (64, False)


def test_an_adapters_record_wins_over_the_demo(no_gpu, capsys):
    recorded = {"base_model_name": TINY_BASE, "use_4bit_quantization": True}
    settings = settings_utils.make_settings({}, recorded, "inference.py")
    assert settings.use_4bit_quantization is True
    assert settings.max_new_tokens == config.CPU_DEMO["MAX_NEW_TOKENS"]
    said = capsys.readouterr().err
    assert said == "No CUDA GPU found, so the demo settings apply (CPU_DEMO in config.py): max_new_tokens=96\n"


def test_what_ships_is_what_the_demo_replaces():
    assert {name.lower() for name in config.CPU_DEMO} == set(settings_utils.SHIPPED)
    for name, value in settings_utils.SHIPPED.items():
        assert (DEFAULTS[name], type(DEFAULTS[name])) == (value, type(value))


EDITS = {
    "use_4bit_quantization": False,
    "gradient_checkpointing": "auto",
    "lora_dropout": 0.2,
    "learning_rate": 3e-4,
    "num_epochs": 1,
    "gradient_accumulation_steps": 8,
    "eval_steps": 10,
    "max_new_tokens": 40,
}


@pytest.mark.parametrize("name", EDITS)
def test_a_value_that_was_edited_in_config_wins_over_the_demo(name, no_gpu, monkeypatch, capsys):
    monkeypatch.setitem(DEFAULTS, name, EDITS[name])
    settings = settings_utils.make_settings()
    demo = {key.lower(): value for key, value in config.CPU_DEMO.items()}
    assert settings == Settings(**(DEFAULTS | demo | {name: EDITS[name]}))
    assert f"{name}=" not in capsys.readouterr().err


def test_a_base_that_was_edited_in_config_switches_the_demo_off(no_gpu, monkeypatch, capsys):
    monkeypatch.setitem(DEFAULTS, "base_model_name", "some/model")
    assert settings_utils.make_settings() == Settings(**DEFAULTS)
    assert capsys.readouterr().err == ""


def test_the_demos_own_base_named_in_config_keeps_the_demo(no_gpu, monkeypatch):
    monkeypatch.setitem(DEFAULTS, "base_model_name", TINY_BASE)
    assert settings_utils.make_settings().learning_rate == config.CPU_DEMO["LEARNING_RATE"]


@pytest.fixture
def restored():
    """config.py's values, whatever file a test takes beside it."""
    before = [(kept, dict(kept)) for kept in (DEFAULTS, settings_utils.CONFIG, settings_utils.OTHER_FILES)]
    yield
    for kept, values in before:
        kept.clear()
        kept.update(values)


def test_another_settings_file_wins_over_config_and_the_command_line_over_it(restored, gpu, tmp_path):
    (tmp_path / "mine.py").write_text("LORA_R = 8\ntwice = 2\nLORA_ALPHA = twice * LORA_R\n")
    values = given("--seed", 1, "--config", tmp_path / "mine.py", "--lora_r", 4)
    assert values == {"seed": 1, "lora_r": 4}
    settings = settings_utils.make_settings(values)
    assert (settings.lora_r, settings.lora_alpha, settings.seed) == (4, 16, 1)


def test_what_a_short_settings_file_sets_wins_over_the_demo_though_it_be_the_shipped_value(restored, no_gpu, tmp_path):
    (tmp_path / "mine.py").write_text("NUM_EPOCHS = 3\n")
    given("--seed", 1, "--config", tmp_path / "mine.py")
    settings = settings_utils.make_settings()
    assert (settings.num_epochs, settings.base_model_name) == (3, TINY_BASE)


def test_of_a_copy_of_config_only_what_was_edited_wins_over_the_demo(restored, no_gpu, tmp_path):
    text = Path(config.__file__).read_text(encoding="utf-8").replace("LORA_DROPOUT = 0.05", "LORA_DROPOUT = 0.3")
    (tmp_path / "mine.py").write_text(text)
    given("--seed", 1, "--config", tmp_path / "mine.py")
    settings = settings_utils.make_settings()
    assert (settings.num_epochs, settings.lora_dropout) == (config.CPU_DEMO["NUM_EPOCHS"], 0.3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SEED = 1\nNUM_EPOCH = 3\n", "mine.py, line 2: NUM_EPOCH is no setting; did you mean NUM_EPOCHS?"),
        ("LORA_R = 8\nseed = 1\n", "mine.py, line 2: seed is no setting; did you mean SEED?"),
        ('{"LORA_R": 8}', "mine.py sets nothing, expected lines such as LORA_R = 8"),
        ("SEED = \n", "mine.py, line 1: invalid syntax (SyntaxError); correct it"),
        ("SEED = 1\n  LORA_R = 2\n", "mine.py, line 2: unexpected indent (IndentationError)"),
        ("SEED = seed\n", "mine.py, line 1: name 'seed' is not defined (NameError)"),
        ("SEED = 1\nimport nowhere\n", "mine.py, line 2: No module named 'nowhere' (ModuleNotFoundError)"),
        ("raise SystemExit(3)\n", "mine.py, line 1: 3 (SystemExit)"),
        ("SEED = 1\nraise KeyboardInterrupt\n", "mine.py, line 2: (KeyboardInterrupt); correct it"),
        ("raise BaseException('boom')\n", "mine.py, line 1: boom (BaseException); correct it"),
        ("raise GeneratorExit\n", "mine.py, line 1: (GeneratorExit); correct it"),
        ("raise TimeoutError\n", "mine.py, line 1: (TimeoutError); correct it"),
        ("class Odd(Exception):\n  __str__ = None\nraise Odd\n", "mine.py, line 3: Odd; correct it"),
        ("def again():\n  again()\nagain()\n", "mine.py, line 2: maximum recursion depth exceeded"),
        ("LORA_R = (1 / 0 for _ in 'ab')\n", "mine.py, line 1: LORA_R is <generator object"),
        ("LORA_R = 10**9999\n", "mine.py, line 1: LORA_R is a value of the type int, expected 1 to 4096"),
        ("#" * 2**21, "mine.py holds more than a megabyte, expected lines such as LORA_R = 8"),
        ("SEED = 1\0\n", "mine.py"),
        ("SEED = '" + "x" * 9999 + "'\n", "mine.py, line 1: SEED is 'xxx"),
        (
            "\n\nLORA_R = '16'\n",
            "mine.py, line 3: LORA_R is '16', expected a whole number; correct it where it was set",
        ),
        ("CPU_DEMO = 3\n", "mine.py, line 1: CPU_DEMO is 3, expected a dict of settings; {} switches it off"),
        ("CPU_DEMO = {'LORA_RR': 3}\n", "mine.py, line 1: CPU_DEMO['LORA_RR'] is no setting"),
        ("CPU_DEMO = {3: 3}\n", "mine.py, line 1: CPU_DEMO[3] is no setting"),
        ("CPU_DEMO = {'LORA_R': '3'}\n", "CPU_DEMO['LORA_R'] is '3', expected a whole number"),
        ("OUTPUT_DIR = 5\n", "mine.py, line 1: OUTPUT_DIR is 5, expected a text"),
        ("TEMPERATURE = 0\n", "mine.py, line 1: TEMPERATURE is 0; for the likeliest answer"),
        (None, "mine.py cannot be read (No such file or directory); give one by --config"),
    ],
)
def test_a_mistake_in_another_settings_file_is_one_line(text, words, restored, tmp_path):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    message = refusal(given, "--seed", 1, "--config", tmp_path / "mine.py")
    assert words in message
    assert len(message) < 400


def test_a_temperature_of_zero_points_to_do_sample():
    assert "set --do_sample false instead" in refusal(settings_utils.make_settings, {"temperature": 0.0})


def test_an_adapter_of_another_base_switches_the_demo_off(no_gpu):
    settings = settings_utils.make_settings({}, {"base_model_name": "some/model"})
    assert settings == Settings(**(DEFAULTS | {"base_model_name": "some/model"}))


# ---- Paths -----------------------------------------------------------------------------------------------------------
def test_relative_paths_start_at_the_project_whatever_the_folder_of_the_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file_utils.resolve_path("output/x") == PROJECT_DIR / "output" / "x"
    assert file_utils.resolve_path("./data/../data/demo.json") == PROJECT_DIR / "data" / "demo.json"


def test_a_file_that_is_read_is_looked_for_where_the_user_stands_and_then_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file_utils.resolve_input("data/demo.json") == PROJECT_DIR / "data" / "demo.json"
    message = refusal(find_files, "rows.json", tmp_path)
    assert message.startswith("dataset rows.json does not exist;")
    assert f"looked for in {tmp_path} and in {PROJECT_DIR}" in message
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo.json").touch()
    assert file_utils.resolve_input("data/demo.json") == tmp_path / "data" / "demo.json"
    assert find_files("data/demo.json", tmp_path)[1] == [tmp_path / "data" / "demo.json"]


def test_absolute_paths_and_the_home_folder_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert file_utils.resolve_path(tmp_path / "x") == (tmp_path / "x").resolve()
    assert file_utils.resolve_path("~/x") == (tmp_path / "x").resolve()


def test_a_path_is_shown_as_a_user_would_type_it(tmp_path):
    assert file_utils.display_path(PROJECT_DIR / "data" / "demo.json") == os.path.join("data", "demo.json")
    assert file_utils.display_path(tmp_path / "x") == str(tmp_path / "x")
    beside = PROJECT_DIR.with_name(PROJECT_DIR.name + "-copy")
    assert file_utils.display_path(beside) == str(beside)


# ---- Folders and records ---------------------------------------------------------------------------------------------
def test_written_json_is_read_back_as_it_was(tmp_path):
    value = {"text": "é\u2028☃", "number": 1.5, "nested": {"list": [None, True]}}
    file_utils.write_json(tmp_path / "record.json", value)
    assert file_utils.read_json(tmp_path / "record.json", "record") == value
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@contextlib.contextmanager
def files_of_at_most(size):
    """Let the system refuse to write files longer than so many bytes, as a full disk does."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_the_system_refuses_leaves_the_old_json_whole(tmp_path):
    path = tmp_path / "record.json"
    file_utils.write_json(path, {"old": 1})
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        file_utils.write_json(path, {"new": "long" * 1000})
    assert file_utils.read_json(path, "record") == {"old": 1}


def test_a_value_that_json_cannot_hold_leaves_the_old_json_whole(tmp_path):
    path = tmp_path / "record.json"
    file_utils.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        file_utils.write_json(path, {"new": object()})
    assert file_utils.read_json(path, "record") == {"old": 1}


# ---- Folders that appear only when they are whole --------------------------------------------------------------------
def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_staged_folder_takes_its_name_at_the_end_with_all_its_files_readable(tmp_path):
    with file_utils.staged_folder(tmp_path / "made" / "it") as staged:
        (staged / "inner").mkdir()
        for name in ("a", "inner/b"):
            (staged / name).touch(mode=0o600)
        assert names_in(tmp_path / "made") == [
            "it.incomplete",
            *(f"it.incomplete/{n}" for n in ("a", "inner", "inner/b")),
        ]
    assert names_in(tmp_path / "made") == ["it", "it/a", "it/inner", "it/inner/b"]
    umask = os.umask(0)
    os.umask(umask)
    modes = {(tmp_path / "made" / "it" / name).stat().st_mode & 0o777 for name in ("a", "inner/b")}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("fault", [RuntimeError("ours"), KeyboardInterrupt()])
def test_a_staged_folder_that_fails_is_removed(fault, tmp_path):
    def fill():
        with file_utils.staged_folder(tmp_path / "it") as staged:
            (staged / "half").touch()
            raise fault

    with pytest.raises(type(fault)):
        fill()
    assert names_in(tmp_path) == []


def test_a_staged_folder_whose_files_the_system_refuses_is_removed(tmp_path):
    with (
        pytest.raises(OSError, match="File too large"),
        file_utils.staged_folder(tmp_path / "it") as staged,
        files_of_at_most(1000),
    ):
        (staged / "weights").write_bytes(bytes(2000))
    assert names_in(tmp_path) == []


def test_what_a_killed_process_left_does_not_count_and_is_removed_by_the_next_attempt(tmp_path):
    pid = os.fork()
    if pid == 0:
        with file_utils.staged_folder(tmp_path / "it") as staged:
            (staged / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert names_in(tmp_path) == ["it.incomplete", "it.incomplete/half"]
    with file_utils.staged_folder(tmp_path / "it") as staged:
        (staged / "whole").touch()
    assert names_in(tmp_path) == ["it", "it/whole"]


def test_a_staged_folder_never_overwrites_one_that_holds_something(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "precious").touch()
    with pytest.raises(OSError, match="not empty"), file_utils.staged_folder(tmp_path / "it") as staged:
        (staged / "new").touch()
    assert names_in(tmp_path) == ["it", "it/precious"]


# ---- A disk that refuses to write ------------------------------------------------------------------------------------
# an exception -> what the message says of it
REFUSALS = {
    "a full disk": (OSError(28, "No space left on device"), "No space left on device"),
    "a quota": (OSError(122, "Disk quota exceeded"), "Disk quota exceeded"),
    "a read-only disk": (OSError(30, "Read-only file system"), "Read-only file system"),
    "no permission": (PermissionError(13, "Permission denied"), "Permission denied"),
    "safetensors": (
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "No space left on device",
    ),
    "torch, at its end": (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        "it could not be written",
    ),
    "torch": (
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
        "it could not be written",
    ),
}


def fail_to_save(error):
    with file_utils.storage_errors("checkpoint-4", "mend that"):
        raise error


@pytest.mark.parametrize("refusal_of", REFUSALS)
def test_a_disk_that_refuses_to_write_is_one_line(refusal_of):
    error, words = REFUSALS[refusal_of]
    assert refusal(fail_to_save, error) == f"checkpoint-4 could not be saved: {words}; mend that"


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), RuntimeError("ours"), KeyboardInterrupt()])
def test_other_errors_of_a_save_pass_unchanged(error):
    with pytest.raises(type(error)) as caught:
        fail_to_save(error)
    assert caught.value is error


# ---- Hashes ----------------------------------------------------------------------------------------------------------
def test_a_hash_is_that_of_texts_bytes_and_files_one_after_the_other(tmp_path):
    (tmp_path / "file").write_bytes(b"cd" * 2**20)
    expected = hashlib.sha256("é".encode() + b"ab" + b"cd" * 2**20).hexdigest()
    assert file_utils.sha256(["é", b"ab", tmp_path / "file"]) == expected
    assert file_utils.short_hash("é") == hashlib.sha256("é".encode()).hexdigest()[:12]


# ---- Records and earlier runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b'"text"', b"\xff\xfe{", None])
def test_a_damaged_or_missing_record_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_bytes(content)
    message = refusal(file_utils.read_json, path, "the run record")
    assert "the run record" in message
    assert str(path) in message


def test_an_earlier_run_is_moved_whole_and_the_rest_stays(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("old")
    (tmp_path / "rows.jsonl").write_text("rows")
    (tmp_path / "notes.txt").write_text("mine")
    target = run_utils.set_aside(tmp_path, ("adapter", "rows.jsonl", "absent"))
    assert target.parent == tmp_path / "previous"
    assert (target / "adapter" / "weights").read_text() == "old"
    assert (target / "rows.jsonl").read_text() == "rows"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous"]


def test_setting_aside_nothing_makes_no_folder(tmp_path):
    assert run_utils.set_aside(tmp_path, ("adapter",)) is None
    assert list(tmp_path.iterdir()) == []


def test_runs_set_aside_within_one_second_never_overwrite_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(run_utils.time, "strftime", lambda _: "20260101-000000")
    targets = []
    for number in range(4):
        (tmp_path / "adapter").write_text(str(number))
        targets.append(run_utils.set_aside(tmp_path, ("adapter",)))
    assert [(target / "adapter").read_text() for target in targets] == ["0", "1", "2", "3"]


def test_a_folder_that_does_not_exist_yet_is_writable_where_its_parent_is(tmp_path):
    file_utils.check_writable(tmp_path / "a" / "b", "--logs_dir")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_belongs_is_refused(tmp_path):
    (tmp_path / "output").write_text("a file")
    message = refusal(file_utils.check_writable, tmp_path / "output" / "deeper", "--output_dir")
    assert str(tmp_path / "output") in message


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    # by a fake of os.access, since root may write anywhere
    monkeypatch.setattr(file_utils.os, "access", lambda path, _: Path(path) != tmp_path)
    message = refusal(file_utils.check_writable, tmp_path / "output", "--output_dir")
    assert str(tmp_path) in message
    assert "--output_dir" in message


# ---- Messages and exit codes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rank", "heard"), [(None, "hello\n"), ("0", "hello\n"), ("1", "")])
def test_only_the_first_process_speaks_and_on_stderr(monkeypatch, capsys, rank, heard):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    message_utils.say("hello")
    out, err = capsys.readouterr()
    assert (out, err) == ("", heard)
    message_utils.say("trouble", each_process=True)
    assert capsys.readouterr().err == ("trouble\n" if heard else "process 1: trouble\n")


def raiser(error):
    def main(argv):
        raise error

    return main


ENDS = [
    (None, True),
    (message_utils.Stopped(15, "saved"), True),
    (UserError("no space left"), True),
    (UserError("out of memory", each_process=True), False),
    (torch.distributed.DistBackendError("NCCL error"), False),
    (ValueError(), False),
]


@pytest.mark.parametrize(("end", "left"), ENDS)
def test_processes_take_leave_of_each_other_where_all_end_together(end, left, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append(1))
    with contextlib.suppress(ValueError):
        script_utils.run_script(raiser(end) if end else len, [])
    assert bool(calls) is left


def test_a_script_that_ends_well_exits_with_zero_and_gets_its_arguments(capsys):
    seen = []
    assert script_utils.run_script(seen.append, ["--lora_r", "8"]) == 0
    assert seen == [["--lora_r", "8"]]
    assert capsys.readouterr().err == ""


def test_a_users_mistake_is_one_line_and_exit_code_two(capsys):
    assert script_utils.run_script(raiser(UserError("no such file")), []) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: no such file\n")


@pytest.mark.parametrize("each_process", [False, True])
@pytest.mark.parametrize(("rank", "local_rank"), [("0", "0"), ("1", "1"), ("1", "0")])
def test_a_mistake_is_said_by_the_first_on_a_machine_or_by_the_one_that_outlives_it(
    rank, local_rank, each_process, monkeypatch, capsys
):
    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(message_utils.time, "sleep", waited.append)
    assert script_utils.run_script(raiser(UserError("no such file", each_process=each_process)), []) == 2
    before = "" if rank == "0" else "process 1: "
    assert capsys.readouterr().err == f"{before}error: no such file\n"
    assert waited == ([message_utils.FIRST_SPEAKS] if local_rank == "1" else [])  # meanwhile a launcher ends it


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]"
        ),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."),
        torch.distributed.DistNetworkError("The client socket has timed out"),
    ],
)
def test_a_process_that_is_gone_is_one_line_for_the_others(error, capsys):
    assert script_utils.run_script(raiser(error), []) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "another process of this run ended" in line


def test_debug_shows_the_traceback_of_a_users_mistake(capsys):
    assert script_utils.run_script(raiser(UserError("no such file")), ["--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no such file\n")


def test_ctrl_c_exits_with_130_and_no_traceback(capsys):
    assert script_utils.run_script(raiser(KeyboardInterrupt()), []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        script_utils.run_script(raiser(ZeroDivisionError()), [])


def test_help_exits_with_zero_and_prints_every_group_that_has_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        given("--help")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    banners = re.findall(r"^# ---- (.+?) -+$", Path(config.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    without_flags = {"Evaluation", banners[-1]}  # of evaluate.py alone, and CPU_DEMO, which is no flag
    assert {banner for banner in banners if f"{banner}:" not in out} == without_flags


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (90, "1 min 30 s"),
        (3599.7, "1 h"),
        (3661, "1 h 1 min"),
        (90000, "25 h"),
    ],
)
def test_durations_are_short_to_read(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("LORA_R = 16", "# LORA_R = 16"), "config.py lacks LORA_R; restore what was there"),
        (("LORA_R = 16", "LORA_R = '16'"), ": LORA_R is '16', expected a whole number; correct it"),
        (("SEED = 42", "SEED = -1"), ": SEED is -1, expected 0 to 4294967295; correct it there"),
        (("SEED = 42", "SEED = ="), ": invalid syntax (SyntaxError); correct it"),
        (("SEED = 42", "SEED = 42\nSEEED = 3"), ": SEEED is no setting; did you mean SEED?"),
        (("SEED = 42", "SEED = 42\nlora_r = 3"), ": lora_r is no setting; did you mean LORA_R?"),
        (("DATASET_COLUMNS = ", "COLUMNS = "), ": COLUMNS is no setting; did you mean DATASET_COLUMNS?"),
        (("SEED = 42", "raise KeyboardInterrupt"), ": (KeyboardInterrupt); correct it"),
        (("SEED = 42", "SEED = seed"), ": name 'seed' is not defined (NameError); correct it"),
        (("CPU_DEMO = {", "CPU_DEMO = 3 or {"), ": CPU_DEMO is 3, expected a dict of settings"),
        (('OUTPUT_DIR = "output"', "OUTPUT_DIR = 5"), ": OUTPUT_DIR is 5, expected a text; correct it"),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_a_mistake_in_config_is_one_line(script, edit, message, tmp_path):
    for path in PROJECT_DIR.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = Path(config.__file__).read_text(encoding="utf-8")
    assert edit[0] in text
    (tmp_path / "config.py").write_text(text.replace(*edit), encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    lines = (tmp_path / "config.py").read_text(encoding="utf-8").splitlines()
    number = next(n for n, line in enumerate(lines, 1) if edit[1].splitlines()[-1] in line)
    place = "" if "lacks" in message else f", line {number}"
    assert done.stderr.startswith(f"error: config.py{place}")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_no_setting_is_named(gpu, monkeypatch):
    monkeypatch.setitem(settings_utils.CONFIG, "CPU_DEMO", {"FOO": 1})
    assert refusal(settings_utils.make_settings).endswith("CPU_DEMO['FOO'] is no setting; correct or remove it")
    monkeypatch.undo()
    assert refusal(settings_utils.make_settings, {"lora_rr": 8}).startswith("unknown settings: LORA_RR;")


@pytest.mark.parametrize("name", ["../out", "/tmp/x", "a/b", ".."])
def test_a_run_name_cannot_leave_the_logs_folder(name):
    assert "--run_name" in refusal(settings_utils.check_settings, with_value("run_name", name))


@pytest.mark.parametrize("name", ["custom_dataset_path", "output_dir", "base_model_name", "run_name"])
def test_an_empty_value_is_not_taken_for_a_missing_one(name):
    assert f"--{name} is empty" in refusal(settings_utils.check_settings, with_value(name, " "))


def test_control_characters_of_a_users_file_do_not_reach_the_terminal():
    assert str(message_utils.UserError("columns found: \x1b[31mred\nx")) == "columns found: [31mred x"
