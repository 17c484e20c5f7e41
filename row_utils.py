"""One row as a conversation: which columns hold what, and what each key of a row or a message means.

A conversation is a list of messages, {"role": "user", "content": "..."}. Every format that is read becomes one. Beside
these two keys a message may hold tool_calls, reasoning_content, name and tool_call_id, as transformers documents them
for chat templates, and "weight": 0 for an answer that is context only. The definitions of a conversation's tools stand
in its first message, under "tools".

A whole text, of which every token is trained, is a conversation of one message, {"role": "text", "content": "..."}.

`where` names a row, and `report` is the DataReport that counts what was found.
"""

import json
import re
import shlex
import sys
from functools import lru_cache
from pathlib import Path

from call_utils import forms_taken
from message_utils import UserError
from reader_utils import shown, without_nulls

COLUMN_NAMES = {
    "instruction": ("instruction", "prompt", "question"),
    "response": ("response", "output", "answer", "completion"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text",),
}
# Names of columns beside a text that say what it is, so that the text is all that there is to learn
ABOUT_TEXTS = {
    *("id", "_id", "idx", "index", "url", "source", "src", "timestamp", "date", "created", "meta", "metadata"),
    *("language", "lang", "license", "author", "title"),
}
# Parts of the names of columns, for a guess at what others hold
HINTS = {
    "instruction": ("instruct", "prompt", "quest", "query", "frage", "user", "human", "input", "problem", "source"),
    "response": ("respon", "answer", "antwort", "output", "complet", "repl", "assist", "target", "solution", "summary"),
}
NO_ANSWERS = ("rejected", "score", "rating")  # columns that hold no answer to be learned
OF_MESSAGES = ("conv", "dialog", "chat", "messages", "turns")
OPTIONAL = ("input", "system")
MAPPING_SCRIPTS = ("train.py", "evaluate.py", "inference.py")  # those that take --dataset_columns
INSTANCES = "instances"  # a column of {"input", "output"} objects that share one instruction, as in self-instruct
# ShareGPT and OpenAI names of the speakers -> roles of a chat template
ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "environment": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}

# What a row may hold beside its texts, and what it means
CALLS = "function_call"  # the key of a call in OpenAI's first format
ARGUMENTS = ("arguments", "parameters", "args", "input")  # of a call, by the names of several providers
CALLERS = (CALLS, "tool_call")  # the speakers of a call in ShareGPT
NULLABLE = ("default", "const")  # the keys of a JSON schema under which null says something
SCHEMAS = {"parameters", "input_schema"}  # of a tool, perhaps as JSON
TOOL_COLUMNS = ("tools", "functions")  # the definitions of the tools that a conversation may call
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
LABELS = ("label", "kto_tag")  # whether the answer is a good one, as KTO has it
GOOD, BAD = ("true", "desirable", "chosen", "good"), ("false", "undesirable", "rejected", "bad")
YES, NO = ("true", "yes", "on"), ("false", "no", "off")
WHOLE_ROW = ("weight", "loss_weight", "sample_weight", "train", "training", "trainable")  # 0: the row is not learned
WEIGHTS = (*WHOLE_ROW, "loss", "loss_scale", "loss_mask", "train_on_turn")  # 0 or false: an answer that is not learned
PARTLY = ("train_detail", "training_detail")  # which characters of an answer are learned, as axolotl has it
MASKS = ("mask", "masked", "ignore", "skip")  # such keys say so too, or the opposite: 1 is trained in a mask of losses
HISTORY = ("history",)  # the questions and answers before an instruction, as LLaMA-Factory has them: [["q", "a"], ...]
REASONING = ("reasoning_content", "reasoning", "thinking")  # as transformers has it
# OpenAI's keys and ShareGPT's; the first are read where both are there
TWINS = (("role", "from"), ("content", "value"))
TURN_TEXTS = {"content", "value", "tool_calls"}
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_CHANNELS = ("analysis",)  # of gpt-oss
THOUGHT_PARTS = ("thinking", "reasoning")  # of an answer
PREFERENCE = ("chosen", "rejected")  # two answers to one prompt, as DPO has it
# columns that hold the worse of two answers
WORSE = ("rejected", *(f"rejected_{what}" for what in ("response", "answer", "output", "completion", "messages")))
WORSE += ("non_preferred_output",)
# a text that says who speaks: two questions and answers of a conversation, or one, in the marks of a template
SPOKEN = re.compile(
    r"(?:(?:^|\s|#)(?:Human|User|Instruction): ?|<\|im_start\|>user|\[INST\]|<\|user\|>|<start_of_turn>user).*"
    r"(?:(?:^|\s|#)(?:Assistant|Response|AI|Bot):|<\|im_start\|>assistant|\[/INST\]|<\|assistant\|>|<start_of_turn>model)",
    re.DOTALL | re.IGNORECASE,
)
MARKS_OF_PAIRS = (("input", "output"), ("human", "assistant"), ("user", "assistant"), ("question", "answer"))
TURN_KEYS = {
    *("role", "from", "content", "value", "tools", "tool_calls", CALLS, "tool_call_id"),
    *(*WEIGHTS, *MASKS, *PARTLY, *LABELS, *REASONING, *MEDIA, "channel"),
}


# ---- Columns ---------------------------------------------------------------------------------------------------------
def find_columns(found, mapping, name, chosen_only=False, or_usual_names=False, answered=True):
    """Return {"messages": column} or {"instruction": column, "response": column}, perhaps with input and system.

    Of whole texts {"text": column}; of preferences {"chosen": column}, where the user asked for the chosen answers.
    With answered=False the response may be missing, and a whole text is none.

    `mapping` is DATASET_COLUMNS; without it the usual names are looked for, in any case ("Question" is question). With
    `or_usual_names` they are looked for too where no column of the mapping is there.
    """
    if mapping and not (or_usual_names and not set(map(str, mapping.values())) & set(found)):
        check_mapping(found, mapping, name, answered)
        return dict(mapping)
    columns = match_columns(found, COLUMN_NAMES)
    chosen, rejected = (first_named(tuple(found), (name,)) for name in PREFERENCE)
    if chosen and rejected:
        if not chosen_only:
            raise UserError(
                f"dataset {name}: columns chosen and rejected, so these are preferences; add --chosen_only true to"
                " train on the chosen answers, or give a file of instructions and responses"
            )
        return {"chosen": chosen} | {part: column for part, column in columns.items() if part == "system"}
    if (worse := first_named(tuple(found), WORSE)) and not chosen_only:
        raise UserError(
            f"dataset {name}: a column {worse}, so these are preferences; add --chosen_only true to train on the better"
            " answers, or remove it"
        )
    if "messages" in columns:
        return {part: column for part, column in columns.items() if part in ("messages", "system")}
    text = columns.pop("text", None)
    needed = {"response"} if answered else set()
    if "instruction" not in columns and {"input", *needed} <= set(columns):
        columns = {"instruction": columns.pop("input"), **columns}
    if {"instruction", *needed} <= set(columns):
        return columns
    if answered and text is not None and all(column.strip().lower() in {"text", *ABOUT_TEXTS} for column in found):
        return {"text": text}
    if first_named(tuple(found), ("role", "from")) and (
        said := first_named(tuple(found), ("content", "value", "text"))
    ):
        raise UserError(
            f"dataset {name}: a message a row, in the column {said}, expected a conversation a row; join the messages"
            ' of each: {"messages": [{"role": "user", "content": "..."}, ...]}'
        )
    expected = "instruction (or prompt, question, input)"
    whole = ""
    if answered:
        expected = "instruction and response (or prompt, question and output, answer, completion)"
        whole = f"; --dataset_columns '{json.dumps({'text': text})}' trains on whole texts" if text is not None else ""
    raise UserError(
        f"dataset {name}: columns found: {', '.join(found) or 'none'}; expected {expected}, messages, or conversations;"
        f" {advise_mapping(found, answered)}{whole}"
    )


def advise_mapping(found, answered=True):
    """The command that names the columns, with a guess at which are meant, to be pasted into a shell.

    With answered=False only the question's is guessed.
    """
    left = [column for column in found if column.lower() not in ABOUT_TEXTS and not column.lower().endswith("_id")]
    left = [column for column in left if column.lower() not in NO_ANSWERS]
    guess = {}
    for part, hints in HINTS.items():
        alike = [column for column in left if any(hint in column.lower() for hint in hints)]
        guess[part] = next(iter(alike), None)
        left = [column for column in left if column != guess[part]]
    if not answered:
        del guess["response"]
    for part in guess:
        if guess[part] is None and left:
            guess[part] = left.pop(0)
    if None in guess.values():
        guess = {"messages": next((c for c in found if any(name in c.lower() for name in OF_MESSAGES)), None)}
    if None in guess.values():
        return "give a file with both" if answered else "give a file with one of them"
    script, *arguments = sys.argv
    if "--dataset_columns" in arguments:
        place = arguments.index("--dataset_columns")
        del arguments[place : place + 2]
    command = ["python", script, *arguments] if Path(script).name in MAPPING_SCRIPTS else []
    pasted = shlex.join([*command, "--dataset_columns", json.dumps(guess, ensure_ascii=False)])
    return f"name yours, if {'these are' if len(guess) > 1 else 'this is'} meant: {pasted}"


def optional_parts(columns):
    """The parts of a conversation that a row of this shape may have, or may lack."""
    return () if "text" in columns else ("system",) if {"messages", "chosen"} & set(columns) else OPTIONAL


def match_columns(found, parts):
    """{part: the first column found under one of the part's usual names}."""
    by_lower = {column.strip().lower(): column for column in found}
    present = {part: [by_lower[name] for name in COLUMN_NAMES[part] if name in by_lower] for part in parts}
    return {part: columns[0] for part, columns in present.items() if columns}


@lru_cache(maxsize=64)
def find_named(found, names, taken=()):
    """Those of the found columns that have one of these names, in any case, in the names' order; all are tuples.

    `taken` are columns that hold a part of the conversation, whatever their name.
    """
    by_name = {column.strip().lower(): column for column in found if column not in taken}
    return [by_name[name] for name in names if name in by_name]


def first_named(found, names):
    return next(iter(find_named(found, names)), None)


def check_mapping(found, mapping, name, answered=True):
    """Raise UserError unless DATASET_COLUMNS names known parts of a row and columns that exist."""
    alone = ({"messages", "text"} if answered else {"messages"}) & set(mapping)
    required = alone or {"instruction", "response"}
    allowed = required | set(optional_parts(mapping))
    required -= set() if answered else {"response"}
    problem, advice = None, ""
    if not required <= set(mapping) <= allowed:
        problem = "expected the keys instruction and response, perhaps input and system; or messages; or text"
        problem = problem if answered else "expected the key instruction, perhaps input and system; or messages"
    elif missing := [str(mapping[part]) for part in sorted(required) if mapping[part] not in found]:
        problem, advice = f"missing {', '.join(missing)}", f"; {advise_mapping(found, answered)}"
    elif any(not isinstance(column, str) for column in mapping.values()):
        problem = "expected the names of columns"
    if problem:
        columns = f"columns found: {', '.join(found)}"
        raise UserError(f"dataset {name}: --dataset_columns {mapping}: {problem}; {columns}{advice}")


def require_text(value, what):
    """Return value if it is a text that can be written as UTF-8, else raise UserError."""
    if not isinstance(value, str):
        remedy = "give a text or remove the row" if value is None else "put it in quotes or remove the row"
        raise UserError(f"{what}: {shown(value)} is no text; {remedy}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{what}: half of a surrogate pair or a byte that is not UTF-8; remove that character"
        ) from None
    return value


def message_text(row, columns, part, where):
    column = columns.get(part)
    if column is None or (part in OPTIONAL and is_missing(row.get(column))):
        return ""
    return require_text(find_cell(row, column, where), f"{where}, column {column!r}")


def is_missing(value):
    """Whether a value stands for none: null, or the NaN that tables have in place of it."""
    return value is None or value != value


def find_cell(row, column, where):
    if column not in row:
        raise UserError(f"{where}: column {column!r} is missing; columns found: {', '.join(row)}")
    return row[column]


# ---- A row -----------------------------------------------------------------------------------------------------------
def to_conversation(row, columns, where, report):
    """The messages of a row: its system text if it is not blank, then its turns or its instruction and response."""
    if "text" in columns:
        text = message_text(row, columns, "text", where)
        report.spoken_texts += bool(SPOKEN.search(text[:5000]))
        return [{"role": "text", "content": text}]
    system = message_text(row, columns, "system", where)
    conversation = [{"role": "system", "content": system}] if system.strip() else []
    if "chosen" in columns:
        conversation += read_chosen(row, columns, where, report)
    elif "messages" in columns or any(find_turns(row.get(columns.get(part))) for part in ("instruction", "response")):
        if "messages" in columns:
            turns = read_turns(find_cell(row, columns["messages"], where), columns["messages"], where, report)
        else:
            turns = read_prompt(row, columns, where, report)
            turns += read_answer(row, columns["response"], where, report) if "response" in columns else []
        if conversation and turns and turns[0]["role"] == "system":
            if turns[0]["content"] != system:
                raise UserError(f"{where}: a system text in column {columns['system']!r} and another in the messages")
            conversation = []
        conversation += turns
    else:
        response = message_text(row, columns, "response", where)
        reasoning = read_reasoning(row, columns, report)
        thought = {"reasoning_content": reasoning} if reasoning else {}
        report.thoughts += bool(thought) or "</think>" in response
        report.reasoning += bool(thought)
        conversation += [
            *read_history(row, columns, where, report),
            read_question(row, columns, where),
            {"role": "assistant", "content": response} | thought,
        ]
    return with_tools(conversation, read_tools(row, columns, where, report))


def read_question(row, columns, where):
    """The user's message of an instruction and the input that may belong to it."""
    instruction, extra = (message_text(row, columns, part, where) for part in ("instruction", "input"))
    return {"role": "user", "content": "\n\n".join(text for text in (instruction, extra) if text.strip())}


def find_turns(value):
    """The messages that a cell holds, as a list, as one of them or as JSON; None where it holds none."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return value
    if isinstance(value, str):
        value = parse_text(value) if value.lstrip()[:1] in ("[", "{") else None
    turns = value if isinstance(value, list) else [value]
    known = (isinstance(turn, dict) and find_role(turn) and TURN_TEXTS & turn.keys() for turn in turns)
    return turns if turns and all(known) else None


def read_prompt(row, columns, where, report):
    """The messages of a prompt: a list of them, as TRL has it, or an instruction and perhaps an input."""
    turns = find_turns(row.get(columns["instruction"]))
    return read_turns(turns, columns["instruction"], where, report) if turns else [read_question(row, columns, where)]


def read_answer(row, column, where, report):
    """The messages of an answer, a text or a list too."""
    answer = row.get(column)
    turns = find_turns(answer) or ([{"role": "assistant", "content": answer}] if isinstance(answer, str) else None)
    if not turns:
        raise UserError(f"{where}, column {column!r}: {shown(answer)}, expected a text or a list of messages")
    return read_turns(turns, column, where, report)


def read_reasoning(row, columns, report):
    """The thought before the answer out of a column of its own, or None."""
    for column in find_named(tuple(row), REASONING, tuple(columns.values())):
        value = row[column]
        if isinstance(value, str) and value.strip() and read_flag(value) is None:  # "on" is no thought
            report.note_read(column)
            return value
        if value not in (None, ""):
            report.note_odd(column, value)
    return None


def read_history(row, columns, where, report):
    """The messages of the questions and answers that came before an instruction; [] where no list of them is there."""
    messages = []
    for column in find_named(tuple(row), HISTORY, tuple(columns.values())):
        turns = parse_text(row[column])
        if not isinstance(turns, list):
            if row[column] not in (None, ""):
                report.note_odd(column, row[column])
            continue
        report.note_read(column)
        if find_turns(turns):
            messages = read_turns(turns, column, where, report)
            continue
        if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise UserError(f'{where}, column {column!r}: expected a list of pairs, [["question", "answer"], ...]')
        messages = [
            {"role": role, "content": require_text(text, f"{where}, column {column!r}")}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    return messages


def read_chosen(row, columns, where, report):
    """The messages of a row of preferences: its prompt, and the answer that was chosen."""
    answer = read_answer(row, columns["chosen"], where, report)
    prompt = match_columns(row, ("instruction", "input", "messages"))
    if not any(message["role"] == "user" for message in answer):
        for column in prompt.values():
            report.note_read(column)
        if column := prompt.get("messages"):
            return read_turns(row[column], column, where, report) + answer
        if "instruction" not in prompt:
            raise UserError(
                f"{where}: an answer in column {columns['chosen']!r}, but no prompt; expected a column prompt or"
                " messages, or that answer as a list of messages"
            )
        return read_prompt(row, prompt, where, report) + answer
    return answer


# ---- Messages --------------------------------------------------------------------------------------------------------
def read_turns(turns, column, where, report):
    """OpenAI {"role", "content"} or ShareGPT {"from", "value"} turns to messages; blank system turns are left out."""
    turns = parse_text(turns)  # a CSV file holds them as JSON
    if isinstance(turns, dict):
        turns = as_turns(turns)
    if not isinstance(turns, list):
        found = "a text that is no JSON" if isinstance(turns, str) else f"{shown(turns)}"
        remedy = "; if it is Python's form of one, write it by json.dumps" if str(turns).startswith("[{") else ""
        raise UserError(f"{where}, column {column!r}: {found}, expected a list of messages{remedy}")
    if [turn.get("role") for turn in turns if isinstance(turn, dict)] == ["text"]:  # as the held-out rows are kept
        return [{"role": "text", "content": require_text(turns[0].get("content"), where)}]
    messages, tools, calls = [], None, 0
    for index, turn in enumerate(split_pairs(map(parse_text, turns)), start=1):
        spoken = f"{where}, message {index}"
        if not isinstance(turn, dict):
            raise UserError(f'{spoken}: {shown(turn)}, expected an object: {{"role": "assistant", "content": "..."}}')
        turn = {key: value for key, value in turn.items() if value is not None}
        message = read_message(turn, spoken)
        tools = tools or parse_tools(turn.get("tools"), spoken)
        other = {new for old, new in TWINS if old in turn}
        unused = [key for key in turn if key not in TURN_KEYS or key in other]
        if message["role"] == "tool" and "name" in unused:
            message["name"] = require_text(turn["name"], spoken)
            unused.remove("name")
        report.unused_keys += [key for key in unused if key not in report.unused_keys]
        report.context_only += "weight" in message
        for call in message.get("tool_calls", ()):
            calls += 1
            report.note_call(forms_taken(call, calls - 1))
        if message["role"] != "assistant":
            report.marked_others += any(read_flag(turn[key]) for key in turn if key in WEIGHTS)
        report.reasoning += "reasoning_content" in message
        report.thoughts += "reasoning_content" in message or "</think>" in message["content"]
        if message["role"] != "system" or message["content"].strip():
            messages.append(message)
    return with_tools(messages, tools)


def as_turns(columns):
    """The turns of {"from": ["human", "gpt"], "value": ["...", "..."]}, as older versions of datasets keep them."""
    lists = list(columns.values())
    if not lists or not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        return columns
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def split_pairs(turns):
    """The turns, those that hold a question and its answer (Capybara's "input" and "output") as two."""
    for turn in turns:
        keys = {key for key in turn if turn[key] is not None} if isinstance(turn, dict) else set()
        if pair := next((pair for pair in MARKS_OF_PAIRS if keys == set(pair)), None):
            yield from (
                {"role": role, "content": turn[key]} for role, key in zip(("user", "assistant"), pair, strict=True)
            )
        else:
            yield turn


def read_message(turn, where):
    """One turn as a message, with the keys that have a meaning here in a fixed order."""
    speaker, role = turn.get("role", turn.get("from")), find_role(turn)
    if speaker is None:
        raise UserError(
            f"{where}: no role such as user or assistant; keys found: {', '.join(turn) or 'none'}, expected role and"
            " content"
        )
    if role is None:
        raise UserError(f"{where}: speaker {speaker!r}, expected one of {', '.join(ROLES)}")
    check_media(turn, where)
    calls = read_calls(turn, where)
    content, thought = split_thought(turn.get("content", turn.get("value")), where, role)
    if speaker in CALLERS and not calls and isinstance(content, str):
        calls = parse_calls(content, where)
        content = None if calls else content
    text = "" if content is None and (calls or role == "system") else join_parts(content, where, role)
    message = {"role": role, "content": text}
    if calls and role != "assistant":
        raise UserError(f"{where}: a call of a tool by the {role}, expected calls in messages of the assistant alone")
    if calls:
        message["tool_calls"] = calls
    if thought:
        message["reasoning_content"] = thought
    for key in ("tool_call_id", *REASONING):
        if turn.get(key) not in (None, ""):
            message.setdefault(
                "reasoning_content" if key in REASONING else key, require_text(turn[key], f"{where}, {key}")
            )
    if not is_learned(turn, role, where):
        message["weight"] = 0
    return message


def is_learned(turn, role, where):
    """Whether a turn is not an answer that says of itself that it is context only; UserError where that is unclear."""
    flags = []
    if partly := next((key for key in PARTLY if turn.get(key)), None):
        raise UserError(
            f"{where}: {partly}, so parts of this answer are not to be learned, which is not known here; give them as"
            " messages of their own, of weight 0 or 1"
        )
    if turn.get("channel") in THOUGHT_CHANNELS:
        raise UserError(
            f"{where}: a message of channel {turn['channel']}, which is a thought; give it as reasoning_content of the"
            " answer that follows"
        )
    for key in turn:
        if key in WEIGHTS and turn[key] is not None:
            flags.append(read_flag(turn[key]))
            if flags[-1] is None:
                raise UserError(f"{where}: {key} {shown(turn[key])}, expected 0 (read, not trained) or 1")
        unclear = key in MASKS or (key in LABELS and not read_label(turn[key]))
        if role == "assistant" and unclear and turn[key] is not None:
            raise UserError(
                f"{where}: {key} {shown(turn[key])}, so it may be that this answer is not to be learned; give weight 0"
                f" (read, not trained) or 1 in place of {key}"
            )
    return role != "assistant" or False not in flags


def read_flag(value):
    """Whether a value says yes or no, as a number or as a text; None for any other."""
    word = value.strip().lower() if isinstance(value, str) else None
    if word in YES + NO:
        return word in YES
    number = read_number(value)
    return bool(number) if number in (0, 1) else None


def read_number(value):
    """The number that a value is or that a text spells, else None."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def read_label(value):
    """Whether a value says that an answer is a good or a bad one; None for any other."""
    word = value.strip().lower() if isinstance(value, str) else None
    if word in GOOD + BAD:
        return word in GOOD
    number = read_number(value)
    return number == 1 if number in (-1, 0, 1) else None


def split_thought(content, where, role):
    """(content, thought) of a message, whose parts may be thoughts where it is an answer."""
    if role != "assistant" or not isinstance(content, list):
        return content, ""
    thoughts = [part for part in content if isinstance(part, dict) and part.get("type") in THOUGHT_PARTS]
    texts = [next((part[key] for key in (*THOUGHT_PARTS, "text") if part.get(key)), None) for part in thoughts]
    rest = [part for part in content if part not in thoughts] if thoughts else content
    return rest, "\n".join(join_parts(text, where, role) for text in texts)


def find_role(turn):
    """The role of a turn's speaker, or None where that is not known."""
    speaker = turn.get("role") or turn.get("from")
    return ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None


def join_parts(content, where, role):
    """The text of a message: a text, or OpenAI's list of parts, whose texts are joined by line breaks.

    What a tool has returned may be any JSON, which then is the text.
    """
    if isinstance(content, str) or content is None:
        return require_text(content, where)
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in as_list(content)]
    typed = all(isinstance(part, dict) and "type" in part for part in parts)
    if not typed:
        return json.dumps(content, ensure_ascii=False) if role == "tool" else require_text(content, where)
    if others := sorted({str(part["type"]) for part in parts if part["type"] not in TEXT_PARTS}):
        raise UserError(f"{where}: a part of type {', '.join(others)}, expected texts only; remove those rows")
    return "\n".join(require_text(part.get("text"), where) for part in parts)


def check_media(found, where):
    """Raise UserError where pictures, films or sounds belong to a row or a message."""
    if media := [key for key in found if key.strip().lower() in MEDIA and found[key] not in (None, "", [], {})]:
        raise UserError(
            f"{where}: {media[0]} beside the text, which is not read here; remove those rows, or remove"
            f" {media[0]} where the text makes sense alone"
        )


# ---- Tools -----------------------------------------------------------------------------------------------------------
def with_tools(conversation, tools):
    """The conversation with the definitions of its tools in its first message.

    Where a call has arguments that its tool does not know, and they are null, all null ones are left out: the rows come
    from Arrow, which gives all objects of a column the same keys.
    """
    if not conversation or not tools:
        return conversation
    functions = [tool["function"] for tool in tools]
    known = {function["name"]: function.get("parameters") for function in functions}
    calls = [call["function"] for message in conversation for call in message.get("tool_calls", ())]
    if any(is_filled_up(call["arguments"], known.get(call["name"])) for call in calls):
        for call in calls:
            call["arguments"] = without_nulls(call["arguments"])
    return [conversation[0] | {"tools": tools}, *conversation[1:]]


def is_filled_up(arguments, parameters):
    """Whether some arguments of a call are null that a tool's parameters, a JSON schema, do not name."""
    parameters = parameters if isinstance(parameters, dict) else {"type": None}
    properties = parameters.get("properties", None if "type" in parameters else parameters)  # perhaps unwrapped
    return isinstance(properties, dict) and any(
        value is None and name not in properties for name, value in arguments.items()
    )


def holds_null(schema):
    """Whether a JSON schema has null where it says nothing, so that something else has filled it up."""
    if isinstance(schema, dict):
        return any((item is None and key not in NULLABLE) or holds_null(item) for key, item in schema.items())
    return isinstance(schema, list) and any(map(holds_null, schema))


def read_tools(row, columns, where, report):
    """The definitions of a row's tools, or None; a column of this name beside an instruction may be about hammers."""
    for column in find_named(tuple(row), TOOL_COLUMNS, tuple(columns.values())):
        try:
            if tools := parse_tools(row[column], f"{where}, column {column!r}"):
                report.note_read(column)
                return tools
        except UserError:
            if "messages" in columns:
                raise
            report.note_odd(column, row[column])
    return None


def parse_tools(value, where):
    """OpenAI's list of {"type": "function", "function": {"name", ...}}, from it or from JSON, perhaps unwrapped."""
    tools = parse_text(value)
    if tools in (None, "", [], {}):
        return None
    tools = without_nulls(tools) if holds_null(tools) else tools
    functions = [
        (tool.get("function") or tool) if isinstance(tool, dict) else {} for tool in map(parse_text, as_list(tools))
    ]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise UserError(f'{where}: tools without a name, expected a list of objects such as {{"name": "search"}}')
    functions = [
        function | {key: parse_text(function[key]) for key in SCHEMAS & function.keys()} for function in functions
    ]
    check_texts(functions, where)
    return [{"type": "function", "function": function} for function in functions]


def check_texts(value, where):
    """Raise UserError where a text inside a value is none."""
    require_text(json.dumps(value, ensure_ascii=False), where)


def read_calls(turn, where):
    """The calls of a turn, from tool_calls or from function_call; [] where there are none."""
    calls = turn.get("tool_calls") or turn.get(CALLS) or []
    found = parse_calls(calls, where)
    if calls and not found:
        raise UserError(f'{where}: a call of a tool without a name, expected {{"name": "search", "arguments": {{}}}}')
    return found


def parse_calls(value, where):
    """Calls as templates take them: a list of {"type": "function", "function": {"name", "arguments": {...}}}."""
    calls = []
    for call in map(parse_text, as_list(parse_text(value))):
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return []
        given = [key for key in ARGUMENTS if function.get(key)]
        if len(given) > 1:
            raise UserError(f"{where}: {' and '.join(given)} of {function['name']}, expected arguments alone")
        arguments = parse_text(function[given[0]] if given else {})
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: the arguments of {function['name']} are no JSON object; mend or remove the row")
        check_texts(function, where)
        number = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append(number | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def parse_text(value):
    """What a text says as JSON; another value, or a text that is no JSON, is returned as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def as_list(value):
    return value if isinstance(value, list) else [value]


# ---- Which rows are trained on ---------------------------------------------------------------------------------------
def reason_to_leave_out(row, columns, where, report, chosen_only):
    """Why a row is not to be learned as it says itself, or None; UserError where that is said otherwise than by 0."""
    taken, reasons = tuple(columns.values()), []
    for column in find_named(tuple(row), LABELS, taken):
        good = read_label(row[column])
        if good is False and not chosen_only:
            raise UserError(
                f"{where}: {column} is {shown(row[column])}, so its answer would be trained as a good one; add"
                f" --chosen_only true to leave such rows out, or remove the column {column}"
            )
        reasons += note_flag(column, row[column], good, report)
    for column in find_named(tuple(row), WHOLE_ROW, taken):
        if row[column] in (None, ""):  # as if it were not there
            continue
        if (read_number(row[column]) or 0) < 0:
            raise UserError(
                f"{where}: {column} is {shown(row[column])}, expected 0 (the row is not learned) or 1; no answer is"
                f" unlearned here: write 0, or rename the column {column} if it is about something else"
            )
        reasons += note_flag(column, row[column], read_flag(row[column]), report)
    return next(iter(reasons), None)


def note_flag(column, value, flag, report):
    """Count whether a column says something that is known of its row; returns [the reason to leave it out], or []."""
    if flag is None:
        report.note_odd(column, value)
    else:
        report.note_read(column)
    return [f"{column} is {shown(value)}"] if flag is False else []


def reason_to_drop(conversation):
    """Why a conversation cannot be trained on, or None."""
    roles = [message["role"] for message in conversation]
    if roles == ["text"]:
        return None if conversation[0]["content"].strip() else "an empty text"
    if "assistant" not in roles:
        return "no answer"
    if roles[0] == "assistant":
        return "the answer comes first"
    if any(is_empty(message) for message in conversation):
        return "an empty text"
    if not any(is_trained(message) for message in conversation):
        return "every answer has weight 0"
    return None


def is_empty(message):
    return not message["content"].strip() and "tool_calls" not in message and message["role"] != "tool"


def is_trained(message):
    """Whether a message is an answer to be learned, or a whole text."""
    return message["role"] in ("assistant", "text") and message.get("weight") != 0


def expand_instances(row, where):
    """The row itself, or one row for each of its `instances` where it has no answer of its own."""
    instances = row.get(INSTANCES)
    if not isinstance(instances, list) or match_columns(row, ("response", "messages")):
        return [row]
    if not instances or not all(isinstance(instance, dict) for instance in instances):
        raise UserError(
            f"{where}, column {INSTANCES!r}: {shown(instances)}, expected a list of objects with input and output; mend"
            " or remove the row"
        )
    shared = {column: value for column, value in row.items() if column != INSTANCES}
    return [shared | instance for instance in instances]
