"""The Trainer, its arguments and its making."""

import contextlib
import math
import shutil
import time
from collections import UserList
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object
from peft.optimizers import create_loraplus_optimizer
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from board_utils import RunBoard, SampleAnswers
from checkpoint_utils import AGAIN, best_whole_step, validation_losses
from engine_passes import count_tokens, pack_rows, perplexity
from engine_runner import StepCheck, StepRunner
from file_utils import display_path, files_in, sha256, storage_errors, sync_file
from message_utils import Stopped, UserError, counted, say
from model_utils import ADAPTER_WEIGHTS, measured_peak, save_adapter
from plan_utils import (
    RunTimes,
    StepPlan,
    count_rounds,
    expected_seconds,
    longest_rows,
    row_lengths,
    worth_recording,
)
from process_utils import StopSignals, from_first_process
from progress_utils import progress

# What LoraTrainer relies on beside the Trainer's public methods. A test tells when a release of it has lost one.
TRAINER_METHODS = (
    "_clip_grad_norm",
    "_finalize_training",
    "_get_grad_norm",
    "_get_output_dir",
    "_init_training_state",
    "_load_best_model",
    "_maybe_log_save_evaluate",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
)
TRAINER_ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged", "_n_gpu")  # the last one is the arguments'


# A rehearsal times so large a share of the steps, and at most so many seconds
SHARE_REHEARSED, LONGEST_REHEARSAL = 0.02, 10
SHORT_RUN = 5  # seconds; of shorter runs nothing but the passes is rehearsed


class EvaluationStopped(Exception):
    """A signal came during an evaluation."""


# ---- Trainer ---------------------------------------------------------------------------------------------------------
class LoraTrainer(Trainer):
    """A Trainer whose steps are a StepRunner's, and whose checkpoints are a Checkpoints'; a signal ends it well.

    Its batch is the BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS rows of an optimizer step, and it accumulates nothing. The
    loss is the sum over the step's trained tokens divided by their number, over all passes and processes, so that the
    gradient does not depend on how the rows were cut. A signal ends it after its step or in an evaluation; several
    processes learn of each other's signals with the flags of a step, so that it may take two steps more.

    checkpoints: None where nothing can be saved. base_content: of the base model, which each saved adapter records.
    all_validation_rows: where the evaluations measure only some of them. times: the RunTimes of the run. seen: the
    SeenRows of the run, which each saved adapter carries.
    """

    def __init__(
        self,
        *args,
        plan=None,
        checkpoints=None,
        base_content=None,
        all_validation_rows=None,
        times=None,
        seen=None,
        **kwargs,
    ):
        # UserList: the Trainer would search a plain list of rows for tensors, token by token
        super().__init__(*args, data_collator=UserList, **kwargs)
        self.runner = StepRunner(self.model, plan or StepPlan(), self.accelerator)
        self.check = StepCheck(self.runner)
        self.checkpoints, self.base_content, self.seen = checkpoints, base_content, seen
        self.all_validation_rows, self.final_loss = all_validation_rows, None
        self.times = times or RunTimes()
        self.bar = progress("Training")
        self.signals = StopSignals()
        self.stop_now = 0  # how many processes had got a signal by the last step whose flags were read
        self.going_on = None  # the Resumption, until what it left was taken up
        self.evaluation_due = False  # whether the step that is saved still has to be evaluated
        self.rehearsed = False
        self.rows_of_step, self.loss_of_step = [], None
        self.timed_step = 0  # up to which the seconds of the steps were noted
        self.speed = SpeedMeter()

    def train(self, *args, **kwargs):
        with progress("Training", left=self.seconds_left) as self.bar:
            return super().train(*args, **kwargs)

    def close(self):
        """Write what waits to be shown of the training."""
        for board in self._callbacks(RunBoard):
            board.close()

    def seconds_left(self):
        """Seconds to the end of the run; None until they were rehearsed."""
        return self.times.left(self.state.global_step) if self.rehearsed else None

    # ---- A step ----
    def get_train_dataloader(self):
        """Gives each process all rows of a step, of which it takes its part.

        Accelerate would deal them out in parts of one size, and fill the last step of an epoch up with rows that the
        epoch has had.
        """
        batch_size = self.args.train_batch_size * self._processes()
        loader = self._get_dataloader(
            self.train_dataset, "Training", batch_size, self._get_train_sampler, is_training=True
        )
        if self._processes() > 1:
            whole = loader.batch_sampler
            whole.num_processes, whole.process_index, whole.even_batches = 1, 0, False
        return loader

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward over one step's rows; returns the step's mean loss a token."""
        self.speed.start()
        inputs = inputs[self.accelerator.process_index :: self._processes()]
        if self.checkpoints:
            self.checkpoints.check_folder()
        if not self.rehearsed:
            broadcast([parameter.detach() for parameter in self.runner.parameters])  # all begin with the first's
            self.rehearse(self.checkpoints and self.checkpoints.staging)
            self.rehearsed = True
            self.timed_step = self.bar.done = self.state.global_step
            self.bar.total = self.state.max_steps
            self.speed.start()
        self.rows_of_step, self.loss_of_step = inputs, self.runner.step(inputs)
        self.speed.tokens += count_tokens(inputs)
        return self.loss_of_step

    # ---- The rehearsal ----
    def rehearse(self, scratch):
        """Let the runner rehearse the longest pass that the data can ask for; say what it takes, and what the run will.

        Nothing that is tried here leaves a trace in the weights or the random numbers. scratch: a folder to save in,
        which is removed; None: no save is tried.
        """
        rows, processes = self.train_dataset, self._processes()
        self.times.steps, self.times.eval_steps = self.state.max_steps, self.args.save_steps
        done = self.state.global_step
        steps = self.times.steps - done
        with progress("Rehearsing"):
            rehearsal = self._rehearse_passes(steps)
            peak = measured_peak(self.args.device)
            say(
                f"Rehearsal: the longest pass, {rehearsal.tokens:,} tokens, takes {rehearsal.seconds:.2f} s and"
                f" {peak:.2f} GiB"
            )
            seconds = expected_seconds(self.runner.plan, rehearsal, rows, steps, processes)
            if not self.runner.plan.recorded:
                enough = min(SHARE_REHEARSED * seconds, LONGEST_REHEARSAL)
                tokens, taken = self.runner.time_passes(self._usual_step(), enough)
                rehearsal = rehearsal._replace(tokens=tokens, seconds=taken)
                seconds = expected_seconds(self.runner.plan, rehearsal, rows, steps, processes)
            self.runner.lower(expected_seconds=seconds)
            self.times.expect("step", seconds / max(steps, 1))
            if max(gather_object([self._rough_seconds()])) >= SHORT_RUN:
                self._rehearse_rounds(scratch)
        say(self.times.describe(done, *self._round()))

    def _rehearse_passes(self, steps):
        """The Rehearsal of the passes, after which they are recorded only if that is faster over so many steps.

        A run that goes on does as it did before, since this decides the last digits. All processes decide alike: a step
        takes as long as in the slowest.
        """
        longest = longest_rows(self.train_dataset, self.args.per_device_train_batch_size)
        usual = sorted(self._usual_step(), key=lambda row: len(row["input_ids"]))
        usual = usual[(len(usual) - 1) // 2 :][:2]
        resumption = self.checkpoints and self.checkpoints.resumption
        before = resumption.progress.get("passes_recorded") if resumption else None
        if before is False:
            self.runner.record_nothing()
        rehearsal = self.runner.rehearse(longest, usual)
        if before is None:
            plan, known = self.runner.plan, (rehearsal, self.train_dataset, steps, self._processes())
            worth = any(gather_object([bool(plan.recorded and worth_recording(plan, *known))]))
            if plan.recorded and not worth:
                say("Passes are not recorded, since the run is expected to take no longer without")
                self.runner.record_nothing()
                rehearsal = self.runner.rehearse(longest, usual)
        return rehearsal

    def _processes(self):
        return self.accelerator.num_processes

    def _rough_seconds(self):
        """Of the run, where a token that is only scored takes a third of one that is trained."""
        scored = sum(int(row_lengths(rows).sum()) for rows in (self.eval_dataset, self.all_validation_rows) if rows)
        step = self.times.each("step")
        tokens = float(row_lengths(self.train_dataset).mean()) * self.args.per_device_train_batch_size
        rounds = max(1, count_rounds(self.times.steps, self.times.eval_steps, self.state.global_step))
        return step * (self.times.steps - self.state.global_step) + rounds * scored / tokens * step / 3

    def _usual_step(self):
        """The rows of a step, drawn at random."""
        rows, count = self.train_dataset, self.args.per_device_train_batch_size
        chosen = np.random.default_rng(0).choice(len(rows), min(count, len(rows)), replace=False)
        return [rows[int(index)] for index in chosen]

    def _round(self):
        """How many rows are measured at each evaluation, how many prompts answered, and how many rows at the end."""
        answers = self._sample_answers()
        return (
            len(self.eval_dataset or ()),
            len(answers.prompts) if answers else 0,
            len(self.all_validation_rows or ()),
        )

    def _callbacks(self, kind):
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, kind)]

    def _sample_answers(self):
        """The callback that answers prompts at each evaluation, or None."""
        found = self._callbacks(SampleAnswers)
        return found[0] if found and found[0].prompts and self.eval_dataset else None

    def _rehearse_rounds(self, scratch):
        """Time a pass of an evaluation, some tokens of its answers, and a save."""
        if self.eval_dataset:
            lengths = row_lengths(self.eval_dataset)
            middle = np.argsort(lengths, kind="stable")[len(lengths) // 2 :]  # the median row and longer ones
            size = max(self.runner.plan.max_pass_tokens, 1)
            fitting = max(1, int((lengths[middle].cumsum() <= size).sum()))
            tried = [self.eval_dataset[int(index)] for index in middle[:fitting]]
            for _ in range(2 if self.args.device.type == "cuda" else 1):  # a GPU loads what it needs first
                started = time.perf_counter()
                self.runner.score(tried, what="Rehearsing an evaluation")
            a_token = (time.perf_counter() - started) / sum(len(row["input_ids"]) for row in tried) / self._processes()
            self.times.expect("evaluation", a_token * int(lengths.sum()))
            if self.all_validation_rows:
                self.times.expect("end", a_token * int(row_lengths(self.all_validation_rows).sum()))
        answers = self._sample_answers()
        if answers and (self.is_world_process_zero() or self.runner.plan.shards > 1):
            self.times.expect("answers", answers.rehearse(self.model))
        if self.is_world_process_zero() and scratch:
            self.times.expect("save", self._time_save(scratch))

    def _time_save(self, folder):
        """Seconds of a checkpoint: the adapter is written and thrown away; AdamW's moments are twice as large.

        0 where the disk refuses: a save will tell why.
        """
        started = time.perf_counter()
        try:
            with storage_errors("a checkpoint", "free some space"):
                shutil.rmtree(folder, ignore_errors=True)
                self._save(folder)
                files = files_in(folder)
                for path in files:
                    sync_file(path)
                sha256(files)
            weights, size = (folder / ADAPTER_WEIGHTS).stat().st_size, sum(path.stat().st_size for path in files)
        except UserError:
            return 0.0
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return (time.perf_counter() - started) * (size + 2 * weights) / size

    def _clip_grad_norm(self, model):
        """Accelerate's clipping walks through all modules several times a step."""
        self.accelerator.unscale_gradients()
        return self.runner.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """Flag a loss or gradient that is not finite; the optimizer leaves out a flagged step."""
        norm = super()._get_grad_norm(model, grad_norm)
        finite, scaler = torch.isfinite(self.loss_of_step), self.accelerator.scaler
        if not answers_overflow(scaler):
            finite &= torch.isfinite(norm)
        optimizer = self.optimizer.optimizer
        leaves_out = optimizer.defaults.get("fused") and scaler is None
        self._judge(
            self.check.note(
                self.state.global_step + 1,
                self.rows_of_step,
                self.loss_of_step,
                finite,
                self.signals.requested > 0,
                optimizer if leaves_out else None,
            )
        )
        if not leaves_out:
            self._judge(self.check.read())
        return norm

    def _judge(self, flags):
        """Refuse a step that was not finite; note how many processes got a signal. flags: StepFlags or None."""
        if flags is None:
            return
        self.stop_now = flags.stopping
        if flags.faults:
            what = "gradient" if torch.isfinite(flags.loss) else "loss"
            refuse(self, f"the {what} of step {flags.step}", flags.rows, "training data")

    def floating_point_ops(self, inputs):
        """Not counted: the Trainer's estimate needs padded batches."""
        return 0

    # ---- Between two steps ----
    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_log = True  # the last loss belongs to the record, whatever LOGGING_STEPS is
        long = self.control.should_evaluate or self.control.should_save
        if long or self.control.should_log:
            self._judge(self.check.read())  # which waits for the GPU
        self.bar.done = self.state.global_step
        self.speed.pause()
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._stop(evaluated=False)
        # asking the other processes takes a message, so that after a short step only what they had said counts
        ask = long or self.accelerator.num_processes == 1
        if (self.stop_now or (ask and self._stop_requested())) and not self.control.should_training_stop:
            self._stop()
        self.speed.start()  # the time of evaluations and saves is no training time

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Token-weighted loss and perplexity over the validation rows, shared out among the processes."""
        started = time.perf_counter()
        loss = self._loss_of(self.eval_dataset if eval_dataset is None else eval_dataset)
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity(loss)}
        evaluated = time.perf_counter()
        self.times.measured("evaluation", evaluated - started)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.times.measured("answers", time.perf_counter() - evaluated)
        return metrics

    def _loss_of(self, validation_rows):
        """Mean loss a trained token over validation rows, of which each process computes its share."""
        mine, loss = validation_loss(self.runner, list(validation_rows), self.accelerator, self.stop_if_requested)
        if not math.isfinite(loss):
            refuse(self, f"the validation loss of step {self.state.global_step}", mine, "validation data")
        return loss

    def measure_best(self):
        """After the training: the loss of the checkpoint that was kept over all validation rows, as `final_loss`.

        The evaluations may have measured some of them. A signal leaves this to the next start of the command.
        """
        self.final_loss = self.state.best_metric
        if self.all_validation_rows:
            try:
                self.final_loss = self._loss_of(self.all_validation_rows)
            except EvaluationStopped:
                self._stop(evaluated=False)
            perplexities = f"{perplexity(self.final_loss):.2f}"
            say(
                f"Validation loss {self.final_loss:.4f}, perplexity {perplexities}, on all"
                f" {counted(len(self.all_validation_rows), 'row')}"
            )
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        for board in self._callbacks(RunBoard):
            board.add_final(self.final_loss, losses[-1] if losses else None, self.state.global_step)

    def log(self, logs, start_time=None):
        """Add speed and memory to the training losses. Speed counts real tokens and training time only."""
        if "loss" in logs:
            self.speed.pause()  # reading the loss waited for the GPU to finish its steps
            self.times.measured("step", self.speed.seconds, self.state.global_step - self.timed_step)
            self.timed_step = self.state.global_step
            logs["tokens_per_second"] = round(self.accelerator.num_processes * self.speed.read(), 1)
            logs["peak_memory_gib"] = round(measured_peak(self.args.device), 3)
        if "loss" in logs or "eval_loss" in logs:
            logs["elapsed_seconds"] = round(self.times.elapsed(), 1)
            logs["seconds_left"] = round(self.times.left(self.state.global_step), 1)
        super().log(logs, start_time)

    # ---- Stopping ----
    def _stop_requested(self):
        """Whether any process got a signal; the same answer in all of them."""
        if self.accelerator.num_processes == 1:
            return self.signals.requested > 0
        requested = torch.tensor(self.signals.requested, device=self.args.device)
        return self.accelerator.reduce(requested, "sum").item() > 0

    def stop_if_requested(self):
        """Raise EvaluationStopped in all processes if any got a signal; all must ask equally often."""
        if self._stop_requested():
            raise EvaluationStopped

    def _stop(self, evaluated=True):
        """Save where the training is and end it, as a signal asked; when it goes on, a broken-off evaluation is made.

        That evaluation draws no random numbers and changes no weight, so it may as well come after the save.
        """
        number = max(gather_object([self.signals.requested]))
        step, steps = self.state.global_step, self.state.max_steps
        self.evaluation_due = not evaluated
        if self.checkpoints.saved_step != step:
            self._save_checkpoint(self.model, None)
        where = f"Stopped {'at' if evaluated else 'in the evaluation of'} step {step} of {steps}"
        raise Stopped(number, f"{where}, saved in {display_path(self.checkpoints.path(step))}; {AGAIN}")

    # ---- Saving ----
    def _get_output_dir(self, trial):
        """Where the Trainer puts checkpoint-<step>: a folder that it leaves only when it is whole."""
        return str(self.checkpoints.staging) if self.checkpoints else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        self._judge(self.check.read())
        # each process adds up its own rows' losses, and the log shows their mean
        loss = self.accelerator.reduce(self._tr_loss.double(), "mean").item()
        record = {
            "loss_since_log": loss,
            "last_logged_step": self._globalstep_last_logged,
            "evaluation_due": self.evaluation_due,
            "passes_recorded": self.runner.plan.recorded,
        }
        started = time.perf_counter()
        with progress("Saving"), self.checkpoints.save(self.state, self.control.should_training_stop, record):
            super()._save_checkpoint(model, trial)
        self.times.measured("save", time.perf_counter() - started)

    def save_model(self, output_dir=None, _internal_call=False):
        """In a checkpoint all processes learn of a failure here, before the Trainer lets them wait for each other."""
        step = self.state.global_step
        with self.checkpoints.shared_storage_errors(step) if _internal_call else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None):
        """Write adapter and tokenizer only: the Trainer's training_args.bin is a pickle that can hold a Hub token."""
        if self.args.should_save:  # the first process alone: two would write into the same files
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, self.processing_class, output_dir, self.base_content, self.seen)

    def _load_best_model(self):
        """Take the weights of the best checkpoint that is whole; the state, and with it the record, says which."""
        state = self.state
        losses = validation_losses(state)
        known = (self.checkpoints.folder, state.best_global_step, losses, state.global_step)
        best = from_first_process(best_whole_step, *known)
        state.best_global_step, state.best_metric = best, losses[best]
        state.best_model_checkpoint = str(self.checkpoints.path(best))
        if best != state.global_step:  # else they are in memory
            super()._load_best_model()

    # ---- Going on ----
    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        if checkpoint is not None:
            self.going_on = self.checkpoints.resumption
            best = self.going_on.best_step
            self.state.best_global_step = best
            self.state.best_model_checkpoint = best and str(self.checkpoints.path(best))
            self.state.best_metric = best and validation_losses(self.state)[best]
            self.state.compute_steps(self.args, max_steps)  # LOGGING_STEPS may have been changed
        return begin

    def _run_epoch(self, **kwargs):
        """One epoch, or the rest of it where the training goes on."""
        self._go_on()
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _finalize_training(self, *args):
        """The end of the training; one that goes on from the last step of an epoch may come here without an epoch."""
        self._go_on()
        return super()._finalize_training(*args)

    def _go_on(self):
        """Take up, once, what was left at the step where the training goes on."""
        resumption, self.going_on = self.going_on, None
        if resumption is None:
            return
        self._tr_loss += resumption.progress["loss_since_log"]  # the loss that was not logged yet
        self._globalstep_last_logged = resumption.progress["last_logged_step"]
        if resumption.progress.get("evaluation_due"):
            self._make_up_for_evaluation()
        if resumption.finished:  # killed between its last checkpoint and the adapter
            self.control.should_training_stop = True

    def _make_up_for_evaluation(self):
        """Evaluate the step at which the training goes on, in whose evaluation a signal had come.

        Its checkpoint has the weights already.
        """
        self.control.should_evaluate, self.control.should_save = True, False
        self._maybe_log_save_evaluate(
            self._tr_loss,
            grad_norm=None,
            model=self.model,
            trial=None,
            epoch=self.state.epoch,
            ignore_keys_for_eval=None,
            start_time=time.time(),
        )
        best = self.state.best_global_step
        self.state.best_model_checkpoint = best and str(self.checkpoints.path(best))


class SpeedMeter:
    """Counts tokens, and the seconds in which they were trained; evaluations and saves are left out."""

    def __init__(self):
        self.tokens, self.seconds = 0, 0.0
        self.started = time.perf_counter()

    def start(self):
        """What went by since the last call counts as no training time."""
        self.started = time.perf_counter()

    def pause(self):
        """What went by since the last call counts as training time."""
        before, self.started = self.started, time.perf_counter()
        self.seconds += self.started - before

    def read(self):
        """Tokens a second since the last reading."""
        speed = self.tokens / self.seconds
        self.tokens, self.seconds = 0, 0.0
        return speed


def answers_overflow(scaler):
    """Whether the loss scaling of float16 answers an overflowing gradient by a smaller scale, as it must at first.

    scaler: torch's GradScaler, or None in other number formats.
    """
    return scaler is not None and scaler.get_scale() > 1


def validation_loss(runner, rows, accelerator, before_pass):
    """The rows of this process, and the mean loss a trained token over the rows of all processes, in nats.

    before_pass is called as often in each process, since in it all of them ask each other.
    """
    processes, lengths = accelerator.num_processes, [len(row["input_ids"]) for row in rows]
    mine = rows[accelerator.process_index :: processes]
    max_tokens = min(gather_object([runner.plan.max_pass_tokens]))  # memory may have run out in one process alone
    passes = [len(pack_rows(lengths[rank::processes], max_tokens)) for rank in range(processes)]
    scores = runner.score(mine, before_pass, max_tokens, passes=max(passes))
    # float64 counts tokens exactly, and a process without rows must send the type that the others send
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = [sum(nll for nll, _ in scores), sum(tokens for _, tokens in scores)]
    nll, tokens = accelerator.reduce(torch.tensor(sums, dtype=exact, device=accelerator.device), "sum").tolist()
    return mine, nll / tokens


def refuse(trainer, what, rows, name):
    """Raise the UserError of a loss or gradient that is not finite, naming the rows at fault as far as they are known.

    Each row is scored by itself for that; the rows of all processes are named where none is found.
    """
    scores = trainer.runner.score(rows, max_pass_tokens=0, passes=max(gather_object([len(rows)])))
    bad = [row["row"] for row, (nll, _) in zip(rows, scores, strict=True) if not math.isfinite(nll)]
    numbers = gather_object([(bad, [row["row"] for row in rows])])
    numbers = sorted({number for own, _ in numbers for number in own} or {n for _, every in numbers for n in every})
    more = f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
    last = trainer.checkpoints.last() if trainer.checkpoints else "nothing saved"
    raise UserError(
        f"{what} is not finite (nan or inf); its rows of the {name}: {', '.join(map(str, numbers[:20]))}{more}; {last};"
        " look at these rows, or train anew with --fresh and a lower --learning_rate or a longer --warmup_ratio"
    )


# ---- Making it -------------------------------------------------------------------------------------------------------
def build_training_arguments(settings, output_dir, device, dtype, has_validation):
    """Trainer's arguments; evaluation and checkpoints fall on the same steps, so that the best one can be kept."""
    strategy = "steps" if has_validation else "no"
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size * settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=choose_optimizer(settings, device),
        gradient_checkpointing=False,  # the StepRunner checkpoints
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # True would log a diverged loss as 0
        eval_strategy=strategy,
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.eval_steps,
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting where it was
        load_best_model_at_end=has_validation,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        seed=settings.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to=[],
    )
    if arguments.n_gpu > 1:
        launch = f"accelerate launch --num_processes {arguments.n_gpu} train.py"
        say(f"{arguments.n_gpu} GPUs are visible and one is used; to use them all: {launch}")
    # Without a launcher the Trainer would scale the loss by the number of visible GPUs (trainer.py, n_gpu)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def choose_optimizer(settings, device):
    """The Trainer's name of the optimizer; on a CPU bitsandbytes cannot page, and would say so in its own words."""
    if settings.optimizer == "paged_adamw_8bit" and device.type == "cpu":
        say("On a CPU paged_adamw_8bit keeps its state in 8 bits and does not page it; the result is the same")
        return "adamw_8bit"
    if settings.optimizer == "paged_adamw_8bit":
        return settings.optimizer
    return "adamw_torch_fused" if device.type in ("cuda", "cpu") else "adamw_torch"


def build_trainer(settings, base, rows, plan, model, checkpoints=None, callbacks=(), times=None, seen=None):
    """A LoraTrainer of a model with its adapter.

    base: a model_utils.Base. rows: its `training`, `validation` and `evaluated` are TokenizedRows. plan: its
    `arguments` are the TrainingArguments, its `steps` are a StepPlan. times: RunTimes. seen: the SeenRows of the run.
    """
    trainer = LoraTrainer(
        model=model,
        args=plan.arguments,
        train_dataset=rows.training,
        eval_dataset=rows.evaluated or None,
        processing_class=base.tokenizer,
        optimizers=(build_optimizer(model, settings, plan.arguments), None),
        plan=plan.steps,
        checkpoints=checkpoints,
        base_content=base.content,
        all_validation_rows=rows.validation if len(rows.evaluated) < len(rows.validation) else None,
        times=times,
        seen=seen,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if settings.early_stopping_patience and rows.validation:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def build_optimizer(model, settings, arguments):
    """LoRA+'s optimizer (Hayou et al. 2024), or None: the Trainer makes the usual one."""
    if settings.lora_plus_ratio == 1:
        return None
    optimizer, options = LoraTrainer.get_optimizer_cls_and_kwargs(arguments, model)
    return create_loraplus_optimizer(
        model,
        optimizer,
        loraplus_lr_ratio=settings.lora_plus_ratio,
        loraplus_weight_decay=settings.weight_decay,
        **options,
    )
