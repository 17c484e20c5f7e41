"""Conversations to tokenized rows: encoded in batches, cut, checked and kept on disk."""

import copy
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import transformers

from file_utils import cached_folder, hash_files
from message_utils import UserError, printable
from process_utils import count_processes, run_in_processes
from prompt_utils import (
    IGNORED,
    answer_spans,
    control_tokens,
    encode_conversation,
    find_end_token,
    hide_control_tokens,
    render,
    writes_one_bos,
)

STATUSES = ("kept", "shortened", "answer_cut", "no trainable token")


KEPT, SHORTENED, ANSWER_CUT, DROPPED = range(4)


BATCH = 1000  # conversations that are tokenized together, to use all cores


# from so many on, processes share them; on two cores one process is as fast, since it encodes in threads
SHARED_ROWS, SHARED_CORES = 10_000, 3


# ---- Tokenized rows on disk ------------------------------------------------------------------------------------------


class TokenizedRows(Sequence):
    """Tokenized rows, read from disk one at a time: [i] is {"input_ids", "labels", "row", "status"}.

    `index` holds an array of each of INDEX for every row; `all_rows` is the same index with the dropped rows in it.
    """

    # start in the file, tokens, trained tokens, tokens before cutting, row number, status, whether the answers hold
    # control tokens
    INDEX: ClassVar = {
        "start": "q",
        "length": "q",
        "trained": "q",
        "full_length": "q",
        "row": "q",
        "status": "b",
        "control": "b",
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


def tokenize_conversations(tokenizer, conversations, max_seq_length, source, cache_dir):
    """Turn Conversations into TokenizedRows, kept in cache_dir under a key of all that shapes them.

    The key covers the texts, the tokenizer's own files and template, the length, and the code of this step.
    """
    code = [Path(__file__), Path(__file__).with_name("prompt_utils.py")]
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    key = hash_files(
        code,
        conversations.fingerprint(),
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokens,
        max_seq_length,
        transformers.__version__,
    )
    folder = cached_folder(
        cache_dir, "tokens", key, lambda staged: write_rows(staged, tokenizer, conversations, max_seq_length, source)
    )
    return TokenizedRows(folder)


def write_rows(folder, tokenizer, conversations, max_seq_length, source):
    """Tokenize, cut and check conversations and write what TokenizedRows reads; many of them on all cores."""
    count = len(conversations)
    parts = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    backend = plain_backend(tokenizer)
    chunks = run_in_processes(
        lambda parts: tokenize_parts(tokenizer, backend, conversations, parts, max_seq_length, source),
        parts,
        choose_processes(count),
    )
    index = {name: array(kind) for name, kind in TokenizedRows.INDEX.items() if name != "start"}
    with closing(chunks), open(folder / "ids.bin", "wb") as ids_file, open(folder / "trained.bin", "wb") as mask_file:
        for ids, trained, columns in chunks:
            ids_file.write(ids)
            mask_file.write(trained)
            for values_of, values in zip(index.values(), columns, strict=True):
                values_of.extend(values)
    index = {name: np.array(values) for name, values in index.items()}
    written = np.where(index["status"] == DROPPED, 0, index["length"])
    np.savez(folder / "index.npz", start=written.cumsum() - written, **index)


def choose_processes(count):
    """How many processes tokenize `count` rows: one on each core, or one where that is as fast."""
    cores = count_processes()
    return min(cores, -(-count // BATCH)) if count >= SHARED_ROWS and cores >= SHARED_CORES else 1


def tokenize_parts(tokenizer, backend, conversations, parts, max_seq_length, source):
    """Yield (ids, trained, columns of INDEX but start) of each part, a range of positions.

    The kept rows' ids and trained mask are laid end to end.
    """
    end_token = find_end_token(tokenizer)
    special = (tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids(end_token))
    one_bos = writes_one_bos(tokenizer)
    # select() opens the file anew: processes that share an open file move each other's place in it
    rows = chain.from_iterable(conversations.select(part) for part in parts)
    encoded = encode_conversations(tokenizer, backend, rows, end_token, source)
    for part in parts:
        kept_ids, kept_trained, values = [np.zeros(0, np.int32)], [np.zeros(0, bool)], []
        numbers = conversations.index["number"][part.start : part.stop].tolist()
        for number, row in zip(numbers, islice(encoded, len(part)), strict=True):
            ids, trained, full_length, status, control = cut_row(*row, max_seq_length, special[0])
            if status != DROPPED:
                check_row(ids, trained, status, *special, f"{source}, row {number}", one_bos)
                kept_ids.append(ids)
                kept_trained.append(trained)
            values.append((len(ids), int(trained[1:].sum()), full_length, number, status, control))
        yield np.concatenate(kept_ids), np.concatenate(kept_trained), list(zip(*values, strict=True))


# ---- Encoding --------------------------------------------------------------------------------------------------------


def plain_backend(tokenizer):
    """A copy of the tokenizer's backend, for another thread, that cuts and pads nothing and knows control tokens."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend


def encode_conversations(tokenizer, backend, conversations, end_token, source):
    """Yield (ids, trained, start of the last answer in tokens, control tokens in an answer?) of (number, messages).

    BATCH texts are encoded in one call, in a thread of its own that leaves Python free to render the next ones. The
    result is encode_conversation's, which still does the rows with control tokens in their texts, and those in which a
    token spans the start of an answer. `backend` is the tokenizer's plain_backend.
    """
    rows, waiting = iter(conversations), None
    with ThreadPoolExecutor(1) as thread:
        while True:
            try:
                batch = list(islice(rows, BATCH))
                rendered = [render_row(tokenizer, messages, end_token, f"{source}, row {n}") for n, messages in batch]
            except Exception:
                if waiting:  # the rows before the faulty one come first
                    yield from label_batch(tokenizer, *waiting, end_token, source)
                raise
            if not batch:
                break
            texts = [text for text, _, _ in rendered]
            encodings = thread.submit(backend.encode_batch, texts, add_special_tokens=False)
            if waiting:
                yield from label_batch(tokenizer, *waiting, end_token, source)
            waiting = (batch, rendered, encodings)
        if waiting:
            yield from label_batch(tokenizer, *waiting, end_token, source)


def label_batch(tokenizer, batch, rendered, encodings, end_token, source):
    """Finish what encode_conversations began: wait for the encodings and find the trained tokens."""
    for (number, messages), (_, spans, hidden), encoding in zip(batch, rendered, encodings.result(), strict=True):
        stretches = None if hidden else find_stretches(encoding, spans, end_token)
        if stretches is None:
            try:
                ids, labels, last_start = encode_conversation(tokenizer, messages, end_token)
            except UserError as error:
                raise UserError(f"{source}, row {number}: {error}") from None
            yield np.array(ids, np.int32), np.array(labels) != IGNORED, last_start, holds_control(tokenizer, messages)
            continue
        trained = np.zeros(stretches[-1][1], dtype=bool)
        for start, end in stretches:
            trained[start:end] = True
        yield np.array(encoding.ids[: len(trained)], np.int32), trained, stretches[-1][0], False


def render_row(tokenizer, messages, end_token, where):
    """Return (text up to the last end token, answer spans in characters, whether stand-ins are in it)."""
    hidden = hide_control_tokens(tokenizer, messages)
    try:
        text = render(tokenizer, hidden, add_generation_prompt=False)
        spans = answer_spans(tokenizer, hidden, text, end_token)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return text[: spans[-1][1]], spans, hidden != messages


def find_stretches(encoding, spans, end_token):
    """The (first, behind the last) token of each answer; None where the tokens do not begin where the answer does."""
    stretches = []
    for start, end in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - len(end_token))
        if first is None or last is None or encoding.token_to_chars(first)[0] != start:
            return None
        stretches.append((first, last + 1))
    return stretches


def holds_control(tokenizer, messages):
    pattern = control_tokens(tokenizer)[0]
    return any(message["role"] == "assistant" and pattern.search(message["content"]) for message in messages)


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


def cut_row(ids, trained, last_start, control, max_seq_length, bos_id):
    """Cut an encoded row to max_seq_length tokens; returns (ids, trained, length before cutting, status, control)."""
    full_length, status = len(ids), KEPT
    if full_length > max_seq_length:
        positions, status = fit_to_length(ids, last_start, max_seq_length, bos_id)
        ids, trained = ids[positions], trained[positions]
    return ids, trained, full_length, status if trained[1:].any() else DROPPED, control


def check_row(ids, trained, status, bos_id, end_id, where, one_bos=False):
    """The promises made of every row: one BOS, trained and untrained tokens, a trained end token.

    Where a template writes a BOS for each question (`one_bos` is False), only two in a row are wrong.
    """
    assert not one_bos or (ids == bos_id).sum() == 1, f"{where}: {(ids == bos_id).sum()} BOS tokens"
    if bos_id not in (None, end_id):
        begins = ids == bos_id
        assert not (begins[1:] & begins[:-1]).any(), f"{where}: two BOS tokens in a row"
    assert trained.any(), f"{where}: no trained token"
    assert not trained.all(), f"{where}: no untrained token"
    last = ids[np.flatnonzero(trained)[-1]]
    assert status == ANSWER_CUT or last == end_id, f"{where}: the end token is not trained"


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
