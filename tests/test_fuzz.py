"""Random bytes in each file of an output folder, random values in each setting: a line or the right result, no more.

The seeds are fixed, so that what failed once fails again. `python -m pytest -m "" tests/test_fuzz.py` tries all
of them, some five hundred files.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
import inference
import settings_utils
import train
from conftest import PROJECT, TINY_BASE, adapter_bytes, small_base
from message_utils import UserError
from script_utils import run_script
from settings_utils import DEFAULTS

ROWS = [{"instruction": f"Say {word} {n} times", "response": word} for word in ("red", "blue") for n in range(12)]
SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(2, 20))]
FLAGS = {
    "base_model_name": small_base(),
    "device": "cpu",
    "use_4bit_quantization": "false",
    "gradient_checkpointing": "false",
    "sample_prompts": 0,
    "max_steps": 3,
    "eval_steps": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "lora_r": 2,
    "lora_target_modules": "q_proj",
}


def command_line(folder, **changes):
    flags = FLAGS | {"output_dir": folder / "out", "logs_dir": folder / "logs"} | changes
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    """The output folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_script(train.main, command_line(folder, custom_dataset_path=rows)) == 0
    return folder / "out"


def spoil(path, draw):
    """Random bytes at a random place of a file, or a file that is cut, longer or made of nothing but them."""
    content = bytearray(path.read_bytes())
    place, noise = draw.randrange(len(content) + 1), draw.randbytes(draw.choice((1, 4, 64)))
    kind = draw.randrange(5)
    if kind == 0:
        content[place : place + len(noise)] = noise
    elif kind == 1:
        content = content[:place]
    elif kind == 2:
        content += noise
    elif kind == 3:
        content = bytearray(noise)
    elif content:
        content[min(place, len(content) - 1)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def end_of(main, argv, capsys):
    """(exit code, stdout) of a script; it must end without a traceback, and code 2 with one line."""
    capsys.readouterr()
    code = run_script(main, argv)
    printed, said = capsys.readouterr()
    lines = said.splitlines()
    assert code in (0, 2)
    assert "Traceback" not in said, lines
    if code == 2:
        assert lines[-1].startswith("error: "), lines
    return code, printed


@pytest.mark.parametrize("seed", SEEDS)
def test_random_bytes_in_a_checkpoint_or_a_cache_change_no_result(seed, rows, finished, tmp_path, capsys):
    names = [name for name in names_in(finished) if name.startswith(("checkpoints", "cache", "validation", ".lock"))]
    draw = random.Random(seed)
    for number, name in enumerate(draw.sample(names, 8)):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder / "out")
        shutil.rmtree(folder / "out/lora-adapter")
        spoil(folder / "out" / name, draw)
        code, _ = end_of(train.main, command_line(folder, custom_dataset_path=rows), capsys)
        if code == 0:
            assert adapter_bytes(folder / "out") == adapter_bytes(finished), name


@pytest.mark.parametrize("seed", SEEDS)
def test_random_bytes_in_an_adapter_are_a_line_or_change_no_answer(seed, finished, tmp_path, capsys):
    draw = random.Random(seed)
    flags = ["Hi", "--max_new_tokens=8", "--do_sample=false", "--device=cpu"]
    expected = end_of(inference.main, [*flags, f"--adapter_path={finished / 'lora-adapter'}"], capsys)
    for number, name in enumerate(names_in(finished / "lora-adapter")):
        folder = tmp_path / str(number)
        shutil.copytree(finished / "lora-adapter", folder)
        spoil(folder / name, draw)
        code, answer = end_of(inference.main, [*flags, f"--adapter_path={folder}"], capsys)
        assert code == 2 or answer == expected[1], name


@pytest.mark.parametrize("seed", SEEDS)
def test_random_bytes_in_the_rows_to_evaluate_on_are_a_line_or_rows(seed, finished, tmp_path, capsys):
    draw = random.Random(seed)
    for number in range(2):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        spoil(folder / "validation.jsonl", draw)
        flags = ["--eval_samples=0", "--device=cpu", f"--adapter_path={folder / 'lora-adapter'}"]
        end_of(evaluate.main, flags, capsys)


VALUES = (
    *(None, True, False, 0, -1, 1, 7, 10**30, -(10**30), 0.5, -0.5, 1e308, float("nan"), float("inf"), 1j),
    *("", " ", "x", "auto", "none", "\0", "a\0b", "~nouser", "../..", "\ud800", "x" * 5000, "1", "\x1b[31m"),
    *(b"x", [], [1], (), {}, {"a": 1}, {1: 2}, {"instruction": []}, object(), len, Path(TINY_BASE), range(3)),
)


def words_of(function, *arguments):
    """What the call refuses its arguments with; an empty text if it takes them."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", DEFAULTS)
def test_any_value_of_a_setting_is_taken_or_refused_in_a_line(name, monkeypatch):
    shown = random.Random(name).sample(VALUES, 8)  # a parser takes a hundredth of a second
    for value in VALUES:
        for sources in (({name: value}, None), ({}, {name: value})):
            assert len(words_of(settings_utils.make_settings, *sources)) < 400
        with monkeypatch.context() as patch:
            patch.setitem(DEFAULTS, name, value)
            readers = [settings_utils.make_settings]
            if any(value is one for one in shown):
                readers.append(lambda: settings_utils.build_parser("train.py", "about"))
            for reader in readers:
                words = words_of(reader)
                assert not words or words.startswith("config.py")


@pytest.mark.parametrize("name", DEFAULTS)
def test_any_text_of_a_flag_is_taken_or_refused_in_a_line(name):
    script = next(script for script, names in settings_utils.USED_SETTINGS.items() if name in names)
    parser = settings_utils.build_parser(script, "about")
    draw = random.Random(name)
    texts = ["", "[" * 100_000, "9" * 5000, "1e999", "nan", "-0", "\ud800"]
    texts += ["".join(chr(draw.randrange(1, 0x300)) for _ in range(draw.randrange(1, 40))) for _ in range(50)]
    for text in texts:
        assert len(words_of(settings_utils.parse_command_line, parser, [f"--{name}={text}"])) < 500


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "inference.py"])
def test_ctrl_c_at_any_moment_of_the_start_leaves_no_traceback(script, tmp_path):
    draw = random.Random(script)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for storm in (1, 5, 1, 5, 1, 5):
        process = subprocess.Popen(
            [sys.executable, PROJECT / script, "--output_dir", tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        time.sleep(0.1 + 0.6 * draw.random())
        for _ in range(storm):
            process.send_signal(2)
            time.sleep(0.005)
        said = process.communicate(timeout=60)[1]
        assert process.returncode in (-2, 130, 2)  # 2: there is no adapter
        assert "Traceback" not in said
        assert "ignored" not in said
