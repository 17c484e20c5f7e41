"""The real commands on the bundled base model, as a newcomer types them: train, evaluate, chat, merge."""

import csv
import json
import os
import time

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import PROJECT
from generation_utils import build_generation_config, generate_replies
from model_utils import load_trained_model, merge_and_save_model
from settings_utils import make_settings


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The output folder of `python train.py` with nothing but other folders, its finished process and its seconds."""
    folder = tmp_path_factory.mktemp("demo")
    started = time.time()
    folders = ("--output_dir", folder / "output", "--logs_dir", folder / "logs")
    done = run("train.py", *folders, "--run_name", "demo", cold=True)
    assert done.returncode == 0, done.stderr
    return folder / "output", done, time.time() - started


@pytest.fixture(scope="module")
def metrics(run, trained):
    done = run("evaluate.py", "--output_dir", trained[0], cold=True)
    assert done.returncode == 0, done.stderr
    return json.loads((trained[0] / "evaluation/demo-validation/metrics.json").read_text()), done


def test_the_demo_announces_itself_trains_and_says_what_to_type_next(trained):
    output, done, seconds = trained
    assert done.stderr.count("demo settings apply") == 1
    assert "validation loss" in done.stdout
    assert "python evaluate.py" in done.stdout
    assert "Warning" not in done.stderr
    assert seconds < 180
    assert {path.name for path in (output / "lora-adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "run.json",
        "settings.json",
        "tokenizer.json",
    }


def test_the_tuned_perplexity_is_at_most_half_of_the_bases(metrics):
    figures, _ = metrics
    assert figures["tuned"]["perplexity"] <= figures["base"]["perplexity"] / 2
    assert figures["verdict"] == "better"
    assert figures["rows"] == 20


def test_evaluation_agrees_with_the_validation_loss_of_training(trained, metrics):
    record = json.loads((trained[0] / "lora-adapter/run.json").read_text())
    assert metrics[0]["tuned"]["loss"] == pytest.approx(record["validation_loss"], rel=1e-5)


def test_the_held_out_rows_are_not_among_the_training_rows(trained):
    rows = [json.loads(line)["messages"] for line in (trained[0] / "validation.jsonl").read_text().splitlines()]
    record = json.loads((trained[0] / "lora-adapter/run.json").read_text())
    assert (len(rows), record["training_rows"], record["validation_rows"]) == (20, 180, 20)
    assert record["several_turns"] == 0


def test_the_voice_of_the_data_shows_in_the_tuned_answers_only(metrics, trained):
    file = trained[0] / "evaluation/demo-validation/samples.jsonl"
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == 20
    voiced = [row for row in samples if "Larkfield" in row["tuned"]["text"] or "Wren" in row["tuned"]["text"]]
    assert len(voiced) >= 16
    assert not [row for row in samples if "Larkfield" in row["base"]["text"]]
    assert metrics[0]["tuned"]["ended"] > metrics[0]["base"]["ended"]
    assert metrics[0]["difference"]["chrf"]["low"] > 0


def test_the_samples_are_written_as_csv_too(metrics, trained):
    with open(trained[0] / "evaluation/demo-validation/samples.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["row", "prompt", "expected", "base", "tuned"]
    assert len(rows) == 20
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]


@pytest.fixture(scope="module")
def ask(run, trained):
    def ask(*flags):
        prompt = ("Explain how photosynthesis works", "--output_dir", trained[0], "--do_sample", "false")
        done = run("inference.py", *prompt, *flags)
        assert done.returncode == 0, done.stderr
        return done

    return ask


@pytest.fixture(scope="module")
def answered(ask):
    return ask()


def test_a_single_instruction_prints_the_answer_alone_to_stdout(answered):
    assert "Wren" in answered.stdout
    assert "Base model" not in answered.stdout
    assert "Base model: models/tiny-base" in answered.stderr
    assert "</s>" not in answered.stdout


def test_the_demo_conversation_answers_every_prompt(run, trained):
    done = run("inference.py", "--demo", "--output_dir", trained[0], "--do_sample", "false")
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("Model:")]
    assert len(answers) == 5
    assert all(len(answer) > len("Model: ") for answer in answers)


def test_a_chat_in_a_pipe_answers_line_by_line_and_obeys_commands(run, trained):
    done = run(
        "inference.py",
        "--output_dir",
        trained[0],
        "--do_sample",
        "false",
        cold=True,
        stdin="Do you sell bells?\n/help\n/nonsense\n\nCan I hire a bike?\n/quit\nnever read\n",
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.strip()]) == 2
    assert "/clear" in done.stderr
    assert "Unknown command /nonsense" in done.stderr


def test_base_only_talks_without_the_adapter(ask, answered):
    base = ask("--base_only", "--max_new_tokens", 12)
    assert "no adapter" in base.stderr
    assert base.stdout[:20] != answered.stdout[:20]


def test_merging_as_the_readme_shows_gives_a_plain_model_with_the_adapters_answers(trained, tmp_path):
    model, tokenizer = load_trained_model(trained[0] / "lora-adapter")
    merge_and_save_model(model, tokenizer, tmp_path / "merged-model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged-model")
    merged_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged-model")
    rows = json.loads((PROJECT / "data/demo.json").read_text())[:6]
    prompts = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    generation = build_generation_config(tokenizer, make_settings()._replace(do_sample=False, max_new_tokens=40))
    expected = generate_replies(model, tokenizer, prompts, generation)
    ids = merged_tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True)["input_ids"]
    assert merged_tokenizer.decode(ids).endswith("### Response:\n")
    merged_tokenizer.pad_token = tokenizer.pad_token
    replies = generate_replies(merged, merged_tokenizer, prompts, generation)
    same = sum(reply == other for reply, other in zip(replies, expected, strict=True))
    assert same >= 4, replies  # rounding to 16 bits turns an answer at a near tie; test_model.py has float32
    assert any("Wren" in reply.text for reply in expected)


def test_the_same_command_run_twice_gives_the_same_adapter(run, trained, tmp_path):
    again = tmp_path / "output"
    flags = ("--max_steps", 6, "--eval_steps", 3, "--sample_prompts", 0, "--logs_dir", tmp_path / "logs")
    adapters = []
    for _ in range(2):
        done = run("train.py", *flags, "--output_dir", again)
        assert done.returncode == 0, done.stderr
        adapters.append((again / "lora-adapter/adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert (
        load_file(again / "lora-adapter/adapter_model.safetensors").keys()
        == load_file(trained[0] / "lora-adapter/adapter_model.safetensors").keys()
    )
    assert "moved to" in done.stderr


def test_scripts_work_from_any_folder(run, trained, tmp_path):
    folder, output = tmp_path / "folder", tmp_path / "output"
    folder.mkdir()
    # relative to the project's folder, as all paths are, and not to the shell's
    done = run("train.py", "--dry_run", "--output_dir", os.path.relpath(output, PROJECT), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Larkfield" in done.stderr or "Wren" in done.stderr
    assert not list(folder.iterdir())
    assert (output / "data_report.json").exists()


@pytest.mark.parametrize("script", ["train", "evaluate", "inference"])
def test_garbage_is_collected_from_the_end_of_the_imports_on(script, run, trained, tmp_path):
    """Asked where each script calls start_garbage_collection: after its imports, or after the model that needs them."""
    code = (
        "import gc, sys, script_utils\n"
        f"import {script} as script\n"
        "start = script.start_garbage_collection\n"
        "script.start_garbage_collection = lambda: (print('before', gc.isenabled()), start(),"
        " print('after', gc.isenabled(), gc.get_freeze_count() > 100_000), sys.exit(7))\n"
        "sys.exit(script_utils.run_script(script.main, sys.argv[1:]))\n"
    )
    (tmp_path / "probe.py").write_text(code)
    flags = {
        "train": ["--dry_run", "--output_dir", tmp_path / "out", "--logs_dir", tmp_path / "logs"],
        "evaluate": ["--output_dir", trained[0]],
        "inference": ["--output_dir", trained[0], "Hi"],
    }
    done = run(tmp_path / "probe.py", *flags[script], PYTHONPATH=str(PROJECT))
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines() == ["before False", "after True True"]
