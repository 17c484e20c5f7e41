"""Conversations out of files: what is read, dropped and why; de-duplication and the split.

row_utils.py says what a conversation is, and reads one row as one.
"""

import json
import random
import tempfile
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from file_utils import DiskWatch, cached_folder, digest, sha256
from hub_utils import find_files
from message_utils import UserError, counted, say
from progress_utils import progress
from prompt_utils import begin_with
from reader_utils import PROMPTS_EXPECTED, check_beginning, expected_rows, read_rows, shown
from row_utils import (
    COLUMN_NAMES,
    INSTANCES,
    check_media,
    expand_instances,
    find_columns,
    is_empty,
    is_trained,
    match_columns,
    optional_parts,
    reason_to_drop,
    reason_to_leave_out,
    to_conversation,
)


@dataclass
class DataReport:
    """What became of each row of a file when it was read: it was kept, or dropped for a reason."""

    name: str
    format: str = ""
    columns: dict = field(default_factory=dict)  # part of a conversation -> column
    further: list = field(default_factory=list)  # other columns that were read, such as history
    unused: list = field(default_factory=list)  # columns that were not read
    odd: dict = field(default_factory=dict)  # column -> {"count", "rows", "value"} of what was not understood in it
    unused_keys: list = field(default_factory=list)  # keys of messages that are not used
    context_only: int = 0  # answers of weight 0
    marked_others: int = 0  # messages of weight 1 that are no answers
    thoughts: int = 0  # answers with a thought before them
    several_turns: int = 0  # rows of more than one question
    reasoning: int = 0  # those of them that have it as reasoning_content
    spoken_texts: int = 0  # whole texts that are conversations
    calls: int = 0  # of tools
    ids_taken: dict = field(default_factory=dict)  # a name of call_utils.ID_FORMS -> calls with an id in this form
    rows: int = 0
    kept: int = 0
    left_out: int = 0  # rows that are dropped because they say so themselves
    dropped: dict = field(default_factory=dict)  # reason -> {"count": 3, "rows": [the first five row numbers]}
    number: int = 0  # of the row that is being read

    def drop(self, reason, numbers):
        """Count the rows with these numbers as dropped for a reason."""
        add_rows(self.dropped.setdefault(reason, {"count": 0, "rows": []}), numbers)

    def note_read(self, column):
        """Remember that a column was read beside those of the texts."""
        if column not in self.further:
            self.further.append(column)

    def note_odd(self, column, value):
        """Count a value of a column that is read where it says something, and here says nothing that is known."""
        add_rows(self.odd.setdefault(column, {"count": 0, "rows": [], "value": shown(value)}), [self.number])

    def note_call(self, forms):
        """Count a call of a tool whose id has these forms."""
        self.calls += 1
        for form in forms:
            self.ids_taken[form] = self.ids_taken.get(form, 0) + 1

    def count_dropped(self):
        return sum(found["count"] for found in self.dropped.values())

    def line(self):
        """One dense line: 'data/mine.csv, CSV (instruction, response): 200 rows, 199 kept, 1 dropped ...'."""
        columns = ", ".join([*self.columns.values(), *self.further])
        if self.unused:
            columns += f"; not used: {', '.join(self.unused)}"
        if self.unused_keys:
            columns += f"; not used in messages: {', '.join(self.unused_keys)}"
        parts = [counted(self.rows, "row"), f"{self.kept:,} kept"]
        parts += [f"{found['count']:,} dropped: {why} ({list_rows(**found)})" for why, found in self.dropped.items()]
        if "text" in self.columns:
            parts.append("whole texts: every token is trained, and no chat template is used")
        if self.spoken_texts:
            parts.append(
                f"{counted(self.spoken_texts, 'text')} of what a user and a model say, whose questions are trained too;"
                " give messages to train the answers alone"
            )
        if self.context_only:
            parts.append(f"{counted(self.context_only, 'answer')} of weight 0 read but not trained")
        if self.marked_others:
            parts.append(f"{counted(self.marked_others, 'message')} of weight 1 not trained, being no answers")
        parts += [
            f"{column} not understood in {list_rows(found['count'], found['rows'])}, such as {found['value']}, and read"
            " as if it were not there"
            for column, found in self.odd.items()
            if column in self.further
        ]
        return f"{self.name}, {self.format} ({columns}): {', '.join(parts)}"


def add_rows(found, numbers):
    """Add row numbers to {"count", "rows"}, which keeps the first five."""
    found["count"] += len(numbers)
    found["rows"] = [*found["rows"], *numbers][:5]


def list_rows(count, rows):
    """'row 7', 'rows 7, 8', or 'rows 1, 2, 3, 4, 5, ...' where there are more."""
    more = ", ..." if count > len(rows) else ""
    return f"{'row' if count == 1 else 'rows'} {', '.join(map(str, rows))}{more}"


# ---- Reading rows ----------------------------------------------------------------------------------------------------
def read_conversations(
    paths,
    name,
    mapping,
    report,
    number_column=None,
    chosen_only=False,
    or_usual_names=False,
    on_row=lambda: None,
):
    """Yield (row number, conversation) of every row that can be trained on; counts the others in the report.

    The first row decides the columns; optional ones may first appear later. With `number_column` the rows of
    validation.jsonl keep the numbers that they had in the user's file.
    """
    known = {name for names in COLUMN_NAMES.values() for name in names}
    known |= {str(column).strip().lower() for column in mapping.values()}
    notes, seen = [], {}
    for place, nested in read_rows(paths, name, notes, known):
        on_row()
        number = nested.get(number_column) if number_column else place
        number = number if isinstance(number, int) and abs(number) < 2**63 else place
        report.number = number
        rows = expand_instances(nested, f"dataset {name}, row {place}")
        if rows != [nested]:
            seen[tuple(nested)] = True
            report.note_read(INSTANCES)
        for row in rows:
            if not report.columns:
                report.columns = find_columns(list(row), mapping, name, chosen_only, or_usual_names)
            elif tuple(row) not in seen and report.columns != mapping:
                lacking = [part for part in optional_parts(report.columns) if part not in report.columns]
                report.columns |= match_columns(row, lacking)
            seen[tuple(row)] = True
            where = f"dataset {name}, row {place}"
            check_media({key: value for key, value in row.items() if key not in report.columns.values()}, where)
            itself = reason_to_leave_out(row, report.columns, where, report, chosen_only)
            conversation = to_conversation(row, report.columns, where, report)
            report.rows += 1
            report.left_out += bool(itself)
            if reason := itself or reason_to_drop(conversation):
                report.drop(reason, [number])
            else:
                report.several_turns += [message["role"] for message in conversation].count("user") > 1
                yield number, conversation
    report.format = ", ".join(dict.fromkeys(notes))
    columns = dict.fromkeys(column for row in seen for column in row)
    read = {number_column, *report.columns.values(), *report.further}
    report.further = [
        column for column in columns if column in report.further and column not in report.columns.values()
    ]
    report.unused = [column or "(no name)" for column in columns if column not in read]


def read_unanswered(dataset, mapping, cache_dir):
    """Yield (row number, the row as it was given, its messages) of every row, whether it has an answer or not.

    Rows may have any shape that training reads with a question in it, and the usual columns in place of the mapping's;
    no row is dropped. Raises UserError for a row without a text to answer.
    """
    name, paths = find_files(dataset, Path(cache_dir) / "hub")
    for path in paths:
        check_beginning(path, name)
    known = {name for names in COLUMN_NAMES.values() for name in names} | set(map(str, mapping.values()))
    for place, nested in read_rows(paths, name, [], known, PROMPTS_EXPECTED):
        where = f"dataset {name}, row {place}"
        for row in expand_instances(nested, where):
            how = {"chosen_only": True, "or_usual_names": True, "answered": False}
            columns = find_columns(list(row), mapping, f"{name}, row {place}", **how)
            check_media({key: value for key, value in row.items() if key not in columns.values()}, where)
            answered = "instruction" not in columns or row.get(columns.get("response")) is not None
            if not answered:
                columns.pop("response", None)
            conversation = to_conversation(row, columns, where, DataReport(name))
            if not answered and conversation[-1]["role"] == "assistant":
                conversation.pop()
            if not unanswered(conversation) or any(map(is_empty, unanswered(conversation))):
                raise UserError(f"{where}: no question, or an empty text, which cannot be answered; write or remove it")
            yield place, row, conversation


def unanswered(conversation):
    """A conversation without the answers at its end: what a model is asked."""
    asked = [index for index, message in enumerate(conversation, start=1) if message["role"] in ("user", "tool")]
    return conversation[: asked[-1]] if asked else []


# ---- Conversations on disk -------------------------------------------------------------------------------------------
class Conversations(Sequence):
    """Conversations in a JSONL file, read one at a time: [i] is (row number, messages).

    `index` holds arrays with a value for each conversation, so that splitting, comparing and counting never read the
    texts: those of INDEX, and `text`, a digest of all messages.
    """

    # row number, place in the file, number of its trained answers, and digests of the parts that describe() names
    INDEX: ClassVar = {
        "number": "q",
        "offset": "q",
        "answers": "q",
        "prompt": "Q",
        "answer": "Q",
        "opening": "Q",
        "closing": "Q",
        "question": "Q",
        "system": "Q",
    }

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


def store_conversations(path, rows, repeated=None):
    """Write (row number, messages) pairs as JSONL, a line each, and return their Conversations.

    repeated: a list to which the numbers of those go that are equal to an earlier one. They are not written: a Parquet
    file of some kilobytes may repeat a row until the disk is full. None: all are written.

    Raises UserError before the rows fill the disk.
    """
    watch = DiskWatch(path.parent)
    seen, texts, columns = set(), bytearray(), {name: array(kind) for name, kind in Conversations.INDEX.items()}
    with open(path, "wb") as file:
        for number, messages in rows:
            text = json.dumps(messages, ensure_ascii=False)
            found = digest(text)
            if repeated is not None:
                if found in seen:
                    repeated.append(number)
                    continue
                seen.add(found)
            texts += found
            for name, value in zip(columns, (number, file.tell(), *describe(messages)), strict=True):
                columns[name].append(value)
            file.write(f'{{"row": {number}, "messages": {text}}}\n'.encode())
            watch(file.tell())
    index = {name: np.array(values) for name, values in columns.items()}
    return Conversations(path, index | {"text": np.frombuffer(bytes(texts), dtype="S16")})


def last_answer(messages):
    """Index of a conversation's last answer that is trained."""
    return max(index for index, message in enumerate(messages) if is_trained(message))


def describe(messages):
    """The number of trained answers, and 64-bit digests: of the prompt, the last of these answers, its first four and
    its last four words, the prompt without its system text, and the system text.

    They are 0 for what is not there, such as the first four words of a short answer. But for the system text, white
    space and the way an accent is encoded do not count, nor does case in a prompt: prompts that differ in nothing else
    are the same question.
    """
    answers = digest_answers(messages)
    question, answer = answers[-1]
    last = last_answer(messages)
    prompt = [word for message in messages[:last] for word in prompt_words(message)]
    words = normal(words_of(messages[last])).split()
    ends = (words[:4], words[-4:]) if len(words) >= 8 else ((), ())
    system = [messages[0]["content"]] if messages[0]["role"] == "system" else ()
    first, end, system = map(digest_words, (*ends, system))
    return len(answers), digest_words(prompt), answer, first, end, question, system


def digest_answers(messages):
    """(digest of the question, digest of the answer) of each trained answer; describe() gives those of the last.

    An answer's question is all that was said before it, without the system text.
    """
    found, question = [], []
    for position, message in enumerate(messages):
        if is_trained(message):
            found.append((digest_words(question), digest_words(normal(words_of(message)).split())))
        if position or message["role"] != "system":
            question += prompt_words(message)
    return found


def digest_words(words):
    return int.from_bytes(digest(" ".join(words), 8), "little") if words else 0


def prompt_words(message):
    return normal(words_of(message)).casefold().split()


def normal(text):
    """The text with each accented letter as one character, as Unicode's form NFC has it."""
    return unicodedata.normalize("NFC", text)


def shared_system_text(conversations):
    """The system text that all Conversations begin with, or None."""
    digests = conversations.index["system"]
    if not len(digests) or not digests[0] or (digests != digests[0]).any():
        return None
    return conversations[0][1][0]["content"]


def with_questions(conversations, count):
    """(row number, messages) of the first `count` conversations that can be answered: whole texts cannot."""
    found = ((number, messages) for number, messages in conversations if messages[0]["role"] != "text")
    return list(islice(found, count))


def words_of(message):
    """What a message says: its text, its tool calls and the tools that it defines."""
    return " ".join(
        [message["content"], *(json.dumps(message[key]) for key in ("tool_calls", "tools") if key in message)]
    )


# ---- Loading and splitting -------------------------------------------------------------------------------------------
def load_conversations(
    dataset,
    mapping=None,
    cache_dir=None,
    number_column=None,
    chosen_only=False,
    system_prompt=None,
    or_usual_names=False,
):
    """Read a file or Hub dataset into Conversations without unusable and duplicate rows; returns them and a report.

    With `or_usual_names` the file may have the usual columns in place of the mapping's. Rows without a system text
    begin with `system_prompt`, if it is one.
    They are kept in cache_dir under a key of the files' content, or in a temporary folder that goes with them.
    """
    mapping = mapping or {}
    temporary = None
    if cache_dir is None:
        temporary = tempfile.TemporaryDirectory()
        cache_dir = temporary.name
    name, paths = find_files(str(dataset), Path(cache_dir) / "hub")
    for path in paths:
        check_beginning(path, name)
    code = [
        Path(__file__).with_name(name) for name in ("data_utils.py", "row_utils.py", "reader_utils.py", "call_utils.py")
    ]
    parts = json.dumps(
        [mapping, number_column, chosen_only, system_prompt, or_usual_names, [path.suffix for path in paths]]
    )
    states = file_states(paths)
    with progress(f"Hashing {name}"):
        key = sha256([parts, *paths, *code])

    def build(folder):
        report = DataReport(name)
        with progress("Reading", expected_rows(paths), "rows") as bar:
            rows = read_conversations(
                paths, name, mapping, report, number_column, chosen_only, or_usual_names, bar.update
            )
            rows = ((number, begin_with(system_prompt, messages)) for number, messages in rows)
            repeated = array("q")
            conversations = store_conversations(folder / "conversations.jsonl", rows, repeated)
        if file_states(paths) != states:  # other rows must not be kept under the hash of these
            raise UserError(f"dataset {name} was changed while it was read; try again once it is whole")
        if repeated:
            report.drop("duplicate", repeated.tolist())
        report.kept = len(conversations)
        if not report.kept:
            raise UserError(f"{report.line()}; no row is left, so mend these or give others")
        np.savez(folder / "index.npz", **conversations.index)
        (folder / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")

    folder = cached_folder(cache_dir, "rows", key, build)
    report = DataReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))
    report.name = name
    with np.load(folder / "index.npz") as index:
        return Conversations(folder / "conversations.jsonl", dict(index), temporary), report


def file_states(paths):
    """What tells whether a file was written to or replaced: its number, size and time of change."""
    states = [path.stat() for path in paths]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def load_announced(label, dataset, mapping, cache_dir, chosen_only=False, **options):
    """Load the conversations that the user named, and say what became of the rows; returns them and the report.

    `options` are those of load_conversations.
    """
    conversations, report = load_conversations(dataset, mapping, cache_dir, chosen_only=chosen_only, **options)
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
            f"{counted(len(shuffled), 'usable row')} cannot be split into training and validation rows;"
            " add rows, or train without validation by --validation_split 0"
        )
    return conversations.select(shuffled[held_out:]), conversations.select(shuffled[:held_out])


def remove_overlap(conversations, validation):
    """Drop training conversations that the validation set holds too, and say how many."""
    distinct = ~np.isin(conversations.index["text"], validation.index["text"])
    if not distinct.all():
        left_out = counted(int((~distinct).sum()), "training row")
        say(f"{left_out} left out, to be found in the validation file too")
    if not distinct.any():
        raise UserError("every training row stands in the validation file too; give a validation file of other rows")
    return conversations.select(distinct)
