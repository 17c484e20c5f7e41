"""Benchmarks: tasks of lm-evaluation-harness, asked with the adapter's own chat template.

It is an optional extra: pip install -r requirements-benchmarks.txt. Base and tuned answer the same rows in one load.
"""

import contextlib
import difflib
import importlib
import io
import logging
import sys
from pathlib import Path

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from encoding_utils import encode_texts
from file_utils import PROJECT_DIR, resolve_input
from hub_utils import hub_errors
from message_utils import UserError
from progress_utils import progress
from prompt_utils import FIRST_STAND_IN, MarkedText, end_token_ids, hide_control_tokens, render
from score_utils import as_figures, mean_interval, share_interval

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its notices need no action of the user


# ---- Tasks -----------------------------------------------------------------------------------------------------------
def find_tasks(names):
    """(a TaskManager, the tasks as it takes them) of names of tasks, or of files that define one; else UserError.

    Their rows are loaded here, so that what cannot be had is told of before anything is measured.
    """
    manager = TaskManager()
    found = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            path = resolve_input(name)
            if not path.is_file():
                raise UserError(
                    f"--benchmarks: {name} does not exist; give a file that defines a task, or a task's name"
                )
            found.append(str(path))
        elif name in manager.all_tasks:
            found.append(name)
        else:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them"
            raise UserError(f"--benchmarks: {name} is no task of lm-evaluation-harness; {hint}")
    with prepared(), hub_errors(", ".join(found), "give another task", "benchmark"):
        manager.load(found)
    return manager, found


@contextlib.contextmanager
def prepared():
    """The surroundings in which lm-evaluation-harness makes tasks."""
    no_bars = contextlib.redirect_stderr(io.StringIO())  # of the library's own, which cannot be switched off
    with the_library_evaluate(), no_bars:
        yield


@contextlib.contextmanager
def the_library_evaluate():
    """While tasks are made, let `import evaluate` find the library of that name: our script has the same one."""
    ours, path = sys.modules.pop("evaluate", None), sys.path
    sys.path = [folder for folder in path if Path(folder or ".").resolve() != PROJECT_DIR]
    try:
        importlib.import_module("evaluate")
    finally:
        sys.path = path
    try:
        yield
    finally:
        sys.modules.pop("evaluate")
        if ours is not None:
            sys.modules["evaluate"] = ours


# ---- The model -------------------------------------------------------------------------------------------------------
class TemplatedModel(HFLM):
    """lm-evaluation-harness's model with our prompts: the same token ids as in training and in chat."""

    def __init__(self, model, tokenizer, name, batch_size):
        half = model.dtype if model.dtype in (torch.bfloat16, torch.float16) else None
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=half)
        self.name, self.bar, self.stderr = name, None, sys.stderr

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        if not add_generation_prompt:  # the task begins the answer itself
            return super().apply_chat_template(chat_history, add_generation_prompt)
        return render(self.tokenizer, hide_control_tokens(self.tokenizer, chat_history, FIRST_STAND_IN), True)

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs):
        ids = next(encode_texts(self.tokenizer, [MarkedText(string, [])])).ids.tolist()
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _encode_pair(self, context, continuation):
        """No token spans the start of an answer, and white space before it belongs to the prompt."""
        text = MarkedText(context + continuation, [(len(context), len(context) + len(continuation))])
        row = next(encode_texts(self.tokenizer, [text]))
        start = int(row.trained.argmax())
        ids = row.ids.tolist()
        return ids[:start], ids[start:]

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        ids = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        longest = max(map(len, ids))
        padded = [[self.tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
        return torch.tensor(padded), torch.tensor(mask)

    def loglikelihood(self, requests, disable_tqdm=True):
        with self.shown(requests, "choices"):
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests, disable_tqdm=True):
        with self.shown(requests, "answers"):
            return super().generate_until(requests, disable_tqdm=True)

    @contextlib.contextmanager
    def shown(self, requests, unit):
        """Show how far the requests are, by a bar like the project's others."""
        with (
            contextlib.redirect_stderr(self.stderr),
            progress(f"Benchmarks of {self.name}", total=len(requests), unit=unit) as self.bar,
        ):
            yield

    def _model_call(self, inps, attn_mask=None, labels=None):
        logits = super()._model_call(inps, attn_mask, labels)
        if self.bar is not None:
            self.bar.update(len(inps))
        return logits

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        generation_kwargs["eos_token_id"] = end_token_ids(self.tokenizer)
        output = super()._model_generate(context, max_length, stop, **generation_kwargs)
        self.bar.update(len(context))
        return output


# ---- Figures ---------------------------------------------------------------------------------------------------------
def compare_tasks(base, tuned):
    """{task: {"rows": n, "metrics": {metric: {"base", "tuned", "mean", "low", "high"}}}} of what answer_tasks gave.

    The interval is that of the paired difference.
    """
    return {task: compare_task(base[task], tuned[task]) for task in tuned}


def answer_tasks(model, tokenizer, name, tasks, limit, batch_size):
    """{task: its samples} of one model; a sample is a dict with a value of each of the task's metrics.

    name: the model's, for the bar. tasks: what find_tasks gave. limit: rows of each task, or None.
    """
    model, (manager, names) = TemplatedModel(model, tokenizer, name, batch_size), tasks
    with prepared():
        found = lm_eval.simple_evaluate(
            model, tasks=names, limit=limit, apply_chat_template=True, task_manager=manager, bootstrap_iters=0
        )
    return found["samples"]


def compare_task(base, tuned):
    """The figures of one task from the samples of both models, paired by the task's rows."""
    metrics = {}
    for name, sieve in dict.fromkeys((name, sample["filter"]) for sample in tuned for name in sample["metrics"]):
        before, after = (
            {sample["doc_id"]: sample[name] for sample in samples if sample["filter"] == sieve}
            for samples in (base, tuned)
        )
        pairs = np.array([(before[row], after[row]) for row in after], dtype=float)
        yes_or_no = np.isin(pairs, (0, 1)).all()
        interval = share_interval(*pairs.T) if yes_or_no else mean_interval(pairs[:, 1] - pairs[:, 0])
        shown = name if sieve == "none" else f"{name} ({sieve})"
        metrics[shown] = {"base": pairs[:, 0].mean(), "tuned": pairs[:, 1].mean()} | as_figures(interval)
    return {"rows": len({sample["doc_id"] for sample in tuned}), "metrics": metrics}
