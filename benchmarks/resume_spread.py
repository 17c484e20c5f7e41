"""How far a run that was killed and resumed lies from an undisturbed one, and two undisturbed ones from each other.

    python benchmarks/resume_spread.py RESULTS                                             # on a CUDA machine, 4-bit
    python benchmarks/resume_spread.py RESULTS --device cpu --use_4bit_quantization false  # here all must be equal

Trains models/tiny-base with dropout for 24 steps, twice undisturbed and once killed by SIGKILL right after
checkpoint-12 and resumed. Further flags are train.py's. RESULTS gets the runs, their logs and spread.json.
"""

import argparse
import json
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

from safetensors.torch import load_file

PROJECT = Path(__file__).resolve().parent.parent
FLAGS = ("--base_model_name=models/tiny-base", "--custom_dataset_path=data/demo.json", "--validation_split=0")
FLAGS += ("--lora_dropout=0.1", "--learning_rate=1e-3", "--gradient_accumulation_steps=2", "--num_epochs=2")
FLAGS += ("--max_steps=24", "--eval_steps=12", "--logging_steps=1")
BEGAN = time.time()


def tell(message):
    print(f"{time.time() - BEGAN:4.0f} s  {message}", flush=True)


def start(folder, flags):
    """Begin a run in the folder, or go on with it; its messages are added to FOLDER.log."""
    command = [sys.executable, PROJECT / "train.py", *FLAGS, *flags]
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, "--output_dir", folder, "--logs_dir", folder / "logs"], stdout=log, stderr=log
        )


def finish(name, process):
    if process.wait() != 0:
        raise SystemExit(f"{name} ended with {process.returncode}; see its log")
    tell(f"{name} has ended")


def kill_after_checkpoint(folder, process, step):
    while not (folder / f"checkpoints/checkpoint-{step}").exists():
        if process.poll() is not None:
            raise SystemExit(f"{folder.name} ended with {process.returncode} before its checkpoint; see its log")
        time.sleep(0.005)
    process.kill()
    process.wait()
    tell(f"{folder.name} was killed after checkpoint-{step}")


def read_run(folder):
    """Return the adapter's bytes and tensors, and {step: loss}."""
    path = folder / "lora-adapter/adapter_model.safetensors"
    history = json.loads((folder / "checkpoints/checkpoint-24/trainer_state.json").read_text())["log_history"]
    return path.read_bytes(), load_file(path), {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def compare(first, second):
    """The largest differences of two runs' tensors, absolute and relative to the tensor's largest value, and losses."""
    (bytes_a, tensors_a, losses_a), (bytes_b, tensors_b, losses_b) = first, second
    moved = {name: (tensors_a[name] - tensors_b[name]).abs().max().item() for name in tensors_a}
    apart = [step for step in losses_a if losses_a[step] != losses_b.get(step)]
    return {
        "bytes_equal": bytes_a == bytes_b,
        "tensors_that_differ": f"{sum(value > 0 for value in moved.values())} of {len(moved)}",
        "largest_difference": max(moved.values()),
        "largest_relative_difference": max(moved[name] / tensors_a[name].abs().max().item() for name in moved),
        "first_loss_that_differs": f"step {apart[0]}" if apart else None,
        "largest_difference_of_losses": max(abs(losses_a[step] - losses_b[step]) for step in losses_a),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a folder that does not exist yet")
    options, flags = parser.parse_known_args()
    results = options.results.resolve()
    results.mkdir(parents=True)
    names = ("undisturbed 1", "undisturbed 2", "killed")
    folders = {name: results / name.replace(" ", "-") for name in names}
    processes = {name: start(folder, flags) for name, folder in folders.items()}
    kill_after_checkpoint(folders["killed"], processes["killed"], 12)
    processes["killed"] = start(folders["killed"], flags)
    for name in names:
        finish(name, processes[name])
    runs = {name: read_run(folders[name]) for name in names}
    spread = {f"{a} | {b}": compare(runs[a], runs[b]) for a, b in combinations(names, 2)}
    (results / "spread.json").write_text(json.dumps(spread, indent=2) + "\n")
    print(json.dumps(spread, indent=2))


if __name__ == "__main__":
    main()
