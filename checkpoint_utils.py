"""Checkpoints of a run of train.py: whole or not counted; what its weights depend on; where it goes on."""

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import time
from collections import namedtuple
from datetime import datetime
from importlib.metadata import version
from pathlib import PurePosixPath

import numpy as np
import torch
from transformers import TrainerState
from transformers.trainer import safe_globals

from file_utils import (
    SHOWN_DIGITS,
    check_space,
    display_path,
    files_in,
    read_json,
    sha256,
    staged_folder,
    storage_errors,
    write_json,
)
from message_utils import UserError, say
from model_utils import ADAPTER_WEIGHTS, base_revision, template_content, tokenizer_content, write_recorded_settings
from process_utils import from_first_process, shared_errors
from progress_utils import progress
from run_utils import ADAPTER, CHECKPOINTS, set_aside
from settings_utils import PLACES, is_folder_name

# In a checkpoint: its manifest and what the Trainer's own state leaves out. Beside the checkpoints: the unfinished one.
MANIFEST, PROGRESS, STAGING = "manifest.json", "progress.json", "incomplete"


AGAIN = "the same command goes on from the last checkpoint"


# Where an interrupted run goes on: the folder of its newest checkpoint; that one's step; whether the training had ended
# there; the step of the best checkpoint, or None if there is none or it is damaged; the content of progress.json; the
# run's name in TensorBoard.
Resumption = namedtuple("Resumption", "folder step finished best_step progress run_name")


# ---- What the weights depend on --------------------------------------------------------------------------------------
# The settings that may change when a run goes on: they shape no weight, or the identity holds what follows from them,
# such as the content of the data for its path. A setting that is not listed here belongs to the identity, so that a new
# one is refused at worst, and never overlooked.
FREE_SETTINGS = {
    *("base_model_name", "device", "use_fp16", "custom_dataset_path", "validation_dataset_path", "answers_cut_limit"),
    *("chosen_only", "system_prompt"),
    *("gradient_checkpointing", "logging_steps", "save_total_limit", "sample_prompts"),
    *("eval_rows", "eval_samples", "answer_check"),
    *("max_new_tokens", "do_sample", "temperature", "top_p", "repetition_penalty"),
    *PLACES,
}

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
BLOCK = 2**20  # token ids that are hashed at once: 4 MiB


def training_identity(settings, base, rows, arguments):
    """Everything that the trained weights depend on, as {name: value}; base: model_utils.Base, rows: train.Rows.

    An interrupted run goes on only with a command of the same identity.
    """
    shaping = {name: value for name, value in settings._asdict().items() if name not in FREE_SETTINGS}
    if len(rows.evaluated) < len(rows.validation):  # which of them are measured can decide which checkpoint is the best
        shaping["evaluated_rows"] = rows_content(rows.evaluated)
    return shaping | {
        "base_model": f"{settings.base_model_name} @ {base_revision(base.path, base.models_dir)}",
        "tokenizer": tokenizer_content(base.tokenizer),
        "chat_template": template_content(base.tokenizer),
        "template_date": date.isoformat() if (date := getattr(base.tokenizer, "template_date", None)) else None,
        "training_data": rows_content(rows.training),
        "validation_data": rows_content(rows.validation),
        "device": arguments.device.type,
        "number_format": str(base.dtype).removeprefix("torch."),
        "processes": arguments.world_size,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def rows_content(rows):
    """The number of TokenizedRows and the hash of their ids and labels in their order.

    It does not matter where they lie in the file, or which dropped rows lie between them.
    """
    starts, lengths = rows.index["start"], rows.index["length"]
    # Rows without a gap between them are hashed as one stretch: all their ids, later which of them are trained
    first = np.flatnonzero(np.diff(starts, prepend=-1) != np.append(0, lengths)[:-1])
    last = np.append(first[1:], len(starts))[: len(first)] - 1
    stretches = [(starts[begin], starts[end] + lengths[end]) for begin, end in zip(first, last, strict=True)]
    blocks = (
        values[block : min(block + BLOCK, end)].astype(kind).tobytes()
        for values, kind in ((rows.ids, "<i4"), (rows.is_trained, bool))
        for start, end in stretches
        for block in range(start, end, BLOCK)
    )
    content = sha256(itertools.chain([lengths.astype("<i8").tobytes()], blocks))
    return f"{len(rows)} rows {content[:SHOWN_DIGITS]}"


def differences(old, new):
    """["learning_rate 0.0002 -> 0.001", ...]: why a run of identity `new` cannot go on with one of identity `old`."""

    def compared(identity, name):
        value = identity.get(name)
        # of a base model only the content, since its folder may have been moved
        return value.rpartition(" @ ")[2] if name == "base_model" and value else value

    names = sorted((old.keys() | new.keys()) - {"versions"})
    return [
        f"{name} {old.get(name)} -> {new.get(name)}" for name in names if compared(old, name) != compared(new, name)
    ]


def version_differences(old, new):
    """["peft 0.20.0 -> 0.21.2", ...]: other libraries may change the last bits of the weights, which is allowed."""
    old, new = old.get("versions", {}), new["versions"]
    return [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]


def run_date(output_dir, fresh):
    """The date that templates write in a run: that of an interrupted run in output_dir, which may go on, else now."""
    checkpoints = [] if fresh or os.path.lexists(output_dir / ADAPTER) else list_checkpoints(output_dir / CHECKPOINTS)
    for folder in checkpoints:
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):  # verified later, by find_resumption
            return datetime.fromisoformat(read_json(folder / MANIFEST, "its manifest")["identity"]["template_date"])
    return datetime.now().replace(microsecond=0)


# ---- Manifest --------------------------------------------------------------------------------------------------------
def required_files(identity):
    """The files without which a run would go on differently."""
    processes = identity["processes"]
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    scaler = ["scaler.pt"] if identity["number_format"] == "float16" else []
    names = (ADAPTER_WEIGHTS, "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", PROGRESS)
    return {*names, *states, *scaler}


def seal(folder, identity, **facts):
    """Write the manifest, which makes a checkpoint count: the facts, the identity, and each file's size and sha256.

    Raises RuntimeError if a required file is missing.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in files_in(folder) if path.name != MANIFEST}
    if missing := sorted(required_files(identity) - paths.keys()):
        raise RuntimeError(f"{folder} is to be sealed without {', '.join(missing)}")
    files = {name: {"bytes": path.stat().st_size, "sha256": sha256([path])} for name, path in paths.items()}
    write_json(folder / MANIFEST, facts | {"identity": identity, "files": files})


def verify(folder):
    """Compare every file of a checkpoint with its manifest and return the manifest; the UserError says what differs.

    What the manifest does not list makes a checkpoint not count either: the Trainer prefers a stray model.safetensors
    to the adapter, and would go on with fresh LoRA weights, in silence.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST, "its manifest")
    files = listed_files(manifest)
    missing = sorted(required_files(manifest["identity"]) - files.keys())
    expected = f"checkpoint-{manifest['step']}"
    if missing or folder.name != expected:
        raise UserError(f"its {MANIFEST} is of {expected} and lacks {', '.join(missing) or 'nothing'}")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if absent := sorted(files.keys() - found):
        raise UserError(f"{absent[0]} is missing")
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    if stray := sorted(found - files.keys() - folders - {MANIFEST}):
        raise UserError(f"it holds {stray[0]}, which its {MANIFEST} does not list; move that away to use it")
    for name, (size, content) in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{name} is no file")
        if path.stat().st_size != size:
            raise UserError(f"{name} has {path.stat().st_size:,} bytes, expected {size:,}")
        if sha256([path]) != content:
            raise UserError(f"{name} is damaged: its content is not what was saved")
    return manifest


# What a manifest says beside its files, and of which type
FACTS = {"step": int, "best_step": (int, type(None)), "finished": bool, "run_name": str, "identity": dict}


def listed_files(manifest):
    """{name: (bytes, sha256)} of a manifest's files; UserError unless the manifest says what seal writes, and no path.

    The run's name becomes that of a folder, so that a manifest may not choose another place by it.
    """
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        wrong = [name for name, kind in FACTS.items() if not isinstance(manifest[name], kind)]
        wrong += ["run_name"] if not is_folder_name(manifest["run_name"]) else []
        # each process has a file of its own, so that there cannot be more processes than files
        wrong += ["processes"] if not 0 < manifest["identity"]["processes"] <= len(files) else []
        wrong += ["number_format"] if not isinstance(manifest["identity"]["number_format"], str) else []
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"its {MANIFEST} is damaged ({type(error).__name__}: {error})") from None
    if wrong:
        raise UserError(f"its {MANIFEST} is damaged ({', '.join(wrong)})")
    return files


def list_checkpoints(folder):
    """The folders checkpoint-<step> in a folder, the newest first. None of them has been verified."""
    return sorted(
        (path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]{1,18}", path.name)),
        key=step_of,
        reverse=True,
    )


def step_of(path):
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("checkpoint-"))


def find_newest(folder):
    """Return (path, manifest) of the newest checkpoint that verifies, or None, and [(path, reason)] of newer ones."""
    skipped = []
    for path in list_checkpoints(folder):
        try:
            return (path, verify(path)), skipped
        except UserError as error:
            skipped.append((path, str(error)))
    return None, skipped


# ---- Going on --------------------------------------------------------------------------------------------------------
def find_resumption(output_dir, identity, fresh):
    """Return the Resumption of an interrupted run of this identity in output_dir, or None to start from the beginning.

    Raises UserError if the interrupted run has another identity, unless `fresh` asks for a new one. Moves nothing but
    checkpoints that do not verify, so that a command that is refused leaves everything as it was.
    """
    folder = output_dir / CHECKPOINTS
    if fresh:
        return None
    with progress("Verifying checkpoints"):
        newest, skipped = find_newest(folder)
    for path, reason in skipped:
        say(f"Skipped {display_path(path)}: {reason}")
    if (folder / STAGING).exists():
        say(f"Skipped {display_path(folder / STAGING)}: a checkpoint that was being saved when the run ended")
    if newest is None:
        if skipped or folder.exists():
            say(f"The interrupted run in {display_path(output_dir)} has no whole checkpoint; starting afresh")
        return None
    path, manifest = newest
    check_identity(output_dir, manifest, identity)
    check_states(path)
    losses, counters = read_history(path, manifest["step"])
    if skipped:
        moved = set_aside(output_dir, [f"{CHECKPOINTS}/{old.name}" for old, _ in skipped])
        say(f"What was skipped lies in {display_path(moved)}")
    resumption = Resumption(
        path,
        manifest["step"],
        manifest["finished"],
        best_whole_step(folder, manifest["best_step"], losses, manifest["step"]),
        counters,
        manifest["run_name"],
    )
    say(f"Going on with the interrupted run from {display_path(path)}; --fresh would start a new one")
    return resumption


def check_identity(output_dir, manifest, identity):
    """Raise UserError, naming what differs, unless the interrupted run had this identity; warn of other libraries."""
    identity = json.loads(json.dumps(identity))  # as it would be read from a manifest
    if changed := differences(manifest["identity"], identity):
        raise UserError(
            f"{display_path(output_dir)} holds an interrupted run with other settings or data: {', '.join(changed)};"
            " undo that to go on with it, add --fresh to set it aside and start a new run, or give another --output_dir"
        )
    if changed := version_differences(manifest["identity"], identity):
        say(f"Other versions than the run began with, so that its last digits may differ: {', '.join(changed)}")


def check_states(folder):
    """Raise UserError unless a checkpoint's pickles hold numbers only, which is how the Trainer will load them.

    A manifest does not protect from code in a pickle: who can change a file can also write a manifest that verifies.
    With weights_only=True torch runs no code.
    """
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        try:
            with safe_globals():  # allows numpy's random state
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"{display_path(path)} holds other things than numbers, such as code, and is not loaded; remove"
                f" {display_path(folder)} to go on from the checkpoint before it, or add --fresh to start anew"
            ) from error


def read_history(folder, step):
    """Return ({step: validation loss} so far, the content of progress.json) of the checkpoint of a step.

    Raises UserError if they are not what is saved: a manifest that verifies proves no more than who wrote it.
    """
    try:
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        losses = validation_losses(state)
        counters = read_json(folder / PROGRESS, "the checkpoint's progress")
        numbers = [*losses.values(), *(counters[name] for name in ("seconds", "loss_since_log", "last_logged_step"))]
        if state.global_step != step or not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise UserError(
            f"{display_path(folder)} does not hold what train.py saves in trainer_state.json and {PROGRESS}; remove it"
            " to go on from the checkpoint before it, or add --fresh to start anew"
        ) from None
    return losses, counters


def validation_losses(state):
    """{step: validation loss} of all evaluations that a TrainerState knows."""
    return {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}


def best_whole_step(folder, best, losses, at_hand):
    """The step of the best checkpoint that is whole: `best`, or, with a notice, the next best; None if there is none.

    losses: {step: validation loss} so far. at_hand: the step whose weights need no verifying, in memory or verified.
    """
    if best is None:
        return None
    candidates = {best, at_hand, *map(step_of, list_checkpoints(folder))} & losses.keys()
    for step in sorted(candidates, key=lambda step: (step != best, losses[step], step)):
        try:
            if step != at_hand:
                verify(folder / f"checkpoint-{step}")
        except UserError as error:
            say(f"The best checkpoint, checkpoint-{step}, is lost ({error}); looking for the next best")
        else:
            if step != best:
                say(f"The best whole one is that of step {step}, validation loss {losses[step]:.4f}")
            return step
    say("No evaluated checkpoint is left; the best of the coming ones is kept")
    return None


# ---- Saving ----------------------------------------------------------------------------------------------------------
MARGIN = 2**20  # bytes beside the weights: tokenizer, settings and manifest of a tiny model


def checkpoint_bytes(trainable):
    """Disk space of a checkpoint, for a number of trainable parameters: they and AdamW's two moments, in float32."""
    return trainable * 4 * 3 + MARGIN


def output_bytes(trainable, save_total_limit, existing=0):
    """Disk space that train.py still needs at most: the adapter and the checkpoints, of which some exist already.

    One checkpoint more than save_total_limit, since a new one is written before an old one is deleted.
    """
    return trainable * 4 + max(1, save_total_limit + 1 - existing) * checkpoint_bytes(trainable)


class Checkpoints:
    """Writes the checkpoints of one run of train.py, each as a whole, and deletes old ones."""

    def __init__(self, folder, settings, identity, run_name, trainable, resumption=None):
        self.folder = folder
        self.staging = folder / STAGING  # the Trainer writes <staging>/checkpoint-<step>
        self.settings = settings
        self.identity = identity
        self.run_name = run_name  # in TensorBoard
        self.trainable = trainable  # the number of trained parameters
        self.resumption = resumption
        self.saved_step = resumption.step if resumption else 0
        self.output_folder = None  # the device and number of the one that the run writes to
        self.started = time.time() - (resumption.progress["seconds"] if resumption else 0)

    def path(self, step):
        return self.folder / f"checkpoint-{step}"

    def last(self):
        """The words in which a message names the last good checkpoint."""
        return f"last good checkpoint: {display_path(self.path(self.saved_step)) if self.saved_step else 'none yet'}"

    def check_space(self):
        """Raise UserError unless the disk has room for everything that the run will write."""
        needed = output_bytes(self.trainable, self.settings.save_total_limit, len(list_checkpoints(self.folder)))
        check_space(self.folder, needed, "the run", "free some, or give another folder with --output_dir")

    @contextlib.contextmanager
    def save(self, state, finished, counters):
        """All processes fill <staging>/checkpoint-<step> in the block. Afterwards it is a checkpoint.

        If one process fails, all of them raise its error, nothing of the new checkpoint is left, and those before it
        are untouched. Older checkpoints are deleted only after the new one has been verified.
        """
        step = state.global_step
        with contextlib.ExitStack() as staged:  # in the first process it holds the staged folder, in others nothing
            from_first_process(self.prepare, step, staged)
            with self.shared_storage_errors(step):
                yield
            from_first_process(self.complete, state, finished, counters, staged)
        self.saved_step = step
        state.best_model_checkpoint = str(self.path(state.best_global_step)) if state.best_global_step else None

    def check_folder(self):
        """Raise UserError if the output folder was deleted under the run, or another lies in its place by now."""
        found = None
        with contextlib.suppress(OSError):
            place = self.folder.parent.stat()
            found = (place.st_dev, place.st_ino)
        self.output_folder = self.output_folder or found
        if found is None or found != self.output_folder:
            raise UserError(
                f"{display_path(self.folder.parent)} was deleted or moved while the run was writing to it, so that its"
                " checkpoints are gone; start it again, and leave its folder where it is",
                each_process=True,
            )

    def storage_errors(self, step):
        return storage_errors(f"checkpoint-{step}", f"{self.last()}; mend that, and {AGAIN}")

    @contextlib.contextmanager
    def shared_storage_errors(self, step):
        """If a disk refuses to write in one process, all processes raise the UserError."""
        with shared_errors(), self.storage_errors(step):
            yield

    def prepare(self, step, staged):
        """Make an empty folder for the checkpoint, if the disk has room for it. `staged` becomes responsible for it."""
        self.check_folder()  # making the staging folder would make a deleted one anew
        with self.storage_errors(step):
            shutil.rmtree(self.staging, ignore_errors=True)  # what a killed process left
            remedy = f"{self.last()}; free some space, and {AGAIN}"
            check_space(self.folder, checkpoint_bytes(self.trainable), f"checkpoint-{step}", remedy)
            staged.callback(shutil.rmtree, self.staging, ignore_errors=True)
            staged.enter_context(staged_folder(self.path(step), self.staging / f"checkpoint-{step}"))

    def complete(self, state, finished, counters, staged):
        """Seal the checkpoint, give it its name, verify it, and only then delete older ones."""
        step = state.global_step
        folder, target = self.staging / f"checkpoint-{step}", self.path(step)
        with self.storage_errors(step):
            state.best_model_checkpoint = None  # it is an absolute path, and best_global_step says the same
            state.save_to_json(folder / "trainer_state.json")
            write_json(folder / PROGRESS, counters | {"seconds": round(time.time() - self.started, 1)})
            write_recorded_settings(folder, self.settings)
            facts = {"step": step, "best_step": state.best_global_step, "finished": finished}
            seal(folder, self.identity, **facts, run_name=self.run_name)
            shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step
            staged.close()  # renames the folder
            verify(target)
        self.delete_old(state)

    def delete_old(self, state):
        """Keep the best checkpoint, the newest, and as many more as SAVE_TOTAL_LIMIT allows."""
        kept = {self.path(state.global_step), self.path(state.best_global_step)}
        others = [path for path in list_checkpoints(self.folder) if path not in kept]
        present = sum(path.exists() for path in kept)
        for path in others[max(0, self.settings.save_total_limit - present) :]:
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that half a deleted checkpoint does not count
            shutil.rmtree(path, ignore_errors=True)
