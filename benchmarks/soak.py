"""Does a long run that is stopped again and again stay as small as it began? Trains in this one process on a CPU.

    python benchmarks/soak.py                                       # 2,000 steps, 100 evaluations, 50 stops
    python benchmarks/soak.py --steps 60 --eval_every 6 --stops 5   # a short one

Every stop is a SIGTERM: the run saves and ends, and the next one goes on in the same process, so that whatever a run
leaves behind adds up. Prints a line of JSON: memory, open files and threads after an early stop and after the last one.
Exit code 1 if they grew.
"""

import argparse
import gc
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

import train  # noqa: E402
import training_utils  # noqa: E402
from kill_harness import settings_of, write_base, write_data  # noqa: E402
from message_utils import Stopped, quiet_libraries  # noqa: E402

SETTLED = 5  # stops after which what is loaded once is loaded


def look(process):
    """What the process holds now."""
    return {
        "memory_mib": process.memory_info().rss / 2**20,
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def soak(folder, steps, eval_every, stops, seed):
    """Train with so many stops; returns what the process held after each."""
    write_data(folder)
    changes = {"max_steps": steps, "num_epochs": 10_000, "eval_steps": eval_every, "early_stopping_patience": 0}
    changes |= {"base_model_name": write_base(folder / "base"), "logging_steps": 50}
    settings = settings_of(folder, folder / "out")._replace(**changes)
    due = set(random.Random(seed).sample(range(1, steps), stops))
    step = training_utils.LoraTrainer.training_step

    def stopped_step(trainer, *arguments, **options):
        if trainer.state.global_step in due:
            due.discard(trainer.state.global_step)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *arguments, **options)

    training_utils.LoraTrainer.training_step = stopped_step
    process, held = psutil.Process(), []
    while True:
        try:
            train.train(settings)
        except Stopped:
            held.append(look(process))
        else:
            return [*held, look(process)]


def summarize(held, seconds):
    """Figures early and late, and whether they grew: memory by a twentieth, files or threads by one."""
    early, late = held[SETTLED : SETTLED + 5], held[-5:]
    figures = {"seconds": round(seconds), "stops": len(held) - 1}
    grew = []
    for name, room in {"memory_mib": 1.05, "files": 1, "threads": 1}.items():
        first, last = (statistics.median(sample[name] for sample in samples) for samples in (early, late))
        figures[name] = [round(first, 1), round(last, 1), round(max(sample[name] for sample in held), 1)]
        grew += [name] if last > first * room else []
    return figures | {"grew": grew}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--eval_every", type=int, default=20)
    parser.add_argument("--stops", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_libraries()
    gc.freeze()  # looking through the libraries, which stay, would take a second each time
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        held = soak(Path(folder), options.steps, options.eval_every, options.stops, options.seed)
    figures = summarize(held, time.time() - started)
    print(json.dumps({"steps": options.steps, "evaluations": options.steps // options.eval_every} | figures))
    return 1 if figures["grew"] else 0


if __name__ == "__main__":
    sys.exit(main())
