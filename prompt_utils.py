"""Prompts: one renderer, the tokenizer's chat template; text to token ids; which of them are trained."""

import re
from bisect import bisect_left
from collections import namedtuple
from functools import lru_cache

import numpy as np
from jinja2.exceptions import TemplateError

from message_utils import UserError

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


# ---- Conversations to texts ------------------------------------------------------------
def render(tokenizer, messages, add_generation_prompt):
    """Render messages as text by the tokenizer's chat template; what the template refuses is a UserError."""
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


def describe_template(tokenizer):
    """One line on how prompts are made: whose template, its BOS and its end token."""
    source = "ours, in Alpaca's style" if tokenizer.chat_template == ALPACA_TEMPLATE else "the model's own"
    return f"{source}; {describe_bos(tokenizer)}; answers end with {find_end_token(tokenizer)}"


def describe_bos(tokenizer):
    if tokenizer.bos_token is None:
        return "no BOS"
    if writes_bos(tokenizer):
        return f"begins with {tokenizer.bos_token}"
    by_itself = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    if by_itself:
        return f"writes no BOS, though plain texts of this tokenizer begin with {tokenizer.bos_token}"
    return "writes no BOS"


def writes_bos(tokenizer):
    """Whether the chat template begins a conversation with BOS."""
    return render(tokenizer, [{"role": "user", "content": "Hi"}], True).startswith(tokenizer.bos_token)


def writes_one_bos(tokenizer):
    """Whether a conversation of two questions holds one BOS; some templates (Llama 2's) write one for each."""
    if tokenizer.bos_token in (None, tokenizer.eos_token) or not writes_bos(tokenizer):
        return False
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    return render(tokenizer, turns, True).count(tokenizer.bos_token) == 1


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


def mark_answers(tokenizer, messages, end_token):
    """Render a conversation as the MarkedText that is trained on; it ends with the last answer's end token.

    What follows that token is never trained or read. Raises UserError where the template refuses the conversation or
    an answer cannot be found in what it wrote.
    """
    hidden = hide_control_tokens(tokenizer, messages)
    text = render(tokenizer, hidden, add_generation_prompt=False)
    answers = find_answers(tokenizer, hidden, text, end_token)
    return MarkedText(text[: answers[-1][1]], answers)


def find_answers(tokenizer, messages, text, end_token):
    """The (start, end) characters of every answer in the rendered `text`, its end token included.

    An answer starts where the template's generation prompt ends: what the model will be given is never trained.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], add_generation_prompt=True)
        answer = message["content"].strip()
        start = text.find(answer, len(prompt))
        end = text.find(end_token, start + len(answer))
        # with an end token before them these words belong to a later turn, and this answer was left out
        if not text.startswith(prompt) or start < 0 or end < 0 or end_token in text[len(prompt) : start]:
            shown_alone = answer in render(tokenizer, messages[: index + 1], add_generation_prompt=False)
            if index + 1 < len(messages) and shown_alone:
                raise UserError(
                    f"the model's chat template rewrites message {index + 1} once other turns follow (it may drop"
                    " earlier thinking), so that answer cannot be trained; split the row so that each answer ends one"
                )
            raise UserError(
                f"the model's chat template changes message {index + 1} or leaves it out, so the answer cannot be"
                " located; try rows with plain text answers, or choose another base model"
            )
        spans.append((len(prompt), end + len(end_token)))
    return spans


# ---- Texts to token ids and the mask ---------------------------------------------------------------------------------
# a rendered text, and the (start, end) characters of the answers in it
MarkedText = namedtuple("MarkedText", "text answers")
# (tokens,) int32 ids; (tokens,) bool, whether each is trained; the token at which the last answer starts
EncodedText = namedtuple("EncodedText", "ids trained last_start")
# part of a text; whether other parts stand before it; whether control tokens in it are plain text
Piece = namedtuple("Piece", "text continues literal")


def encode_prompt(tokenizer, messages):
    """Token ids of a conversation up to where the model's answer starts; the same ids as in training."""
    text = render(tokenizer, hide_control_tokens(tokenizer, messages), add_generation_prompt=True)
    return next(encode_texts(tokenizer, [MarkedText(text, [])])).ids.tolist()


def encode_texts(tokenizer, texts):
    """Encode MarkedTexts and find which tokens are trained; yields an EncodedText for each.

    Many texts in one call are encoded on all cores. No token spans the start of an answer: what stands before it is
    encoded as it is when it stands alone, so that a prompt's ids are the same in training and at inference.
    """
    for (text, answers), (ids, offsets) in zip(texts, encode(tokenizer, [text for text, _ in texts]), strict=True):
        ids, offsets = separate(tokenizer, text, ids, offsets, [start for start, _ in answers])
        yield mark_tokens(ids, offsets, answers)


def mark_tokens(ids, offsets, answers):
    """The EncodedText of these ids: a token is trained if it starts inside an answer.

    It may end behind the answer: some end tokens take the line break after them along.
    """
    begins = [begin for begin, _ in offsets]
    trained, last_start = np.zeros(len(ids), dtype=bool), len(ids)
    for start, end in answers:
        last_start = bisect_left(begins, start)
        trained[last_start : bisect_left(begins, end)] = True
    return EncodedText(np.array(ids, dtype=np.int32), trained, last_start)


def separate(tokenizer, text, ids, offsets, cuts):
    """Encode anew the two sides of each cut, a position in the text, that lies inside a token."""
    for cut in cuts:
        if any(start < cut < end for start, end in offsets):
            left, right = encode(tokenizer, [text[:cut], text[cut:]])
            left_ids, left_offsets = separate(tokenizer, text[:cut], *left, [c for c in cuts if c < cut])
            right_ids, right_offsets = separate(tokenizer, text[cut:], *right, [c - cut for c in cuts if c > cut])
            return left_ids + right_ids, left_offsets + shift(right_offsets, cut)
    return ids, offsets


def encode(tokenizer, texts):
    """Yield (ids, offsets) of each rendered text; offsets are the (start, end) characters of its tokens.

    The template's control tokens become control tokens; the users', of which stand-ins are left in the texts, become
    plain text.
    """
    pieces = [split_at_stand_ins(tokenizer, text) for text in texts]
    encodings = iter(encode_pieces(tokenizer, [piece for pieces_of_text in pieces for piece in pieces_of_text]))
    for pieces_of_text in pieces:  # one text at a time: the tuples of offsets take more memory than the texts
        yield join_pieces(tokenizer, pieces_of_text, encodings)


def split_at_stand_ins(tokenizer, text):
    """The Pieces of a text: the control tokens that stand-ins stand for, and what is between them."""
    stand_ins = {stand_in: token for token, stand_in in control_tokens(tokenizer)[1].items() if stand_in in text}
    if not stand_ins:
        return [Piece(text, continues=False, literal=False)]
    parts = [part for part in re.split("(" + "|".join(stand_ins) + ")", text) if part]
    return [Piece(stand_ins.get(part, part), index > 0, part in stand_ins) for index, part in enumerate(parts)]


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
