"""The Hub: finds models and datasets locally, in the cache or on the Hub, and says why one cannot be loaded."""

import contextlib
import json
import os
import re
from pathlib import Path
from threading import Thread

import psutil
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from file_utils import PROJECT_DIR, display_path, resolve_input, resolve_path
from message_utils import UserError, memory_problem, say
from progress_utils import progress, silent_bar
from reader_utils import FILE_TYPES, SUFFIXES, find_kind

SHIPPED_MODELS_DIR = "models"  # MODELS_DIR as config.py ships it


# What a user can give in place of a model or a dataset of the Hub
SUBSTITUTES = {
    "model": "give a local folder by --base_model_name, or try the bundled one: --base_model_name models/tiny-base",
    "dataset": "give a local file",
    "benchmark": "give a task whose rows are a local file",
}


@contextlib.contextmanager
def hub_errors(name, remedy="give a causal language model with safetensors weights", kind="model"):
    """Turn a failure to load one model or dataset, from the Hub or a local folder, into a UserError.

    name: as the user gave it. remedy: what to do if what was found cannot be loaded. kind: one of SUBSTITUTES.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # of any type: tokenizers raises a plain Exception, httpx an ImportError for a SOCKS proxy, and configs anything
        raise UserError(hub_problem(error, name, kind) or loading_problem(error, name, remedy)) from error


def hub_problem(error, name, kind):
    """What the Hub refused, and what to do; None if the failure lies elsewhere."""
    causes = list(chain_of_causes(error))
    place = "folder" if kind == "model" else "file"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        switch = "TRANSFORMERS_OFFLINE" if not os.environ.get("HF_HUB_OFFLINE") else "HF_HUB_OFFLINE"
        if kind != "model":
            return f"{switch} is set, so the Hub is not asked for {name}; unset it or {SUBSTITUTES[kind]}"
        return f"{name} is not in the cache and {switch} is set; unset it or give a local folder"
    if any(isinstance(cause, UnicodeEncodeError) for cause in causes):
        return (
            "the token for the Hub, HF_TOKEN or what hf auth login kept, holds a character that no token has; correct"
            f" it, or {SUBSTITUTES[kind]}"
        )
    if any(re.search("SOCKS proxy|proxy URL|Invalid port", str(cause)) for cause in causes):
        return (
            f"the Hub cannot be reached for {name} through the proxy that ALL_PROXY or HTTPS_PROXY names"
            f" ({' '.join(str(causes[-1]).split())[:120]}); correct or unset it, for a SOCKS proxy pip install"
            f" 'httpx[socks]', or {SUBSTITUTES[kind]}"
        )
    if isinstance(error, HFValidationError):
        return f"{name!r} is neither a {place} nor a Hub id such as mistralai/Mistral-7B-v0.1; correct it"
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    status = next(filter(None, statuses), None)
    if status in (401, 403):
        page = f"https://huggingface.co/{'' if kind == 'model' else 'datasets/'}{name}"
        return (
            f"no local {place} {name}, and the Hub refuses it ({status}): it is gated, private or does not exist; check"
            f" the spelling, or accept its licence at {page} and set HF_TOKEN to a token that may read it"
        )
    if status == 404:
        return f"no local {place} {name}, and the Hub knows no such {kind} (404); check the spelling"
    no_connection = (
        isinstance(error, (ConnectionError, HTTPError))
        or "connection" in str(error).lower()
        or "Errno" in str(error.__cause__)
    )
    if status or no_connection:
        reason = f"it answered {status}" if status else "no connection"
        return (
            f"the Hub cannot be reached for {name} ({reason}); check the network and try again, or {SUBSTITUTES[kind]}"
        )
    return None


def chain_of_causes(error):
    """Yield the exception, the one that it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def loading_problem(error, name, remedy):
    """What is wrong with a model or dataset that was found, and what to do."""
    if isinstance(error, OSError) and error.errno:
        return f"{name} cannot be loaded: {os.strerror(error.errno)}; mend that and try again"
    if problem := memory_problem(error):
        return f"{name} cannot be loaded: {problem}"
    if "out of memory" in str(error):
        return f"{name} does not fit into the GPU's memory; close other programs on it or give a smaller model"
    if "ignore_mismatched_sizes" in str(error):
        return f"{name} cannot be loaded: its weights have other shapes than its config.json says; restore both"
    first, *rest = str(error).strip().split("\n")
    problem = f"{first} {rest[0]}" if first.endswith(":") and rest else first  # what follows a colon says what is wrong
    if isinstance(error, json.JSONDecodeError):
        problem = f"one of its JSON files is damaged ({problem})"
    if "instantiate the backend tokenizer" in problem:
        problem = "it holds no tokenizer.json, or none that is whole"
    if isinstance(error, KeyError):  # whose words are the missing name alone
        problem = f"it names or needs {problem}, which is not known"
    return f"{name} cannot be loaded: {problem or type(error).__name__}; {remedy}"


# ---- Models ----------------------------------------------------------------------------------------------------------
def locate_model(name, models_dir):
    """Return the path of a local folder, or the Hub id once its config.json is in the cache.

    Raises UserError for a mistyped path, an unknown or gated model, and a Hub that cannot be reached.
    """
    local = resolve_path(name)
    if (local / "config.json").is_file():
        return str(local)
    if local.is_dir():
        raise UserError(f"base model folder {name} holds no config.json; give the folder that holds the model's files")
    first, *rest = Path(name).parts
    if name.startswith((".", "~", os.sep)) or len(rest) > 1 or (PROJECT_DIR / first).is_dir():
        raise UserError(f"base model folder {display_path(local)} does not exist; correct the path or give a Hub id")
    with hub_errors(name):
        say(f"Looking up {name} (cache: {display_path(models_dir)})")
        hf_hub_download(name, "config.json", cache_dir=models_dir)
    return name


def models_cache(models_dir, name):
    """The folder for a model of the Hub: MODELS_DIR; left as it ships, it gives way to HF_HUB_CACHE and HF_HOME.

    A model that was downloaded to MODELS_DIR before is used from there all the same.
    """
    folder = resolve_path(models_dir)
    elsewhere = models_dir == SHIPPED_MODELS_DIR and os.environ.keys() & {"HF_HUB_CACHE", "HF_HOME"}
    if elsewhere and not any(folder.glob(f"models--{'--'.join(Path(name).parts)}/snapshots/*/config.json")):
        return Path(HF_HUB_CACHE)
    return folder


def model_folder(name, models_dir):
    """The folder of a model that locate_model has found: its own, or the one in the cache, named by its commit."""
    if Path(name).is_dir():
        return Path(name)
    return Path(try_to_load_from_cache(name, "config.json", cache_dir=models_dir)).parent


def download_weights(name, models_dir):
    """Download a model's safetensors files, unless they are in the cache; what else it has is loaded with it."""
    files = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
    with hub_errors(name), progress(f"Downloading {name}", unit="bytes") as bar:
        snapshot_download(name, cache_dir=models_dir, allow_patterns=files, tqdm_class=silent_bar(bar))


def weight_files(folder):
    """The safetensors files that transformers loads from a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return [path for path in [folder / "model.safetensors"] if path.is_file()]


def read_ahead(name, models_dir):
    """Let the system have a model's weights at hand sooner: a thread reads those that lie here from the disk.

    It runs while libraries are imported and rows are tokenized. Where the weights do not fit twice into free memory, it
    does nothing: what is read ahead would be dropped again.
    """
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # what cannot be found or read is told later
        local = resolve_path(name)
        folder = local if local.is_dir() else model_folder(name, models_cache(models_dir, name))
        paths = weight_files(folder)
        if paths and 2 * sum(path.stat().st_size for path in paths) <= psutil.virtual_memory().available:
            Thread(target=read_files, args=(paths,), name="read ahead", daemon=True).start()


def read_files(paths):
    """Read files and throw away what they hold."""
    buffer = bytearray(2**23)
    with contextlib.suppress(OSError):
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


# ---- Datasets --------------------------------------------------------------------------------------------------------
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")


def find_files(dataset, cache_dir):
    """Return (name for messages, [path, ...]) of a local file, or of a Hub dataset's split, downloaded to cache_dir.

    A Hub dataset is `name`, `name:split` or `name:configuration:split`; the split is "train" unless it is given.
    """
    local = resolve_input(dataset)
    if local.is_file():
        if local.suffix.lower() not in SUFFIXES:
            with open(local, "rb") as file:
                kind = find_kind(file.read(32))
            found = f"unknown file type {local.suffix!r}{f', {kind}' if kind else ''}"
            raise UserError(f"dataset {display_path(local)}: {found}, expected {FILE_TYPES}")
        return display_path(local), [local]
    if local.is_dir():
        raise UserError(f"dataset {display_path(local)} is a folder, expected one {FILE_TYPES} file")
    if local.exists():
        raise UserError(f"dataset {display_path(local)} is a pipe or a device, expected one {FILE_TYPES} file")
    first, *rest = Path(dataset).parts
    is_path = len(rest) != 1 or Path(dataset).suffix.lower() in SUFFIXES or dataset.startswith((".", "~"))
    if is_path or not HUB_ID.fullmatch(dataset) or (PROJECT_DIR / first).is_dir():
        hint = f"give an existing {FILE_TYPES} file or a Hub id such as team/name"
        if not Path(dataset).expanduser().is_absolute() and Path.cwd() != PROJECT_DIR:
            hint += f" (looked for in {Path.cwd()} and in {PROJECT_DIR})"
        raise UserError(f"dataset {display_path(local)} does not exist; {hint}")
    return dataset, download_from_hub(dataset, cache_dir)


def download_from_hub(dataset, cache_dir):
    """Download the data files of a Hub dataset's split to cache_dir and return their paths.

    `datasets` finds the files of the split, as its documentation says; they are read by our own readers, since its
    own turn "None" into null and "007" into 7.
    """
    # a door: half a second that only a Hub dataset needs, and no file of the user's, no chat
    from datasets import get_dataset_config_names, load_dataset_builder

    name, *parts = dataset.split(":")
    split = parts.pop() if parts else "train"
    url = f"hf://datasets/{name}"
    with hub_errors(name, f"give a dataset of {FILE_TYPES} files, or a local file", "dataset"):
        say(f"Looking up the dataset {name} on the Hub")
        HfApi().auth_check(name, repo_type="dataset")  # a refusal with its status, which `datasets` leaves out
        try:
            builder = load_dataset_builder(url, *parts, cache_dir=str(cache_dir))
        except ValueError:
            names = get_dataset_config_names(url)
            if (parts and parts[0] in names) or (not parts and len(names) == 1):
                raise
            what = f"has no configuration {parts[0]!r}" if parts else "has several configurations"
            listed = ", ".join(names[:20] if len(names) <= 20 else [*names[:20], "..."])
            example = (split, "train") if split in names else (names[0], split)
            raise UserError(
                f"dataset {name} {what}; choose one of {listed}, for example {':'.join((name, *example))}"
            ) from None
        found = {str(key): list(map(str, files)) for key, files in (builder.config.data_files or {}).items()}
        if split not in found:
            configs, where = ", ".join(builder.builder_configs), ""
            if len(builder.builder_configs) > 1:
                where = f" in its configuration {builder.config.name}, one of {configs}"
            splits = ", ".join(found) or "none"
            raise UserError(
                f"dataset {name} has no split {split!r}{where}; its splits are {splits}; choose one of them"
            )
        if other := sorted({Path(file).suffix.lower() for file in found[split]} - set(SUFFIXES)):
            raise UserError(f"dataset {name} holds {', '.join(other)} files, expected {FILE_TYPES}; convert them first")
        paths = []
        for file in map(HfFileSystem().resolve_path, found[split]):
            place = {"repo_type": "dataset", "revision": file.revision, "cache_dir": cache_dir}
            with progress(f"Downloading {file.path_in_repo}", unit="bytes") as bar:
                place["tqdm_class"] = silent_bar(bar)
                paths.append(Path(hf_hub_download(file.repo_id, file.path_in_repo, **place)))
        return paths
