"""Checkpoints that are whole or do not count: saved, verified, and found again to go on from."""

import contextlib
import json
import os
import pickle
import shutil
import time
from collections import namedtuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import safe_globals

from cache_utils import hash_files
from fault_utils import (
    StopSignals,
    check_space,
    checkpoint_bytes,
    from_first_process,
    run_bytes,
    saving,
    set_aside_previous_run,
    together,
)
from identity_utils import differences, version_differences
from model_utils import ADAPTER_WEIGHTS, write_recorded_settings
from run_utils import (
    CHECKPOINTS,
    Stopped,
    UserError,
    display_path,
    read_json,
    say,
    sync_file,
    sync_folder,
    write_json,
)

MANIFEST, PROGRESS, STAGING = "manifest.json", "progress.json", "incomplete"
AGAIN = "the same command goes on from the last checkpoint"
# Where a run goes on: its newest checkpoint, that one's step, whether training had ended there, the step of the best
# checkpoint (None if there is none or it is damaged), what progress.json holds, the run's name in TensorBoard.
Resumption = namedtuple("Resumption", "folder step finished best_step progress run_name")


def required_files(identity):
    """The files without which a resumed run would go another way."""
    processes = identity["processes"]
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    scaler = ["scaler.pt"] * (identity["number_format"] == "float16")
    names = (ADAPTER_WEIGHTS, "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", PROGRESS)
    return {*names, *states, *scaler}


# ---- Manifest --------------------------------------------------------------------------------------------------------
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


# ---- The Trainer's part ----------------------------------------------------------------------------------------------
class EvaluationStopped(Exception):
    """A signal came during an evaluation."""


class ResumableTrainer(Trainer):
    """A Trainer that saves and resumes by Checkpoints, and that a signal ends after its step or in an evaluation.

    Several processes learn of each other's signals with the flags of a step, so that it may take two steps more.
    """

    def __init__(self, *args, checkpoints=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.checkpoints = checkpoints  # None: nothing can be saved, which a test may be content with
        self.signals = StopSignals()
        self.stop_now = 0  # how many processes had got a signal by the last step that was looked at
        self.evaluation_due = False  # whether the step that is saved still has to be evaluated

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        long = self.control.should_evaluate or self.control.should_save
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._stop(evaluated=False)
        # asking the other processes takes a message, so that after a short step only what they had said counts
        ask = long or self.accelerator.num_processes == 1
        if (self.stop_now or (ask and self._stop_requested())) and not self.control.should_training_stop:
            self._stop()

    def _stop_requested(self):
        """Whether any process got a signal; the same answer in all of them."""
        if self.accelerator.num_processes == 1:
            return self.signals.requested > 0
        requested = torch.tensor(self.signals.requested, device=self.args.device)
        return self.accelerator.reduce(requested, "sum").item() > 0

    def _stop(self, evaluated=True):
        """Save where the run is and end it, as a signal asked; a resumed run makes up for an evaluation not finished.

        That evaluation draws no random numbers and changes no weight, so it may as well come after the save.
        """
        number = max(gather_object([self.signals.requested]))
        step, steps = self.state.global_step, self.state.max_steps
        self.evaluation_due = not evaluated
        if self.checkpoints.saved_step != step:
            self._save_checkpoint(self.model, None)
        where = f"Stopped {'at' if evaluated else 'in the evaluation of'} step {step} of {steps}"
        raise Stopped(number, f"{where}, saved in {display_path(self.checkpoints.path(step))}; {AGAIN}")

    def stop_if_requested(self):
        """Raise EvaluationStopped in all processes if any got a signal; all must ask equally often."""
        if self._stop_requested():
            raise EvaluationStopped

    def _get_output_dir(self, trial):
        """Where the Trainer puts checkpoint-<step>: a folder that it leaves only when it is whole."""
        return str(self.checkpoints.staging) if self.checkpoints else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        # each process adds up its own rows' losses, and the log shows their mean
        loss = self.accelerator.reduce(self._tr_loss.double(), "mean").item()
        progress = {"loss_since_log": loss, "last_logged_step": self._globalstep_last_logged}
        progress["evaluation_due"] = self.evaluation_due
        with self.checkpoints.save(self.state, self.control.should_training_stop, progress):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir=None, _internal_call=False):
        """In a checkpoint all processes learn of a failure here, before the Trainer lets them wait for each other."""
        step = self.state.global_step
        with self.checkpoints.saving_together(step) if _internal_call else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        if checkpoint is not None:
            best = self.checkpoints.resumption.best_step
            self.state.best_global_step = best
            self.state.best_model_checkpoint = best and str(self.checkpoints.path(best))
            self.state.best_metric = best and self.state.best_metric
            self.state.compute_steps(self.args, max_steps)  # LOGGING_STEPS may have been changed
        return begin

    def _run_epoch(self, **kwargs):
        """One epoch, or the rest of it where a run is resumed; the loss that was not logged yet is kept."""
        resumption = self.checkpoints and self.checkpoints.resumption
        if resumption and self.state.global_step == resumption.step:
            self._tr_loss += resumption.progress["loss_since_log"]
            self._globalstep_last_logged = resumption.progress["last_logged_step"]
            if resumption.progress.get("evaluation_due"):
                self._make_up_for_evaluation(kwargs)
            if resumption.finished:  # killed between its last checkpoint and the adapter
                self.control.should_training_stop = True
            if self.control.should_training_stop:
                return
        super()._run_epoch(**kwargs)

    def _make_up_for_evaluation(self, arguments):
        """Evaluate the resumed step, in whose evaluation a signal came. Its checkpoint has the weights already."""
        self.control.should_evaluate, self.control.should_save = True, False
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self._maybe_log_save_evaluate(self._tr_loss, None, *(arguments[name] for name in names))
        best = self.state.best_global_step
        self.state.best_model_checkpoint = best and str(self.checkpoints.path(best))
