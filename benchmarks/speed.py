"""Tokens/s and peak memory of QLoRA training on this machine: this project and others, in one run.

    python benchmarks/speed.py prepare --rows FILE      # once: a model of Mistral-7B's shape, its 4-bit copy, the rows
    python benchmarks/speed.py prepare --shape 70b      # or Llama 2's 13B, Code Llama's 34B, Llama 2's 70B: 4-bit only
    python benchmarks/speed.py run --out results.jsonl  # every program in every configuration, a process each
    python benchmarks/speed.py run --only ours,trl --configs natural --steps 10 --warmup 4
    python benchmarks/speed.py run --together           # the same in less time, with memory for all the models at once
    python benchmarks/speed.py plot results.jsonl chart.svg
    python benchmarks/speed.py prepare --device cpu     # the same on models/tiny-base, in float32 and without 4-bit

Every program gets the same token ids and labels, as many rows to every optimizer step, in the same order, with the same
seed; only programs that pack rows decide themselves what makes up their steps of 8,192 tokens. Tokens/s count real
tokens only, never padding. All losses are recorded, and compared with those of a plain padded Trainer ("reference"), so
that no speed is bought with a wrong loss. The other programs use FlashAttention-2 where the package flash-attn is
installed. One run at a time in a work folder.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LOSS_TOLERANCE = 0.005  # largest relative distance from the reference's logged loss, in bf16
# given in full, so that an edited config.py changes nothing here
RECIPE = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": "all-linear",
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant_with_warmup",  # so that runs of different lengths can be compared
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optimizer": "adamw_torch",
    "num_epochs": 1,
    "logging_steps": 5,
    "seed": 42,
}
# rows: "natural", or "full", whose answers are repeated up to `length` tokens, the most that a row may have
# batch_size: ours, which bounds a pass, 4 where memory counts
# rows_a_step: 48 natural rows are about the 8,192 tokens of a step of packed rows
Configuration = namedtuple(
    "Configuration", "rows checkpointing dropout batch_size rows_a_step length", defaults=(16, 512)
)
CONFIGURATIONS = {
    "natural-dropout": Configuration("natural", False, 0.05, 16),
    "natural-plain": Configuration("natural", False, 0.0, 16),
    "natural-checkpointing": Configuration("natural", True, 0.05, 4),
    "natural-plain-checkpointing": Configuration("natural", True, 0.0, 4),
    "full-plain": Configuration("full", False, 0.0, 16),
    "full-checkpointing": Configuration("full", True, 0.05, 4),
    "packed-plain": Configuration("natural", False, 0.0, 16, 48),
    "packed-plain-checkpointing": Configuration("natural", True, 0.0, 16, 48),
    "long-8192": Configuration("full", True, 0.0, 1, 2, 8192),
    "long-32768": Configuration("full", True, 0.0, 1, 1, 32768),
}
# "-free": rows laid end to end without padding, "-packed": and cut into steps of 8,192 tokens
OTHERS = ("trl", "unsloth")
PROGRAMS = ("ours", "reference", "tutorial", *(name + how for name in OTHERS for how in ("", "-free", "-packed")))
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "unsloth", "liger-kernel", "flash-attn")


def main():
    options = build_parser().parse_args()
    if options.command == "plot":
        import plot

        return plot.draw(options.results, options.chart)
    default = Path(tempfile.gettempdir()) / f"lora-speed-{options.device}"
    options.work_dir = (options.work_dir or default).resolve()
    if options.command == "prepare":
        import workload

        return workload.prepare(options.work_dir, options.device, options.rows, options.shape)
    options.out = options.out.resolve()
    return run(options) if options.command == "run" else measure(options)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare, run, plot, measure = map(commands.add_parser, ("prepare", "run", "plot", "measure"))
    for command in (prepare, run, measure):
        command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        command.add_argument("--work_dir", type=Path, help="default: a folder of the device's among temporary files")
    prepare.add_argument("--rows", default="data/demo.json", help="JSON of instruction, input, output")
    prepare.add_argument("--shape", choices=("7b", "13b", "34b", "70b"), default="7b", help="of the model, on a GPU")
    run.add_argument("--only", default=",".join(PROGRAMS), help="programs, separated by commas")
    run.add_argument("--configs", default="", help="names or their beginnings, separated by commas")
    run.add_argument("--timeout", type=int, default=600, help="seconds for one configuration; ten times that together")
    run.add_argument("--recording", type=int, default=60, help="more warm-up where ours records new lengths")
    run.add_argument("--together", action="store_true", help="all load at once, then train one after the other")
    measure.add_argument("program", choices=PROGRAMS)
    measure.add_argument("configuration", choices=CONFIGURATIONS)
    measure.add_argument("--turn", type=Path, help="a lock to wait for before training")
    for command in (run, measure):
        command.add_argument("--steps", type=int, default=20, help="optimizer steps, with those of the warm-up")
        command.add_argument("--warmup", type=int, default=10, help="steps that are not timed")
        command.add_argument("--out", type=Path, default=Path("results.jsonl"))
    plot.add_argument("results", type=Path)
    plot.add_argument("chart", type=Path)
    return parser


# ---- All configurations ----------------------------------------------------------------------------------------------
def run(options):
    """Measure every chosen program in every chosen configuration; what fails is a line with its reason.

    Returns 1 if a loss is not the reference's, else 0.
    """
    if not (options.work_dir / "prepared.json").exists():
        raise SystemExit(f"{options.work_dir} holds no prepared model; run: speed.py prepare --device {options.device}")
    programs, beginnings = options.only.split(","), tuple(options.configs.split(","))
    exactly = [name for name in CONFIGURATIONS if name in beginnings]
    chosen = exactly or [name for name in CONFIGURATIONS if name.startswith(beginnings)]
    if unknown := sorted(set(programs) - set(PROGRAMS)) or not chosen:
        raise SystemExit(f"nothing to run: {unknown}; programs: {PROGRAMS}, configurations: {tuple(CONFIGURATIONS)}")
    if not 0 < options.warmup < options.steps:
        raise SystemExit(f"--warmup is {options.warmup}, expected 1 to {options.steps - 1}, one less than --steps")
    programs.sort(key=lambda program: program != "reference")  # the others are compared with it
    jobs = [(program, name) for name in chosen for program in programs if suits(program, CONFIGURATIONS[name])]
    if not jobs:
        raise SystemExit(f"nothing to run: {programs} have no configuration like {options.configs!r}")
    wrong = 0
    for (program, name), result in zip(jobs, results_of(jobs, options), strict=True):
        append(options.out, result)
        expected = reference_losses(options.out, result)
        wrong += bool(expected) and distance(result["losses"], expected) > LOSS_TOLERANCE
        print(f"{name:22} {program:10} {describe(result, expected)}", flush=True)
    return int(wrong > 0)


def suits(program, configuration):
    """Whether the program has this configuration: the tutorials' always checkpoints, the reference has no dropout."""
    if program == "tutorial":
        return configuration.checkpointing and configuration.rows_a_step == 16
    if program.endswith(("-free", "-packed")):
        return program.endswith("-packed") == (configuration.rows_a_step == 48)
    if program in OTHERS:
        return configuration.rows_a_step < 48
    return program != "reference" or not (configuration.dropout or configuration.length > 512)


def results_of(jobs, options):
    """The result of each job, in their order; with --together from the moment on that all are loaded."""
    if not options.together:
        yield from (run_one(program, name, options) for program, name in jobs)
        return
    import fcntl

    turn = options.work_dir / "turn"
    for old in options.work_dir.glob("turn*"):
        old.unlink()
    with open(turn, "w", encoding="utf-8") as lock, ThreadPoolExecutor(len(jobs)) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pending = [(pool.submit(run_one, *job, options, turn), marker(turn, *job)) for job in jobs]
        try:
            while not all(result.done() or loaded.exists() for result, loaded in pending):
                time.sleep(0.2)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
        yield from (result.result() for result, _ in pending)


def marker(turn, program, name):
    """The file by which a process says that it has loaded everything."""
    return turn.with_suffix(f".{program}-{name}")


def run_one(program, name, options, turn=None):
    """Measure in a process of its own; returns its line, or one with the reason why there is none."""
    records = program == "ours" and options.device == "cuda" and CONFIGURATIONS[name].rows == "natural"
    more = options.recording if records else 0
    folder = options.work_dir / f"{program}-{name}"  # where it runs, since some programs write caches there
    folder.mkdir(exist_ok=True)
    out, log = folder / "result.json", folder / "log.txt"
    out.unlink(missing_ok=True)
    flags = {"device": options.device, "work_dir": options.work_dir, "out": out}
    flags |= {"steps": options.steps + more, "warmup": options.warmup + more}
    flags |= {"turn": turn} if turn else {}
    command = [sys.executable, str(Path(__file__).resolve()), "measure", program, name]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    failed, timeout = missing(program, options.device), options.timeout * (10 if turn else 1)
    if not failed:
        with open(log, "w", encoding="utf-8") as file:
            streams = {"stdout": file, "stderr": file}
            try:
                subprocess.run(command, **streams, cwd=folder, env=environment(), timeout=timeout, check=True)
            except subprocess.TimeoutExpired:
                failed = f"more than {timeout} s"
            except subprocess.CalledProcessError:
                failed = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
    if out.exists():  # also of a program that fails while it exits
        return json.loads(out.read_text())
    return {"program": program, "configuration": name, "failed": failed}


def missing(program, device):
    """Why a program cannot be measured here, or None."""
    package = program.partition("-")[0]
    if package not in OTHERS:
        return None
    if device == "cpu":
        return "needs CUDA (Triton's kernels)"
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return None


def environment():
    """No program may reach for a network, report statistics or spread over several GPUs."""
    off = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "WANDB_DISABLED": "true",
    }
    return {"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false"} | os.environ | off


def reference_losses(path, result):
    """The losses that a result without dropout should have had, by the newest such run of the reference; else None."""
    lines = map(json.loads, path.read_text().splitlines())
    references = [line for line in lines if line["program"] == "reference" and "losses" in line]
    same = ("configuration", "device", "workload")
    found = [line["losses"] for line in references if all(line.get(name) == result.get(name) for name in same)]
    return found[-1] if found and result["program"] != "reference" else None


def describe(result, expected):
    """A result in words, with its losses' largest relative distance from the expected ones where there are any."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    text = f"{result['tokens_per_second']:8,.0f} tokens/s {result['peak_reserved_gib']:6.2f} GiB"
    losses = list(result["losses"].values())
    text += f", loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    if expected:
        apart = distance(result["losses"], expected)
        text += f", within {apart:.2%} of the reference{' (WRONG)' if apart > LOSS_TOLERANCE else ''}"
    return text


def distance(losses, expected):
    """The largest relative distance of the losses that both logged at the same step; infinite if one is nan."""
    distances = [abs(losses[step] / expected[step] - 1) for step in losses if step in expected]
    return max((math.inf if math.isnan(found) else found for found in distances), default=math.inf)


def append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


# ---- One configuration -----------------------------------------------------------------------------------------------
def measure(options):
    """Train with one program in one configuration and append its figures to the results."""
    from message_utils import quiet_libraries

    quiet_libraries()
    if options.program.startswith("unsloth"):
        import unsloth  # noqa: F401  patches the libraries that are imported after it
    import psutil

    import programs
    from model_utils import load_tokenizer

    prepared = json.loads((options.work_dir / "prepared.json").read_text())
    configuration = CONFIGURATIONS[options.configuration]
    settings = build_settings(configuration, prepared["base"], options)
    rows, needed = prepared["natural"], options.steps * configuration.rows_a_step
    packed = options.program.endswith("-packed")
    rows = (rows * (needed // len(rows) + 1))[: needed + needed // 4 * packed]  # packing may fit more rows into a step
    if configuration.rows == "full":
        rows = [programs.fill(row, configuration.length) for row in rows]
    tokenizer = load_tokenizer(prepared["base"])
    kind, _, laid_out = options.program.partition("-")
    trainer = programs.BUILDERS[kind](settings, rows, tokenizer, prepared["copy"], laid_out)
    stopwatch = programs.Stopwatch(trainer)
    if options.turn:
        wait_for_turn(options)
    trainer.train()
    if not packed:
        lengths = [len(row["input_ids"]) for row in rows]
        assert [length for call in stopwatch.lengths for length in call] == lengths, "not these rows in their order"
    losses = {str(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    ours = options.program == "ours"  # its Trainer's batch is all rows of a step, whatever its passes hold
    calls = trainer.args.gradient_accumulation_steps
    seconds = stopwatch.step_seconds(options.warmup)
    tokens = sum(map(sum, stopwatch.lengths[options.warmup * calls : options.steps * calls]))
    line = {
        "program": options.program,
        "configuration": options.configuration,
        "rows": configuration.rows,
        "longest": configuration.length,
        "rows_a_step": configuration.rows_a_step,
        "checkpointing": configuration.checkpointing,
        "dropout": configuration.dropout,
        "batch_size": settings.batch_size if ours else trainer.args.per_device_train_batch_size,
        "tokens_per_second": round(tokens / sum(seconds), 1),
        "median_step_seconds": round(statistics.median(seconds), 4),
        "shape": prepared["shape"],
        "workload": fingerprint(prepared["natural"]),
        "seconds_from_start": round(time.time() - psutil.Process().create_time(), 1),
        "step_seconds": [round(second, 4) for second in stopwatch.step_seconds(1)],
        "timed_steps": len(seconds),
        "timed_tokens": tokens,
        **stopwatch.peak_memory(),
        **(plan_of(trainer.runner.plan) if ours else {}),
        "losses": losses,
    }
    append(options.out, line | machine(options.device))


def plan_of(plan):
    """What a result says of the plan that was in force at its end."""
    return {
        "recorded": plan.recorded,
        "dequantized": plan.dequantized,
        "offloaded": plan.offloaded,
        "lengths": plan.lengths,
        "pass_tokens": plan.max_pass_tokens,
        "expected_gib": round(plan.expected_bytes / 2**30, 2),
    }


def wait_for_turn(options):
    """Say that everything is loaded, and wait until the process that trained before has ended with all its memory."""
    import fcntl

    lock = os.open(options.turn, os.O_RDWR)  # stays open as long as this process lives
    marker(options.turn, options.program, options.configuration).touch()
    fcntl.flock(lock, fcntl.LOCK_EX)


def fingerprint(rows):
    """A short hash of rows' tokens and labels."""
    return hashlib.sha256(json.dumps([[row["input_ids"], row["labels"]] for row in rows]).encode()).hexdigest()[:12]


def build_settings(configuration, base, options):
    """The project's settings of a configuration, all that matter given, so that CPU_DEMO changes nothing either."""
    from settings_utils import make_settings

    given = {
        "base_model_name": base,
        "device": options.device,
        "use_4bit_quantization": options.device == "cuda",
        "use_fp16": True,
        "lora_dropout": configuration.dropout,
        "gradient_checkpointing": configuration.checkpointing,
        "batch_size": configuration.batch_size,
        "gradient_accumulation_steps": configuration.rows_a_step // configuration.batch_size,
        "max_seq_length": configuration.length,
        "max_steps": options.steps,
        "output_dir": str(options.work_dir / "output"),
    }
    return make_settings(RECIPE | given)


def machine(device):
    """What a figure must name: the hardware, the day and the versions."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return {"device": name, "date": time.strftime("%Y-%m-%d"), "versions": versions()}


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
