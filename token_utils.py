"""Conversations to tokenized rows: encoded in batches, cut, checked and kept on disk."""

import copy
import json
import re
from array import array
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import numpy as np
import transformers

from encoding_utils import IGNORED, encode_texts, is_whole_text
from file_utils import DiskWatch, cached_folder, sha256
from message_utils import UserError, printable
from progress_utils import progress
from prompt_utils import (
    control_tokens,
    end_token_ids,
    find_end_token,
    mark_answers,
    writes_one_bos,
    written_date,
)
from worker_utils import count_processes, run_in_processes

# what became of a row, and the numbers that stand for it in an index
STATUSES = ("kept", "shortened", "answer_cut", "no trainable token")
KEPT, SHORTENED, ANSWER_CUT, DROPPED = range(4)

# How templates of well-known models mark turns: texts that hold these were templated already
TEMPLATE_MARKS = re.compile(
    r"\[/?INST\]|<\|im_(?:start|end)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|<(?:start|end)_of_turn>"
    r"|<\|(?:system|user|assistant|end)\|>|### (?:Instruction|Response):"
)

ROWS_A_CALL = 1000  # conversations that the tokenizer is given in one call
SHARED_ROWS = 10_000  # from so many rows on, several processes share them


# ---- Tokenized rows on disk ------------------------------------------------------------------------------------------
class TokenizedRows(Sequence):
    """Tokenized rows, read from disk one at a time: [i] is {"input_ids", "labels", "row", "status"}.

    `index` holds an array of each of INDEX for every row; `all_rows` is the same index with the dropped rows in it.
    """

    # start in the file, tokens, trained tokens, tokens before cutting, row number, status, whether the answers and
    # whether other texts hold control tokens, whether it is a further sequence of the conversation before it
    INDEX: ClassVar = {
        "start": "q",
        "length": "q",
        "trained": "q",
        "full_length": "q",
        "row": "q",
        "status": "b",
        "control": "b",
        "other_control": "b",
        "further": "b",
    }

    def __init__(self, folder):
        with np.load(folder / "index.npz") as index:
            self.all_rows = dict(index)
        kept = self.all_rows["status"] != DROPPED
        self.index = {name: values[kept] for name, values in self.all_rows.items()}
        tokens = int(self.index["length"].sum())
        # an empty file cannot be mapped
        self.ids, self.is_trained = (
            np.memmap(folder / name, dtype=kind, mode="r") if tokens else np.zeros(0, dtype=kind)
            for name, kind in (("ids.bin", np.int32), ("trained.bin", bool))
        )

    def __len__(self):
        return len(self.index["row"])

    def select(self, positions):
        """The rows at these positions, in this order."""
        chosen = copy.copy(self)
        chosen.index = {name: values[positions] for name, values in self.index.items()}
        chosen.all_rows = chosen.index
        return chosen

    def __getitem__(self, position):
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        start, length = int(self.index["start"][position]), int(self.index["length"][position])
        ids, trained = self.ids[start : start + length], self.is_trained[start : start + length]
        return {
            "input_ids": ids.tolist(),
            "labels": np.where(trained, ids, IGNORED).tolist(),
            "row": int(self.index["row"][position]),
            "status": STATUSES[self.index["status"][position]],
        }


def tokenize_conversations(
    tokenizer, conversations, max_seq_length, source, cache_dir, processes=None, batch=ROWS_A_CALL
):
    """Turn Conversations into TokenizedRows, kept in cache_dir under a key of all that shapes them.

    The key covers the texts, the tokenizer with its template, the length, and the code of this step. `source` names the
    rows in messages. The number of processes is chosen by the number of rows unless it is given. Raises UserError with
    the number of the first row that the template refuses.
    """
    rooms = ("token_utils.py", "encoding_utils.py", "prompt_utils.py", "thought_utils.py", "call_utils.py")
    code = [Path(__file__).with_name(name) for name in rooms]
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    shaping = json.dumps(
        [
            conversations.fingerprint(),
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            written_date(tokenizer),
            tokens,
            max_seq_length,
            transformers.__version__,
        ]
    )
    key = sha256([shaping, *code])
    parts = [range(start, min(start + batch, len(conversations))) for start in range(0, len(conversations), batch)]
    if processes is None:
        processes = min(count_processes(), len(parts)) if len(conversations) >= SHARED_ROWS else 1

    def make(parts):
        return tokenize_parts(tokenizer, conversations, parts, max_seq_length, source)

    def build(folder):
        with closing(run_in_processes(make, parts, processes)) as chunks:
            write_rows(folder, shown(chunks))

    def shown(chunks):
        with progress("Tokenizing", len(conversations), "rows") as bar:
            for part, chunk in zip(parts, chunks, strict=True):
                yield chunk
                bar.update(len(part))

    return TokenizedRows(cached_folder(cache_dir, "tokens", key, build))


def write_rows(folder, chunks):
    """Write the chunks that tokenize_parts yields as the files that TokenizedRows reads."""
    index = {name: array(kind) for name, kind in TokenizedRows.INDEX.items() if name != "start"}
    watch = DiskWatch(folder)
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "trained.bin", "wb") as mask_file:
        for ids, trained, columns in chunks:
            ids_file.write(ids)
            mask_file.write(trained)
            watch(ids_file.tell() + mask_file.tell())
            for values_of, values in zip(index.values(), columns, strict=True):
                values_of.extend(values)
    index = {name: np.array(values) for name, values in index.items()}
    written = np.where(index["status"] == DROPPED, 0, index["length"])
    np.savez(folder / "index.npz", start=written.cumsum() - written, **index)


def tokenize_parts(tokenizer, conversations, parts, max_seq_length, source):
    """Yield (ids, trained, columns of INDEX but start) of each part, a range of positions.

    The kept rows' ids and trained mask are laid end to end.
    """
    end_token = find_end_token(tokenizer)
    ends = end_token_ids(tokenizer)
    one_bos = writes_one_bos(tokenizer)
    for part in parts:
        # select() opens the file anew: processes that share an open file move each other's place in it
        rows = [
            (number, messages, text, place > 0)
            for number, messages in conversations.select(part)
            for place, text in enumerate(mark_row(tokenizer, number, messages, end_token, source))
        ]
        kept_ids, kept_trained, values = [np.zeros(0, np.int32)], [np.zeros(0, bool)], []
        before = -1
        for row in encode_texts(tokenizer, [text for _, _, text, _ in rows]):
            number, messages, text, further = rows[row.position]
            further, before = further or row.position == before, row.position
            check_answers(text, end_token, f"{source}, row {number}")
            whole = is_whole_text(tokenizer, text)
            ids, trained, status = cut_row(row, max_seq_length, tokenizer.bos_token_id)
            if status != DROPPED:
                may_end = ends if not any("tool_calls" in message for message in messages) else None
                where = f"{source}, row {number}"
                check_row(ids, trained, status, tokenizer.bos_token_id, may_end, where, one_bos and not whole, whole)
                kept_ids.append(ids)
                kept_trained.append(trained)
            control = holds_control(tokenizer, messages)
            values.append((len(ids), int(trained[1:].sum()), len(row.ids), number, status, *control, further))
        yield np.concatenate(kept_ids), np.concatenate(kept_trained), list(zip(*values, strict=True))


def mark_row(tokenizer, number, messages, end_token, source):
    """The MarkedTexts of a row, whose number is named where that fails."""
    try:
        return mark_answers(tokenizer, messages, end_token)
    except UserError as error:
        raise UserError(f"{source}, row {number}: {error}") from None


def holds_control(tokenizer, messages):
    """(whether an answer, whether another text holds control tokens or marks of a template, which are plain text)."""
    control, found = control_tokens(tokenizer), [False, False]
    for message in messages:
        is_answer = message["role"] == "assistant"
        pattern = control.in_answers if is_answer else control.pattern
        text = message["content"]
        if pattern.search(text) or (any(start in text for start in ("[", "<", "###")) and TEMPLATE_MARKS.search(text)):
            found[0 if is_answer else 1] = True
    return found


# ---- Cutting and checking --------------------------------------------------------------------------------------------
def fit_to_length(ids, last_start, max_seq_length, bos_id=None):
    """Choose what is left of a row that is longer than max_seq_length; returns (positions of ids, status).

    The oldest part of the prompt goes first, but never its BOS. Only an answer that would leave less than a quarter of
    the length to its prompt loses its tail, and then gets no end token: the model must not learn to stop in
    mid-sentence.
    """
    answer_end = min(len(ids), last_start + max_seq_length - min(last_start, max_seq_length // 4))
    positions = newest_positions(ids, answer_end, max_seq_length, bos_id)
    return np.array(positions), SHORTENED if answer_end == len(ids) else ANSWER_CUT


def newest_positions(ids, end, limit, bos_id):
    """Positions of the last `limit` tokens before `end`, the first of them given up for the BOS at the start of ids."""
    positions = range(max(end - limit, 0), end)
    if ids[0] != bos_id:
        return positions
    # where the rest starts with a BOS of its own, two would stand in a row
    return positions[1:] if any(ids[index] == bos_id for index in positions[1:2]) else [0, *positions[1:]]


def cut_row(row, max_seq_length, bos_id):
    """Cut an EncodedText to max_seq_length tokens; returns (ids, trained, status)."""
    ids, trained, status = row.ids, row.trained, KEPT
    if len(ids) > max_seq_length:
        positions, status = fit_to_length(ids, row.last_start, max_seq_length, bos_id)
        ids, trained = ids[positions], trained[positions]
    return ids, trained, status if trained[1:].any() else DROPPED


def check_answers(text, end_token, where):
    """The promise made of the spans of every MarkedText: one after the other, each with one end token, at its end.

    So none of them holds a character of another turn.
    """
    before = 0
    for start, end in text.answers:
        answer = text.text[start:end]
        assert before <= start < end <= len(text.text), f"{where}: an answer at {start} to {end}, after {before}"
        assert answer.find(end_token) in (-1, len(answer) - len(end_token)), f"{where}: an answer beyond its end token"
        before = end


def check_row(ids, trained, status, bos_id, end_ids, where, one_bos=False, whole=False):
    """The promises made of every row: one BOS, trained and untrained tokens, a trained end token.

    `end_ids` is None where a call may end with a token of its own. Where a template writes a BOS for each question
    (`one_bos` is False), only two in a row are wrong. In a whole text all tokens may be trained.
    """
    assert not one_bos or (ids == bos_id).sum() == 1, f"{where}: {(ids == bos_id).sum()} BOS tokens"
    if bos_id not in (None, *(end_ids or ())):
        begins = ids == bos_id
        assert not (begins[1:] & begins[:-1]).any(), f"{where}: two BOS tokens in a row"
    assert trained.any(), f"{where}: no trained token"
    assert whole or not trained.all(), f"{where}: no untrained token"
    last = ids[np.flatnonzero(trained)[-1]]
    ended = status == ANSWER_CUT or end_ids is None or last in end_ids
    assert ended, f"{where}: the end token is not trained"


def mark_trained_tokens(tokenizer, example, start="[", end="]"):
    """Decode an example with its trained stretches between `start` and `end`, so that a user can check the mask."""
    pieces, stretch, trained = [], [], False
    for token, label in [*zip(example["input_ids"], example["labels"], strict=True), (None, None)]:
        if token is None or (label != IGNORED) != trained:
            text = printable(tokenizer.decode(stretch))
            pieces.append(f"{start}{text}{end}" if trained else text)
            stretch, trained = [], label != IGNORED
        stretch.append(token)
    return "".join(pieces)
