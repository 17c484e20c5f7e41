"""Does a run take as long as it announces? Trains three on a CPU and prints announced over real seconds.

    python benchmarks/announced.py                 # some minutes; a line of JSON for each run
    python benchmarks/announced.py --clock cpu     # by processor time, where other programs use the machine as well

The announced seconds are those of the line `Time`, from its moment on; the real ones are those from there to the end.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

# What differs from config.py's settings for a CPU
RUNS = {
    "the demo": {},
    "many short rows, a large validation set": {
        "rows": (1500, 12),
        "validation_split": 0.3,
        "num_epochs": 1,
        "eval_steps": 30,
        "eval_rows": 200,
    },
    "long rows, long answers": {
        "rows": (240, 120),
        "num_epochs": 1,
        "batch_size": 8,
        "eval_steps": 5,
        "sample_prompts": 8,
        "max_new_tokens": 160,
    },
}
WORDS = ("the", "a", "dog", "cat", "bell", "chain", "runs", "sings", "red", "green", "tall", "over", "under", "with")


def write_rows(path, count, words):
    """Rows of so many words an answer, more or less; no two are alike."""
    draw = random.Random(0)
    rows = [
        {
            "instruction": f"Tell me of {n}",
            "response": " ".join(draw.choices(WORDS, k=draw.randint(words // 2, words * 2))),
        }
        for n in range(count)
    ]
    path.write_text(json.dumps(rows))


def train_one(name, folder, clock):
    """Train one of RUNS in this process and print its figures."""
    import train
    import training_utils
    from message_utils import quiet_libraries
    from settings_utils import CONFIG, DEFAULTS, Settings

    quiet_libraries()
    changes = dict(RUNS[name])
    demo = {key.lower(): value for key, value in CONFIG["CPU_DEMO"].items()}
    settings = Settings(**DEFAULTS)._replace(
        **demo, device="cpu", output_dir=f"{folder}/out", logs_dir=f"{folder}/logs"
    )
    if "rows" in changes:
        write_rows(folder / "rows.json", *changes.pop("rows"))
        settings = settings._replace(custom_dataset_path=f"{folder}/rows.json")
    if clock == "cpu":
        time.perf_counter = time.process_time
    announced, rehearse = [], training_utils.LoraTrainer.rehearse

    def noted(trainer, scratch):
        rehearse(trainer, scratch)
        announced.extend([time.perf_counter(), trainer.times.left(0)])

    training_utils.LoraTrainer.rehearse = noted
    train.train(settings._replace(**changes))
    real = time.perf_counter() - announced[0]
    figures = {"announced_s": round(announced[1], 1), "real_s": round(real, 1), "ratio": round(announced[1] / real, 2)}
    print(json.dumps({"run": name, "clock": clock} | figures), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--one", choices=RUNS, help="train this run only, in this process")
    options = parser.parse_args()
    for name in [options.one] if options.one else RUNS:
        with tempfile.TemporaryDirectory() as folder:
            if options.one:
                train_one(name, Path(folder), options.clock)
                continue
            command = [sys.executable, __file__, "--one", name, "--clock", options.clock]
            environment = os.environ | ({"OMP_NUM_THREADS": "1"} if options.clock == "cpu" else {})
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            print(done.stdout.splitlines()[-1] if done.returncode == 0 else done.stderr, flush=True)


if __name__ == "__main__":
    main()
