"""The programs that benchmarks/speed.py measures, each as a transformers Trainer on the same model and rows.

The settings of the other programs are the fastest that they offer for these rows; only the tutorials' are as they are
usually given, 4 rows x 4 accumulation steps. A builder's last argument says how rows are laid out: "" padded, "free"
end to end without padding, "packed" end to end and in steps of 8,192 tokens.
"""

import importlib.util
import time
from itertools import pairwise
from pathlib import Path

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

import model_utils
import plan_utils
import train
import training_utils
from file_utils import resolve_path

PACKED_TOKENS = 8192  # in a step of packed rows
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---- Ours and the plain Trainer --------------------------------------------------------------------------------------
def build_ours(settings, rows, tokenizer, folder, laid_out):
    """As train.py does it, but for validation and checkpoints; from the 16-bit weights where there are any."""
    base = model_utils.find_base(settings)._replace(tokenizer=tokenizer)
    arguments = training_utils.build_training_arguments(
        settings, resolve_path(settings.output_dir), base.device, base.dtype, has_validation=False
    )
    arguments.save_strategy = SaveStrategy.NO
    gpu = plan_utils.look_at_gpu(base.device)
    plan = train.Plan(arguments, plan_utils.plan_steps(base.shapes, settings, base.dtype, rows, gpu))
    if model_utils.weights_at_hand(Path(base.path)):
        model, base = model_utils.load_for_training(settings, base)
    else:
        model = model_utils.attach_lora(load_base(settings, folder).eval(), settings)
        model_utils.share_token_ids(model, tokenizer)
    return training_utils.build_trainer(settings, base, train.Rows(rows, [], [], None), plan, model)


def build_reference(settings, rows, tokenizer, folder, laid_out):
    """The library's own loss over padded batches, without dropout: what the losses should be."""
    model = get_peft_model(load_base(settings, folder), model_utils.build_lora_config(settings))
    return build_plain_trainer(model, settings, rows, tokenizer, settings.gradient_checkpointing)


def build_tutorial(settings, rows, tokenizer, folder, laid_out):
    """QLoRA as most tutorials have it: everything upcast by prepare_model_for_kbit_training, and checkpointing."""
    model = prepare_model_for_kbit_training(
        load_base(settings, folder), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, model_utils.build_lora_config(settings))
    return build_plain_trainer(model, settings, rows, tokenizer, checkpointing=True)


def build_plain_trainer(model, settings, rows, tokenizer, checkpointing):
    arguments = TrainingArguments(
        **common_arguments(settings, min(4, settings.batch_size)), **checkpointing_arguments(checkpointing)
    )
    return Trainer(model, arguments, PaddingCollator(tokenizer), as_dataset(rows), processing_class=tokenizer)


# ---- TRL and Unsloth -------------------------------------------------------------------------------------------------
def build_trl(settings, rows, tokenizer, folder, laid_out):
    """TRL's SFTTrainer, all rows in one pass, with Liger's kernels and FlashAttention-2 where they are installed."""
    from trl import SFTConfig, SFTTrainer

    liger = settings.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    arguments = SFTConfig(
        **sft_arguments(settings, laid_out),
        **checkpointing_arguments(settings.gradient_checkpointing),
        use_liger_kernel=liger,
    )
    flash = importlib.util.find_spec("flash_attn") is not None
    return SFTTrainer(
        load_base(settings, folder, **({"attn_implementation": "flash_attention_2"} if flash else {})),
        arguments,
        None if laid_out else PaddingCollator(tokenizer),
        as_dataset(rows),
        processing_class=tokenizer,
        peft_config=model_utils.build_lora_config(settings),
    )


def build_unsloth(settings, rows, tokenizer, folder, laid_out):
    """Unsloth's model in TRL's trainer, all rows in one pass, with its own checkpointing."""
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    model, own_tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=settings.max_seq_length, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=LINEAR_LAYERS,
        bias="none",
        use_gradient_checkpointing="unsloth" if settings.gradient_checkpointing else False,
        random_state=settings.seed,
    )
    own_tokenizer.pad_token = tokenizer.pad_token
    arguments = SFTConfig(**sft_arguments(settings, laid_out))
    collator = None if laid_out else PaddingCollator(tokenizer)
    return SFTTrainer(model, arguments, collator, as_dataset(rows), processing_class=own_tokenizer)


def sft_arguments(settings, laid_out):
    """TRL's and Unsloth's arguments: all rows of a step in one pass, or of long rows as many as PACKED_TOKENS hold.

    Packed rows fill PACKED_TOKENS of a step.
    """
    rows, fitting = settings.batch_size * settings.gradient_accumulation_steps, PACKED_TOKENS // settings.max_seq_length
    batch = fitting if laid_out == "packed" else max(1, min(rows, fitting))
    passes = 1 if laid_out == "packed" else rows // batch
    arguments = common_arguments(settings, batch, passes) | {"max_length": settings.max_seq_length}
    if not laid_out:
        return arguments | {"dataset_kwargs": {"skip_prepare_dataset": True}}
    return arguments | ({"packing": True} if laid_out == "packed" else {"padding_free": True})


BUILDERS = {
    "ours": build_ours,
    "reference": build_reference,
    "tutorial": build_tutorial,
    "trl": build_trl,
    "unsloth": build_unsloth,
}


# ---- What the other programs share -----------------------------------------------------------------------------------
def load_base(settings, folder, **how):
    """The base as from_pretrained gives it: the 4-bit copy on a GPU, float32 on a CPU. The seed is LoRA's."""
    device = model_utils.resolve_device(settings.device)
    dtype = model_utils.choose_dtype(device, settings.use_fp16)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, dtype=dtype, **how)
    model.config.use_cache = False
    set_seed(settings.seed)
    return model


def common_arguments(settings, batch_size, accumulation=None):
    """The recipe as TrainingArguments: the same rows to an optimizer step, in passes of batch_size rows."""
    rows = settings.batch_size * settings.gradient_accumulation_steps
    return {
        "output_dir": settings.output_dir,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation or rows // batch_size,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": settings.seed,
        "bf16": settings.device == "cuda",
        "use_cpu": settings.device == "cpu",
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def checkpointing_arguments(checkpointing):
    return {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def as_dataset(rows):
    from datasets import Dataset

    return Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def fill(row, length):
    """The row with its answer repeated up to so many tokens."""
    answer = [token for token in row["labels"] if token != -100]
    room = length - len(row["input_ids"])
    more = (answer * (room // len(answer) + 1))[:room]
    return {**row, "input_ids": row["input_ids"] + more, "labels": row["labels"] + more}


class PaddingCollator:
    """Rows padded on the right to the longest of them, and on to a multiple of 8, which GPUs multiply faster."""

    def __init__(self, tokenizer):
        self.pad = {"input_ids": tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}

    def __call__(self, rows):
        length = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([row[name] + [pad] * (length - len(row[name])) for row in rows])
            for name, pad in self.pad.items()
        }


# ---- Measuring -------------------------------------------------------------------------------------------------------
class Stopwatch(TrainerCallback):
    """Keeps a trainer's rows in their order and notes their lengths by call, its steps' seconds and its peak memory."""

    def __init__(self, trainer):
        self.device, self.ends, self.lengths = trainer.args.device, [], []
        self.collate, trainer.data_collator = trainer.data_collator, self.note_rows
        trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
        trainer.add_callback(self)

    def note_rows(self, rows):
        self.lengths.append([len(row["input_ids"]) for row in rows])
        return self.collate(rows)

    def on_train_begin(self, *_, **__):
        if self.device.type == "cuda":  # what loading needed is not counted
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *_, **__):
        if self.device.type == "cuda":  # noted by the GPU, so that nobody has to wait for it
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())

    def step_seconds(self, warmup):
        """Seconds of each step after the first `warmup`, with the logging between two steps."""
        ends = self.ends[warmup - 1 :]
        if self.device.type != "cuda":
            return [end - begin for begin, end in pairwise(ends)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(ends)]

    def peak_memory(self):
        """GiB reserved and allocated by PyTorch on a GPU; on a CPU the resident memory, loading included."""
        peak = {"peak_reserved_gib": round(model_utils.measured_peak(self.device), 3)}
        if self.device.type == "cuda":
            peak["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return peak
