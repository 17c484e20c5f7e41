"""What a run is made of, and its checkpoints: whole, or they do not count; found again to go on from."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import time
from collections import namedtuple
from importlib.metadata import version

import numpy as np
import torch
from accelerate import PartialState
from transformers.trainer import safe_globals

from file_utils import (
    SHOWN_DIGITS,
    check_space,
    display_path,
    hash_files,
    read_json,
    saving,
    sync_file,
    sync_folder,
    write_json,
)
from message_utils import UserError, say
from model_utils import ADAPTER_WEIGHTS, base_revision, template_content, tokenizer_content, write_recorded_settings
from process_utils import from_first_process, together
from run_utils import CHECKPOINTS, set_aside_previous_run

MANIFEST, PROGRESS, STAGING = "manifest.json", "progress.json", "incomplete"


AGAIN = "the same command goes on from the last checkpoint"


# Where a run goes on: its newest checkpoint, that one's step, whether training had ended there, the step of the best
# checkpoint (None if there is none or it is damaged), what progress.json holds, the run's name in TensorBoard.
Resumption = namedtuple("Resumption", "folder step finished best_step progress run_name")


# ---- What a run is made of -------------------------------------------------------------------------------------------


# Settings that a resumed run may change: they shape no weight, or what counts of them is hashed or resolved instead.
# A setting that is not listed here belongs to the identity, so that a new one is refused before it is overlooked.
FREE_SETTINGS = {
    *("base_model_name", "device", "use_fp16", "custom_dataset_path", "validation_dataset_path", "answers_cut_limit"),
    *("gradient_checkpointing", "logging_steps", "save_total_limit", "sample_prompts", "eval_samples"),
    *("max_new_tokens", "do_sample", "temperature", "top_p", "repetition_penalty"),
    *("output_dir", "logs_dir", "models_dir", "run_name"),
}


LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


BLOCK = 2**20  # token ids that are hashed at once: 4 MiB


def rows_content(rows):
    """How many TokenizedRows there are, and the hash of their ids and labels in their order.

    Neither where they lie in the file nor the dropped rows between them matter.
    """
    starts, lengths = rows.index["start"], rows.index["length"]
    digest = hashlib.sha256(lengths.astype("<i8").tobytes())
    # rows that lie one behind the other are hashed as one, ids first and which of them are trained second
    first = np.flatnonzero(np.diff(starts, prepend=-1) != np.append(0, lengths)[:-1])
    last = np.append(first[1:], len(starts))[: len(first)] - 1
    stretches = [(starts[begin], starts[end] + lengths[end]) for begin, end in zip(first, last, strict=True)]
    for values, kind in ((rows.ids, "<i4"), (rows.is_trained, bool)):
        for start, end in stretches:
            for block in range(start, end, BLOCK):
                digest.update(values[block : min(block + BLOCK, end)].astype(kind).tobytes())
    return f"{len(rows)} rows {digest.hexdigest()[:SHOWN_DIGITS]}"


def run_identity(settings, base, rows, arguments):
    """All that the weights of a run depend on, {name: value}; an interrupted run goes on only where it is the same."""
    settled = {name: value for name, value in settings._asdict().items() if name not in FREE_SETTINGS}
    return settled | {
        "base_model": f"{settings.base_model_name} @ {base_revision(base.path, base.models_dir)}",
        "tokenizer": tokenizer_content(base.tokenizer),
        "chat_template": template_content(base.tokenizer),
        "training_data": rows_content(rows.training),
        "validation_data": rows_content(rows.validation),
        "device": arguments.device.type,
        "number_format": str(base.dtype).removeprefix("torch."),
        "processes": arguments.world_size,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def differences(old, new):
    """Return ["learning_rate 0.0002 -> 0.001", ...]: what forbids that a run `new` goes on with `old`."""

    def told(identity, name):
        value = identity.get(name)
        return value.rpartition(" @ ")[2] if name == "base_model" and value else value  # a moved folder is the same

    names = sorted((old.keys() | new.keys()) - {"versions"})
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if told(old, name) != told(new, name)]


def version_differences(old, new):
    """The same for the libraries, which may change the last bits of the weights and forbid nothing."""
    old, new = old.get("versions", {}), new["versions"]
    return [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]


# ---- Manifest --------------------------------------------------------------------------------------------------------


def required_files(identity):
    """The files without which a resumed run would go another way."""
    processes = identity["processes"]
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    scaler = ["scaler.pt"] * (identity["number_format"] == "float16")
    names = (ADAPTER_WEIGHTS, "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", PROGRESS)
    return {*names, *states, *scaler}


def seal(folder, identity, **facts):
    """Put every file of a folder on the disk, then write the manifest of sizes and hashes, which makes it count."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    if missing := sorted(required_files(identity) - {path.name for path in paths}):
        raise RuntimeError(f"{folder} is to be sealed without {', '.join(missing)}")
    for path in paths:
        sync_file(path)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": hash_files([path])} for path in paths}
    write_json(folder / MANIFEST, facts | {"identity": identity, "files": files})
    sync_folder(folder)


def verify(folder):
    """Return a checkpoint's manifest after comparing every file with it; UserError says what is wrong."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"it has no {MANIFEST}")
    manifest = read_json(folder / MANIFEST, "its manifest")
    try:
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        missing = sorted(required_files(manifest["identity"]) - files.keys())
        expected = f"checkpoint-{manifest['step']}"
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"its {MANIFEST} is damaged") from None
    if missing or folder.name != expected:
        raise UserError(f"its {MANIFEST} is of {expected} and lacks {', '.join(missing) or 'nothing'}")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{name} is missing")
        if path.stat().st_size != size:
            raise UserError(f"{name} has {path.stat().st_size:,} bytes, expected {size:,}")
        if hash_files([path]) != digest:
            raise UserError(f"{name} is damaged: its content is not what was saved")
    return manifest


def list_checkpoints(folder):
    """The folders checkpoint-<step> in it, the newest first, verified or not."""
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def find_newest(folder):
    """Return the newest checkpoint that verifies, (path, manifest) or None, and [(path, reason)] of those skipped."""
    skipped = []
    for path in list_checkpoints(folder):
        try:
            return (path, verify(path)), skipped
        except UserError as error:
            skipped.append((path, str(error)))
    return None, skipped


# ---- Going on --------------------------------------------------------------------------------------------------------


def find_resumption(output_dir, identity, fresh):
    """Return where an interrupted run of this identity goes on, or None where a run starts from its beginning.

    Raises UserError if there is an interrupted run of another identity, unless a fresh start is wanted. Moves nothing
    but checkpoints that do not verify, so that a run that cannot start leaves all as it was.
    """
    folder = output_dir / CHECKPOINTS
    if fresh:
        return None
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
    if skipped:
        moved = set_aside_previous_run(output_dir, [f"{CHECKPOINTS}/{old.name}" for old, _ in skipped])
        say(f"What was skipped lies in {display_path(moved)}")
    resumption = Resumption(
        path,
        manifest["step"],
        manifest["finished"],
        whole_best_step(folder, manifest),
        read_json(path / PROGRESS, "the checkpoint's progress"),
        manifest["run_name"],
    )
    say(f"Going on with the interrupted run from {display_path(path)}; --fresh would start a new one")
    return resumption


def check_identity(output_dir, manifest, identity):
    """Raise UserError, naming what differs, unless the interrupted run is this one; warn of other library versions."""
    identity = json.loads(json.dumps(identity))
    if changed := differences(manifest["identity"], identity):
        raise UserError(
            f"{display_path(output_dir)} holds an interrupted run with other settings or data: {', '.join(changed)};"
            " undo that to go on with it, add --fresh to set it aside and start a new run, or give another --output_dir"
        )
    if changed := version_differences(manifest["identity"], identity):
        say(f"Other versions than the run began with, so that its last digits may differ: {', '.join(changed)}")


def check_states(folder):
    """Raise UserError unless torch reads a checkpoint's states as numbers, which is how they will be loaded.

    Whoever can change a file can make a manifest that verifies; weights_only=True runs no code of a pickle.
    """
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        try:
            with safe_globals():  # numpy's random state
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise UserError(
                f"{display_path(path)} holds other things than numbers, such as code, and is not loaded; remove"
                f" {display_path(folder)} to go on from the checkpoint before it, or add --fresh to start anew"
            ) from error


def whole_best_step(folder, manifest):
    """The step of the best checkpoint so far, or None, with a line, if that one is not whole any more."""
    step = manifest["best_step"]
    if step in (None, manifest["step"]):
        return step
    try:
        verify(folder / f"checkpoint-{step}")
    except UserError as error:
        say(f"The best checkpoint so far, checkpoint-{step}, is lost ({error}); the best of the coming ones is kept")
        return None
    return step


# ---- Saving ----------------------------------------------------------------------------------------------------------


MARGIN = 2**20  # bytes beside the weights: tokenizer, settings and manifest of a tiny model


def checkpoint_bytes(trainable):
    """Disk space of a checkpoint: the adapter in float32 and the two moments of AdamW, and a margin."""
    return trainable * 4 * 3 + MARGIN


def run_bytes(trainable, save_total_limit, existing=0):
    """Disk space that a run takes at most: the adapter, the kept checkpoints, and the one that is being written."""
    return trainable * 4 + max(1, save_total_limit + 1 - existing) * checkpoint_bytes(trainable)


class Checkpoints:
    """The checkpoints of one run. Each is written under another name and takes its own when it is whole."""

    def __init__(self, folder, settings, identity, run_name, trainable, resumption=None):
        self.folder = folder
        self.staging = folder / STAGING
        self.settings = settings
        self.identity = identity
        self.run_name = run_name
        self.trainable = trainable
        self.resumption = resumption
        self.saved_step = resumption.step if resumption else 0
        self.started = time.time() - (resumption.progress["seconds"] if resumption else 0)

    def path(self, step):
        return self.folder / f"checkpoint-{step}"

    def last(self):
        """What a message says of the last good checkpoint."""
        return f"last good checkpoint: {display_path(self.path(self.saved_step)) if self.saved_step else 'none yet'}"

    def check_space(self):
        """Raise UserError unless the disk has room for all that the run will write."""
        needed = run_bytes(self.trainable, self.settings.save_total_limit, len(list_checkpoints(self.folder)))
        check_space(self.folder, needed, "the run", "free some, or give another folder with --output_dir")

    @contextlib.contextmanager
    def save(self, state, finished, progress):
        """Fill the staging folder inside; afterwards it is a checkpoint, or the save failed and it is gone."""
        step = state.global_step
        from_first_process(self.prepare, step)
        with self.cleaned_up(step), self.saving_together(step):
            yield  # each process writes its random state
        from_first_process(self.complete, state, finished, progress)
        self.saved_step = step
        state.best_model_checkpoint = str(self.path(state.best_global_step)) if state.best_global_step else None

    def saving(self, step):
        return saving(f"checkpoint-{step}", f"{self.last()}; mend that, and {AGAIN}")

    @contextlib.contextmanager
    def saving_together(self, step):
        """What is inside is done by all processes; where one of them cannot save, all end with its line."""
        with together(), self.saving(step):
            yield

    @contextlib.contextmanager
    def cleaned_up(self, step):
        """Remove a torn save and say why it failed; the checkpoints before it are untouched."""
        try:
            with self.saving(step):
                yield
        except BaseException:
            if PartialState().is_main_process:
                shutil.rmtree(self.staging, ignore_errors=True)
            raise

    def prepare(self, step):
        with self.cleaned_up(step):
            shutil.rmtree(self.staging, ignore_errors=True)
            remedy = f"{self.last()}; free some space, and {AGAIN}"
            check_space(self.folder, checkpoint_bytes(self.trainable), f"checkpoint-{step}", remedy)
            (self.staging / f"checkpoint-{step}").mkdir(parents=True)

    def complete(self, state, finished, progress):
        """Seal the checkpoint, give it its name, verify it, and only then delete older ones."""
        staged, target = self.staging / f"checkpoint-{state.global_step}", self.path(state.global_step)
        with self.cleaned_up(state.global_step):
            state.best_model_checkpoint = None  # an absolute path; best_global_step says the same
            state.save_to_json(staged / "trainer_state.json")
            write_json(staged / PROGRESS, progress | {"seconds": round(time.time() - self.started, 1)})
            write_recorded_settings(staged, self.settings)
            facts = {"step": state.global_step, "best_step": state.best_global_step, "finished": finished}
            seal(staged, self.identity, **facts, run_name=self.run_name)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staged, target)
            self.staging.rmdir()
            sync_folder(self.folder)
            verify(target)
        self.delete_old(state)

    def delete_old(self, state):
        """Keep the best, the newest and as many more as SAVE_TOTAL_LIMIT allows."""
        kept = {self.path(state.global_step), self.path(state.best_global_step)}
        others = [path for path in list_checkpoints(self.folder) if path not in kept]
        present = sum(path.exists() for path in kept)
        for path in others[max(0, self.settings.save_total_limit - present) :]:
            (path / MANIFEST).unlink(missing_ok=True)  # first, so that half a deleted checkpoint does not count
            shutil.rmtree(path, ignore_errors=True)
