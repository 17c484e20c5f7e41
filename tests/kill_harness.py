"""Kill training runs with SIGKILL at random moments, let them go on, and compare what they end with to the byte.

    python tests/kill_harness.py --kills 30 --seed 0

Each run is a fork of this process, which has loaded the libraries once, so that a run takes about two seconds. Prints
one line of JSON: kills, how many of them inside a save, runs, and how many of these ended in other bytes.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import train
from message_utils import quiet_libraries, run_script
from settings_utils import DEFAULTS, Settings

TINY_BASE = Path(__file__).resolve().parent.parent / "models" / "tiny-base"
WEIGHTS = "lora-adapter/adapter_model.safetensors"


def write_data(folder):
    """A training file, and validation rows that it contradicts, so that the best checkpoint is an early one."""
    for name, counts, answer in (("train", range(1, 7), "{word}"), ("validation", range(10, 14), "a dog ran")):
        rows = [
            {"instruction": f"Say {word} {n} times", "response": " ".join([answer.format(word=word)] * n)}
            for word in ("red", "green", "blue", "grey")
            for n in counts
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def settings_of(data, output_dir):
    """Dropout, accumulation, several passes to a step, early stopping and the best checkpoint: all on."""
    return Settings(**DEFAULTS)._replace(
        base_model_name=str(TINY_BASE),
        custom_dataset_path=str(data / "train.json"),
        validation_dataset_path=str(data / "validation.json"),
        output_dir=str(output_dir),
        logs_dir=str(output_dir / "logs"),
        run_name="run",
        use_4bit_quantization=False,
        device="cpu",
        gradient_checkpointing=False,
        lora_r=4,
        lora_dropout=0.1,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        batch_size=2,
        gradient_accumulation_steps=2,
        max_seq_length=48,
        num_epochs=4,
        eval_steps=2,
        logging_steps=3,
        early_stopping_patience=3,
        sample_prompts=1,
        max_new_tokens=3,
    )


def start(data, output_dir):
    """Begin a run, or go on with it, in a fork; returns its pid. Its messages go to OUTPUT_DIR.log."""
    pid = os.fork()
    if pid == 0:
        log = os.open(f"{output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        quiet_libraries()
        os._exit(run_script(lambda argv: train.train(settings_of(data, output_dir)), []))
    return pid


def ended(pid):
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def is_saving(output_dir):
    return (output_dir / "checkpoints/incomplete").exists() or (output_dir / "lora-adapter.incomplete").exists()


def kill_in_a_save(pid, output_dir, draw):
    """Kill the run at a random moment of one of its next saves; False if it ended before."""
    for _ in range(draw.randint(1, 3)):  # of so many saves the last is hit
        while is_saving(output_dir):
            if ended(pid):
                return False
        while not is_saving(output_dir):
            if ended(pid):
                return False
    time.sleep(draw.uniform(0, 0.04))
    return kill(pid)


def kill_at_any_moment(pid, seconds, draw):
    """Kill the run somewhere between its start and the time that an undisturbed one takes; False if it ended."""
    time.sleep(draw.uniform(0, seconds))
    return not ended(pid) and kill(pid)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def finish_run(data, output_dir):
    code = os.waitstatus_to_exitcode(os.waitpid(start(data, output_dir), 0)[1])
    if code != 0:
        raise RuntimeError(f"the run ended with {code}:\n{Path(f'{output_dir}.log').read_text()}")
    return (output_dir / WEIGHTS).read_bytes()


def harass(folder, kills, seed):
    """Kill runs so many times in all, one to four times each, and return the figures."""
    draw = random.Random(seed)
    write_data(folder)
    began = time.time()
    expected = finish_run(folder, folder / "whole")
    seconds = time.time() - began
    figures = {"kills": 0, "inside_saves": 0, "runs": 0, "other_bytes": 0, "seconds_of_a_run": round(seconds, 1)}
    while figures["kills"] < kills:
        figures["runs"] += 1
        output_dir = folder / f"run-{figures['runs']}"
        for _ in range(min(draw.randint(1, 4), kills - figures["kills"])):
            pid = start(folder, output_dir)
            in_a_save = draw.random() < 0.6
            killed = kill_in_a_save(pid, output_dir, draw) if in_a_save else kill_at_any_moment(pid, seconds, draw)
            figures["kills"] += killed
            figures["inside_saves"] += killed and is_saving(output_dir)
            if not killed:
                break
        if not (output_dir / WEIGHTS).exists():
            finish_run(folder, output_dir)
        figures["other_bytes"] += (output_dir / WEIGHTS).read_bytes() != expected
    return figures


if __name__ == "__main__":
    for module in ("checkpoint_utils", "data_utils", "generation_utils", "board_utils", "torch.utils.tensorboard"):
        importlib.import_module(module)  # train.py loads them late; the forks are to find them loaded
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(harass(Path(scratch), options.kills, options.seed)))
