"""From conversations to what the model trains on: prompts -> token ids and labels -> passes without padding."""

import re
from functools import lru_cache
from itertools import pairwise

import torch

from data_utils import DataReport
from run_utils import UserError, printable

IGNORED = -100  # label of a token that is not trained, as in torch's cross_entropy
# Alpaca's headings, for base models whose tokenizer has no chat template. `bos_token` is undefined where there is none.
ALPACA_TEMPLATE = (
    "{{ bos_token if bos_token else '' }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}"
    "{% else %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)


# ---- Prompts: one renderer, the tokenizer's chat template ------------------------------------------------------------
def render(tokenizer, messages, add_generation_prompt):
    """Render messages as text by the tokenizer's chat template; what the template refuses is a UserError."""
    from jinja2.exceptions import TemplateError

    try:
        # enable_thinking=False: Qwen3 and its like then write the empty thought into the prompt, not into the answer
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"the model's chat template refuses a conversation of {roles}: {error}; change those rows (many templates"
            " take no system message) or choose another base model"
        ) from None


def find_end_token(tokenizer):
    """Return the token that the template writes after an answer: the one a reply stops at.

    It is found by rendering a conversation, since for chat models it often differs from tokenizer.eos_token.
    """
    probe = "The quick brown fox"
    rendered = render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": probe}], False)
    _, answer, tail = rendered.rpartition(probe)
    found = control_tokens(tokenizer)[0].search(tail)
    if not answer or found is None:
        raise UserError(
            "the model's chat template writes no end token after an answer, or changes it, so the model could not learn"
            " to stop; choose a base model without a chat template, or one whose template ends each answer"
        )
    return found[0]


def end_token_ids(tokenizer):
    """The ids that end a reply: EOS, and the token that the chat template writes after an answer."""
    return sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(find_end_token(tokenizer))})


@lru_cache(maxsize=4)
def control_tokens(tokenizer):
    """Return (pattern, stand_ins) of the tokenizer's special tokens, longest first.

    A stand-in is a run of one private-use character, as long as the token that it stands for in a user's text.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ordered = sorted(special, key=lambda token: (-len(token), token))
    pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
    return pattern, {token: chr(0xF0000 + index) * len(token) for index, token in enumerate(ordered)}


def hide_control_tokens(tokenizer, messages):
    """Put stand-ins for the control tokens in users' texts, so that after rendering only the template's are left."""
    pattern, stand_ins = control_tokens(tokenizer)

    def hide(text):
        return pattern.sub(lambda found: stand_ins[found[0]], text)

    return [message | {"content": hide(message["content"])} for message in messages]


def encode(tokenizer, text, cuts=()):
    """Encode a rendered text; returns its ids and their (start, end) character offsets.

    The template's control tokens become control tokens; the users', of which stand-ins are left in the text, become
    plain text. No token spans a character position in `cuts`, where answers start: what stands before is encoded as it
    is when it stands alone, so that a prompt's ids are the same in training and at inference.
    """
    stand_ins = {stand_in: token for token, stand_in in control_tokens(tokenizer)[1].items() if stand_in in text}
    ids, offsets, position = [], [], 0
    for piece in re.split("(" + "|".join(stand_ins) + ")", text) if stand_ins else [text]:
        piece_ids, piece_offsets = encode_piece(
            tokenizer, stand_ins.get(piece, piece), piece in stand_ins, position > 0
        )
        ids += piece_ids
        offsets += [(position + start, position + end) for start, end in piece_offsets]
        position += len(piece)
    for cut in cuts:
        if any(start < cut < end for start, end in offsets):
            left_ids, left_offsets = encode(tokenizer, text[:cut], [c for c in cuts if c < cut])
            right_ids, right_offsets = encode(tokenizer, text[cut:], [c - cut for c in cuts if c > cut])
            return left_ids + right_ids, left_offsets + [(start + cut, end + cut) for start, end in right_offsets]
    return ids, offsets


def encode_piece(tokenizer, text, literal, continues):
    """Ids and offsets of one piece of a text; if `literal`, without control tokens.

    A piece that `continues` a text is encoded behind a line break, which is then taken off again: SentencePiece-style
    tokenizers put a blank before the start of whatever they are given.
    """
    guard = "\n" if continues else ""
    encoded = tokenizer(
        guard + text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=literal,
        verbose=False,  # it would warn of texts beyond the model's context, which are cut later
    )
    offsets = encoded["offset_mapping"]
    if guard and any(start < 1 < end for start, end in offsets):  # the line break merged with the text
        return encode_piece(tokenizer, text, literal, False)
    kept = [index for index, (_, end) in enumerate(offsets) if end > len(guard) or not guard]
    return [encoded["input_ids"][i] for i in kept], [
        (offsets[i][0] - len(guard), offsets[i][1] - len(guard)) for i in kept
    ]


def encode_prompt(tokenizer, messages):
    """Token ids of a conversation up to where the model's answer starts; the same ids as in training."""
    return encode(tokenizer, render(tokenizer, hide_control_tokens(tokenizer, messages), True))[0]


def answer_spans(tokenizer, messages, text, end_token):
    """Return the (start, end) characters of every assistant turn in `text`, end token included.

    A turn starts where the template's generation prompt ends: what the model will be given is never trained.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
        answer = message["content"].strip()
        start = text.find(answer, len(prompt))
        end = text.find(end_token, start + len(answer))
        # an end token before the answer: these words belong to a later turn, this one was left out
        if not text.startswith(prompt) or start < 0 or end < 0 or end_token in text[len(prompt) : start]:
            raise UserError(
                f"the model's chat template changes message {index + 1} or leaves it out, so the answer cannot be"
                " located; if the row has several turns try single-turn rows, else choose another base model"
            )
        spans.append((len(prompt), end + len(end_token)))
    return spans


def encode_conversation(tokenizer, messages, end_token):
    """Token ids and labels of a conversation; labels are the ids of the answers and end tokens, IGNORED elsewhere.

    Returns (input_ids, labels, start of the last answer in tokens).
    """
    messages = hide_control_tokens(tokenizer, messages)
    text = render(tokenizer, messages, add_generation_prompt=False)
    spans = answer_spans(tokenizer, messages, text, end_token)
    text = text[: spans[-1][1]]  # nothing after the last end token is ever trained or read
    ids, offsets = encode(tokenizer, text, [start for start, _ in spans])
    labels, last_start = [IGNORED] * len(ids), len(ids)
    for start, end in spans:
        # by where a token starts: some end tokens take the line break behind them along
        trained = [index for index, (begin, _) in enumerate(offsets) if start <= begin < end]
        for index in trained:
            labels[index] = ids[index]
        last_start = min(trained, default=len(ids))
    return ids, labels, last_start


# ---- Examples --------------------------------------------------------------------------------------------------------
def fit_to_length(ids, labels, last_start, max_seq_length, bos_id=None):
    """Cut an example to max_seq_length tokens; returns (ids, labels, status).

    The oldest part of the prompt goes first, but never its BOS. Only an answer that would leave less than a quarter of
    the length to its prompt loses its tail, and then gets no end token: the model must not learn to stop in
    mid-sentence.
    """
    if len(ids) <= max_seq_length:
        return ids, labels, "kept"
    answer_end = min(len(ids), last_start + max_seq_length - min(last_start, max_seq_length // 4))
    kept = newest_positions(ids, answer_end, max_seq_length, bos_id)
    status = "shortened" if answer_end == len(ids) else "answer_cut"
    return [ids[index] for index in kept], [labels[index] for index in kept], status


def newest_positions(ids, end, limit, bos_id):
    """Positions of the last `limit` tokens before `end`, the first of them given up for the BOS at the start of ids."""
    positions = range(max(end - limit, 0), end)
    if ids[0] != bos_id:
        return positions
    # where the rest starts with a BOS of its own, two would stand in a row
    return positions[1:] if any(ids[index] == bos_id for index in positions[1:2]) else [0, *positions[1:]]


def check_example(tokenizer, example, end_id, where):
    """The promises made of every example: no doubled BOS, both kinds of label, a trained end token.

    Some templates (Llama 2's) write a BOS for each question, so only two in a row are wrong.
    """
    ids, labels, bos = example["input_ids"], example["labels"], tokenizer.bos_token_id
    trained = [label for label in labels if label != IGNORED]
    doubled = bos not in (None, end_id) and any(a == b == bos for a, b in pairwise(ids))
    assert not doubled, f"{where}: two BOS tokens in a row"
    assert 0 < len(trained) < len(ids), f"{where}: {len(trained)} of {len(ids)} tokens trained"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True)), f"{where}: labels differ"
    assert example["status"] == "answer_cut" or trained[-1] == end_id, f"{where}: the end token is not trained"


def tokenize_conversations(tokenizer, conversations, max_seq_length, source):
    """Turn [(row number, conversation), ...] into examples: dicts of input_ids, labels, row and status.

    Returns them and a report of what was kept, shortened, cut or dropped; `source` names the rows in it.
    """
    report = DataReport(source, len(conversations))
    end_token = find_end_token(tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end_token)
    examples = []
    for number, conversation in conversations:
        try:
            ids, labels, last_start = encode_conversation(tokenizer, conversation, end_token)
        except UserError as error:
            raise UserError(f"{source}, row {number}: {error}") from None
        ids, labels, status = fit_to_length(ids, labels, last_start, max_seq_length, tokenizer.bos_token_id)
        if all(label == IGNORED for label in labels):
            report.drop("no trainable token", number)
            continue
        example = {"input_ids": ids, "labels": labels, "row": number, "status": status}
        check_example(tokenizer, example, end_id, f"{source}, row {number}")
        setattr(report, status, getattr(report, status) + 1)
        examples.append(example)
    if conversations and not examples:
        raise UserError(f"{report.line()}; nothing is left to train on, raise --max_seq_length")
    return examples, report


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


# ---- Batches: rows laid end to end -----------------------------------------------------------------------------------
def pack_rows(lengths, max_tokens):
    """Cut one optimizer step's rows into few passes of at most max_tokens tokens; returns lists of indices.

    First-fit decreasing. A row longer than max_tokens gets a pass of its own.
    """
    passes, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((p for p, free in enumerate(room) if lengths[index] <= free), None)
        if fitting is None:
            passes.append([])
            room.append(max_tokens)
            fitting = len(passes) - 1
        passes[fitting].append(index)
        room[fitting] -= lengths[index]
    return passes


def build_pass(rows):
    """Lay rows end to end, without padding, as one batch of size 1 for a causal LM.

    input_ids and position_ids have shape (1, tokens); positions restart at 0 with each row, which is how transformers'
    masks keep the rows apart (it needs attention_mask=None and use_cache=False; masking_utils.py). `predicting` holds
    the positions whose next token is trained, `targets` that token, `row_of_target` the row's index: (targets,) each.
    """
    ids, positions, predicting, targets, row_of_target = [], [], [], [], []
    for index, row in enumerate(rows):
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                predicting.append(len(ids) + position)
                targets.append(label)
                row_of_target.append(index)
        ids += row["input_ids"]
        positions += range(len(row["input_ids"]))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "predicting": torch.tensor(predicting, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "row_of_target": torch.tensor(row_of_target, dtype=torch.long),
    }


def count_trained_tokens(rows):
    """Number of tokens whose prediction is trained: labels other than IGNORED, without a row's first token."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
