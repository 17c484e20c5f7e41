"""From a user's file to conversations: strict readers, the row formats, de-duplication and split.

A conversation is a list of messages, {"role": "user", "content": "..."}. Every format that is read becomes one.
"""

import csv
import io
import json
import random
from collections import Counter
from dataclasses import dataclass, field

from run_utils import UserError, display_path, resolve_path, say

COLUMN_NAMES = {
    "instruction": ("instruction", "prompt", "question"),
    "response": ("response", "output", "answer", "completion"),
    "input": ("input", "context"),
}
# ShareGPT and OpenAI names of the speakers -> roles of a chat template
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass
class DataReport:
    """What became of every row, at reading (kept or dropped) or at tokenizing (shortened or cut as well)."""

    source: str
    rows: int
    kept: int = 0
    shortened: int = 0
    answer_cut: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    first_rows: dict = field(default_factory=dict)  # reason -> number of the first such row

    def drop(self, reason, number):
        self.dropped[reason] += 1
        self.first_rows.setdefault(reason, number)

    def line(self, kept="kept"):
        """One dense line: 'data/demo.json: 200 rows, 199 kept, 1 dropped: duplicate (first: row 7)'."""
        parts = [f"{self.rows} rows", f"{self.kept} {kept}"]
        parts += [f"{self.shortened} with the prompt shortened"] * (self.shortened > 0)
        parts += [f"{self.answer_cut} with the answer cut"] * (self.answer_cut > 0)
        parts += [f"{n} dropped: {why} (first: row {self.first_rows[why]})" for why, n in self.dropped.items()]
        return f"{self.source}: {', '.join(parts)}"


# ---- Reading: nothing here changes a text ----------------------------------------------------------------------------
def read_text(path):
    """Return the file's text; a UTF-8 byte order mark is dropped, any other encoding is a UserError."""
    name = display_path(path)
    if not path.exists():
        raise UserError(f"dataset {name} does not exist; give an existing .json, .jsonl or .csv file")
    if path.is_dir():
        raise UserError(f"dataset {name} is a folder, expected one .json, .jsonl or .csv file")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"dataset {name}, line {line}: not UTF-8 text; save the file as UTF-8 and try again") from None
    if not text.strip():
        raise UserError(f"dataset {name} is empty, expected rows with an instruction and a response")
    return text


def parse_json(text, where):
    """json.loads whose failure names the line; NaN and Infinity, which are no JSON, are refused."""

    def reject(constant):
        line = text[: text.find(constant)].count("\n") + 1
        raise UserError(f"{where(line)}: {constant} is not valid JSON; write null or a quoted text")

    try:
        return json.loads(text, parse_constant=reject)
    except json.JSONDecodeError as error:
        problem, remedy = f"invalid JSON ({error.msg}, column {error.colno})", "mend it there"
        if error.msg == "Extra data":
            remedy = "if each line is a row of its own, name the file .jsonl"
        elif text.strip() in ("[", "[{"):
            remedy = "if the file is one list of rows, name it .json"
        raise UserError(f"{where(error.lineno)}: {problem}; {remedy}") from None
    except (RecursionError, ValueError):  # thousands of brackets, or of digits in one number
        raise UserError(f"{where(1)}: JSON nested too deeply or a number too long, expected rows of text") from None


def read_json_rows(text, name):
    rows = parse_json(text, lambda line: f"dataset {name}, line {line}")
    if isinstance(rows, dict):
        lists = [key for key, value in rows.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise UserError(f"dataset {name}: a JSON object, expected a list of rows: [{{...}}, {{...}}]")
        rows = rows[lists[0]]
    if not isinstance(rows, list):
        raise UserError(f"dataset {name}: JSON {type(rows).__name__}, expected a list of rows: [{{...}}, {{...}}]")
    return list(enumerate(rows, start=1))


def read_jsonl_rows(text, name):
    """Rows of a JSON Lines file, numbered by their lines; blank lines are allowed."""
    rows = []
    # split("\n") and not splitlines(): U+2028 and its like may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append((number, parse_json(line, lambda _, number=number: f"dataset {name}, line {number}")))
    return rows


def read_csv_rows(text, name):
    """Rows of a CSV file by the standard library's reader, which keeps "007", "None" and blanks as they are.

    The delimiter is the one of , ; and tab that the header line holds most often.
    """
    header_line = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, header = [], None
    csv.field_size_limit(2**31 - 1)
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                width = len(header)
                while header and not header[-1]:  # spreadsheets save empty columns behind the last one
                    header.pop()
                continue
            if len(cells) == width and not any(cells[len(header) :]):
                cells = cells[: len(header)]
            if len(cells) != len(header):
                raise UserError(
                    f"dataset {name}, line {reader.line_num}: {len(cells)} cells, expected {len(header)} as in the"
                    f" header ({', '.join(header)}); put quotes around texts that hold a {delimiter!r}"
                )
            rows.append((len(rows) + 1, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        line = reader.line_num
        raise UserError(f"dataset {name}, line {line}: invalid CSV ({error}); mend the quotes there") from None
    if len(set(header)) != len(header):
        raise UserError(f"dataset {name}: the header names a column twice ({', '.join(header)}); rename one")
    return rows


READERS = {".json": read_json_rows, ".jsonl": read_jsonl_rows, ".csv": read_csv_rows}


def read_rows(path):
    """Return [(row number, row), ...] of a .json, .jsonl or .csv file; every row is a dict, at least one is there."""
    name = display_path(path)
    if path.is_file() and path.suffix.lower() not in READERS:
        raise UserError(f"dataset {name}: unknown file type {path.suffix!r}, expected .json, .jsonl or .csv")
    text = read_text(path)
    rows = READERS[path.suffix.lower()](text, name)
    if not rows:
        raise UserError(f"dataset {name} holds no rows, expected rows with an instruction and a response")
    for number, row in rows:
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f"dataset {name}, row {number}: {kind}, expected an object with named columns")
    return rows


# ---- Rows to conversations -------------------------------------------------------------------------------------------
def find_columns(found, mapping, name):
    """Return {"messages": column} or {"instruction": column, "response": column, perhaps "input": column}.

    `mapping` is DATASET_COLUMNS; without it the usual names are looked for, in any case ("Question" is question).
    """
    if mapping:
        check_mapping(found, mapping, name)
        return dict(mapping)
    by_lower = {column.strip().lower(): column for column in found}
    for column in ("messages", "conversations"):
        if column in by_lower:
            return {"messages": by_lower[column]}
    columns = {}
    for role, names in COLUMN_NAMES.items():
        present = [by_lower[candidate] for candidate in names if candidate in by_lower]
        if present:
            columns[role] = present[0]
    if not {"instruction", "response"} <= set(columns):
        raise UserError(
            f"dataset {name}: columns found: {', '.join(found) or 'none'}; expected instruction and response (or"
            " prompt, question and output, answer, completion), messages, or conversations; map others with"
            " --dataset_columns"
        )
    return columns


def check_mapping(found, mapping, name):
    """Raise UserError unless DATASET_COLUMNS names known parts of a row and columns that exist."""
    missing = [column for column in mapping.values() if not isinstance(column, str) or column not in found]
    problem = f"missing {', '.join(map(str, missing))}" if missing else None
    if set(mapping) != {"messages"} and not {"instruction", "response"} <= set(mapping) <= set(COLUMN_NAMES):
        problem = "expected the keys instruction and response, perhaps input; or messages alone"
    if problem:
        raise UserError(f"dataset {name}: --dataset_columns {mapping}: {problem}; columns found: {', '.join(found)}")


def require_text(value, what):
    """Return value if it is a text that can be written as UTF-8, else raise UserError."""
    if not isinstance(value, str):
        remedy = "give a text or remove the row" if value is None else "put it in quotes or remove the row"
        raise UserError(f"{what}: {json.dumps(value)[:40]} is no text; {remedy}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what}: half of a surrogate pair, which is no text; remove that character") from None
    return value


def message_text(row, columns, role, where):
    column = columns.get(role)
    if column is None or (role == "input" and row.get(column) is None):
        return ""
    if column not in row:
        raise UserError(f"{where}: column {column!r} is missing; columns found: {', '.join(row)}")
    return require_text(row[column], f"{where}, column {column!r}")


def instruction_to_conversation(row, columns, where):
    instruction, extra, response = (
        message_text(row, columns, role, where) for role in ("instruction", "input", "response")
    )
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def messages_to_conversation(row, columns, where):
    """OpenAI {"role", "content"} or ShareGPT {"from", "value"} turns; a ShareGPT "system" column comes first."""
    turns = row.get(columns["messages"])
    if not isinstance(turns, list):
        raise UserError(f"{where}, column {columns['messages']!r}: expected a list of messages")
    conversation = []
    if row.get("system") is not None and require_text(row["system"], f"{where}, column 'system'").strip():
        conversation.append({"role": "system", "content": row["system"]})
    for index, turn in enumerate(turns, start=1):
        speaker = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise UserError(f"{where}, message {index}: speaker {speaker!r}, expected one of {', '.join(ROLES)}")
        content = require_text(turn.get("content", turn.get("value")), f"{where}, message {index}")
        conversation.append({"role": ROLES[speaker], "content": content})
    return conversation


def reason_to_drop(conversation):
    """Why a conversation cannot be trained on, or None."""
    roles = [message["role"] for message in conversation]
    if "assistant" not in roles:
        return "no answer"
    if roles[0] == "assistant":
        return "the answer comes first"
    if any(not message["content"].strip() for message in conversation):
        return "an empty text"
    return None


def load_conversations(path, mapping=None):
    """Read a file into [(row number, conversation), ...] without empty and duplicate rows; returns it and a report."""
    rows = read_rows(path)
    name = display_path(path)
    # of all rows, in the order of their first appearance: an optional input may be absent from the first
    columns = find_columns(dict.fromkeys(column for _, row in rows for column in row), mapping, name)
    report = DataReport(f"{name} ({', '.join(columns.values())})", len(rows))
    convert = messages_to_conversation if "messages" in columns else instruction_to_conversation
    conversations, seen = [], set()
    for number, row in rows:
        conversation = convert(row, columns, f"dataset {name}, row {number}")
        key = json.dumps(conversation, sort_keys=True)
        reason = reason_to_drop(conversation) or ("duplicate" if key in seen else None)
        if reason:
            report.drop(reason, number)
        else:
            seen.add(key)
            report.kept += 1
            conversations.append((number, conversation))
    if not conversations:
        raise UserError(f"{report.line()}; no row is left to train on")
    return conversations, report


def load_announced(label, path, mapping):
    """Load the conversations of a path as the user gave it, and say what became of the rows."""
    conversations, report = load_conversations(resolve_path(path), mapping)
    say(f"{label}: {report.line()}")
    return conversations


def split_conversations(conversations, validation_split, seed):
    """Shuffle by seed and hold out validation_split of the conversations; returns (train, validation).

    Call it after de-duplication: then the two share no conversation.
    """
    shuffled = list(conversations)
    random.Random(seed).shuffle(shuffled)
    if validation_split == 0:
        return shuffled, []
    held_out = max(1, round(len(shuffled) * validation_split))
    if held_out >= len(shuffled):
        raise UserError(
            f"{len(shuffled)} usable row(s) cannot be split into training and validation rows;"
            " add rows, or train without validation by --validation_split 0"
        )
    return shuffled[held_out:], shuffled[:held_out]


def remove_overlap(conversations, validation):
    """Drop training conversations that the validation set holds too, and say how many."""
    held_out = {json.dumps(conversation, sort_keys=True) for _, conversation in validation}
    kept = [row for row in conversations if json.dumps(row[1], sort_keys=True) not in held_out]
    if len(kept) < len(conversations):
        say(f"{len(conversations) - len(kept)} training rows stand in the validation file too and are not trained on")
    if not kept:
        raise UserError("every training row stands in the validation file too; give a validation file of other rows")
    return kept


def read_conversations(path):
    """Read back what write_conversations wrote: [(row number in the user's file, conversation), ...]."""
    conversations, _ = load_conversations(path)
    return [
        (row.get("row", number), messages)
        for (number, row), (_, messages) in zip(read_rows(path), conversations, strict=True)
    ]


def write_conversations(path, conversations):
    """Write [(row number, conversation), ...] as JSONL that read_conversations reads back."""
    rows = ({"row": number, "messages": messages} for number, messages in conversations)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
