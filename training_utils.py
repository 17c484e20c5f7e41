"""The Trainer subclass with its exact, padding-free passes, and the plan shown before training."""

import contextlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainingArguments,
)

from checkpoint_utils import ResumableTrainer
from fault_utils import run_bytes
from generation_utils import autocast
from model_utils import save_adapter
from run_utils import UserError, say
from token_utils import build_pass, count_trained_tokens, pack_rows


# ---- Loss ------------------------------------------------------------------------------------------------------------
def pass_losses(model, rows):
    """Cross entropy of every trained token of rows laid end to end; returns (losses, row of each), (targets,) each.

    use_cache=False and no attention mask: only then do transformers' masks keep the rows apart. Logits are computed
    only where a trained token follows.
    """
    batch = {name: tensor.to(model.device) for name, tensor in build_pass(rows).items()}
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        logits_to_keep=batch["predicting"],
        use_cache=False,
    ).logits
    return F.cross_entropy(logits[0].float(), batch["targets"], reduction="none"), batch["row_of_target"]


@torch.no_grad()
def score_rows(model, rows, max_tokens, before_pass=lambda: None):
    """Return [(negative log-likelihood in nats, trained tokens) for each row], whatever the batching."""
    scores = [None] * len(rows)
    model.eval()
    for indices in pack_rows([len(row["input_ids"]) for row in rows], max_tokens):
        before_pass()
        group = [rows[index] for index in indices]
        with autocast(model):
            losses, row_of_target = pass_losses(model, group)
        sums = torch.zeros(len(group), dtype=torch.float64)
        sums.index_add_(0, row_of_target.cpu(), losses.cpu().double())
        for index, row, total in zip(indices, group, sums.tolist(), strict=True):
            scores[index] = (total, count_trained_tokens([row]))
    return scores


def choose_pass_tokens(model, max_tokens):
    """Return max_tokens if the model keeps rows laid end to end apart, else 0: each row is a pass of its own.

    Tried on two short rows. Attention layers with rotary positions pass; recurrent and convolutional layers, and
    learned absolute positions in some families, let a row read the one before it.
    """
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [torch.randint(vocabulary, (24,), generator=draw).tolist() for _ in range(2)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    training = model.training
    with torch.no_grad(), autocast(model):
        model.eval()
        together = pass_losses(model, rows)[0][-23:]
        alone = pass_losses(model, rows[1:])[0]
        model.train(training)
    # in half precision the order of summation alone moves a loss by some hundredths
    if (together - alone).abs().max() <= (1e-3 if model.dtype == torch.float32 else 0.25):
        return max_tokens
    say("This model mixes rows that are laid end to end, so each row is computed by itself, which is slower")
    return 0


def mean_loss(scores):
    """Token-weighted mean of score_rows' result, in nats a token; exp of it is the perplexity."""
    return sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def perplexity(loss):
    """exp(loss), infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


# ---- Trainer ---------------------------------------------------------------------------------------------------------
class LoraTrainer(ResumableTrainer):
    """A Trainer whose optimizer step sees one batch of rows and cuts it into passes of at most max_pass_tokens tokens.

    The batch is BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS rows; the Trainer itself accumulates nothing. The loss is the
    sum over trained tokens divided by the step's number of trained tokens over all passes and processes, so that the
    gradient does not depend on how the rows were cut.
    """

    def __init__(self, *args, max_pass_tokens, **kwargs):
        super().__init__(*args, data_collator=list, **kwargs)
        self.rows_of_step, self.loss_of_step = [], None
        self.max_pass_tokens = max_pass_tokens
        self.tokens_trained = 0  # real tokens of this process and seconds of training, both since the last log
        self.seconds_trained = 0.0
        self.clock = time.perf_counter()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward over one step's rows; returns the step's mean loss a token."""
        self.clock = time.perf_counter()
        self.rows_of_step = inputs
        model.train()
        processes = self.accelerator.num_processes
        trained = torch.tensor(count_trained_tokens(inputs), device=self.args.device)
        trained = self.accelerator.reduce(trained, "sum")
        step_loss = torch.zeros((), device=self.args.device)
        passes = pack_rows([len(row["input_ids"]) for row in inputs], self.max_pass_tokens)
        for number, indices in enumerate(passes, start=1):
            sync = contextlib.nullcontext() if number == len(passes) else self.accelerator.no_sync(model)
            with sync:
                losses, _ = pass_losses(model, [inputs[index] for index in indices])
                # DDP averages the gradients of the processes, hence the factor
                loss = losses.sum() * processes / trained
                self.accelerator.backward(loss)
            step_loss += loss.detach()
        self.tokens_trained += sum(len(row["input_ids"]) for row in inputs)
        self.loss_of_step = step_loss
        return step_loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Refuse a loss or gradient that is not finite before the optimizer sees it, and agree on whether to stop."""
        norm = super()._get_grad_norm(model, grad_norm)
        finite = torch.isfinite(self.loss_of_step) & (torch.isfinite(norm) | self._scaler_will_skip())
        # one message for both, since it makes the host wait for the device; all processes must decide alike
        flags = torch.stack([~finite, torch.tensor(self.signals.requested > 0, device=finite.device)]).int()
        faults, self.stop_now = self.accelerator.reduce(flags, "sum").tolist()
        if faults:
            what = "gradient" if torch.isfinite(self.loss_of_step) else "loss"
            self._refuse(f"the {what} of step {self.state.global_step + 1}", self.rows_of_step)
        return norm

    def _scaler_will_skip(self):
        """Whether fp16's loss scaling answers an overflowing gradient by a smaller scale, as it must at first."""
        scaler = self.accelerator.scaler
        return torch.tensor(scaler is not None and scaler.get_scale() > 1, device=self.args.device)

    def _refuse(self, what, rows, name="training data"):
        """Raise the UserError of a loss or gradient that is not finite, naming the rows at fault as far as known."""
        bad = [
            row["row"]
            for row, (nll, _) in zip(rows, score_rows(self.model, rows, 0), strict=True)
            if not math.isfinite(nll)
        ]
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
        now = time.perf_counter()
        self.seconds_trained += now - self.clock
        self.clock = now

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._count_time()
        if self.state.global_step >= self.state.max_steps:
            self.control.should_log = True  # the last loss belongs to the record, whatever LOGGING_STEPS is
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.clock = time.perf_counter()  # what it took to evaluate and save is no training time

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Token-weighted loss and perplexity over the validation rows, shared out among the processes."""
        rows = list(self.eval_dataset if eval_dataset is None else eval_dataset)
        processes, lengths = self.accelerator.num_processes, [len(row["input_ids"]) for row in rows]
        mine = rows[self.accelerator.process_index :: processes]
        passes = [len(pack_rows(lengths[rank::processes], self.max_pass_tokens)) for rank in range(processes)]
        scores = score_rows(self.model, mine, self.max_pass_tokens, self.stop_if_requested)
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
            logs["peak_memory_gib"] = round(peak_memory_gib(self.args.device), 3)
            self.tokens_trained, self.seconds_trained = 0, 0.0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs):
        """Not counted: the Trainer's estimate needs padded batches."""
        return 0

    def _save(self, output_dir=None, state_dict=None):
        """Write adapter and tokenizer only: the Trainer's training_args.bin is a pickle that can hold a Hub token."""
        if self.args.should_save:  # the first process alone: two would write into the same files
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_adapter(self.model, self.processing_class, output_dir)


def peak_memory_gib(device):
    """Peak memory of this process in GiB: reserved by PyTorch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        import resource
    except ImportError:  # Windows has no such figure in the standard library
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


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
        optim="paged_adamw_8bit" if settings.optimizer == "paged_adamw_8bit" else fused_adamw(device),
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
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
        ddp_find_unused_parameters=False,  # every LoRA weight takes part in every pass
        report_to=[],
    )
    if arguments.n_gpu > 1:
        launch = f"accelerate launch --num_processes {arguments.n_gpu} train.py"
        say(f"{arguments.n_gpu} GPUs are visible and one is used; to use them all: {launch}")
    # Without a launcher the Trainer would scale the loss by the number of visible GPUs (trainer.py, n_gpu)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def fused_adamw(device):
    return "adamw_torch_fused" if device.type in ("cuda", "cpu") else "adamw_torch"


def build_trainer(model, tokenizer, train_rows, validation_rows, settings, arguments, callbacks, checkpoints=None):
    if settings.early_stopping_patience and validation_rows:
        callbacks = [*callbacks, EarlyStoppingCallback(settings.early_stopping_patience)]
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=validation_rows or None,
        processing_class=tokenizer,
        max_pass_tokens=choose_pass_tokens(model, settings.batch_size * settings.max_seq_length),
        checkpoints=checkpoints,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


# ---- The plan --------------------------------------------------------------------------------------------------------
def count_steps(rows, settings, processes=1):
    """Optimizer steps of a run, as the Trainer counts them."""
    rows_a_step = settings.batch_size * settings.gradient_accumulation_steps * processes
    steps = settings.num_epochs * math.ceil(rows / rows_a_step)
    return min(steps, settings.max_steps) if settings.max_steps else steps


def print_plan(settings, device, dtype, rows, validation_rows, parameters, processes=1):
    """Say, before any weight is loaded, what the run will do and what it needs."""
    total, trainable = parameters
    steps = count_steps(len(rows), settings, processes)
    tokens, trained = int(rows.index["length"].sum()), int(rows.index["trained"].sum())
    quantized = "4-bit NF4, " if settings.use_4bit_quantization else ""
    disk = run_bytes(trainable, settings.save_total_limit) / 2**20
    say(
        f"Model: {settings.base_model_name}, {total:,} parameters, {quantized}{str(dtype).removeprefix('torch.')}"
        f" on {device.type.upper()}; LoRA r={settings.lora_r} trains {trainable:,} ({trainable / total:.2%})"
    )
    say(
        f"Plan: {len(rows)} rows ({tokens:,} tokens, {trained / tokens:.0%} trained), {len(validation_rows)} held out;"
        f" {settings.batch_size * settings.gradient_accumulation_steps * processes} rows a step, {steps} steps;"
        f" about {disk:,.0f} MiB on disk"
    )
    if steps == 1 and settings.warmup_ratio > 0:
        say("A run of one step trains nothing, since the learning rate starts at 0; add --warmup_ratio 0")
