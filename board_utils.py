"""What a training shows of itself: a line for each logged loss, TensorBoard, sample answers."""

import contextlib
import copy
import time
from typing import ClassVar

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from transformers import TrainerCallback

from data_utils import last_answer
from engine_shards import is_sharded
from file_utils import display_path
from generation_utils import generate_replies
from message_utils import say
from progress_utils import format_duration, progress
from settings_utils import PLACES

TIMED_PROMPTS, TIMED_TOKENS = 8, 8  # by which the speed of answers is rehearsed


class ProgressLine(TrainerCallback):
    """One dense line for each logged loss and each evaluation, with the time that went by and what is left of it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            line = (
                f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  gradient {logs.get('grad_norm', 0):.2f}"
                f"  {logs.get('tokens_per_second', 0):,.0f} tokens/s"
            )
        elif "eval_loss" in logs:
            line = f"validation loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.2f}"
        else:
            return
        elapsed, left = (format_duration(logs[name]) for name in ("elapsed_seconds", "seconds_left"))
        say(f"step {state.global_step}/{state.max_steps}  {line}  {elapsed}, {left} left")


class RunBoard(TrainerCallback):
    """Writes a run to TensorBoard: losses, learning rate, gradient, speed, memory, sample answers and settings."""

    NAMES: ClassVar = {
        "loss": "train/loss",
        "learning_rate": "train/learning_rate",
        "grad_norm": "train/gradient_norm",
        "tokens_per_second": "train/tokens_per_second",
        "peak_memory_gib": "train/peak_memory_gib",
        "eval_loss": "validation/loss",
        "eval_perplexity": "validation/perplexity",
    }
    FINAL: ClassVar = ("final/validation_loss", "final/training_loss")  # beside the settings in the HParams tab

    def __init__(self, log_dir, settings, first_step=0):
        self.first_step = first_step  # what a killed run wrote of later steps is not shown
        self.log_dir = log_dir
        self.settings = settings
        self.writer = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with self.kept_going():
                purge = {"purge_step": self.first_step + 1} if self.first_step else {}
                self.writer = SummaryWriter(str(self.log_dir), **purge)
                rows = "\n".join(f"| {name} | {value} |" for name, value in self.settings._asdict().items())
                self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)
                self.add_hparams()
                self.writer.flush()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.writer is not None:
            with self.kept_going():
                for name in self.NAMES.keys() & logs.keys():
                    self.writer.add_scalar(self.NAMES[name], logs[name], state.global_step)
                self.writer.flush()

    def add_hparams(self):
        """The settings, for the HParams tab. SummaryWriter.add_hparams would show them as a second run.

        TensorBoard shows first the settings in which runs differ, unless a run lists the columns (an "experiment").
        """
        shown = {
            name: value if type(value) in (int, float) else str(value)
            for name, value in self.settings._asdict().items()
            if name not in PLACES
        }
        _, start, _ = hparams(shown, {})
        self.writer.file_writer.add_summary(start)

    def add_final(self, validation_loss, training_loss, step):
        """The figures of the run's end beside its settings; the validation loss is the adapter's, on all rows."""
        if self.writer is not None:
            with self.kept_going():
                for name, figure in zip(self.FINAL, (validation_loss, training_loss), strict=True):
                    if figure is not None:
                        self.writer.add_scalar(name, figure, step)

    def add_samples(self, prompts, expected, replies, step):
        """Show each prompt with the reply of this step and the answer in the data."""
        if self.writer is not None:
            parts = [
                f"**Prompt** {prompt}\n\n**Reply** {reply}\n\n**Answer in the data** {answer}"
                for prompt, reply, answer in zip(prompts, replies, expected, strict=True)
            ]
            with self.kept_going():
                self.writer.add_text("samples", "\n\n---\n\n".join(parts), step)
                self.writer.flush()

    def close(self):
        """Write what waits, and end the writer's thread; however the training ended."""
        if self.writer is not None:
            with self.kept_going():
                self.writer.close()
            self.writer = None

    @contextlib.contextmanager
    def kept_going(self):
        """A disk that refuses to write the logs costs the logs, not the run; it is said once."""
        try:
            yield
        except OSError as error:
            self.writer = None
            say(
                f"TensorBoard logs end here: {display_path(self.log_dir)} cannot be written ({error.strerror or error})"
            )


class SampleAnswers(TrainerCallback):
    """Answers a few validation prompts at each evaluation, so that progress can be read and not only plotted.

    Greedily: the replies must not move the random numbers that dropout and shuffling draw from.
    """

    def __init__(self, tokenizer, conversations, generation_config, max_prompt_tokens, board):
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.prompts = [conversation[: last_answer(conversation)] for conversation in conversations]
        self.expected = [conversation[last_answer(conversation)]["content"] for conversation in conversations]
        self.generation_config = generation_config
        self.board = board

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        # where the processes share out the weights of the model, all of them answer, and the first one's answers count
        if not self.prompts or not (state.is_world_process_zero or is_sharded(model)):
            return
        with progress("Answering", len(self.prompts), "prompts") as bar:
            replies = self.answer(model, self.prompts, self.generation_config, lambda replies: bar.update(len(replies)))
        if not state.is_world_process_zero:
            return
        texts = [reply.text for reply in replies]
        self.board.add_samples([p[-1]["content"] for p in self.prompts], self.expected, texts, state.global_step)

    def answer(self, model, prompts, generation_config, on_replies=lambda replies: None):
        model.eval()
        return generate_replies(model, self.tokenizer, prompts, generation_config, self.max_prompt_tokens, on_replies)

    def rehearse(self, model):
        """Seconds that the answers of an evaluation will take: as long as those in the data, a few tokens are timed."""
        prompts = self.prompts[:TIMED_PROMPTS]
        seconds = []
        loading = (1,) if model.device.type == "cuda" else ()  # a GPU loads and compiles what it needs first
        for tokens in (*loading, 1, 1 + TIMED_TOKENS):  # one token takes the reading of the prompts
            config = copy.deepcopy(self.generation_config)
            config.max_new_tokens, config.eos_token_id = tokens, None
            started = time.perf_counter()
            self.answer(model, prompts, config)
            seconds.append(time.perf_counter() - started)
        lengths = [len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in self.expected]
        longest = min(max(lengths), self.generation_config.max_new_tokens)
        one, more = seconds[-2:]
        a_token = max(0, more - one) / TIMED_TOKENS
        return (one + a_token * (longest - 1)) * len(self.prompts) / len(prompts)
