"""Texts to token ids, and which of them are trained: one encoder for training, evaluation and replies."""

import re
from bisect import bisect_left
from collections import namedtuple

import numpy as np

from prompt_utils import (
    PRIVATE_USE,
    MarkedText,
    choose_stand_ins,
    control_tokens,
    hide_control_tokens,
    render,
    stand_ins,
    time_limit,
)

IGNORED = -100  # label of a token that is not trained, as in torch's cross_entropy
# (tokens,) int32 ids; (tokens,) bool, whether each is trained; the token at which the last answer starts; the position
# of its text among those that were encoded
EncodedText = namedtuple("EncodedText", "ids trained last_start position", defaults=[0])
# part of a text; whether other parts stand before it; whether control tokens in it are plain text
Piece = namedtuple("Piece", "text continues literal")


def encode_prompt(tokenizer, messages):
    """Token ids of a conversation up to where the model's answer starts; the same ids as in training."""
    first = choose_stand_ins(tokenizer, messages)
    with time_limit():
        text = render(tokenizer, hide_control_tokens(tokenizer, messages, first), add_generation_prompt=True)
    return next(encode_texts(tokenizer, [MarkedText(text, [], first)])).ids.tolist()


def encode_texts(tokenizer, texts):
    """Encode MarkedTexts and find which tokens are trained; yields an EncodedText for each, seldom several.

    Many texts in one call are encoded on all cores. The tokens before an answer are those of its prompt when that is
    encoded alone, as at inference, so that no token spans the answer's start. In the prompt of a later answer an
    earlier one may have a token in common with what stands before it, such as a line break: then the later answers get
    an EncodedText of their own.
    """
    for position, (text, (ids, offsets)) in enumerate(zip(texts, encode(tokenizer, texts), strict=True)):
        groups = split_behind(text.answers, lambda start, offsets=offsets: is_inside_token(offsets, start))
        for group in groups:
            part = text
            if len(groups) > 1:
                part = text._replace(text=text.text[: group[-1][1]])
                ((ids, offsets),) = encode(tokenizer, [part])
            if group and (is_inside_token(offsets, group[-1][0]) or is_whole_text(tokenizer, text)):
                ids, offsets = encode_apart(tokenizer, part, group[-1][0])
            yield mark_tokens(ids, offsets, group, position)


def split_behind(answers, is_merged):
    """Split a list of (start, end) behind each one whose start is merged."""
    groups = [[]]
    for index, answer in enumerate(answers):
        groups[-1].append(answer)
        if index < len(answers) - 1 and is_merged(answer[0]):
            groups.append([])
    return groups


def is_whole_text(tokenizer, text):
    """Whether nothing but BOS stands before what is trained in a MarkedText: it is encoded as if it stood alone."""
    start = text.answers[0][0] if text.answers else None
    return start == 0 or (bool(start) and text.text[:start] == tokenizer.bos_token)


def is_inside_token(offsets, place):
    """Whether a place in the text lies inside a token."""
    before = first_token(offsets, place) - 1
    return before >= 0 and offsets[before][1] > place


def encode_apart(tokenizer, text, cut):
    """(ids, offsets) of a MarkedText whose two parts, before and behind a place in it, are encoded each by itself."""
    parts = [text._replace(text=part) for part in (text.text[:cut], text.text[cut:])]
    (left, left_offsets), (right, right_offsets) = encode(tokenizer, parts)
    return left + right, left_offsets + shift(right_offsets, cut)


def mark_tokens(ids, offsets, answers, position):
    """The EncodedText of these ids: a token is trained if it starts inside an answer.

    It may end behind the answer: some end tokens take the line break after them along.
    """
    trained, last_start = np.zeros(len(ids), dtype=bool), len(ids)
    for start, end in answers:
        last_start = first_token(offsets, start)
        trained[last_start : first_token(offsets, end)] = True
    return EncodedText(np.array(ids, dtype=np.int32), trained, last_start, position)


def first_token(offsets, position):
    """The index of the first token that starts at a position in the text or behind it; offsets are in order."""
    return bisect_left(offsets, (position,))


def encode(tokenizer, texts):
    """Yield (ids, offsets) of each MarkedText; offsets are the (start, end) characters of its tokens.

    The template's control tokens become control tokens; the users', of which stand-ins are left in the texts, become
    plain text.
    """
    pieces = [split_at_stand_ins(tokenizer, text) for text in texts]
    encodings = iter(encode_pieces(tokenizer, [piece for pieces_of_text in pieces for piece in pieces_of_text]))
    for pieces_of_text in pieces:  # one text at a time: the tuples of offsets take more memory than the texts
        yield join_pieces(tokenizer, pieces_of_text, encodings)


def split_at_stand_ins(tokenizer, marked):
    """The Pieces of a MarkedText: the control tokens that stand-ins stand for, and what is between them."""
    text, tokens = marked.text, {}
    if PRIVATE_USE.search(text):
        replacements = stand_ins(tuple(control_tokens(tokenizer).tokens), marked.first_stand_in)
        tokens = {stand_in: token for token, stand_in in replacements.items() if stand_in in text}
    if not tokens:
        return [Piece(text, continues=False, literal=False)]
    special, pieces = control_tokens(tokenizer).special, []
    for part in filter(None, re.split("(" + "|".join(tokens) + ")", text)):
        token = tokens.get(part)
        # the tokenizer can leave special tokens unread (split_special_tokens); another one is halved for that
        halves = [token or part] if token is None or token in special else [token[0], token[1:]]
        pieces += [Piece(half, bool(pieces) or index > 0, token is not None) for index, half in enumerate(halves)]
    return pieces


def join_pieces(tokenizer, pieces, encodings):
    """(ids, offsets) of a text from the encodings of its Pieces, which are taken from an iterator."""
    ids, offsets, position = [], [], 0
    for piece in pieces:
        encoding = next(encodings)
        more = (encoding.ids, encoding.offsets)
        if piece.continues:
            more = remove_line_break(*more) or encode_alone(tokenizer, piece)
        ids += more[0]
        offsets += shift(more[1], position)
        position += len(piece.text)
    return ids, offsets


def shift(offsets, distance):
    return [(start + distance, end + distance) for start, end in offsets] if distance else offsets


def encode_alone(tokenizer, piece):
    """(ids, offsets) of a Piece as if nothing stood before it."""
    (encoding,) = call_tokenizer(tokenizer, [piece.text], piece.literal)
    return encoding.ids, encoding.offsets


def encode_pieces(tokenizer, pieces):
    """A list with the Encoding of each Piece.

    A piece that continues a text is encoded behind a line break, which remove_line_break takes off again:
    SentencePiece-style tokenizers put a blank before the start of whatever they are given.
    """
    found = [None] * len(pieces)
    for literal in (False, True):
        chosen = [index for index, piece in enumerate(pieces) if piece.literal == literal]
        texts = [("\n" if pieces[index].continues else "") + pieces[index].text for index in chosen]
        for index, encoding in zip(chosen, call_tokenizer(tokenizer, texts, literal), strict=True):
            found[index] = encoding
    return found


def call_tokenizer(tokenizer, texts, literal):
    """The Encodings of texts as the tokenizers library returns them; if `literal`, without control tokens."""
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=literal,
        verbose=False,  # it would warn of texts beyond the model's context, which are cut later
    ).encodings


def remove_line_break(ids, offsets):
    """(ids, offsets) without the line break at the start; None if it merged with what follows."""
    if any(start < 1 < end for start, end in offsets):
        return None
    kept = [index for index, (_, end) in enumerate(offsets) if end > 1]
    return [ids[index] for index in kept], shift([offsets[index] for index in kept], -1)
