"""The Trainer subclass with its exact, padding-free passes, its arguments and its making."""

import contextlib
import math
import time
from collections import UserList
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast, gather_object, parse_flag_from_env
from peft.optimizers import create_loraplus_optimizer
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

import plan_utils
from checkpoint_utils import AGAIN
from engine_passes import count_tokens, count_trained_tokens, pack_rows, perplexity, score_rows
from engine_runner import StepFlags, StepRunner, choose_kernels, choose_pass_tokens, compiling, start_copy_to_host
from file_utils import display_path
from message_utils import Stopped, UserError, say
from model_utils import measured_peak, save_adapter
from process_utils import StopSignals
from progress_utils import format_duration

# ---- Trainer ---------------------------------------------------------------------------------------------------------


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
        with self.checkpoints.shared_storage_errors(step) if _internal_call else contextlib.nullcontext():
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


class LoraTrainer(ResumableTrainer):
    """A Trainer whose optimizer step sees one batch of rows and cuts it into passes of at most max_pass_tokens tokens.

    The batch is BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS rows; the Trainer itself accumulates nothing. The loss is the
    sum over trained tokens divided by the step's number of trained tokens over all passes and processes, so that the
    gradient does not depend on how the rows were cut.
    """

    def __init__(self, *args, max_pass_tokens, runner=None, **kwargs):
        # a list of rows would be searched for tensors, token by token
        super().__init__(*args, data_collator=UserList, **kwargs)
        self.runner = runner or StepRunner(self.model)
        self.model.zero_grad = lambda **_: self.runner.release_gradients()  # Module's walks through all modules
        self.model.train()  # the whole of it: a loaded base comes in eval mode
        self.runner.averaging = self.accelerator.num_processes > 1
        # no DDP, which would average in each pass; what it keeps of the first stream breaks a recording
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.rehearsed = False
        self.rows_of_step, self.loss_of_step = [], None
        self.unchecked = None  # StepFlags of the newest step, until they are read
        self.max_pass_tokens = max_pass_tokens
        self.tokens_trained, self.seconds_trained = 0, 0.0  # real tokens of this process and time, since the last log
        self.clock = time.perf_counter()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward over one step's rows; returns the step's mean loss a token."""
        self.clock = time.perf_counter()
        self.rows_of_step = inputs
        if not self.model.training:  # it walks through all modules
            model.train()
        processes, trained = self.accelerator.num_processes, count_trained_tokens(inputs)
        if processes > 1:
            trained = self.accelerator.reduce(torch.tensor(trained, device=self.args.device), "sum")
        if not self.rehearsed:
            self.rehearsed = True
            broadcast([parameter.detach() for parameter in self.runner.parameters])  # all begin with the first's
            self._rehearse()
        # the gradients of the processes are averaged, hence the factor
        step_loss = self._forward_backward(inputs, processes / trained)
        if self.runner.averaging:
            self.runner.flat.copy_(self.accelerator.reduce(self.runner.flat, "mean"))
        self.tokens_trained += count_tokens(inputs)
        self.loss_of_step = step_loss
        return step_loss

    def _forward_backward(self, rows, scale):
        """All passes of a step; returns the sum of scale times each loss.

        Out of memory gives up dequantized weights, then halves the passes' ceiling. Each try begins with the same
        random numbers of the CPU. No process waits for another here: training_step averages the gradients.
        """
        seed = torch.get_rng_state()
        while True:
            torch.set_rng_state(seed)
            try:
                return self._run_passes(rows, scale)
            except torch.OutOfMemoryError as error:
                largest = None if self.runner.dequantized else self._largest_pass(rows, error)
            except Exception as error:
                if not self.runner.simplify(error):
                    raise
                continue
            # here, where the exception no longer holds on to the tensors of its frames
            if largest is None:
                self.runner.give_up_dequantized()
                kept = "frozen weights are dequantized in each pass: slower, the same result"
                say(f"Out of memory; from here on {kept}", each_process=True)
                continue
            self.runner.release()
            say(
                f"Out of memory with a pass of {largest:,} tokens; from here on at most {largest // 2:,}, which takes"
                " more passes and gives the same result",
                each_process=True,
            )
            self.max_pass_tokens = largest // 2

    def _run_passes(self, rows, scale):
        self.runner.begin()
        step_loss = torch.zeros((), device=self.args.device)
        for indices in pack_rows([len(row["input_ids"]) for row in rows], self.max_pass_tokens):
            step_loss += self.runner.run(self.model, [rows[i] for i in indices], scale, self.accelerator.backward)
        return step_loss

    def _largest_pass(self, rows, error):
        """The tokens of a step's largest pass, which did not fit; a UserError where passes cannot be made smaller."""
        group = plan_utils.longest_pass(rows, self.max_pass_tokens)
        largest = count_tokens(group)
        if len(group) == 1:
            raise UserError(
                f"out of memory with a single row of {largest:,} tokens; lower --max_seq_length, or switch on"
                " --gradient_checkpointing or --use_4bit_quantization",
                each_process=True,
            ) from error
        return largest

    def _compare_with_plain_passes(self):
        """Do without compiled layers and recorded passes unless a typical pass has the gradients of a plain one."""

        def gradient():
            torch.manual_seed(0)  # the same dropout
            # a small factor, since that of float16's loss scaling comes on top
            self._forward_backward(plan_utils.typical_rows(self.train_dataset, 2), 1e-4)
            # compared on the host, since two more copies of the gradients would add to the peak of the memory
            return torch.cat([parameter.grad.cpu().flatten() for parameter in self.runner.parameters])

        found = gradient()
        with self.runner.plain_passes():
            expected = gradient()
        if not torch.linalg.vector_norm(found - expected) <= 0.3 * torch.linalg.vector_norm(expected):  # nan is none
            say(
                "Compiled layers have other gradients than plain ones; none is used, which is slower", each_process=True
            )
            self.runner.compiled = self.runner.recording = False
        self.runner.release()  # the longest pass is to be recorded first, whose memory then serves the others

    def _rehearse(self):
        """Run the longest pass that the data can ask for, without a trace, and say what it takes."""
        rows = plan_utils.longest_rows(self.train_dataset, self.args.per_device_train_batch_size)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        if devices:
            torch.cuda.empty_cache()  # what loading left
        with torch.random.fork_rng(devices):
            if self.runner.compiled:
                self._compare_with_plain_passes()
            first = self.runner.compiled or self.args.device.type != "cpu"  # it compiles, records, or loads kernels
            seconds = 0.0
            while True:
                before, started = (self.max_pass_tokens, self.runner.dequantized), time.perf_counter()
                group = plan_utils.longest_pass(rows, self.max_pass_tokens)
                with compiling():
                    self._forward_backward(group, 1e-3).item()
                earlier, seconds = seconds, time.perf_counter() - started
                again = before != (self.max_pass_tokens, self.runner.dequantized)
                if not (first or again):
                    break
                first = again
        self.runner.release_gradients()
        tokens, peak = count_tokens(group), measured_peak(self.args.device)
        steps = self.state.max_steps - self.state.global_step
        shares = (self.train_dataset, self.args.per_device_train_batch_size, self.accelerator.num_processes)
        expected = steps * plan_utils.tokens_a_step(*shares) / tokens * seconds
        if self.runner.recording:
            expected += plan_utils.count_recordings(*shares, steps, self.max_pass_tokens) * max(0, earlier - seconds)
        say(
            f"Rehearsal: the longest pass, {tokens:,} tokens, takes {seconds:.2f} s and {peak:.2f} GiB; the {steps}"
            f" steps will take about {format_duration(expected)}"
        )
        self.clock = time.perf_counter()

    def _clip_grad_norm(self, model):
        """Accelerate's clipping walks through all modules several times a step."""
        self.accelerator.unscale_gradients()
        return self.runner.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """Flag a loss or gradient that is not finite, and whether to stop; the optimizer leaves out a flagged step.

        The host reads a step's flags in the next one, before its optimizer step, so that it prepares a step while the
        GPU still computes the one before. What logs, evaluates or saves reads them first.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        finite = torch.isfinite(self.loss_of_step)
        if not self._scaler_will_skip():
            finite &= torch.isfinite(norm)
        # one message for both; all processes must decide alike
        flags = torch.stack([~finite, torch.full_like(finite, self.signals.requested > 0)]).int()
        flags = self.accelerator.reduce(flags, "sum")
        self._check_step()
        step, optimizer = self.state.global_step + 1, self.optimizer.optimizer
        self.unchecked = StepFlags(step, self.rows_of_step, self.loss_of_step, *start_copy_to_host(flags))
        if optimizer.defaults.get("fused") and self.accelerator.scaler is None:
            optimizer.found_inf = flags[0].clamp(max=1).float()
        else:
            self._check_step()
        return norm

    def _scaler_will_skip(self):
        """Whether fp16's loss scaling answers an overflowing gradient by a smaller scale, as it must at first."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _check_step(self):
        """Read the newest step's flags: refuse a loss or gradient that was not finite; note who got a signal."""
        if self.unchecked is None:
            return
        step, rows, loss, flags, wait = self.unchecked
        self.unchecked = None
        wait()
        faults, self.stop_now = flags.tolist()
        if faults:
            self._refuse(f"the {'gradient' if torch.isfinite(loss) else 'loss'} of step {step}", rows)

    def _refuse(self, what, rows, name="training data"):
        """Raise the UserError of a loss or gradient that is not finite, naming the rows at fault as far as known."""
        scores = score_rows(self.model, rows, 0)
        bad = [row["row"] for row, (nll, _) in zip(rows, scores, strict=True) if not math.isfinite(nll)]
        numbers = gather_object([(bad, [row["row"] for row in rows])])
        numbers = sorted({number for own, _ in numbers for number in own} or {n for _, every in numbers for n in every})
        shown = ", ".join(map(str, numbers[:20])) + f" and {len(numbers) - 20} more" * (len(numbers) > 20)
        last = self.checkpoints.last() if self.checkpoints else "nothing saved"
        raise UserError(
            f"{what} is not finite (nan or inf); its rows of the {name}: {shown}; {last}; look at these rows, or train"
            " anew with --fresh and a lower --learning_rate or a longer --warmup_ratio"
        )

    def _count_time(self):
        """Add the time since the step began, or since the last call, to the time spent in training."""
        started, self.clock = self.clock, time.perf_counter()
        self.seconds_trained += self.clock - started

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_log = True  # the last loss belongs to the record, whatever LOGGING_STEPS is
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._check_step()  # which waits for the GPU
        self._count_time()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.clock = time.perf_counter()  # what it took to evaluate and save is no training time

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Token-weighted loss and perplexity over the validation rows, shared out among the processes."""
        rows = list(self.eval_dataset if eval_dataset is None else eval_dataset)
        processes, lengths = self.accelerator.num_processes, [len(row["input_ids"]) for row in rows]
        mine = rows[self.accelerator.process_index :: processes]
        max_tokens = min(gather_object([self.max_pass_tokens]))  # memory may have run out in one alone
        passes = [len(pack_rows(lengths[rank::processes], max_tokens)) for rank in range(processes)]
        scores = score_rows(self.model, mine, max_tokens, self.stop_if_requested)
        for _ in range(max(passes) - passes[self.accelerator.process_index]):
            self.stop_if_requested()  # as often in each process, since all ask together
        # float64 counts tokens exactly, and a process without rows must send the type that the others send
        exact = torch.float32 if self.args.device.type == "mps" else torch.float64
        sums = [sum(nll for nll, _ in scores), sum(tokens for _, tokens in scores)]
        sums = torch.tensor(sums, dtype=exact, device=self.args.device)
        nll, tokens = self.accelerator.reduce(sums, "sum").tolist()
        loss = nll / tokens
        if not math.isfinite(loss):
            self._refuse(f"the validation loss of step {self.state.global_step}", mine, "validation data")
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity(loss)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs, start_time=None):
        """Add speed and memory to the training losses. Speed counts real tokens and training time only."""
        if "loss" in logs:
            self._count_time()  # reading the loss waited for the GPU to finish its steps
            processes = self.accelerator.num_processes
            logs["tokens_per_second"] = round(processes * self.tokens_trained / self.seconds_trained, 1)
            logs["peak_memory_gib"] = round(measured_peak(self.args.device), 3)
            self.tokens_trained, self.seconds_trained = 0, 0.0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        """Not counted: the Trainer's estimate needs padded batches."""
        return 0

    def _save_checkpoint(self, model, trial):
        self._check_step()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        """Write adapter and tokenizer only: the Trainer's training_args.bin is a pickle that can hold a Hub token."""
        if self.args.should_save:  # the first process alone: two would write into the same files
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, self.processing_class, output_dir)


# ---- Making it -------------------------------------------------------------------------------------------------------


def build_training_arguments(settings, output_dir, device, dtype, has_validation):
    """Trainer's arguments; evaluation and checkpoints fall on the same steps, so that the best one can be kept."""
    sharding = [name for name in ("FSDP", "DeepSpeed") if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")]
    if sharding:
        raise UserError(
            f"accelerate launch asks for {sharding[0]}, which shards a model over GPUs; here each GPU holds the model:"
            " run accelerate launch --multi_gpu train.py"
        )
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
        gradient_checkpointing=False,  # StepRunner's, which the fused kernels and compilation are made for
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


def build_trainer(
    model, tokenizer, train_rows, validation_rows, settings, arguments, callbacks, checkpoints=None, memory=None
):
    """A LoraTrainer with the fastest passes that the model, the machine and the length of the run are fit for.

    memory: plan_utils.plan_memory's MemoryPlan.
    """
    if settings.early_stopping_patience and validation_rows:
        callbacks = [*callbacks, EarlyStoppingCallback(settings.early_stopping_patience)]
    choose_kernels(model)
    max_pass_tokens = choose_pass_tokens(model, settings.batch_size * settings.max_seq_length)
    passes = plan_utils.count_passes(train_rows, settings, max_pass_tokens, arguments.world_size)
    compiled = plan_utils.choose_compilation(model, settings, arguments.device, passes)
    runner = StepRunner(
        model,
        **(memory or plan_utils.MemoryPlan())._asdict(),
        compiled=compiled,
        graphs=compiled,
        rows_a_pass=arguments.per_device_train_batch_size,
        longest=int(plan_utils.row_lengths(train_rows).max()),
    )
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows or None,
        processing_class=tokenizer,
        max_pass_tokens=max_pass_tokens,
        runner=runner,
        checkpoints=checkpoints,
        optimizers=(build_optimizer(model, settings, arguments), None),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
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
