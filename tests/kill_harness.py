"""Kill commands with SIGKILL, let them be typed again, and compare what they end with to the byte.

    python tests/kill_harness.py --kills 30 --seed 0     # training runs, at random moments
    python tests/kill_harness.py --events all            # each command before each thing it does to a file or folder
    python tests/kill_harness.py --events 8              # before eight of them, drawn by the seed

Each command is a fork of this process, which has loaded the libraries once, so that a run takes about two seconds.
Prints lines of JSON. Of random moments: kills, how many of them inside a save, runs, and how many of these ended in
other bytes. Of events: for each command how many there are, at how many it was killed, and where it ended otherwise.
"""

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

import evaluate
import inference
import model_utils
import train
from message_utils import quiet_libraries
from script_utils import run_script
from settings_utils import DEFAULTS, Settings

TINY_BASE = Path(__file__).resolve().parent.parent / "models" / "tiny-base"
WEIGHTS, ANSWERS = "lora-adapter/adapter_model.safetensors", "answers.jsonl"


def write_data(folder):
    """A training file, and validation rows that it contradicts, so that the best checkpoint is an early one."""
    for name, counts, answer in (("train", range(1, 7), "{word}"), ("validation", range(10, 14), "a dog ran")):
        rows = [
            {"instruction": f"Say {word} {n} times", "response": " ".join([answer.format(word=word)] * n)}
            for word in ("red", "green", "blue", "grey")
            for n in counts
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))


def write_base(folder):
    """A base model of one small layer, whose runs take no time but that of what surrounds the computing."""
    config = transformers.AutoConfig.from_pretrained(TINY_BASE)
    config.update({"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16})
    transformers.set_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained(folder)
    return str(folder)


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
        num_epochs=2,
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
        raise RuntimeError(f"the run ended with {code}:\n{Path(f'{output_dir}.log').read_text(encoding='utf-8')}")
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


# ---- Kills at events -------------------------------------------------------------------------------------------------
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


def changes_files(event, arguments, folder):
    """Whether an event of Python's audit hooks is about to change something in a folder."""
    if event not in CHANGES and not (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
        return False
    try:
        return os.fsdecode(arguments[0]).startswith(str(folder))
    except TypeError:  # an open descriptor
        return False


def fork_command(command, folder, kill_before=None):
    """Run command(folder) in a fork that is killed before its n-th change of a file; returns (exit code, changes).

    The code is -9 where it was killed. What it says goes to FOLDER.log.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        met = []

        def hook(event, arguments):
            if changes_files(event, arguments, folder):
                met.append(event)
                if len(met) == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        code = run_script(lambda argv: command(folder), [])
        os.write(writer, str(len(met)).encode())
        os._exit(code)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(reader, "rb") as pipe:
        count = pipe.read()
    return code, int(count or 0)


def train_command(folder, **changes):
    quiet_libraries()
    settings = settings_of(folder.parent, folder)._replace(base_model_name=str(folder.parent / "base"), max_steps=3)
    train.train(settings._replace(**changes))


def evaluate_command(folder):
    quiet_libraries()
    evaluate.main(["--output_dir", str(folder), "--eval_samples", "2", "--max_new_tokens", "3"])


def merge_command(folder):
    model_utils.merge_and_save_model(*model_utils.load_trained_model(folder / "lora-adapter"), folder / "merged-model")


def batch_command(folder):
    quiet_libraries()
    files = ["--input_file", str(folder.parent / "validation.json"), "--output_file", str(folder / ANSWERS)]
    inference.main(["--output_dir", str(folder), *files, "--max_new_tokens", "3"])


def files_of(folder, *kept):
    """{name: content} of the files below those names in a folder."""
    paths = [path for name in kept for path in [folder / name, *(folder / name).rglob("*")] if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def trained(folder):
    """What a training leaves: its adapter, its validation rows, and adapters of earlier runs where they were moved."""
    earlier = [path.read_bytes() for path in folder.glob("previous/*/" + WEIGHTS)]
    return files_of(folder, WEIGHTS, "validation.jsonl") | {"earlier": sorted(earlier)}


# name -> the command, whether it starts in the folder of a finished run, and what it leaves
COMMANDS = {
    "train": (train_command, False, trained),
    "train where a run had finished": (train_command, True, trained),
    "evaluate": (evaluate_command, True, lambda folder: files_of(folder, "evaluation", "lora-adapter")),
    "batch inference": (batch_command, True, lambda folder: files_of(folder, ANSWERS, "lora-adapter")),
    "merge": (merge_command, True, lambda folder: files_of(folder, "merged-model", "lora-adapter")),
}
# the file that a command puts in place last, where typing it again would not do the same once more
LAST = {"train": WEIGHTS, "train where a run had finished": WEIGHTS, "batch inference": ANSWERS}


def sweep(scratch, chosen, draw, only=None):
    """Kill each command before each of its changes, or before `chosen` of all; yields a dict of figures for each."""
    write_data(scratch)
    write_base(scratch / "base")
    finished = scratch / "finished"
    earlier = partial(train_command, seed=7)
    assert fork_command(earlier, finished)[0] == 0, Path(f"{finished}.log").read_text(encoding="utf-8")
    plans = {}
    for name, (command, begun, result) in COMMANDS.items():
        whole = [scratch / f"{name}-{number}".replace(" ", "-") for number in (1, 2)]
        counts = []
        for folder in whole if only in (None, name) else ():
            if begun:
                shutil.copytree(finished, folder)
            code, count = fork_command(command, folder)
            assert code == 0, Path(f"{folder}.log").read_text(encoding="utf-8")
            counts.append(count)
        if counts:
            first, second = map(result, whole)
            stable = {key for key in first if first[key] == second.get(key)}  # a report may tell the time
            plans[name] = (command, begun, result, {key: first[key] for key in stable}, min(counts))
    points = [(name, number) for name, plan in plans.items() for number in range(1, plan[-1] + 1)]
    points = points if chosen == "all" else sorted(draw.sample(points, int(chosen)))
    for name, (command, begun, result, expected, count) in plans.items():
        numbers = [number for other, number in points if other == name]
        figures = {"command": name, "changes": count, "kills": 0, "compared": len(expected), "otherwise": []}
        for number in numbers:
            folder = scratch / "killed"
            shutil.rmtree(folder, ignore_errors=True)
            if begun:
                shutil.copytree(finished, folder)
            figures["kills"] += fork_command(command, folder, kill_before=number)[0] == -signal.SIGKILL
            # a kill behind its last step leaves a command that had finished: typed again, a training would start anew,
            # and a batch would refuse to overwrite its answers
            ended = name in LAST and is_finished(folder, expected, LAST[name])
            code = 0 if ended else fork_command(command, folder)[0]
            found = result(folder)
            if code or any(found.get(key) != value for key, value in expected.items()):
                figures["otherwise"].append(number)
        yield figures


def is_finished(folder, expected, name):
    """Whether a killed command had put in place what comes last: the one it was to make, and not an earlier run's."""
    path = folder / name
    return path.exists() and path.read_bytes() == expected[name]


if __name__ == "__main__":
    for module in ("checkpoint_utils", "data_utils", "generation_utils", "board_utils", "torch.utils.tensorboard"):
        importlib.import_module(module)  # the scripts load them late; the forks are to find them loaded
    importlib.import_module("training_utils").SHORT_RUN = 0  # however fast the machine is, a run does the same
    gc.freeze()  # a look through the libraries would take each fork a second
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--events", help="all, or how many of them")
    parser.add_argument("--only", choices=COMMANDS, help="the events of one command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.kills:
            print(json.dumps(harass(Path(scratch), options.kills, options.seed)), flush=True)
        if options.events:
            (Path(scratch) / "events").mkdir()
            for found in sweep(Path(scratch) / "events", options.events, random.Random(options.seed), options.only):
                print(json.dumps(found), flush=True)
