"""Settings: config.py, an adapter's record and the command line, merged into one frozen snapshot."""

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import traceback
from collections import namedtuple
from pathlib import Path

from file_utils import PROJECT_DIR, display_path, resolve_input
from message_utils import UserError, printable, say_once
from script_utils import LateImport, signals_leave_at_once

torch = LateImport("torch")  # which takes seconds, and most mistakes are found without it

CONFIG_FILE = PROJECT_DIR / "config.py"


LONGEST_FILE = 2**20  # bytes of a settings file: /dev/zero never ends
SOURCES = {}  # {settings file: its text}


def read_config(path):
    """{name: value} of a settings file's names; UserError, with file and line, if it cannot be read or executed."""
    path, shown = Path(path), display_path(path)
    try:
        with open(path, "rb") as file:
            source = file.read(LONGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"settings file {shown} cannot be read ({error.strerror}); give one by --config") from None
    if len(source) > LONGEST_FILE:
        raise UserError(f"settings file {shown} holds more than a megabyte, expected lines such as LORA_R = 8")
    SOURCES[path] = source.decode(errors="replace")
    values, problem = {"__file__": str(path)}, None
    try:
        with signals_leave_at_once():
            exec(compile(source, str(path), "exec"), values)
    except BaseException as error:  # noqa: BLE001  whatever a user's file raises is told of with its line
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{shown}, line {line}" if line else shown
        problem = UserError(f"{place}: {describe_error(error)}; correct it")
    if problem:  # raised outside `except`: a KeyboardInterrupt of the file's own would be taken for Ctrl-C
        raise problem
    return {name: value for name, value in values.items() if not name.startswith("_")}


def describe_error(error):
    """'division by zero (ZeroDivisionError)'; the name alone where the user's own exception has no words."""
    with contextlib.suppress(Exception):
        return f"{getattr(error, 'msg', error)} ({type(error).__name__})".strip()
    return type(error).__name__


# A config.py that cannot be read is told of when a command line is parsed or settings are made, not at this import
try:
    CONFIG, CONFIG_PROBLEM = read_config(CONFIG_FILE), None
except UserError as problem:
    CONFIG, CONFIG_PROBLEM = {}, problem


# {name: value} of config.py: its constants in lower case, as the flags are written
DEFAULTS = {name.lower(): value for name, value in CONFIG.items() if name.isupper() and name != "CPU_DEMO"}
# {name: file} of the settings that the file named by --config sets
OTHER_FILES = {}


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
    "eval_rows": (0, 1_000_000_000),
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
OPTIONAL_TEXTS = ("custom_dataset_path", "validation_dataset_path", "run_name", "system_prompt")  # None stands for none
AUTO_SWITCHES = ("gradient_checkpointing",)  # True, False or "auto"

SWITCHES = (
    "chosen_only",
    "use_4bit_quantization",
    "use_fp16",
    "use_rslora",
    "use_dora",
    "torch_compile",
    "do_sample",
    *AUTO_SWITCHES,
)
CHOICES = {
    "answer_check": ("auto", "number", "choice", "json", "off"),
    "device": ("cuda", "cpu"),
    "lr_scheduler_type": ("cosine", "linear", "constant_with_warmup"),
    "optimizer": ("adamw_torch", "paged_adamw_8bit"),
}

# All settings, be config.py as it may
KNOWN = {*RANGES, *SWITCHES, *CHOICES, *REQUIRED_TEXTS, *OPTIONAL_TEXTS, "dataset_columns"}

# Values that earlier versions recorded beside an adapter and that are none any more, and what stands for them now
FORMER_VALUES = {("torch_compile", "auto"): False}

# What config.py ships with of the settings that CPU_DEMO replaces: another value was set by the user, and wins over it
SHIPPED = {
    "base_model_name": "mistralai/Mistral-7B-v0.1",
    "use_4bit_quantization": True,
    "gradient_checkpointing": True,
    "lora_dropout": 0.05,
    "learning_rate": 2e-4,
    "num_epochs": 3,
    "gradient_accumulation_steps": 4,
    "eval_steps": 50,
    "max_new_tokens": 256,
}

# What an adapter was trained with and needs again wherever it is loaded
# Nothing that chooses where files are read or written: who made an adapter may not choose that on your machine
BOUND_TO_ADAPTER = ("base_model_name", "use_4bit_quantization", "use_fp16", "max_seq_length", "system_prompt")


# Where a run's files lie, and its name: they say nothing of its result
PLACES = ("output_dir", "logs_dir", "models_dir", "run_name")


# ---- Which script uses which settings --------------------------------------------------------------------------------
# train.py uses every setting of config.py but these; a new setting is one of train.py unless it is named here
NOT_FOR_TRAINING = ("do_sample", "temperature", "top_p", "eval_samples", "answer_check")

# The other scripts use these. A script offers a flag for each setting that it uses and for no other; a test fails if it
# reads a setting that it does not offer.
TO_USE_AN_ADAPTER = ("base_model_name", "models_dir", "use_4bit_quantization", "use_fp16", "device", "output_dir")
TO_ANSWER = ("max_new_tokens", "repetition_penalty", "system_prompt")
USED_SETTINGS = {
    "train.py": tuple(name for name in DEFAULTS if name not in NOT_FOR_TRAINING),
    "evaluate.py": (
        *TO_USE_AN_ADAPTER,
        *TO_ANSWER,
        *("validation_dataset_path", "dataset_columns", "chosen_only", "max_seq_length", "batch_size"),
        *("eval_samples", "answer_check"),
    ),
    "merge.py": (
        *("models_dir", "device", "output_dir", "batch_size"),
        *("do_sample", "temperature", "top_p", "repetition_penalty"),
        *("validation_dataset_path", "dataset_columns", "chosen_only"),
    ),
    "inference.py": (
        *TO_USE_AN_ADAPTER,
        *TO_ANSWER,
        *("do_sample", "temperature", "top_p", "seed", "dataset_columns"),
    ),
}


# ---- Command line ----------------------------------------------------------------------------------------------------
def describe_settings():
    """Return [(banner, [(name, help text), ...]), ...] as config.py is written: banners and trailing comments."""
    groups = []
    for line in CONFIG_FILE.read_text(encoding="utf-8", errors="replace").splitlines():
        if banner := re.match(r"# ---- (.+?) -+$", line):
            groups.append((banner[1], []))
        elif (constant := re.match(r"([A-Z][A-Z0-9_]*) = .*?  # (.+)$", line)) and constant[1].lower() in DEFAULTS:
            if not groups:
                groups.append(("Settings", []))
            groups[-1][1].append((constant[1].lower(), constant[2]))
    described = {name for _, constants in groups for name, _ in constants}
    # a value without a comment, or of several lines, is a setting too
    return [*groups, ("More settings", [(name, "") for name in DEFAULTS if name not in described])]


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
    except (ValueError, KeyError, RecursionError):
        raise UserError(
            f"--{name} got {shortened(text)}, expected {expected[kind]}; the default is {default!r}"
        ) from None


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises a UserError with a remedy for a mistyped command line."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is None:
            raise UserError(f"{message}; see python {self.prog} --help")
        flag = unknown[1].split("=")[0]
        name = flag.removeprefix("--")
        if flag in self._option_string_actions:
            raise UserError(f"{flag} stands behind a lone --, where no flag is read; put it in front of that")
        if name in DEFAULTS:
            *users, last = [script for script, names in USED_SETTINGS.items() if name in names]
            users = f"{', '.join(users)} and {last}" if users else last
            raise UserError(f"{flag} is a setting of {users}; {self.prog} does not use it, so leave it out")
        if not flag.startswith("-") and self._get_positional_actions():
            raise UserError(
                f"{flag!r} stands behind the instruction, expected one text; put all of it in quotes, such as"
                ' "Explain how photosynthesis works"'
            )
        known = [option.lstrip("-") for option in self._option_string_actions]
        near = difflib.get_close_matches(flag.lstrip("-"), known, n=1, cutoff=0.6)
        hint = f"did you mean --{near[0]}?" if near else f"python {self.prog} --help lists all settings"
        raise UserError(f"unknown argument {flag}; {hint}")


def build_parser(script, description):
    """A parser with a flag for each setting that a script uses; help texts and defaults are those of config.py."""
    if CONFIG_PROBLEM:
        raise CONFIG_PROBLEM
    check_config()
    parser = Parser(
        prog=script, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's mistake too")
    parser.add_argument("--config", metavar="FILE", help="settings that win over those of config.py, written like it")
    for banner, constants in describe_settings():
        group = parser.add_argument_group(banner)  # --help leaves out a group without flags
        for name, text in constants:
            if name in USED_SETTINGS[script]:
                bare = {"nargs": "?", "const": "true"} if setting_type(name) is bool else {}
                shown = f"{text} (default: {DEFAULTS[name]!r})".replace("%", "%%")
                group.add_argument(f"--{name}", help=shown, metavar="VALUE", default=argparse.SUPPRESS, **bare)
    return parser


def parse_command_line(parser, argv):
    """Parse argv; return the script's own options and {name: value} of the settings given, both checked for type.

    What the file that --config names sets replaces from here on what config.py does.
    """
    argv = [re.sub(r"^--[a-z0-9_-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), item) for item in argv]
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and name != "instruction":  # of which inference.py has its own words
                require_utf8(text, f"--{name}")
    if options.config is not None:
        use_config(options.config)
    given = {name: getattr(options, name) for name in DEFAULTS if hasattr(options, name)}
    return options, {name: parse_value(name, text, DEFAULTS[name]) for name, text in given.items()}


# ---- config.py and other settings files ------------------------------------------------------------------------------
def use_config(path):
    """Let the settings in another file win over those of config.py; it may hold all of them or some."""
    file = resolve_input(path)
    values = read_config(file)
    check_known(values, file)
    values = {name: value for name, value in values.items() if name.isupper()}
    if not values:
        raise UserError(f"settings file {display_path(file)} sets nothing, expected lines such as LORA_R = 8")
    OTHER_FILES.update({name.lower(): file for name in values})
    CONFIG.update(values)
    DEFAULTS.update({name.lower(): value for name, value in values.items() if name != "CPU_DEMO"})
    check_config()


def place_of(name, file=None):
    """The words for where a setting has its value: "config.py, line 31: LORA_R"."""
    file = file or OTHER_FILES.get(name.lower(), CONFIG_FILE)
    lines = SOURCES[file].splitlines()
    numbers = [number for number, line in enumerate(lines, 1) if re.match(rf"{name}\b\s*[:=]", line)]
    return f"{display_path(file)}{f', line {numbers[-1]}' if numbers else ''}: {name}"


def check_known(names, file):
    """Raise UserError for a name in capitals that is no setting, or a setting's name in other letters.

    Other names in small letters, of what a file computes its settings by, are the user's own.
    """
    known = [*map(str.upper, KNOWN), "CPU_DEMO"]
    for name in names:
        if name not in known and (name.isupper() or name.upper() in known):
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "config.py lists all settings"
            raise UserError(f"{place_of(name, file)} is no setting; {hint}")


def check_config():
    """Raise UserError, with file and line, for no setting, a missing one, or a value that it may not have."""
    check_known(CONFIG, CONFIG_FILE)
    if missing := sorted(KNOWN - set(DEFAULTS)):
        raise UserError(f"config.py lacks {', '.join(missing).upper()}; restore what was there")
    for name, value in DEFAULTS.items():
        check_value(name, value, place_of(name.upper()))
    demo = CONFIG.get("CPU_DEMO") or {}
    if not isinstance(demo, dict):
        raise UserError(
            f"{place_of('CPU_DEMO')} is {shortened(demo)}, expected a dict of settings; {{}} switches it off"
        )
    for name, value in demo.items():
        place = f"{place_of('CPU_DEMO')}[{name!r}]"
        if not isinstance(name, str) or name.lower() not in DEFAULTS:
            raise UserError(f"{place} is no setting; correct or remove it")
        check_value(name.lower(), value, place)


def shortened(value):
    """A value as Python writes it, cut to what fits into a line."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  an object of the user's own, or a number of more digits than Python writes
        text = f"a value of the type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


# ---- One snapshot ----------------------------------------------------------------------------------------------------
def make_settings(given=None, recorded=None, script="train.py"):
    """Merge the settings' sources into a checked snapshot. In this order, a later source replaces an earlier one:

    1. config.py as it ships
    2. CPU_DEMO in config.py, where it applies (demo_settings)
    3. what was edited in config.py, or set in the file that --config names
    4. recorded: {name: value} of an adapter's record, of which only what the adapter is bound to counts; a
       SYSTEM_PROMPT in config.py wins over its system text
    5. given: {name: value} of the command line

    Of the demo's settings those that the script uses are announced. Raises UserError for a name that is no setting, and
    for a value of the wrong type or out of its range.
    """
    if CONFIG_PROBLEM:
        raise CONFIG_PROBLEM
    check_config()
    given = given or {}
    check_names(given, "unknown settings")
    bound = {name: value for name, value in (recorded or {}).items() if name in BOUND_TO_ADAPTER}
    if DEFAULTS["system_prompt"] is not None:  # the adapter's is a default: what stands in config.py is the user's wish
        bound.pop("system_prompt", None)
    for name, value in bound.items():
        check_value(name, value, f"the adapter's settings.json: {name}")
    for name, value in given.items():
        check_value(name, value, f"--{name}")
    demo = demo_settings((bound | given).get("base_model_name"))
    settings = check_settings(Settings(**(DEFAULTS | demo | bound | given)))
    taken = [name for name in demo if name not in bound | given and name in USED_SETTINGS.get(script, ())]
    if taken:
        used = ", ".join(f"{name}={demo[name]}" for name in taken)
        say_once(f"No CUDA GPU found, so the demo settings apply (CPU_DEMO in config.py): {used}")
    return settings


def demo_settings(chosen_base):
    """{name: value} of CPU_DEMO that take effect, or {} where it does not apply.

    It applies only on a machine without a CUDA GPU, and only to its own base model, which its learning rate belongs
    to: chosen_base is the base model that the command line or the adapter has chosen, or None. A value that was edited
    in config.py stays, and another base model there switches the demo off.
    """
    demo = {name.lower(): value for name, value in (CONFIG.get("CPU_DEMO") or {}).items()}
    base = demo.get("base_model_name")
    edited = {name for name in demo if name in SHIPPED and DEFAULTS[name] != SHIPPED[name]}
    if "cpu_demo" not in OTHER_FILES:  # a file that is no copy of config.py, but sets a few values: all of them count
        edited |= OTHER_FILES.keys() & demo.keys()
    if chosen_base is None and "base_model_name" in edited:
        chosen_base = DEFAULTS["base_model_name"]
    if not demo or chosen_base not in (None, base) or cuda_is_available():
        return {}
    return {name: value for name, value in demo.items() if name not in edited}


def cuda_is_available():
    return torch.cuda.is_available()


# ---- Checks ----------------------------------------------------------------------------------------------------------
def check_names(values, problem):
    """Raise UserError if a key of values is the name of no setting."""
    if unknown := sorted(values.keys() - DEFAULTS.keys()):
        raise UserError(f"{problem}: {', '.join(unknown).upper()}; correct or remove it")


def check_settings(settings):
    """Return the settings, or raise UserError for the first that is of another type or out of its range."""
    for name, value in settings._asdict().items():
        check_value(name, value, f"--{name}")
    return settings


def settings_of_record(recorded):
    """The Settings of an adapter's record, {name: value}, also of an earlier version's; defaults stand for the others.

    Raises UserError for a value of another type or out of its range.
    """
    known = {name: value for name, value in recorded.items() if name in DEFAULTS}
    for name, value in known.items():
        if isinstance(value, str):
            known[name] = value = FORMER_VALUES.get((name, value), value)
        check_value(name, value, f"the adapter's settings.json: {name}")
    return Settings(**(DEFAULTS | known))


def check_value(name, value, shown):
    """Raise UserError unless a value is of its setting's type and in its range. `shown` names it and its place."""
    check_type(name, value, shown)
    # where it was given on the command line, config.py may tell a value that works
    default = f"; the default is {DEFAULTS[name]!r}" if shown.startswith("--") else "; correct it there"
    if name == "temperature" and value == 0:
        remedy = "--do_sample false" if shown.startswith("--") else "DO_SAMPLE = False"
        raise UserError(f"{shown} is 0; for the likeliest answer, the same every time, set {remedy} instead")
    if name in RANGES:
        low, high = RANGES[name]
        if not low <= value <= high:  # a NaN is in no range
            raise UserError(f"{shown} is {shortened(value)}, expected {low} to {high}{default}")
    if name in CHOICES and value not in CHOICES[name]:
        raise UserError(f"{shown} is {shortened(value)}, expected one of {', '.join(CHOICES[name])}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{shown} holds a NUL character, which no name has; correct it")
    if isinstance(value, str):
        require_utf8(value, shown)
    if name == "run_name" and value is not None and not is_folder_name(value):
        raise UserError(f"{shown} is {shortened(value)}, expected one folder's name, no slashes or control characters")


def require_utf8(text, shown):
    """Raise UserError for a text that cannot be written as UTF-8, which logs and records are."""
    if re.search("[\ud800-\udfff]", text):
        encoding = sys.getfilesystemencoding()
        remedy = "" if encoding == "utf-8" else ", or set the environment variable PYTHONUTF8=1"
        raise UserError(f"{shown} is {shortened(text)}, which is no {encoding} text; rename what it names{remedy}")


def is_folder_name(text):
    """Whether a text is the name of one folder and leads to no other place."""
    return (
        text not in ("", ".", "..")
        and not {"/", os.sep, "\n", "\t"} & set(text)
        and text == printable(text)
        and len(text.encode(errors="replace")) <= 255
    )


def check_type(name, value, shown):
    """Raise UserError unless a setting's value is of its type, and no blank text."""
    kind = setting_type(name)
    if name in AUTO_SWITCHES and value == "auto":
        return
    accepted = (int, float) if kind is float else (str, type(None)) if kind is str else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):  # a bool is an int in Python
        switch = 'True, False or "auto"' if name in AUTO_SWITCHES else "True or False"
        wanted = {bool: switch, int: "a whole number", float: "a number", dict: "a dict", str: "a text"}
        raise UserError(f"{shown} is {shortened(value)}, expected {wanted[kind]}; correct it where it was set")
    if isinstance(value, str) and not value.strip() and name != "system_prompt":
        raise UserError(f"{shown} is empty, expected a value; correct it where it was set")
    if name in REQUIRED_TEXTS and value is None:
        raise UserError(f"{shown} is None, expected a name; correct it where it was set")
