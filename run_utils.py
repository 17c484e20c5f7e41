"""Settings and command line, messages, devices, and the folders that a run writes."""

import argparse
import difflib
import errno
import gc
import json
import os
import re
import shutil
import sys
import traceback
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import config

PROJECT_DIR = Path(__file__).resolve().parent
DEFAULTS = {name.lower(): value for name, value in vars(config).items() if name.isupper() and name != "CPU_DEMO"}
# One frozen snapshot of config.py and the command line: settings.lora_r and so on.
Settings = namedtuple("Settings", DEFAULTS)

# Inclusive limits of the numbers. A lower limit with a decimal point marks a decimal number.
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
AUTO_SWITCHES = ("gradient_checkpointing", "torch_compile")  # these may also be "auto"
SWITCHES = ("use_4bit_quantization", "use_fp16", "use_rslora", "use_dora", "do_sample", *AUTO_SWITCHES)
CHOICES = {
    "device": ("cuda", "cpu"),
    "lr_scheduler_type": ("cosine", "linear", "constant_with_warmup"),
    "optimizer": ("adamw_torch", "paged_adamw_8bit"),
}


# What a run leaves in OUTPUT_DIR
ADAPTER, CHECKPOINTS, VALIDATION_ROWS = "lora-adapter", "checkpoints", "validation.jsonl"
DATA_REPORT, CACHE = "data_report.json", "cache"
# What a disk refuses with: full, over quota, read-only, no permission, broken
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# What an adapter was trained with and needs again wherever it is loaded.
BOUND_TO_ADAPTER = ("base_model_name", "models_dir", "use_4bit_quantization", "use_fp16", "max_seq_length")


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line: what was found, what was expected, what to do.

    Of several processes the first says it, unless each may meet it alone.
    """

    def __init__(self, message, alone=False):
        # names out of a user's file can hold line breaks and control characters
        super().__init__(printable(" ".join(message.split())))
        self.alone = alone


class Stopped(BaseException):
    """A signal asked the run to end, and it did after saving. Its message is one line: where, and how to go on.

    Like KeyboardInterrupt it is no Exception, which a library might catch and go on.
    """

    def __init__(self, signal_number, message):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as a shell reports it


# C0 and C1 control characters except tab and newline: no foreign text may steer the terminal
CONTROL_CHARACTERS = dict.fromkeys(c for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\t\n")


def printable(text):
    """The text without terminal control characters. Without ESC no escape sequence can form, also across chunks."""
    return text.translate(CONTROL_CHARACTERS)


def say(message, from_any=False):
    """Tell the user something, on stderr and from the first process only; results go to stdout by print().

    from_any: from the others too, which then give their number.
    """
    rank = os.environ.get("RANK", "0")
    if from_any or rank == "0":
        print(f"process {rank}: " * (rank != "0") + message, file=sys.stderr, flush=True)


def settle():
    """Collect garbage from here on, but not among what is there by now, which stays: the libraries above all."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def run_script(main, argv):
    """Run an entry script's main(argv) and return its exit code.

    A UserError ends in one line and code 2 (--debug shows its traceback), Ctrl-C in 130, another signal in 128 and its
    number; our own bugs in a traceback.
    """
    gc.disable()  # until settle(): imports make a million objects that stay, and looking through them takes a second
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 must not end a run
    try:
        main(argv)
        leave_process_group()
        return 0
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        say(f"error: {error}", from_any=error.alone)
        if not error.alone:
            leave_process_group()
        return 2
    except KeyboardInterrupt:
        say("\nStopped by Ctrl-C.")
        return 130
    except Stopped as stop:
        leave_process_group()
        say(str(stop))
        return stop.exit_code
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        say(f"error: {os.strerror(error.errno)}: {error.filename or 'output'}; mend that and try again")
        return 2


def leave_process_group():
    """End the connection of processes that all come to an end together; else NCCL warns, and Gloo aborts at times."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


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
    """argparse whose mistakes are UserErrors that name the nearest flag."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is None:
            raise UserError(f"{message}; see python {self.prog} --help")
        flag = unknown[1].split("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.6)
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


def check_settings(settings):
    """Raise UserError for the first setting of another type or out of its range; returns the settings."""
    required = {*RANGES, *SWITCHES, *CHOICES, *REQUIRED_TEXTS}
    if missing := sorted(required - set(DEFAULTS)):
        raise UserError(f"config.py lacks {', '.join(missing).upper()}; restore what was there")
    for name, value in settings._asdict().items():
        kind = setting_type(name)
        if name in AUTO_SWITCHES and value == "auto":
            continue
        accepted = (int, float) if kind is float else (str, type(None)) if kind is str else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            switch = 'True, False or "auto"' if name in AUTO_SWITCHES else "True or False"
            wanted = {bool: switch, int: "a whole number", float: "a number", dict: "a dict", str: "a text"}
            raise UserError(f"{name.upper()} is {value!r}, expected {wanted[kind]}; correct it where it was set")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"--{name} is empty, expected a value; the default is {DEFAULTS[name]!r}")
    for name, (low, high) in RANGES.items():
        value = getattr(settings, name)
        if not low <= value <= high:  # a NaN is in no range
            raise UserError(f"--{name} is {value}, expected {low} to {high}; the default is {DEFAULTS[name]}")
    for name, choices in CHOICES.items():
        if getattr(settings, name) not in choices:
            raise UserError(f"--{name} is {getattr(settings, name)!r}, expected one of {', '.join(choices)}")
    for name in REQUIRED_TEXTS:
        if getattr(settings, name) is None:
            raise UserError(f"{name.upper()} is None, expected a name; the default is {DEFAULTS[name]!r}")
    if settings.run_name is not None and (settings.run_name == ".." or {"/", os.sep} & set(settings.run_name)):
        raise UserError(f"--run_name is {settings.run_name!r}, expected one folder's name, without slashes")
    return settings


def make_settings(given=None, recorded=None):
    """Merge the sources of settings: config.py, CPU_DEMO where it applies, an adapter's record, the command line.

    CPU_DEMO applies only on a machine without a CUDA GPU and only to its own base model, which its learning rate
    belongs to. Of an adapter's record only what the adapter is bound to counts (BOUND_TO_ADAPTER).
    """
    given = given or {}
    recorded = {name: value for name, value in (recorded or {}).items() if name in BOUND_TO_ADAPTER}
    demo = {name.lower(): value for name, value in (config.CPU_DEMO or {}).items()}
    if unknown := sorted(set(demo) - set(DEFAULTS)):
        raise UserError(f"CPU_DEMO in config.py names no setting: {', '.join(unknown).upper()}; correct or remove it")
    base = (recorded | given).get("base_model_name", demo.get("base_model_name"))
    if not demo or base != demo.get("base_model_name") or cuda_is_available():
        demo = {}
    settings = check_settings(Settings(**(DEFAULTS | demo | recorded | given)))
    if demo and not recorded:
        used = ", ".join(f"{name}={getattr(settings, name)}" for name in demo if name not in given)
        say(f"No CUDA GPU found, so the demo settings apply (CPU_DEMO in config.py): {used}")
    return settings


def find_adapter(options, given):
    """Return the adapter folder that --adapter_path names, or else OUTPUT_DIR/lora-adapter, and OUTPUT_DIR."""
    output_dir = resolve_path(given.get("output_dir", DEFAULTS["output_dir"]))
    if options.adapter_path is not None and not options.adapter_path.strip():
        raise UserError("--adapter_path is empty; give an adapter's folder, or leave it out")
    return resolve_path(options.adapter_path or output_dir / ADAPTER), output_dir


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
    sync_file(staged)
    os.replace(staged, path)


def sync_file(path):
    """Wait until a file's content is on the disk, so that a power cut cannot take it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder):
    """The same for the names in a folder; Windows keeps no such promise and offers no such call."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_json(path, what):
    """Read a JSON object that a run of ours wrote; `what` names it in the message if it is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {display_path(path)} cannot be read ({error}); train again or restore it") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {display_path(path)} holds no JSON object; train again or restore it")
    return value


def make_readable(folder):
    """Give a folder's files the usual permissions; safetensors writes weights that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


@contextmanager
def staged_folder(target):
    """Yield an empty folder to fill beside target; it takes target's name only if nothing failed."""
    staged = target.with_name(target.name + ".incomplete")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    make_readable(staged)
    for path in staged.iterdir():
        sync_file(path)
    sync_folder(staged)
    os.replace(staged, target)
    sync_folder(target.parent)


def check_writable(folder, flag):
    """Raise UserError unless the folder, or the nearest one above it that exists, can be written to."""
    nearest = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{display_path(nearest)} cannot be written to; choose another folder with {flag}")


def quiet_libraries():
    """Silence notices of the libraries that ask nothing of the user; their errors still show."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset it warns at every fork
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")  # the first process's bar tells of all
    # printed where its optional CPU kernels are not installed; the built-in path is used and is right
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # of datasets on the Hub whose README has no header
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    # the Trainer's, beside several GPUs
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    # transformers 5.23 renames it to activation checkpointing; peft and older releases know the old name only
    warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated")
