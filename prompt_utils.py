"""Prompts: one renderer, the tokenizer's chat template; conversations to texts in which the answers are marked."""

import json
import re
import signal
import threading
from collections import namedtuple
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache

import thought_utils
from call_utils import ID_FORMS, with_ids
from message_utils import UserError, printable, say

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

DEFAULT = "{{% if {0} is not defined %}}{{% set {0} = {1} %}}{{% endif %}}"
# The default of an option by which a template is asked for thoughts, and other options that do the same
THINKING = {enabled: DEFAULT.format("enable_thinking", str(enabled).lower()) for enabled in (True, False)}
THINKING_BY_OTHER_NAMES = {
    option: DEFAULT.format(option, value) for option, value in (("thinking", "true"), ("reasoning_effort", "'high'"))
}
# A conversation that shows how a template writes, and tools for the templates that cannot do without
PROBE = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The quick brown fox"})
PROBE_TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
    }
]
PROBE_CALL = {"name": "look_up", "arguments": {"item": "fox"}}
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
    shown = list(map(public, messages))
    if any("tool_calls" in message for message in shown) and (form := id_form(tokenizer)):
        shown = with_ids(shown, form)
    try:
        return render_calls(tokenizer, shown, tools, add_generation_prompt)
    except Exception as error:  # noqa: BLE001 - a template is a program and can fail in any way
        if isinstance(error, TypeError) and not tools and needs_tools(tokenizer, shown):
            raise UserError(
                f"the model's chat template writes no conversation without tools ({describe_error(error)}); give tools"
                " in the rows, or choose another base model"
            ) from None
        roles = ", ".join(message["role"] for message in messages)
        hint = " (many templates take no system message)" if "system" in roles else ""
        raise UserError(
            f"the model's chat template refuses a conversation of {roles}: {describe_error(error)}; change those rows"
            f"{hint} or choose another base model"
        ) from None


def needs_tools(tokenizer, messages):
    """Whether the chat template can write messages with a tool, which it failed to write without."""
    try:
        return bool(render_calls(tokenizer, messages, PROBE_TOOLS, False))
    except Exception:  # noqa: BLE001 - then it was not for want of tools
        return False


def render_probe(tokenizer, messages, add_generation_prompt):
    """Render a conversation of our own, with a tool for templates that fail without any."""
    with suppress_refusals():
        return render(tokenizer, messages, add_generation_prompt)
    first, *others = messages
    with suppress_refusals():
        return render(tokenizer, [first | {"tools": PROBE_TOOLS}, *others], add_generation_prompt)
    return render(tokenizer, messages, add_generation_prompt)


@contextmanager
def suppress_refusals():
    """Go on where a template refuses a conversation, but not where it never ends."""
    try:
        yield
    except UserError as error:
        if "did not end" in str(error):
            raise


def render_calls(tokenizer, messages, tools, add_generation_prompt):
    """The rendered text, from messages in the form that the template takes.

    A template that cannot take the arguments of calls as objects gets them as JSON.
    """
    options = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    if getattr(tokenizer, "template_date", None):
        options["chat_template"] = with_date(tokenizer.get_chat_template(tools=tools), tokenizer.template_date)
    if takes_parts(tokenizer, str(tokenizer.chat_template)):
        messages = list(map(in_parts, messages))
    arguments = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ())]
    try:
        text = tokenizer.apply_chat_template(messages, **options)
        if not any(found and str(found) in text for found in arguments):  # str() writes Python, which is no JSON
            return text
    except TypeError:
        if not arguments:
            raise
    return tokenizer.apply_chat_template([with_json_arguments(message) for message in messages], **options)


def id_form(tokenizer):
    """The name of the ID_FORMS in which the chat template takes the ids of calls; None where it takes what it gets."""
    return find_id_form(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def find_id_form(tokenizer, template):
    if "tool_call" not in template:
        return None

    def writes(messages):
        try:
            return PROBE_CALL["name"] in render_calls(tokenizer, messages, PROBE_TOOLS, False)
        except TimeoutError:
            raise
        except Exception:  # noqa: BLE001 - whatever fails here is met again with the messages themselves
            return False

    def ask(**given):
        call, result = {"type": "function", "function": PROBE_CALL}, {"role": "tool", "content": "1"}
        calls = {"role": "assistant", "content": "", "tool_calls": [call | given]}
        return [PROBE[0], calls, result | {f"tool_call_{key}": value for key, value in given.items()}]

    conversations = [ask(), ask(id="call_0123456789abcdef")]
    if all(map(writes, conversations)):
        return None
    return next((form for form in ID_FORMS if all(writes(with_ids(asked, form)) for asked in conversations)), None)


@lru_cache(maxsize=8)
def takes_parts(tokenizer, template):
    """Whether a chat template writes texts only as lists of parts, as some of models that see pictures do."""
    if "content" not in template or "text" not in template:
        return False

    def writes(messages):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except TimeoutError:
            raise
        except Exception:  # noqa: BLE001 - whatever fails here is met again with the messages themselves
            return False
        return all(message["content"] in text for message in PROBE)

    return not writes(PROBE) and writes([in_parts(message) for message in PROBE])


def in_parts(message):
    """A message whose text is a list of one part, in OpenAI's form."""
    return message | {"content": [{"type": "text", "text": message["content"]}]}


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
    if kind == "UndefinedError" and str(error).endswith("is undefined"):
        return f"{error}, and no server gives it"
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

    Where it is true and thoughts still have no place, that goes for an option by another name that makes one. The
    default is a part of the template, so that every server that loads the saved tokenizer writes the same prompt.
    """

    def choose(template):
        for default in THINKING.values():
            template = template.removeprefix(default)
        return THINKING[enabled] + template if "enable_thinking" in template else template

    template = tokenizer.chat_template
    is_dict = isinstance(template, dict)
    tokenizer.chat_template = {name: choose(text) for name, text in template.items()} if is_dict else choose(template)
    if not enabled:
        if tokenizer.chat_template != template and refuses_probe(tokenizer):  # some models always think
            tokenizer.chat_template = template
        return
    if is_dict:
        return
    template = tokenizer.chat_template
    for option, default in THINKING_BY_OTHER_NAMES.items():
        if re.search(rf"\b{option} is (not )?defined", template) and not uses_reasoning(tokenizer):
            tokenizer.chat_template = default + template
            if uses_reasoning(tokenizer):
                return
            tokenizer.chat_template = template


def refuses_probe(tokenizer):
    """Whether the chat template writes not even a plain question and its answer."""
    try:
        with time_limit():
            return not render_probe(tokenizer, list(PROBE), False)
    except UserError:
        return True


def has_thinking_default(tokenizer):
    return any(default in str(tokenizer.chat_template) for default in THINKING.values())


def find_end_token(tokenizer):
    """Return the token that a reply stops at: the one that the template writes after an answer, else EOS.

    It is found by rendering conversations, since for chat models it often differs from tokenizer.eos_token. What the
    template writes after an answer whether or not a question follows comes first: some templates close a conversation
    with a token of its own.
    """
    last = render_tail(tokenizer)
    control = control_tokens(tokenizer)
    try:
        followed = render_tail(tokenizer, {"role": "user", "content": "Hi"})
    except UserError:
        followed = last
    ending = last[: count_shared(last, followed)]
    ending = ending.partition(control.turn_start)[0] if control.turn_start else ending
    shared = control.pattern.findall(ending)
    if shared:
        return tokenizer.eos_token if tokenizer.eos_token in shared else shared[-1]
    found = control.pattern.search(last)
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
    if opening := find_opening(tokenizer):
        end = f"answers begin with {json.dumps(opening, ensure_ascii=False)}, which is trained; {end}"
    date = written_date(tokenizer)
    dated = f"; it writes the date, in training that of the run's start: {date}" if date else ""
    return f"{source}; {describe_bos(tokenizer)}; {end}{dated}"


def find_opening(tokenizer):
    """What the template writes before an answer's text and not in its prompt, such as the name of a channel, or ""."""
    with suppress(UserError):
        return (
            write_turn(tokenizer, list(PROBE), find_end_token(tokenizer))
            .answer.partition(PROBE[1]["content"])[0]
            .strip()
        )
    return ""


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
    """The ids that end a reply: EOS, and the tokens that the chat template writes after an answer and after a call."""
    ends = {tokenizer.eos_token, find_end_token(tokenizer), *find_call_end(tokenizer)}
    return sorted(map(tokenizer.convert_tokens_to_ids, ends))


def find_call_end(tokenizer):
    """A list of the token with which the template ends a call, empty where it writes no calls."""
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
    question = PROBE[0] | {"tools": PROBE_TOOLS}
    try:
        end_token = find_end_token(tokenizer)
        with time_limit():
            turn = write_turn(tokenizer, [question, PROBE[1] | {"content": "", "tool_calls": [call]}], end_token)
    except UserError:
        return []
    return control_tokens(tokenizer).pattern.findall(turn.answer)[-1:]


# ---- Control tokens --------------------------------------------------------------------------------------------------
# all control tokens, longest first; the set of the special ones; patterns of all, and of those that an answer may not
# write either; the text with which the template begins turns, whoever speaks, or ""
ControlTokens = namedtuple("ControlTokens", "tokens special pattern in_answers turn_start")
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
    conversation = [*PROBE, {"role": "user", "content": "Hi"}]
    try:
        asked, written = (render_probe(tokenizer, conversation, prompted) for prompted in (False, True))
    except UserError:
        asked = written = ""
    marks = {token.content for token in added if MARK.fullmatch(token.content)}
    of_turns = {mark for mark in marks if mark in written and mark not in thought_utils.MARKS}
    tokens = longest_first(special | of_turns | {mark for mark in marks if mark in template})
    starts = find_turn_start(asked, written, of_turns | special)
    return ControlTokens(tokens, special, any_of(tokens), any_of(longest_first(special | of_turns)), starts)


def find_turn_start(asked, prompted, marks):
    """What the generation prompt and a user's turn have in common at their starts, if a mark of turns is in it.

    asked, prompted: the conversation of find_control_tokens, rendered without and with the generation prompt.
    """
    header = prompted[len(asked) :] if prompted.startswith(asked) else ""
    before_user = prompted.rpartition(PROBE[-1]["content"])[2].partition("Hi")[0]
    shared = next((header[:end] for end in range(len(header), 0, -1) if header[:end] in before_user), "")
    return shared if any(mark in shared for mark in marks) else ""


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
        thought, text = thought_utils.split_inline(content)
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
# a rendered text; the (start, end) characters of the answers in it; its first stand-in's code point (choose_stand_ins)
MarkedText = namedtuple("MarkedText", "text answers first_stand_in", defaults=[FIRST_STAND_IN])


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
    begun = find_begun(tokenizer, prompt, earlier)
    inline, text = thought_utils.split_inline(message["content"], begun)
    parts = parts_of(message, text)
    turn = write_answer(tokenizer, prompt, begun, messages, (inline, text), end_token)
    end = find_answer_end(turn, parts, end_token)
    calls = message.get("tool_calls", ())
    if len(calls) > 1:
        first = [*earlier, message | {"tool_calls": calls[:1]}]
        end = end if render(tokenizer, messages, False) != render(tokenizer, first, False) else None
    if end is None:
        raise UserError(explain_missing(tokenizer, messages, turn, parts))
    return Turn(prompt, end_answer(tokenizer, turn, end, end_token, message))


def find_begun(tokenizer, prompt, messages):
    """The thought that the template has Begun at the end of a prompt, or None; what a user writes there begins none."""
    written = messages[-1]["content"] if messages else ""
    if prompt.endswith(written) and written.strip() and prompt == render(tokenizer, messages, False):
        return None
    return thought_utils.find_begun(prompt)


def write_answer(tokenizer, prompt, begun, messages, content, end_token):
    """What the template writes of an answer behind its prompt, with whatever follows it; None if it writes no answer.

    Its thought is written as the template writes thoughts. One that the prompt has begun and left open is closed in any
    case; where the prompt has closed it, only a thought in the answer's content is kept: (thought, text), as
    split_inline returns it.
    """
    *earlier, message = messages
    inline, text = content
    parts, names = parts_of(message, text), parts_of(message, "")
    base = prompt.removesuffix(begun.text) if begun else prompt
    opened = begun if begun and not begun.closed else None
    reasoning = "" if begun and begun.closed else message.get("reasoning_content", "")
    thought = (inline or reasoning).strip()
    plain = {key: value for key, value in message.items() if key != "reasoning_content"}
    plain["content"] = text.strip() if inline else text

    def write(form, parts):
        rendered = render(tokenizer, [*earlier, form], False)
        turn = find_turn(base, rendered, parts, earlier, is_text=parts[:1] != names[:1])
        return turn if turn is None or rendered.startswith(base) else drop_header(tokenizer, base, turn)

    def try_form(form):
        with suppress_refusals():
            return write(form, [shown, *parts])
        return None

    turn = write(plain, parts)
    if turn is None or not (thought or begun):
        return turn
    empty = thought_utils.split_block(turn)  # an empty thought, or its end alone, that the template writes by itself
    if not thought and (empty or not opened):
        return thought_utils.write_block("", empty, begun) if empty else turn
    # as the template writes thoughts
    shown = thought or thought_utils.STAND_IN
    for form in thoughtful_forms(tokenizer, plain, shown):
        written = try_form(form)
        block = thought_utils.split_block(written or "", shown)
        if block and not thought_utils.split_block(block.rest):
            return thought_utils.write_block(thought, block, opened)
        is_found = not begun and find_answer_end(written, [thought, *parts], end_token)
        if is_found and not any(mark in written.partition(thought)[0] for mark in thought_utils.MARKS):
            return written  # gpt-oss writes a thought as a message of its own
    # it writes none: between the marks of an empty thought, or between those that it knows
    block = empty if empty and (opened or empty.opening.strip()) else None
    if not block:
        rest = empty.rest if empty else turn.removeprefix(opened.text) if opened else turn
        block = thought_utils.own_block(str(tokenizer.chat_template), rest, begun and begun.mark)
    if block and not prompt.endswith(thought_utils.NO_PLACE):
        return thought_utils.write_block(thought, block, opened)
    if not inline:
        return turn
    # it knows none: the answer's text as it is
    parts = parts_of(message, message["content"])
    written = write(message, parts)
    return written if find_answer_end(written, parts) else None


def thoughtful_forms(tokenizer, message, thought):
    """The ways to hand an answer with a thought to a template, which has a place for one of them or for none."""
    yield message | {"reasoning_content": thought}
    template = str(tokenizer.chat_template)
    if "reasoning" in template.replace("reasoning_content", ""):
        yield message | {"reasoning": thought}
    if "<think>" in template or "</think>" in template:
        yield message | {"content": thought_utils.FORMS[0].format(thought) + message["content"]}


def parts_of(message, text):
    """The parts of an answer that are looked for in what a template writes: its text and the names in its calls."""
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return [part for part in (text.strip(), *names) if part]


def uses_reasoning(tokenizer):
    """Whether an answer's reasoning_content is trained: some templates have no place for it."""
    question, answer = PROBE
    thoughtful = answer | {"reasoning_content": "I see a fox."}
    for asked in (question, question | {"tools": PROBE_TOOLS}):  # some templates cannot do without tools
        with suppress(UserError):
            texts = mark_answers(tokenizer, [asked, thoughtful], find_end_token(tokenizer))
            return thoughtful["reasoning_content"] in texts[0].text
    return True  # the rows will tell


def find_turn(base, rendered, parts, earlier, is_text=True):
    """What a template writes behind `base`, the start of a prompt: taken from the conversation with its answer.

    Where the template writes the earlier turns otherwise than in the prompt, it begins behind the base's last words, if
    they stand before the first of the answer's parts and no other turn does; else, where all earlier turns are written
    alike, where the two part; else with the first of the parts, if that is a text. None where a part is missing.
    """
    if rendered.startswith(base):
        return rendered[len(base) :]
    place = next((place for order in orders(parts) if (place := find_back(rendered, order)) is not None), None)
    if place is None:
        return None
    said = [words for message in earlier if (words := message["content"].strip())]
    starts = range(max(place - 200, 0), place + 1)
    start = max(starts, key=lambda start: (shared_end(rendered[:start], base), start))
    shared = rendered[start - shared_end(rendered[:start], base) : start]
    if re.search(r"\w", shared) and not any(words in rendered[start:place] for words in said):
        return rendered[start:]
    start = whole_marks(rendered, count_shared(rendered, base))
    if start <= place and not any(words in base[start:] + rendered[start:place] for words in said):
        return rendered[start:]
    return rendered[place:] if is_text else None


def drop_header(tokenizer, base, turn):
    """A turn without the mark of its speaker, where the prompt ends with it already, with other blanks about it."""
    marks = list(control_tokens(tokenizer).pattern.finditer(base))
    header = base[marks[-1].start() :].strip() if marks else ""
    return turn.lstrip().removeprefix(header) if header and turn.lstrip().startswith(header) else turn


def whole_marks(text, place):
    """A place in a text, or the start of the mark or word that it lies within: <judge> and <think> share no <."""
    mark = re.search(r"[<\[][^<>\[\]\s]*\Z", text[:place])
    begun = mark or (re.match(r"\w", text[place:]) and re.search(r"\w+\Z", text[:place]))
    return begun.start() if begun else place


def count_shared(one, other):
    """How many characters two texts have in common at their starts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def shared_end(one, other):
    """How many of their last 500 characters two texts have in common."""
    return count_shared(one[:-501:-1], other[:-501:-1])


def orders(parts):
    """An answer's parts, and with the first one, the text, behind the calls, as some templates write it."""
    return (parts, [*parts[1:], *parts[:1]]) if len(parts) > 1 else (parts,)


def find_back(rendered, parts):
    """Where the last of these parts in this order begin in a text, or None."""
    place = len(rendered)
    for part in reversed(parts):
        place = rendered.rfind(part, 0, place)
        if place < 0:
            return None
    return place


def find_answer_end(turn, parts, end_token=None):
    """Where an answer's parts end in a turn; None where one is missing or an end token stands before."""
    if turn is None:
        return None
    for order in orders(parts):
        end = 0
        for part in order:
            start = turn.find(part, end)
            if start < 0:
                break
            end = start + len(part)
        else:
            return None if end_token and turn.find(end_token) not in (-1, turn.find(end_token, end)) else end
    return None


def end_answer(tokenizer, turn, end, end_token, message):
    """The turn up to its end token, which is written where the template writes none before another turn begins.

    A call may end with a token of its own.
    """
    control = control_tokens(tokenizer)
    turn = turn.partition(end_token)[0] + end_token if end_token in turn else turn
    following = turn.find(control.turn_start, end) if control.turn_start else -1
    if following >= 0:  # some templates end every conversation with a turn of their own
        turn = turn[:following]
    if turn.endswith(end_token):
        return turn
    turn = turn.rstrip()
    if "tool_calls" in message and any(found.end() == len(turn) for found in control.pattern.finditer(turn, end)):
        return turn
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


def explain_missing(tokenizer, messages, turn, parts):
    """The message of an answer, the last message, that a template does not write or not behind its prompt."""
    *earlier, message = messages
    number = len(messages)
    if find_answer_end(turn, parts) is not None:
        return (
            f"the model's chat template ends message {number} before all of it is written, as several turns; write its"
            " text and its tool call as messages of their own, or choose another base model"
        )
    if "tool_calls" not in message:
        return (
            f"the model's chat template changes message {number} or leaves it out, so the answer cannot be located; try"
            " rows with plain text answers, or choose another base model"
        )
    written = render(tokenizer, messages, False)
    if written == render(tokenizer, [*earlier, {key: message[key] for key in message if key != "tool_calls"}], False):
        return (
            f"the model's chat template has no place for the tool call in message {number}; choose a base model whose"
            " template knows calls, or write the call as text in content"
        )
    return (
        f"the model's chat template does not write all of message {number}, which has a tool call, behind its prompt;"
        " give its text and each of its calls as messages of their own, or choose another base model"
    )
