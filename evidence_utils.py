"""Evidence: digests of the rows that an adapter was trained on and validated with, and the rows that it is measured by.

An adapter's folder carries them in seen_rows.safetensors: 16 bytes an answer, from which no text can be read. Who has
a row can tell by them whether the adapter has seen it; without the file nothing is claimed of any row.
"""

import tempfile
from array import array
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from data_utils import digest_answers, load_announced, load_conversations, store_conversations
from file_utils import display_path
from message_utils import UserError, counted
from progress_utils import progress
from row_utils import is_trained
from run_utils import VALIDATION_ROWS

SEEN_ROWS = "seen_rows.safetensors"  # beside an adapter's weights
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no answer's digest is lost in the product

# Sorted 64-bit digests, without repetition: of the answers that were trained, each with its prompt, and of these
# prompts alone; and of the rows by whose loss the run chose its best step. System texts do not count: a question is the
# same with each.
SeenRows = namedtuple("SeenRows", "trained trained_prompts validated")
# Of the answers of Conversations that count: the positions of their rows, digests of each with its prompt, and of the
# prompt alone. A row's answers stand in their order.
Answers = namedtuple("Answers", "positions digests prompts")
# A mask for the rows of which all answers were trained, for those of which some were, for those of which only a prompt
# was, and for the run's validation rows
Overlap = namedtuple("Overlap", "trained partly prompt_trained validated")


def digest_rows(conversations):
    """A 64-bit digest of each row's prompt and last answer; of the prompt, case and white space do not count."""
    return conversations.index["question"] + conversations.index["answer"] * MIX


def note_rows(training, validation, base=None):
    """The SeenRows of a run that is trained on these Conversations and validated with those.

    base: the SeenRows of the base model, where an adapter was merged into it before, or None.
    """
    answers = list_answers(training)
    trained, prompts = [answers.digests], [answers.prompts]
    if base is not None:
        trained.append(base.trained)
        prompts.append(base.trained_prompts)
    return SeenRows(*map(np.unique, (np.concatenate(trained), np.concatenate(prompts), digest_rows(validation))))


def list_answers(conversations):
    """The Answers of Conversations. Those of one answer are in the index, the others are read."""
    several = conversations.index["answers"] > 1
    single = np.flatnonzero(~several)
    positions, prompts, digests = array("q"), array("Q"), array("Q")
    with progress("Reading conversations of several answers", total=int(several.sum()), unit="rows") as bar:
        for position in np.flatnonzero(several).tolist():
            for question, answer in digest_answers(conversations[position][1]):
                positions.append(position)
                prompts.append(question)
                digests.append(answer)
            bar.update()
    prompts = np.array(prompts)
    return Answers(
        np.concatenate([single, np.array(positions)]),
        np.concatenate([digest_rows(conversations)[single], prompts + np.array(digests) * MIX]),
        np.concatenate([conversations.index["question"][single], prompts]),
    )


def find_overlap(seen, conversations):
    """The Overlap of Conversations with the rows that an adapter has seen."""
    answers = list_answers(conversations)
    known = np.isin(answers.digests, seen.trained)
    prompt_known = ~known & np.isin(answers.prompts, seen.trained_prompts) & (answers.prompts != 0)  # 0: without prompt
    counts, of_all, prompts = (
        np.bincount(answers.positions[mask], minlength=len(conversations)) for mask in (known, ..., prompt_known)
    )
    trained = counts == of_all
    validated = np.isin(digest_rows(conversations), seen.validated)
    return Overlap(trained, ~trained & (counts > 0), ~trained & (prompts > 0), validated)


def join_seen_rows(seen):
    """The SeenRows of several adapters together: what one of them has seen, or another."""
    return SeenRows(*map(np.concatenate, zip(*seen, strict=True)))


def without_seen_answers(conversations, seen):
    """Conversations in which answers that were trained are context: there, and not measured.

    Rows of which all answers were trained stay as they are.
    """
    answers = list_answers(conversations)
    known = np.isin(answers.digests, seen.trained)
    known &= np.isin(answers.positions, answers.positions[~known])
    marks = defaultdict(list)
    for position, mark in zip(answers.positions.tolist(), known.tolist(), strict=True):
        marks[position].append(mark)

    def rows():
        for position, (number, messages) in enumerate(conversations):
            mark = iter(marks[position])
            yield number, [m | {"weight": 0} if is_trained(m) and next(mark) else m for m in messages]

    folder = tempfile.TemporaryDirectory()
    found = store_conversations(Path(folder.name) / "conversations.jsonl", rows())
    found.folder = folder  # lives as long as they do
    return found


def is_own_validation(seen, conversations):
    """Whether Conversations are the rows that the adapter's run was validated with, all of them and no others."""
    return len(seen.validated) > 0 and np.array_equal(np.unique(digest_rows(conversations)), seen.validated)


def write_seen_rows(folder, seen):
    """Write SeenRows into an adapter's folder."""
    save_file(seen._asdict(), Path(folder) / SEEN_ROWS)


def read_seen_rows(folder):
    """The SeenRows of an adapter, or None where its folder holds none: then nobody knows what it has seen."""
    path = Path(folder) / SEEN_ROWS
    if not path.is_file():
        return None
    try:
        found = load(path.read_bytes())
        return SeenRows(**{name: found[name].astype(np.uint64, casting="equiv") for name in SeenRows._fields})
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(
            f"{display_path(path)} is damaged ({type(error).__name__}: {error}); restore it, or remove it: then it is"
            " unknown which rows the adapter has seen"
        ) from None


def describe_rows(metrics):
    """'20 held-out rows', and nothing better of rows that the adapter has seen or may have seen."""
    rows = counted(metrics["rows"], "row")
    if metrics["held_out"]:
        return counted(metrics["rows"], "held-out row")
    if metrics["trained_rows_seen"] is None:
        return f"{rows}, which may have been trained on"
    return f"{rows}, {metrics['trained_rows_seen']:,} of them trained on"


# ---- The rows that an adapter is measured by -------------------------------------------------------------------------
def load_rows(settings, adapter_path, output_dir, seen, cache_dir):
    """(the Conversations that an adapter is measured by, where they come from); UserError where there are none.

    They are those of VALIDATION_DATASET_PATH, or else those that its run held out. seen: its SeenRows, or None.
    """
    if settings.validation_dataset_path is None:
        path = find_own_rows(adapter_path, output_dir, seen, cache_dir)
        return load_own_rows(path, cache_dir, settings.system_prompt), display_path(path)
    path, columns = settings.validation_dataset_path, settings.dataset_columns
    more = {"system_prompt": settings.system_prompt, "or_usual_names": True}
    return load_announced("Validation data", path, columns, cache_dir, settings.chosen_only, **more)[0], path


def find_own_rows(adapter_path, output_dir, seen, cache_dir):
    """The file of the rows that the adapter's run held out: beside the adapter, or in OUTPUT_DIR.

    The adapter's digests prove that they are its own. One without digests is believed about what lies beside it.
    """
    remedy = "give rows by --validation_dataset_path"
    folders = [*adapter_path.parents[:2], *([output_dir] if seen else [])]
    files = [folder / VALIDATION_ROWS for folder in dict.fromkeys(folders) if (folder / VALIDATION_ROWS).is_file()]
    if seen is None and files:
        return files[0]
    if seen is not None and not len(seen.validated):
        raise UserError(f"the adapter was trained without validation rows; {remedy}")
    for path in files if seen is not None else ():
        if is_own_validation(seen, load_own_rows(path, cache_dir)):
            return path
    if files:
        raise UserError(f"{display_path(files[0])} does not hold the rows that this adapter's run held out; {remedy}")
    raise UserError(
        f"no {VALIDATION_ROWS} lies beside {display_path(adapter_path)}, so the rows that its run held out are unknown;"
        f" {remedy}"
    )


def load_own_rows(path, cache_dir, system_prompt=None):
    """The Conversations of a run's validation.jsonl, with the numbers that they had in the user's file."""
    return load_conversations(path, cache_dir=cache_dir, number_column="row", system_prompt=system_prompt)[0]
