"""Prompts: one renderer, the tokenizer's chat template; text to token ids; which of them are trained."""

import re
from functools import lru_cache

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
    return "writes no BOS" + f", though plain texts of this tokenizer begin with {tokenizer.bos_token}" * by_itself


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
            shown_alone = answer in render(tokenizer, messages[: index + 1], add_generation_prompt=False)
            if index + 1 < len(messages) and shown_alone:
                raise UserError(
                    f"the model's chat template rewrites message {index + 1} once other turns follow (it drops earlier"
                    " thinking, say), so that answer cannot be trained; split the row so that each answer ends one"
                )
            raise UserError(
                f"the model's chat template changes message {index + 1} or leaves it out, so the answer cannot be"
                " located; try rows with plain text answers, or choose another base model"
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
