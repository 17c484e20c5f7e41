"""Settings and command line, messages, devices, and the folders that a run writes."""

import argparse
import difflib
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections import namedtuple
from pathlib import Path

import config

PROJECT_DIR = Path(__file__).resolve().parent
DEFAULTS = {name.lower(): value for name, value in vars(config).items() if name.isupper() and name != "CPU_DEMO"}
# One frozen snapshot of config.py and the command line: settings.lora_r and so on.
Settings = namedtuple("Settings", DEFAULTS)

# Inclusive limits of the numbers; None: no upper limit. A lower limit with a decimal point marks a decimal number.
RANGES = {
    "validation_split": (0.0, 0.9),
    "max_seq_length": (8, None),
    "max_train_rows": (0, None),
    "lora_r": (1, None),
    "lora_alpha": (1, None),
    "lora_dropout": (0.0, 0.9),
    "num_epochs": (1, None),
    "batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "learning_rate": (1e-9, 1),
    "warmup_ratio": (0.0, 0.9),
    "weight_decay": (0.0, 1),
    "max_grad_norm": (0.0, None),
    "max_steps": (0, None),
    "seed": (0, 2**32 - 1),
    "logging_steps": (1, None),
    "eval_steps": (1, None),
    "save_total_limit": (1, None),
    "early_stopping_patience": (0, None),
    "sample_prompts": (0, None),
    "max_new_tokens": (1, None),
    "temperature": (1e-3, 10),
    "top_p": (1e-3, 1),
    "repetition_penalty": (0.1, 10),
    "eval_samples": (0, None),
}
SWITCHES = ("use_4bit_quantization", "use_fp16", "gradient_checkpointing", "do_sample")
CHOICES = {
    "device": ("cuda", "cpu"),
    "lr_scheduler_type": ("cosine", "linear", "constant_with_warmup"),
    "optimizer": ("adamw_torch", "paged_adamw_8bit"),
}


# What an adapter was trained with and needs again wherever it is loaded.
BOUND_TO_ADAPTER = ("base_model_name", "models_dir", "use_4bit_quantization", "use_fp16", "max_seq_length")


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: what was found, what was expected, what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))  # names out of a user's file can hold line breaks


def say(message):
    """Tell the user something, on stderr and from the first process only; results go to stdout by print()."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def run_script(main, argv):
    """Run an entry script's main(argv) and return its exit code.

    A UserError ends in one line and code 2 (--debug shows its traceback), Ctrl-C in 130; our own bugs in a traceback.
    """
    try:
        main(argv)
        return 0
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("\nStopped by Ctrl-C.")
        return 130


# ---- Settings and command line ---------------------------------------------------------------------------------------
def describe_settings():
    """Return [(banner, [(name, help text), ...]), ...] as config.py is written: banners and trailing comments."""
    groups = []
    for line in Path(config.__file__).read_text(encoding="utf-8").splitlines():
        if banner := re.match(r"# ---- (.+?) -+$", line):
            groups.append((banner[1], []))
        elif (constant := re.match(r"([A-Z][A-Z0-9_]*) = .*?  # (.+)$", line)) and constant[1].lower() in DEFAULTS:
            groups[-1][1].append((constant[1].lower(), constant[2]))
    return groups


def setting_type(name):
    """The type of a setting, whatever value it was edited to: bool, int, float, dict or str."""
    if name in RANGES:
        return type(RANGES[name][0])
    return bool if name in SWITCHES else dict if name == "dataset_columns" else str


def parse_value(name, text, default):
    """Turn a flag's text into the setting's type; "none" stands for None where that is the default."""
    kind = setting_type(name)
    expected = {bool: "true or false", int: "a whole number", float: "a number", dict: 'JSON such as {"a": "b"}'}
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is dict:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError
            return value
        return None if default is None and text.lower() == "none" else kind(text)
    except (ValueError, KeyError):
        raise UserError(f"--{name} got {text!r}, expected {expected[kind]}; the default is {default!r}") from None


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors that name the nearest flag."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is None:
            raise UserError(f"{message}; see python {self.prog} --help")
        flag = unknown[1].split("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"python {self.prog} --help lists all settings"
        raise UserError(f"unknown argument {flag}; {hint}")


def build_parser(script, description):
    """A parser with one flag for every constant of config.py, its help text and default taken from there."""
    parser = Parser(
        prog=script, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake too")
    for banner, constants in describe_settings():
        group = parser.add_argument_group(banner)
        for name, text in constants:
            bare = {"nargs": "?", "const": "true"} if isinstance(DEFAULTS[name], bool) else {}
            shown = f"{text} (default: {DEFAULTS[name]!r})".replace("%", "%%")
            group.add_argument(f"--{name}", help=shown, metavar="VALUE", default=argparse.SUPPRESS, **bare)
    return parser


def parse_command_line(parser, argv):
    """Parse argv; return the script's own options and {name: value} of the settings given, both checked for type."""
    argv = [re.sub(r"^--[a-z0-9_-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), item) for item in argv]
    options = parser.parse_args(argv)
    given = {name: getattr(options, name) for name in DEFAULTS if hasattr(options, name)}
    return options, {name: parse_value(name, text, DEFAULTS[name]) for name, text in given.items()}


def check_settings(settings):
    """Raise UserError for the first setting of another type or out of its range; returns the settings."""
    for name, value in settings._asdict().items():
        kind = setting_type(name)
        accepted = (int, float) if kind is float else (str, type(None)) if kind is str else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            wanted = {bool: "True or False", int: "a whole number", float: "a number", dict: "a dict", str: "a text"}
            raise UserError(f"{name.upper()} is {value!r}, expected {wanted[kind]}; correct config.py or the flag")
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            limits = f"{low} to {high}" if high is not None else f"{low} or more"
            raise UserError(f"--{name} is {value}, expected {limits}; the default is {DEFAULTS[name]}")
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            raise UserError(f"--{name} is {getattr(settings, name)!r}, expected one of {', '.join(choices)}")
    for name in ("base_model_name", "lora_target_modules", "output_dir", "logs_dir", "models_dir"):
        if not (getattr(settings, name) or "").strip():
            raise UserError(
                f"--{name} is {getattr(settings, name)!r}, expected a name; the default is {DEFAULTS[name]}"
            )
    return settings


def make_settings(given=None, recorded=None):
    """Merge the sources of settings: config.py, CPU_DEMO where it applies, an adapter's record, the command line.

    CPU_DEMO applies only on a machine without a CUDA GPU and only to its own base model, which its learning rate
    belongs to. Of an adapter's record only what the adapter is bound to counts (BOUND_TO_ADAPTER).
    """
    given = given or {}
    recorded = {name: value for name, value in (recorded or {}).items() if name in BOUND_TO_ADAPTER}
    demo = {name.lower(): value for name, value in config.CPU_DEMO.items()}
    base = (recorded | given).get("base_model_name", demo.get("base_model_name"))
    if not demo or base != demo["base_model_name"] or cuda_is_available():
        demo = {}
    settings = check_settings(Settings(**(DEFAULTS | demo | recorded | given)))
    if demo and not recorded:
        used = ", ".join(f"{name}={getattr(settings, name)}" for name in demo if name not in given)
        say(f"No CUDA GPU found, so the demo settings apply (CPU_DEMO in config.py): {used}")
    return settings


def cuda_is_available():
    import torch

    return torch.cuda.is_available()


def resolve_path(path):
    """Anchor a relative path at the project's folder, so that scripts work from any folder; ~ is expanded."""
    return (PROJECT_DIR / Path(path).expanduser()).resolve()


def display_path(path):
    """The path as a user would type it: relative to the project's folder where it lies inside."""
    path = Path(path)
    return str(path.relative_to(PROJECT_DIR)) if path.is_relative_to(PROJECT_DIR) else str(path)


# ---- Folders and records ---------------------------------------------------------------------------------------------
def write_json(path, value):
    """Write value as readable JSON, by a temporary file and a rename, so that a reader never meets half a file."""
    staged = Path(f"{path}.tmp")
    staged.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)


def read_json(path, what):
    """Read a JSON object that a run of ours wrote; `what` names it in the message if it is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {display_path(path)} cannot be read ({error}); train again or restore it") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {display_path(path)} holds no JSON object; train again or restore it")
    return value


def set_aside_previous_run(output_dir, names):
    """Move what an earlier run left in output_dir under these names to output_dir/previous/<time>; nothing is lost.

    Returns the folder that they were moved to, or None where there was nothing to move.
    """
    found = [output_dir / name for name in names if (output_dir / name).exists()]
    if not found:
        return None
    target = output_dir / "previous" / time.strftime("%Y%m%d-%H%M%S")
    while target.exists():
        target = target.with_name(target.name + "-2")
    target.mkdir(parents=True)
    for path in found:
        shutil.move(path, target / path.name)
    return target


def check_writable(folder, flag):
    """Raise UserError unless the folder, or the nearest one above it that exists, can be written to."""
    nearest = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{display_path(nearest)} cannot be written to; choose another folder with {flag}")


def quiet_libraries():
    """Silence notices of the libraries that ask nothing of the user; their errors still show."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # printed where its optional CPU kernels are not installed; the built-in path is used and is right
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers 5.23 renames it to activation checkpointing; peft and older releases know the old name only
    warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated")


def format_duration(seconds):
    """90 -> '1 min 30 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0) + [f"{seconds} s"] * (hours == 0)
    return " ".join(parts)
