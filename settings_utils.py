"""Settings: config.py, an adapter's record and the command line, merged into one frozen snapshot."""

import argparse
import difflib
import json
import os
import re
from collections import namedtuple
from pathlib import Path

import config
from message_utils import UserError, say

# {name: value} of config.py: its constants in lower case, as the flags are written
DEFAULTS = {name.lower(): value for name, value in vars(config).items() if name.isupper() and name != "CPU_DEMO"}


# One frozen snapshot of all settings: settings.lora_r and so on
Settings = namedtuple("Settings", DEFAULTS)


# Inclusive limits of the numbers. A setting whose lower limit has a decimal point is a decimal number.
RANGES = {
    "validation_split": (0.0, 0.9),
    "answers_cut_limit": (0.0, 1),
    "max_seq_length": (8, 1_000_000),
    "max_train_rows": (0, 1_000_000_000),
    "lora_r": (1, 4_096),
    "lora_alpha": (1, 65_536),
    "lora_dropout": (0.0, 0.9),
    "lora_plus_ratio": (1.0, 1_000),
    "num_epochs": (1, 10_000),
    "batch_size": (1, 65_536),
    "gradient_accumulation_steps": (1, 65_536),
    "learning_rate": (1e-9, 1),
    "warmup_ratio": (0.0, 0.9),
    "weight_decay": (0.0, 1),
    "max_grad_norm": (0.0, 1e9),
    "max_steps": (0, 1_000_000_000),
    "seed": (0, 2**32 - 1),
    "logging_steps": (1, 1_000_000_000),
    "eval_steps": (1, 1_000_000_000),
    "save_total_limit": (1, 1_000_000),
    "early_stopping_patience": (0, 1_000_000),
    "sample_prompts": (0, 1_000),
    "max_new_tokens": (1, 1_000_000),
    "temperature": (1e-3, 10),
    "top_p": (1e-3, 1),
    "repetition_penalty": (0.1, 10),
    "eval_samples": (0, 1_000_000),
}


REQUIRED_TEXTS = ("base_model_name", "lora_target_modules", "output_dir", "logs_dir", "models_dir")
AUTO_SWITCHES = ("gradient_checkpointing", "torch_compile")  # True, False or "auto"


SWITCHES = ("chosen_only", "use_4bit_quantization", "use_fp16", "use_rslora", "use_dora", "do_sample", *AUTO_SWITCHES)
CHOICES = {
    "device": ("cuda", "cpu"),
    "lr_scheduler_type": ("cosine", "linear", "constant_with_warmup"),
    "optimizer": ("adamw_torch", "paged_adamw_8bit"),
}


# What an adapter was trained with and needs again wherever it is loaded
BOUND_TO_ADAPTER = ("base_model_name", "models_dir", "use_4bit_quantization", "use_fp16", "max_seq_length")


# ---- Which script uses which settings --------------------------------------------------------------------------------
# train.py uses every setting of config.py but these; a new setting is one of train.py unless it is named here
NOT_FOR_TRAINING = ("do_sample", "temperature", "top_p", "eval_samples")


# The other scripts use these. A script offers a flag for each setting that it uses and for no other; a test fails if it
# reads a setting that it does not offer.
TO_USE_AN_ADAPTER = ("base_model_name", "models_dir", "use_4bit_quantization", "use_fp16", "device", "output_dir")
TO_ANSWER = ("max_new_tokens", "repetition_penalty")
USED_SETTINGS = {
    "train.py": tuple(name for name in DEFAULTS if name not in NOT_FOR_TRAINING),
    "evaluate.py": (
        *TO_USE_AN_ADAPTER,
        *TO_ANSWER,
        *("validation_dataset_path", "dataset_columns", "chosen_only", "max_seq_length", "batch_size", "eval_samples"),
    ),
    "inference.py": (*TO_USE_AN_ADAPTER, *TO_ANSWER, "do_sample", "temperature", "top_p", "seed"),
}


# ---- Command line ----------------------------------------------------------------------------------------------------
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
    switch = "true, false or auto" if name in AUTO_SWITCHES else "true or false"
    expected = {bool: switch, int: "a whole number", float: "a number", dict: 'JSON such as {"a": "b"}'}
    try:
        if name in AUTO_SWITCHES and text.lower() == "auto":
            return "auto"
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
    """An argparse parser that raises a UserError with a remedy for a mistyped command line."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is None:
            raise UserError(f"{message}; see python {self.prog} --help")
        flag = unknown[1].split("=")[0]
        name = flag.removeprefix("--")
        if name in DEFAULTS:
            users = " and ".join(script for script, names in USED_SETTINGS.items() if name in names)
            raise UserError(f"{flag} is a setting of {users}; {self.prog} does not use it, so leave it out")
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"python {self.prog} --help lists all settings"
        raise UserError(f"unknown argument {flag}; {hint}")


def build_parser(script, description):
    """A parser with a flag for each setting that a script uses; help texts and defaults are those of config.py."""
    parser = Parser(
        prog=script, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake too")
    for banner, constants in describe_settings():
        group = parser.add_argument_group(banner)  # --help leaves out a group without flags
        for name, text in constants:
            if name in USED_SETTINGS[script]:
                bare = {"nargs": "?", "const": "true"} if setting_type(name) is bool else {}
                shown = f"{text} (default: {DEFAULTS[name]!r})".replace("%", "%%")
                group.add_argument(f"--{name}", help=shown, metavar="VALUE", default=argparse.SUPPRESS, **bare)
    return parser


def parse_command_line(parser, argv):
    """Parse argv; return the script's own options and {name: value} of the settings given, both checked for type."""
    argv = [re.sub(r"^--[a-z0-9_-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), item) for item in argv]
    options = parser.parse_args(argv)
    given = {name: getattr(options, name) for name in DEFAULTS if hasattr(options, name)}
    return options, {name: parse_value(name, text, DEFAULTS[name]) for name, text in given.items()}


# ---- One snapshot ----------------------------------------------------------------------------------------------------
def make_settings(given=None, recorded=None):
    """Merge the settings' sources into a checked snapshot. In this order, a later source replaces an earlier one:

    1. config.py
    2. CPU_DEMO in config.py, where it applies (demo_settings)
    3. recorded: {name: value} of an adapter's record, of which only what the adapter is bound to counts
    4. given: {name: value} of the command line

    Raises UserError for a name that is no setting, and for a value of the wrong type or out of its range.
    """
    given = given or {}
    check_names(given, "unknown settings")
    bound = {name: value for name, value in (recorded or {}).items() if name in BOUND_TO_ADAPTER}
    demo = demo_settings((bound | given).get("base_model_name"))
    settings = check_settings(Settings(**(DEFAULTS | demo | bound | given)))
    if demo and not bound:
        used = ", ".join(f"{name}={getattr(settings, name)}" for name in demo if name not in given)
        say(f"No CUDA GPU found, so the demo settings apply (CPU_DEMO in config.py): {used}")
    return settings


def demo_settings(chosen_base):
    """{name: value} of CPU_DEMO, or {} where it does not apply.

    It applies only on a machine without a CUDA GPU, and only to its own base model, which its learning rate belongs
    to: chosen_base is the base model that the user or the adapter has chosen, or None.
    """
    demo = {name.lower(): value for name, value in (config.CPU_DEMO or {}).items()}
    check_names(demo, "CPU_DEMO in config.py names no setting")
    base = demo.get("base_model_name")
    return demo if demo and chosen_base in (None, base) and not cuda_is_available() else {}


def cuda_is_available():
    import torch  # here, since importing it takes seconds and most mistakes are found without it

    return torch.cuda.is_available()


# ---- Checks ----------------------------------------------------------------------------------------------------------
def check_names(values, problem):
    """Raise UserError if a key of values is the name of no setting."""
    if unknown := sorted(values.keys() - DEFAULTS.keys()):
        raise UserError(f"{problem}: {', '.join(unknown).upper()}; correct or remove it")


def check_settings(settings):
    """Return the settings, or raise UserError for the first that is missing, of another type or out of its range."""
    required = {*RANGES, *SWITCHES, *CHOICES, *REQUIRED_TEXTS}
    if missing := sorted(required - set(DEFAULTS)):
        raise UserError(f"config.py lacks {', '.join(missing).upper()}; restore what was there")
    for name, value in settings._asdict().items():
        check_type(name, value)
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if not low <= value <= high:  # a NaN is in no range
            raise UserError(f"--{name} is {value}, expected {low} to {high}; the default is {DEFAULTS[name]}")
    for name, choices in CHOICES.items():
        value = getattr(settings, name)
        if value not in choices:
            raise UserError(f"--{name} is {value!r}, expected one of {', '.join(choices)}")
    if settings.run_name is not None and (settings.run_name == ".." or {"/", os.sep} & set(settings.run_name)):
        raise UserError(f"--run_name is {settings.run_name!r}, expected one folder's name, without slashes")
    return settings


def check_type(name, value):
    """Raise UserError unless a setting's value is of its type, and no blank text."""
    kind = setting_type(name)
    if name in AUTO_SWITCHES and value == "auto":
        return
    accepted = (int, float) if kind is float else (str, type(None)) if kind is str else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):  # a bool is an int in Python
        switch = 'True, False or "auto"' if name in AUTO_SWITCHES else "True or False"
        wanted = {bool: switch, int: "a whole number", float: "a number", dict: "a dict", str: "a text"}
        raise UserError(f"{name.upper()} is {value!r}, expected {wanted[kind]}; correct it where it was set")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"--{name} is empty, expected a value; the default is {DEFAULTS[name]!r}")
    if name in REQUIRED_TEXTS and value is None:
        raise UserError(f"{name.upper()} is None, expected a name; the default is {DEFAULTS[name]!r}")
