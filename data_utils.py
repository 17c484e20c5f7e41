"""Rows to conversations: the shapes of a row, what is dropped and why, de-duplication and the split.

A conversation is a list of messages, {"role": "user", "content": "..."}. Every format that is read becomes one.
"""

import json
import random
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from file_utils import cached_folder, digest, sha256
from hub_utils import find_files
from message_utils import UserError, say
from reader_utils import read_rows

COLUMN_NAMES = {
    "instruction": ("instruction", "prompt", "question"),
    "response": ("response", "output", "answer", "completion"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "messages": ("messages", "conversations"),
}
OPTIONAL = ("input", "system")
INSTANCES = "instances"  # a column of {"input", "output"} objects that share one instruction, as in self-instruct
# ShareGPT and OpenAI names of the speakers -> roles of a chat template
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass
class DataReport:
    """What became of every row of a file at reading: kept, or dropped with its reason."""

    name: str
    format: str = ""
    columns: dict = field(default_factory=dict)  # part of a conversation -> column
    unused: list = field(default_factory=list)  # columns that no part of a conversation is made of
    rows: int = 0
    kept: int = 0
    dropped: dict = field(default_factory=dict)  # reason -> {"count": 3, "rows": [the first five row numbers]}

    def drop(self, reason, numbers):
        """Count the rows of these numbers as dropped."""
        found = self.dropped.setdefault(reason, {"count": 0, "rows": []})
        found["count"] += len(numbers)
        found["rows"] = [*found["rows"], *numbers][:5]

    def count_dropped(self):
        return sum(found["count"] for found in self.dropped.values())

    def line(self):
        """One dense line: 'data/mine.csv, CSV (instruction, response): 200 rows, 199 kept, 1 dropped ...'."""
        columns = ", ".join(self.columns.values())
        if self.unused:
            columns += f"; not used: {', '.join(self.unused)}"
        parts = [f"{self.rows:,} rows", f"{self.kept:,} kept"]
        parts += [f"{found['count']:,} dropped: {why} ({list_rows(**found)})" for why, found in self.dropped.items()]
        return f"{self.name}, {self.format} ({columns}): {', '.join(parts)}"


def list_rows(count, rows):
    """'row 7', 'rows 7, 8', or 'rows 1, 2, 3, 4, 5, ...' where there are more."""
    noun = "row" if count == 1 else "rows"
    more = ", ..." if count > len(rows) else ""
    return f"{noun} {', '.join(map(str, rows))}{more}"


# ---- Rows to conversations -------------------------------------------------------------------------------------------
def find_columns(found, mapping, name):
    """Return {"messages": column} or {"instruction": column, "response": column}, perhaps with input and system.

    `mapping` is DATASET_COLUMNS; without it the usual names are looked for, in any case ("Question" is question).
    """
    if mapping:
        check_mapping(found, mapping, name)
        return dict(mapping)
    columns = match_columns(found, COLUMN_NAMES)
    if "messages" in columns:
        return {part: column for part, column in columns.items() if part in ("messages", "system")}
    columns.pop("messages", None)
    if not {"instruction", "response"} <= set(columns):
        raise UserError(
            f"dataset {name}: columns found: {', '.join(found) or 'none'}; expected instruction and response (or"
            " prompt, question and output, answer, completion), messages, or conversations; map others with"
            " --dataset_columns"
        )
    return columns


def optional_parts(columns):
    """The parts that rows of this shape may have or lack."""
    return ("system",) if "messages" in columns else OPTIONAL


def match_columns(found, parts):
    """{part: the first column found under one of the part's usual names}."""
    by_lower = {column.strip().lower(): column for column in found}
    present = {part: [by_lower[name] for name in COLUMN_NAMES[part] if name in by_lower] for part in parts}
    return {part: columns[0] for part, columns in present.items() if columns}


def check_mapping(found, mapping, name):
    """Raise UserError unless DATASET_COLUMNS names known parts of a row and columns that exist."""
    required = {"messages"} if "messages" in mapping else {"instruction", "response"}
    allowed = required | set(optional_parts(mapping))
    problem = None
    if not required <= set(mapping) <= allowed:
        problem = "expected the keys instruction and response, perhaps input and system; or messages"
    elif missing := [str(mapping[part]) for part in sorted(required) if mapping[part] not in found]:
        problem = f"missing {', '.join(missing)}"
    elif any(not isinstance(column, str) for column in mapping.values()):
        problem = "expected the names of columns"
    if problem:
        raise UserError(f"dataset {name}: --dataset_columns {mapping}: {problem}; columns found: {', '.join(found)}")


def require_text(value, what):
    """Return value if it is a text that can be written as UTF-8, else raise UserError."""
    if not isinstance(value, str):
        remedy = "give a text or remove the row" if value is None else "put it in quotes or remove the row"
        raise UserError(f"{what}: {json.dumps(value, default=str)[:40]} is no text; {remedy}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{what}: half of a surrogate pair, which is no text; remove that character") from None
    return value


def message_text(row, columns, part, where):
    column = columns.get(part)
    if column is None or (part in OPTIONAL and row.get(column) is None):
        return ""
    if column not in row:
        raise UserError(f"{where}: column {column!r} is missing; columns found: {', '.join(row)}")
    return require_text(row[column], f"{where}, column {column!r}")


def to_conversation(row, columns, where):
    """The messages of a row: its system text if it is not blank, then its turns or its instruction and response."""
    system = message_text(row, columns, "system", where)
    conversation = [{"role": "system", "content": system}] if system.strip() else []
    if "messages" in columns:
        return conversation + read_turns(row.get(columns["messages"]), columns["messages"], where)
    instruction, extra, response = (
        message_text(row, columns, part, where) for part in ("instruction", "input", "response")
    )
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return [*conversation, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def read_turns(turns, column, where):
    """OpenAI {"role", "content"} or ShareGPT {"from", "value"} turns to messages; blank system turns are left out."""
    if not isinstance(turns, list):
        raise UserError(f"{where}, column {column!r}: expected a list of messages")
    messages = []
    for index, turn in enumerate(turns, start=1):
        speaker = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise UserError(f"{where}, message {index}: speaker {speaker!r}, expected one of {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        if content is None and turn.get("tool_calls"):
            raise UserError(f"{where}, message {index}: tool_calls without a text; write the call as text in content")
        require_text(content, f"{where}, message {index}")
        if ROLES[speaker] != "system" or content.strip():
            messages.append({"role": ROLES[speaker], "content": content})
    return messages


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


def read_conversations(paths, name, mapping, report, number_column=None):
    """Yield (row number, conversation) of every row that can be trained on; counts the others in the report.

    The first row decides the columns; optional ones may first appear later. With `number_column` the rows of
    validation.jsonl keep the numbers that they had in the user's file.
    """
    known = {name for names in COLUMN_NAMES.values() for name in names}
    known |= {str(column).strip().lower() for column in mapping.values()}
    notes, seen = [], {}
    for place, nested in read_rows(paths, name, notes, known):
        number = nested.get(number_column) if number_column else place
        number = number if isinstance(number, int) and abs(number) < 2**63 else place
        for row in expand_instances(nested, f"dataset {name}, row {place}"):
            if not report.columns:
                report.columns = find_columns(list(row), mapping, name)
            elif tuple(row) not in seen and not mapping:
                report.columns = match_columns(row, optional_parts(report.columns)) | report.columns
            seen[tuple(row)] = True
            conversation = to_conversation(row, report.columns, f"dataset {name}, row {place}")
            report.rows += 1
            if reason := reason_to_drop(conversation):
                report.drop(reason, [number])
            else:
                yield number, conversation
    report.format = ", ".join(dict.fromkeys(notes))
    columns = dict.fromkeys(column for row in seen for column in row)
    report.unused = [column for column in columns if column not in (*report.columns.values(), number_column)]


def expand_instances(row, where):
    """The row itself, or one row for each of its `instances` where it has no answer of its own."""
    instances = row.get(INSTANCES)
    if not isinstance(instances, list) or match_columns(row, ("response", "messages")):
        return [row]
    if not all(isinstance(instance, dict) for instance in instances):
        raise UserError(f"{where}, column {INSTANCES!r}: expected a list of objects with input and output")
    shared = {column: value for column, value in row.items() if column != INSTANCES}
    return [shared | instance for instance in instances]


# ---- Conversations on disk -------------------------------------------------------------------------------------------
class Conversations(Sequence):
    """Conversations in a JSONL file, read one at a time: [i] is (row number, messages).

    `index` holds arrays with a value for each conversation, so that splitting, comparing and counting never read the
    texts: those of INDEX, and `text`, a digest of all messages.
    """

    # row number, place in the file, and digests of the parts that describe() names
    INDEX: ClassVar = {"number": "q", "offset": "q", "prompt": "Q", "answer": "Q", "opening": "Q", "closing": "Q"}

    def __init__(self, path, index, folder=None):
        self.path = Path(path)
        self.index = index
        self.folder = folder  # a TemporaryDirectory that lives as long as this object
        self.file = open(path, "rb")  # noqa: SIM115 - open as long as this object lives

    def __len__(self):
        return len(self.index["number"])

    def __getitem__(self, position):
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        self.file.seek(int(self.index["offset"][position]))
        row = json.loads(self.file.readline())
        return row["row"], row["messages"]

    def select(self, positions):
        """The conversations at these positions, in this order, or those where a mask of booleans is true."""
        positions = np.asarray(positions, dtype=None if len(positions) else np.int64)
        return Conversations(self.path, {name: values[positions] for name, values in self.index.items()}, self.folder)

    def fingerprint(self):
        """A hash of all texts and row numbers, in their order."""
        return sha256([self.index["text"].tobytes(), self.index["number"].tobytes()])


def store_conversations(path, rows):
    """Write (row number, messages) pairs as JSONL, a line each, and return their Conversations."""
    texts, columns = bytearray(), {name: array(kind) for name, kind in Conversations.INDEX.items()}
    with open(path, "wb") as file:
        for number, messages in rows:
            text = json.dumps(messages, ensure_ascii=False)
            for name, value in zip(columns, (number, file.tell(), *describe(messages)), strict=True):
                columns[name].append(value)
            texts += digest(text)
            file.write(f'{{"row": {number}, "messages": {text}}}\n'.encode())
    index = {name: np.array(values) for name, values in columns.items()}
    return Conversations(path, index | {"text": np.frombuffer(bytes(texts), dtype="S16")})


def last_answer(messages):
    """Index of a conversation's last assistant message."""
    return max(index for index, message in enumerate(messages) if message["role"] == "assistant")


def describe(messages):
    """64-bit digests of the prompt, the last answer, its first four and its last four words (0 for short answers).

    Case and white space do not count: prompts that differ in nothing else are the same question.
    """
    last = last_answer(messages)
    prompt = [word for message in messages[:last] for word in message["content"].casefold().split()]
    answer = messages[last]["content"].split()
    parts = (prompt, answer, answer[:4] if len(answer) >= 8 else (), answer[-4:] if len(answer) >= 8 else ())
    return [int.from_bytes(digest(" ".join(words), 8), "little") if words else 0 for words in parts]


# ---- Loading and splitting -------------------------------------------------------------------------------------------
def load_conversations(dataset, mapping=None, cache_dir=None, number_column=None):
    """Read a file or Hub dataset into Conversations without unusable and duplicate rows; returns them and a report.

    They are kept in cache_dir under a key of the files' content, or in a temporary folder that goes with them.
    """
    mapping = mapping or {}
    temporary = None
    if cache_dir is None:
        temporary = tempfile.TemporaryDirectory()
        cache_dir = temporary.name
    name, paths = find_files(str(dataset), Path(cache_dir) / "hub")
    code = Path(__file__).with_name("reader_utils.py")
    parts = json.dumps([mapping, number_column, [path.suffix for path in paths]])
    key = sha256([parts, *paths, Path(__file__), code])

    def build(folder):
        report = DataReport(name)
        rows = read_conversations(paths, name, mapping, report, number_column)
        conversations = drop_duplicates(store_conversations(folder / "conversations.jsonl", rows), report)
        report.kept = len(conversations)
        if not report.kept:
            raise UserError(f"{report.line()}; no row is left to train on")
        np.savez(folder / "index.npz", **conversations.index)
        (folder / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    folder = cached_folder(cache_dir, "rows", key, build)
    report = DataReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    report.name = name
    with np.load(folder / "index.npz") as index:
        return Conversations(folder / "conversations.jsonl", dict(index), temporary), report


def drop_duplicates(conversations, report):
    """The first of each conversation; the others are counted in the report."""
    first = np.zeros(len(conversations), dtype=bool)
    first[np.unique(conversations.index["text"], return_index=True)[1]] = True
    if not first.all():
        report.drop("duplicate", conversations.index["number"][~first].tolist())
    return conversations.select(first)


def load_announced(label, dataset, mapping, cache_dir):
    """Load the conversations that the user named, and say what became of the rows; returns them and the report."""
    conversations, report = load_conversations(dataset, mapping, cache_dir)
    say(f"{label}: {report.line()}")
    return conversations, report


def split_conversations(conversations, validation_split, seed):
    """Shuffle by seed and hold out validation_split of the conversations; returns (train, validation).

    Call it after de-duplication: then the two share no conversation.
    """
    shuffled = list(range(len(conversations)))
    random.Random(seed).shuffle(shuffled)
    if validation_split == 0:
        return conversations.select(shuffled), conversations.select([])
    held_out = max(1, round(len(shuffled) * validation_split))
    if held_out >= len(shuffled):
        raise UserError(
            f"{len(shuffled)} usable row(s) cannot be split into training and validation rows;"
            " add rows, or train without validation by --validation_split 0"
        )
    return conversations.select(shuffled[held_out:]), conversations.select(shuffled[:held_out])


def remove_overlap(conversations, validation):
    """Drop training conversations that the validation set holds too, and say how many."""
    distinct = ~np.isin(conversations.index["text"], validation.index["text"])
    if not distinct.all():
        say(f"{(~distinct).sum()} training rows stand in the validation file too and are not trained on")
    if not distinct.any():
        raise UserError("every training row stands in the validation file too; give a validation file of other rows")
    return conversations.select(distinct)
