"""Prompts: one renderer, the tokenizer's chat template; text to token ids; which of them are trained."""

import json
import re
import signal
import threading
from bisect import bisect_left
from collections import namedtuple
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache

import numpy as np

from message_utils import UserError, printable, say

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

# What opens and what closes a thought, in the templates of reasoning models
THOUGHTS = {
    "<think>": "</think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "[THINK]": "[/THINK]",
    "<|open|>think<|sep|>": "<|close|>think<|sep|>",
    "<|channel>thought": "<channel|>",
    "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]",
}
OPENED_THOUGHT = re.compile("(" + "|".join(map(re.escape, THOUGHTS)) + r")(\s*)$")
EMPTY_THOUGHT = re.compile("(?:" + "|".join(rf"{re.escape(a)}\s*{re.escape(b)}" for a, b in THOUGHTS.items()) + r")\s*")
INLINE_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)  # as rows of data write it
THINKING = "{{% if enable_thinking is not defined %}}{{% set enable_thinking = {} %}}{{% endif %}}"
THOUGHT_MARKS = {*THOUGHTS, *THOUGHTS.values()}
# A conversation that shows how a template writes, and tools for the templates that cannot do without
PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The quick brown fox"})
PROBE_TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
    }
]
RENDER_SECONDS = 30  # a template that takes longer for one conversation is taken for one that never ends


# ---- The system text -------------------------------------------------------------------------------------------------
def begin_with(system_text, messages):
    """The messages behind a system text, unless they begin with one of their own or are a whole text.

    A system text that is blank or None is none.
    """
    first = messages[0]
    if not (system_text or "").strip() or first["role"] in ("system", "text"):
        return messages
    tools = {"tools": first["tools"]} if "tools" in first else {}  # they stand in the first message
    rest = {key: value for key, value in first.items() if key != "tools"}
    return [{"role": "system", "content": system_text} | tools, rest, *messages[1:]]


def announce_system_text(tokenizer, system_text):
    """Say which system text conversations begin with, if any; UserError if the chat template cannot write it."""
    if check_system_text(tokenizer, system_text):
        say(f"Conversations begin with the system text {shown_text(system_text)}; --system_prompt gives another")


def check_system_text(tokenizer, system_text):
    """Whether there is a system text; UserError if the chat template cannot write it."""
    messages = begin_with(system_text, [{"role": "user", "content": "Hi"}])
    if len(messages) == 1:
        return False
    try:
        check_prompt(render(tokenizer, messages, add_generation_prompt=True), messages)
    except UserError:
        raise UserError(
            'the model\'s chat template takes no system text; leave it out by --system_prompt "", and put what it says'
            " into the instruction"
        ) from None
    return True


def shown_text(text):
    """A text in quotes, in one line of at most 80 characters."""
    line = " ".join(printable(text).split())
    return f'"{line}"' if len(line) <= 80 else f'"{line[:77]}..."'


# ---- The chat template -----------------------------------------------------------------------------------------------
def render(tokenizer, messages, add_generation_prompt):
    """Render messages as text by the tokenizer's chat template, as servers do; what it refuses is a UserError."""
    tools = messages[0].get("tools") if messages else None
    try:
        return render_calls(tokenizer, list(map(public, messages)), tools, add_generation_prompt)
    except Exception as error:  # noqa: BLE001 - a template is a program and can fail in any way
        roles = ", ".join(message["role"] for message in messages)
        hint = " (many templates take no system message)" if "system" in roles else ""
        raise UserError(
            f"the model's chat template refuses a conversation of {roles}: {describe_error(error)}; change those rows"
            f"{hint} or choose another base model"
        ) from None


def render_probe(tokenizer, messages, add_generation_prompt):
    """Render a conversation of our own, with a tool for templates that fail without any."""
    try:
        return render(tokenizer, messages, add_generation_prompt)
    except UserError as error:
        if "did not end" in str(error):
            raise
        first, *others = messages
        with suppress(UserError):
            return render(tokenizer, [first | {"tools": PROBE_TOOLS}, *others], add_generation_prompt)
        raise


def render_calls(tokenizer, messages, tools, add_generation_prompt):
    """The rendered text; a template that cannot take the arguments of calls as objects gets them as JSON."""
    options = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    if getattr(tokenizer, "template_date", None):
        options["chat_template"] = with_date(tokenizer.get_chat_template(tools=tools), tokenizer.template_date)
    arguments = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    try:
        text = tokenizer.apply_chat_template(messages, **options)
        if not any(found and str(found) in text for found in arguments):  # str() writes Python, which is no JSON
            return text
    except TypeError:
        if not arguments:
            raise
    return tokenizer.apply_chat_template([with_json_arguments(message) for message in messages], **options)


def with_json_arguments(message):
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message


def public(message):
    """A message without the keys that are ours and not the template's."""
    return {key: value for key, value in message.items() if key not in ("tools", "weight")}


def describe_error(error):
    """The words of an error out of a template, with its type where they say little without it."""
    kind = type(error).__name__
    return str(error) if kind in ("TemplateError", "ValueError") and str(error) else f"{kind}: {str(error)[:200]}"


@contextmanager
def time_limit():
    """Raise a TimeoutError in the block after RENDER_SECONDS, where the system can do that."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise TimeoutError(f"it did not end within {RENDER_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def set_date(tokenizer, date):
    """Make `date`, a datetime, the one that the chat template writes, if it writes any; it is not saved."""
    tokenizer.template_date = date if "strftime_now" in str(tokenizer.chat_template) else None


def with_date(template, date):
    """A template whose strftime_now formats this date, in place of transformers' own, which takes the present moment.

    It is a macro, since functions that are handed to a template do not reach it.
    """
    codes = dict.fromkeys(re.findall(r"(?<!\{)%-?[aAwdbBmyYHIMSpfzZjUWcxX]", template))
    replaced = "".join(f".replace({json.dumps(code)}, {json.dumps(date.strftime(code))})" for code in codes)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{template}"


def written_date(tokenizer):
    """What the chat template writes of the date: "28 Nov 2026", or all of it where that is not known; "" for none."""
    template = str(tokenizer.chat_template)
    calls = template.count("strftime_now(")
    if not calls:
        return ""
    date = getattr(tokenizer, "template_date", None) or datetime.now()
    formats = re.findall(r"""strftime_now\(\s*["']([^"']+)["']\s*\)""", template)
    return ", ".join(map(date.strftime, dict.fromkeys(formats))) if len(formats) == calls else date.isoformat()


def set_thinking(tokenizer, enabled):
    """Make `enabled` the template's default of enable_thinking, if it has such an option and no default of ours yet.

    The default is a part of the template, so that every server that loads the saved tokenizer writes the same prompt.
    """

    def choose(template):
        for value in ("true", "false"):
            template = template.removeprefix(THINKING.format(value))
        return THINKING.format(str(enabled).lower()) + template if "enable_thinking" in template else template

    template = tokenizer.chat_template
    is_dict = isinstance(template, dict)
    tokenizer.chat_template = {name: choose(text) for name, text in template.items()} if is_dict else choose(template)


def has_thinking_default(tokenizer):
    return THINKING.format("true") in str(tokenizer.chat_template) or THINKING.format("false") in str(
        tokenizer.chat_template
    )


def find_end_token(tokenizer):
    """Return the token that a reply stops at: the one that the template writes after an answer, else EOS.

    It is found by rendering conversations, since for chat models it often differs from tokenizer.eos_token. What the
    template writes after an answer whether or not a question follows comes first: some templates close a conversation
    with a token of its own.
    """
    last = render_tail(tokenizer)
    pattern = control_tokens(tokenizer).pattern
    try:
        followed = render_tail(tokenizer, {"role": "user", "content": "Hi"})
    except UserError:
        followed = last
    shared = pattern.findall(last[: count_shared(last, followed)])
    if shared:
        return tokenizer.eos_token if tokenizer.eos_token in shared else shared[-1]
    found = pattern.search(last)
    return found[0] if found else tokenizer.eos_token


def render_tail(tokenizer, *following):
    """What the template writes behind an answer."""
    with time_limit():
        _, answer, tail = render_probe(tokenizer, [*PROBE, *following], False).rpartition(PROBE[-1]["content"])
    if not answer:
        raise UserError("the model's chat template changes answers or leaves them out; choose another base model")
    return tail


def writes_end_token(tokenizer):
    """Whether the template itself ends the last answer; if not, EOS is written there for training."""
    return find_end_token(tokenizer) in render_tail(tokenizer)


def describe_template(tokenizer):
    """One line on how prompts are made: whose template, its BOS and its end token."""
    source = "ours, in Alpaca's style" if tokenizer.chat_template == ALPACA_TEMPLATE else "the model's own"
    end = f"answers end with {find_end_token(tokenizer)}"
    if not writes_end_token(tokenizer):
        end = f"it ends answers with nothing, so {find_end_token(tokenizer)} is written and trained there"
    date = written_date(tokenizer)
    dated = f"; it writes the date, in training that of the run's start: {date}" if date else ""
    return f"{source}; {describe_bos(tokenizer)}; {end}{dated}"


def describe_bos(tokenizer):
    if tokenizer.bos_token is None:
        return "no BOS"
    if writes_bos(tokenizer):
        return f"begins with {tokenizer.bos_token}"
    if begins_plain_texts(tokenizer):
        return f"writes no BOS, though plain texts of this tokenizer begin with {tokenizer.bos_token}"
    return "writes no BOS"


def begins_plain_texts(tokenizer):
    """Whether the tokenizer itself puts BOS before a text."""
    return tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def writes_bos(tokenizer):
    """Whether the chat template begins a conversation with BOS."""
    return render_probe(tokenizer, [PROBE[0]], True).startswith(tokenizer.bos_token)


def writes_one_bos(tokenizer):
    """Whether a conversation of two questions holds one BOS; some templates (Llama 2's) write one for each."""
    if tokenizer.bos_token in (None, tokenizer.eos_token) or not writes_bos(tokenizer):
        return False
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    return render_probe(tokenizer, turns, True).count(tokenizer.bos_token) == 1


def end_token_ids(tokenizer):
    """The ids that end a reply: EOS, and the token that the chat template writes after an answer."""
    return sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(find_end_token(tokenizer))})


# ---- Control tokens --------------------------------------------------------------------------------------------------
# all control tokens, longest first; the set of the special ones; patterns of all, and of those that an answer may not
# write either
ControlTokens = namedtuple("ControlTokens", "tokens special pattern in_answers")
MARK = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)  # added tokens such as <|user|>, unlike "\n\n" or a word
PRIVATE_USE = re.compile("[\U000f0000-\U0010ffff]")
FIRST_STAND_IN = 0xF0000


def control_tokens(tokenizer):
    """The ControlTokens of a tokenizer: special ones, and others with which its chat template marks turns.

    Some are published without the flag `special` (DeepSeek's markers of turns). An answer may write those that mark no
    plain turn, such as <tool_call>, which then is the token.
    """
    template = tokenizer.chat_template
    return find_control_tokens(tokenizer, "\n".join(template.values()) if isinstance(template, dict) else template)


@lru_cache(maxsize=8)
def find_control_tokens(tokenizer, template):
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    try:
        written = render_probe(tokenizer, [*PROBE, {"role": "user", "content": "Hi"}], add_generation_prompt=True)
    except UserError:
        written = ""
    marks = {token.content for token in added if MARK.fullmatch(token.content)}
    of_turns = {mark for mark in marks if mark in written and mark not in THOUGHT_MARKS}
    tokens = longest_first(special | of_turns | {mark for mark in marks if mark in template})
    return ControlTokens(tokens, special, any_of(tokens), any_of(longest_first(special | of_turns)))


def longest_first(tokens):
    return sorted(tokens, key=lambda token: (-len(token), token))


def any_of(tokens):
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def private_use_codes(text):
    """The code points of the private-use characters in a text."""
    return frozenset(map(ord, PRIVATE_USE.findall(text)))


template_codes = lru_cache(maxsize=8)(private_use_codes)  # rows are many and differ, a template is always the same


def choose_stand_ins(tokenizer, messages):
    """The code point of the first stand-in for the control tokens in these texts.

    A control token that a user wrote is replaced, while the template is at work, by a run of one private-use character
    that is as long as it. None of these characters stands in the texts or in the template.
    """
    first, count = FIRST_STAND_IN, len(control_tokens(tokenizer).tokens)
    texts = [m["content"] if len(m) == 2 else json.dumps(m, ensure_ascii=False) for m in messages]
    found = template_codes(str(tokenizer.chat_template)).union(*map(private_use_codes, texts))
    for code in sorted(found):
        if code < first + count:
            first = code + 1
    if first + count > 0x110000:
        raise UserError("the texts hold so many private-use characters that none is left; remove some")
    return first


@lru_cache(maxsize=8)
def stand_ins(tokens, first):
    """{control token: its stand-in}; tokens: a tuple."""
    return {token: chr(first + index) * len(token) for index, token in enumerate(tokens)}


def hide_control_tokens(tokenizer, messages, first):
    """Put stand-ins for the control tokens in users' texts, so that after rendering only the template's are left."""
    control = control_tokens(tokenizer)
    replacements = stand_ins(tuple(control.tokens), first)

    def hide(value, pattern=control.pattern):
        if isinstance(value, str):
            return pattern.sub(lambda found: replacements[found[0]], value)
        if isinstance(value, dict):
            return {key: hide(item) for key, item in value.items()}
        return [hide(item) for item in value] if isinstance(value, list) else value

    def hide_answer(content):
        """The marks of a thought at the start of an answer stay what they are."""
        thought, text = split_thought(content)
        hidden = hide(text, control.in_answers)
        return f"<think>{hide(thought)}</think>{hidden}" if thought else hidden

    hidden = []
    for message in messages:
        hider = hide_answer if message["role"] == "assistant" else hide
        others = {key: hide(value) for key, value in message.items() if key not in ("role", "content")}
        hidden.append({"role": message["role"], "content": hider(message["content"])} | others)
    return hidden


# ---- Conversations to marked texts -----------------------------------------------------------------------------------
# What the model is given before an answer, and what it is to write: the answer with its end token
Turn = namedtuple("Turn", "prompt answer")


def mark_answers(tokenizer, messages, end_token):
    """Render a conversation as the MarkedTexts that are trained on.

    Each answer stands behind the prompt that the model is given at inference. Where a later answer's prompt begins with
    an earlier answer's text, they share one MarkedText; elsewhere, since many templates write earlier answers otherwise
    than the last one, each answer has its own. Raises UserError for what the template cannot write.
    """
    first = choose_stand_ins(tokenizer, messages)
    hidden = hide_control_tokens(tokenizer, messages, first)
    if hidden[0]["role"] == "text":
        return [mark_whole_text(tokenizer, hidden[0]["content"], first)]
    texts = []
    with time_limit():
        for index, message in enumerate(hidden):
            if message["role"] == "assistant" and message.get("weight") != 0:
                prompt, answer = write_turn(tokenizer, hidden[: index + 1], end_token)
                earlier = texts.pop() if texts and prompt.startswith(texts[-1].text) else MarkedText("", [], first)
                text = prompt + answer
                texts.append(MarkedText(text, [*earlier.answers, (len(prompt), len(text))], first))
    return texts


def mark_whole_text(tokenizer, text, first_stand_in):
    """The MarkedText of a text without turns: BOS, where plain texts or the template begin with it; text and EOS."""
    begins = tokenizer.bos_token is not None and (writes_bos(tokenizer) or begins_plain_texts(tokenizer))
    bos = tokenizer.bos_token if begins else ""
    end = len(bos) + len(text) + len(tokenizer.eos_token)
    return MarkedText(f"{bos}{text}{tokenizer.eos_token}", [(len(bos), end)], first_stand_in)


def write_turn(tokenizer, messages, end_token):
    """The Turn of the last message, an answer."""
    *earlier, message = messages
    prompt = render(tokenizer, earlier, add_generation_prompt=True)
    check_prompt(prompt, earlier)
    inline, text = split_thought(message["content"])
    thought = (inline or message.get("reasoning_content", "")).strip()
    turns = (
        follow(prompt, render(tokenizer, [*earlier, form], False), text, earlier)
        for form in forms(message, thought, text, inline or (thought and knows_thoughts(tokenizer)))
    )
    for turn in turns:
        end = find_answer_end(turn, thought, text, message) if turn else None
        if end is not None and turn.find(end_token) in (-1, turn.find(end_token, end)):
            return Turn(prompt, end_answer(tokenizer, turn, end, end_token, message))
    plain = {key: value for key, value in message.items() if key != "reasoning_content"}
    turn = follow(prompt, render(tokenizer, [*earlier, plain | {"content": text}], False), text, earlier)
    end = find_answer_end(turn, "", text, message) if turn else None
    if end is None or (turn.find(end_token) not in (-1, turn.find(end_token, end))):
        raise UserError(explain_missing(turn, text, message, len(messages)))
    turn = end_answer(tokenizer, turn, end, end_token, message)
    return Turn(prompt, write_thought(prompt, thought, turn) if inline or OPENED_THOUGHT.search(prompt) else turn)


def forms(message, thought, text, in_content):
    """The ways to hand an answer to a template: as it is, and with its thought where other templates look for it.

    in_content: whether the thought may stand in the answer's text.
    """
    yield message
    if thought:
        plain = {key: value for key, value in message.items() if key != "reasoning_content"}
        yield plain | {"content": text.strip(), "reasoning_content": thought}
        if in_content:
            yield plain | {"content": f"<think>\n{thought}\n</think>\n\n{text.strip()}"}


def knows_thoughts(tokenizer):
    """Whether the chat template speaks of thoughts in answers."""
    return any(mark in str(tokenizer.chat_template) for mark in THOUGHT_MARKS)


def uses_reasoning(tokenizer):
    """Whether an answer's reasoning_content is trained: some templates have no place for it."""
    question, answer = PROBE
    thought = "I see a fox."
    try:
        texts = mark_answers(tokenizer, [question, answer | {"reasoning_content": thought}], find_end_token(tokenizer))
    except UserError:
        return True  # the rows will tell
    return thought in texts[0].text


def split_thought(content):
    """(thought, text) of an answer that begins with <think>...</think>, else ("", the answer)."""
    found = INLINE_THOUGHT.fullmatch(content)
    return found.groups() if found else ("", content)


def follow(prompt, rendered, text, earlier):
    """What the template writes behind a prompt, taken from the conversation rendered with its answer.

    A thought that the prompt has opened is closed first. Where the template writes the earlier turns otherwise than in
    the prompt, only the answer is taken, with what stands between the prompt's last words and it, unless that is of
    another turn. None where the answer's text is not found.
    """
    if rendered.startswith(prompt):
        return rendered[len(prompt) :]
    opened, empty = OPENED_THOUGHT.search(prompt), list(EMPTY_THOUGHT.finditer(prompt))
    begin = opened.start() if opened else empty[-1].start() if empty and empty[-1].end() == len(prompt) else len(prompt)
    base = prompt[:begin]
    if rendered.startswith(base):
        rest = rendered[begin:]
    else:
        place = rendered.rfind(text.strip())
        if place < 0 or not text.strip():
            return None
        starts = range(max(place - 200, 0), place + 1)
        start = max(starts, key=lambda start: (shared_end(rendered[:start], base), start))
        said = [message["content"].strip() for message in earlier]
        foreign = any(words and words in rendered[start:place] for words in said)
        rest = rendered[place if foreign or not shared_end(rendered[:start], base) else start :]
    if begin < len(prompt):
        rest = EMPTY_THOUGHT.sub("", rest.lstrip(), count=1) if EMPTY_THOUGHT.match(rest.lstrip()) else rest
    return close_thought(opened) + rest.lstrip() if opened else rest


def count_shared(one, other):
    """How many characters two texts have in common at their starts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def shared_end(one, other):
    """How many of their last 500 characters two texts have in common."""
    return count_shared(one[:-501:-1], other[:-501:-1])


def close_thought(opened):
    """What closes the thought that a prompt has opened, a match of OPENED_THOUGHT."""
    return f"{opened[2]}{THOUGHTS[opened[1]]}\n\n"


def write_thought(prompt, thought, turn):
    """A turn with its thought before it, for templates that leave thoughts out of answers."""
    opened = OPENED_THOUGHT.search(prompt)
    if not opened or not thought:
        return f"<think>\n{thought}\n</think>\n\n{turn.lstrip()}" if thought else turn
    return f"{thought}{opened[2]}{THOUGHTS[opened[1]]}\n\n{turn.removeprefix(close_thought(opened)).lstrip()}"


def find_answer_end(turn, thought, text, message):
    """Where an answer's thought, text and calls, in this order, end in a turn; None where one of them is missing."""
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    end = 0
    for part in filter(None, [thought, text.strip(), *names]):
        start = turn.find(part, end)
        if start < 0:
            return None
        end = start + len(part)
    return end


def end_answer(tokenizer, turn, end, end_token, message):
    """The turn up to its end token, which is written where the template writes none.

    A call may end with a token of its own.
    """
    found = turn.find(end_token, end)
    if found >= 0:
        return turn[: found + len(end_token)]
    turn = turn.rstrip()
    if "tool_calls" in message and (closed := list(control_tokens(tokenizer).pattern.finditer(turn, end))):
        return turn[: closed[-1].end()] if closed[-1].end() == len(turn) else turn + end_token
    return turn + end_token


def check_prompt(prompt, messages):
    """Raise UserError if a template leaves out tools, or what somebody else than the model has said."""
    for tool in messages[0].get("tools", ()) if messages else ():
        if tool["function"]["name"] not in prompt:
            raise UserError(
                f"the model's chat template has no place for tools, such as {tool['function']['name']}; choose a base"
                " model whose template knows them, or remove the tools from the rows"
            )
    for number, message in enumerate(messages, start=1):
        text = message["content"].strip()
        if message["role"] == "assistant" or text in prompt:
            continue
        if not all(word in prompt for word in re.findall(r"\w+", text)):  # its blanks, or the form of JSON, may change
            raise UserError(
                f"the model's chat template leaves out message {number}, of role {message['role']}, or changes its"
                " text; remove such messages or choose another base model"
            )


def explain_missing(turn, text, message, number):
    """The message of an answer that a template does not write, or writes with an end token in the middle."""
    if turn and find_answer_end(turn, "", text, message) is not None:
        return (
            f"the model's chat template ends message {number} before all of it is written, as several turns; write its"
            " text and its tool call as messages of their own, or choose another base model"
        )
    if "tool_calls" in message and find_answer_end(turn or "", "", text, {}) is not None:
        return (
            f"the model's chat template has no place for the tool call in message {number}; choose a base model whose"
            " template knows calls, or write the call as text in content"
        )
    return (
        f"the model's chat template changes message {number} or leaves it out, so the answer cannot be located; try"
        " rows with plain text answers, or choose another base model"
    )


# ---- Texts to token ids and the mask ---------------------------------------------------------------------------------
# a rendered text; the (start, end) characters of the answers in it; its first stand-in's code point (choose_stand_ins)
MarkedText = namedtuple("MarkedText", "text answers first_stand_in", defaults=[FIRST_STAND_IN])
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
