"""Files to rows: strict readers of JSON, JSON Lines, CSV and Parquet that change no text.

Rows come one at a time, so that a file may be larger than the memory; only a JSON array is read whole.
"""

import csv
import json
import re
from itertools import chain, islice

import psutil
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from file_utils import READ_BYTES
from message_utils import UserError, counted

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
LINES = (".jsonl", ".ndjson")
FILE_TYPES = ".json, .jsonl, .csv or .parquet"
# How files that are no text begin, and what a user would have to do
OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or a spreadsheet (unpack it, or save the sheet as CSV)",
    b"\xd0\xcf\x11\xe0": "a spreadsheet of an old Excel (save it as CSV)",
    b"\x1f\x8b": "a file packed by gzip (unpack it)",
    b"BZh": "a file packed by bzip2 (unpack it)",
    b"\xfd7zXZ": "a file packed by xz (unpack it)",
    b"\x28\xb5\x2f\xfd": "a file packed by zstd (unpack it)",
    b"ARROW1": "an Arrow file (write it as Parquet)",
    b"PAR1": "a Parquet file (name it .parquet)",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a pointer to a file in Git LFS (fetch it by git lfs pull)",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}
ROWS_EXPECTED = 'expected rows with an instruction and a response: {"instruction": "Hi", "response": "Hello!"}'
PROMPTS_EXPECTED = 'expected rows with an instruction: {"instruction": "Hi"}'
PARQUET_ROWS = 100  # in memory at a time; a text of megabytes that they share is in each of them
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how files begin that say so
NO_TEXT = "a NUL byte, which no text holds; save the file as UTF-8 text and try again"

# Excel and other programs may name the delimiter in a first line of its own
DELIMITERS, DELIMITER_LINE = ",;\t|", re.compile(r"sep=(.)\r?\n", re.IGNORECASE)


def read_rows(paths, name, notes, columns=(), expected=ROWS_EXPECTED):
    """Yield (row number, row) of one file or of several in a row; each row is a dict, and at least one comes.

    Rows are numbered by their line in JSON Lines, else by their order. What was detected about the format is added to
    the list `notes`. `columns` are names that the header of a CSV file is known to hold. `expected`: what is said of
    a file in which nothing of the kind is found.
    """
    number = last = 0
    for path in paths:
        where = name if len(paths) == 1 else f"{name}, {path.name}"
        if is_blank(path, where):
            raise UserError(f"dataset {where} is empty, {expected}")
        for number, row in READERS[path.suffix.lower()](path, where, notes, columns):
            if is_turns(row):
                row = {"messages": row}
            if not isinstance(row, dict):
                raise UserError(f"dataset {where}, row {number}: {shown(row)}, {expected}")
            yield last + number, row
        last += number
    if not last:
        raise UserError(f"dataset {name} holds no rows, {expected}")


def shown(value):
    """A value as JSON, its first 40 characters."""
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


def is_turns(value):
    """Whether a list is the turns of one conversation, in OpenAI's or ShareGPT's names."""
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(
        isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
        for turn in turns
    )


def check_beginning(path, name):
    """Raise UserError where a file of text begins with what is none, before a large one is read whole."""
    if path.suffix.lower() != ".parquet":
        with open(path, "rb") as file:
            block = file.read(READ_BYTES)
        if kind := find_kind(block):
            raise UserError(f"dataset {name}: found {kind}, expected a file of rows: {FILE_TYPES}")
        if b"\0" in block and not block.startswith(UTF_16):
            line = block[: block.index(b"\0")].count(b"\n") + 1
            raise UserError(f"dataset {name}, line {line}: {NO_TEXT}")


def is_blank(path, name):
    """Whether a file holds nothing, or a file of text nothing but blanks."""
    if path.suffix.lower() == ".parquet":
        return path.stat().st_size == 0
    with open(path, "rb") as file:  # the first line of a file may be all of it
        if file.read(READ_BYTES).decode("utf-8-sig", errors="ignore").strip():
            return False
    return not any(text.strip() for _, text in read_lines(path, name))


def find_kind(block):
    """What a file is, in words, if it begins with these bytes and is no text; else None."""
    return next((OTHER_FILES[start] for start in OTHER_FILES if block.startswith(start)), None)


def expected_rows(paths):
    """About how many rows files hold, without reading any; None where only reading them tells.

    A line is a row: of a CSV file that is too many where texts have several lines.
    """
    total = 0
    for path in paths:
        if path.suffix.lower() == ".json":
            return None
        if path.suffix.lower() == ".parquet":
            try:
                with ParquetFile(path) as file:
                    total += file.metadata.num_rows
            except (ArrowException, OSError, ValueError):  # reading it will say what is wrong
                return None
        else:
            with open(path, "rb") as file:
                while block := file.read(READ_BYTES):
                    total += block.count(b"\n")
    return total


def read_lines(path, name):
    """Yield (line number, text) of a UTF-8 file, without its byte order mark; another encoding is a UserError.

    Lines end at a line feed only: U+2028 and its like may stand inside a JSON string.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if b"\0" in raw and not raw.startswith(UTF_16):
                raise UserError(f"dataset {name}, line {number}: {NO_TEXT}")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                utf16 = number == 1 and raw.startswith(UTF_16)
                found = "UTF-16, expected UTF-8 text" if utf16 else "not UTF-8 text"
                remedy = "save the file as UTF-8 and try again"
                raise UserError(f"dataset {name}, line {number}: {found}; {remedy}") from None


# ---- JSON ------------------------------------------------------------------------------------------------------------
def read_json_rows(path, name, notes, columns):
    """Rows of a JSON array, of the one array that an object holds, or of JSON Lines: told apart by how they begin."""
    first = next(text for _, text in read_lines(path, name) if text.strip())
    if begins_json_lines(path, name, first):
        notes.append("JSON Lines")
        return read_json_lines(path, name)
    notes.append("JSON")
    size, memory = path.stat().st_size, psutil.virtual_memory().total
    if size > memory:
        raise UserError(
            f"dataset {name}: {size / 2**30:,.0f} GiB of JSON, which is read whole, and this machine has"
            f" {memory / 2**30:,.0f} GiB of memory; write it as JSON Lines, a row a line, in a .jsonl file"
        )
    text = "".join(line for _, line in read_lines(path, name))
    rows = parse_json(text, lambda line: f"dataset {name}, line {line}")
    if is_turns(rows) or (
        isinstance(rows, dict) and any(is_turns(rows.get(key)) for key in ("messages", "conversations"))
    ):
        notes.append("one conversation")
        rows = [rows]
    if isinstance(rows, dict):
        lists = [key for key, value in rows.items() if isinstance(value, list)]
        if len(lists) != 1:
            held = f" that holds the lists {', '.join(lists)}" if lists else ""
            raise UserError(f"dataset {name}: a JSON object{held}, expected a list of rows: [{{...}}, {{...}}]")
        notes.append(f"rows under {lists[0]!r}")
        rows = rows[lists[0]]
    if not isinstance(rows, list):
        raise UserError(f"dataset {name}: {shown(rows)}, expected a list of rows: [{{...}}, {{...}}]")
    return enumerate(rows, start=1)


def begins_json_lines(path, name, first):
    """Whether a file is JSON Lines: always by its name unless it opens an array, else by two objects in its lines."""
    if path.suffix.lower() in LINES:
        return not first.lstrip().startswith("[")
    lines = islice((text for _, text in read_lines(path, name) if text.strip()), 2)
    return sum(text.startswith("{") and text.rstrip().endswith("}") for text in lines) == 2


def read_json_lines(path, name):
    for number, line in read_lines(path, name):
        if line.strip():
            yield number, parse_json(line, lambda _, number=number: f"dataset {name}, line {number}")


def parse_json(text, where):
    """json.loads whose failure names the line; NaN and Infinity, which are no JSON, are refused."""

    def reject(constant):
        line = text[: text.find(constant)].count("\n") + 1
        raise UserError(f"{where(line)}: {constant} is not valid JSON; write null or a quoted text")

    def unique(pairs):
        if len(keys := dict(pairs)) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
            raise UserError(f"{where(1)}: an object names {twice!r} twice; remove one of them")
        return keys

    try:
        return json.loads(text, parse_constant=reject, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        problem = f"invalid JSON ({error.msg}, column {error.colno})"
        remedy = "mend it there"
        if text.strip() in ("{", "[", "[{"):
            remedy = "a .jsonl file holds one row a line; if this file is one list of rows, name it .json"
        raise UserError(f"{where(error.lineno)}: {problem}; {remedy}") from None
    except (RecursionError, ValueError):  # thousands of brackets, or of digits in one number
        raise UserError(f"{where(1)}: JSON nested too deeply or a number too long, expected rows of text") from None


# ---- Parquet ---------------------------------------------------------------------------------------------------------
def read_parquet_rows(path, name, notes, columns):
    """Rows of a Parquet file, PARQUET_ROWS in memory at a time.

    Inside its objects a key that is null counts as not there: Arrow gives all objects of a column the same keys, and
    fills up with null those that an object had not.
    """
    notes.append("Parquet")
    try:
        with ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=PARQUET_ROWS)
            maps = {"maps_as_pydicts": "strict"} if "map<" in str(file.schema_arrow) else {}  # which takes longer
            rows = (row for batch in batches for row in batch.to_pylist(**maps))
            yield from enumerate(({name: without_nulls(row[name]) for name in row} for row in rows), start=1)
    except (ArrowException, OSError, ValueError, KeyError) as error:  # text that is no UTF-8, a map with a key twice
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"dataset {name}: damaged or no Parquet file ({reason}); write it again") from None


def without_nulls(value):
    """A value whose objects, at any depth, have no keys that are null."""
    if isinstance(value, str):  # most are
        return value
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# ---- CSV -------------------------------------------------------------------------------------------------------------
def read_csv_rows(path, name, notes, columns):
    """Rows of a CSV file by the standard library's reader, which keeps "007", "None" and blanks as they are."""
    lines = (line for _, text in read_lines(path, name) for line in split_returns(text))
    skipped, head = 0, []  # the head tells the delimiter and the quotes
    for line in lines:
        if head or line.strip():
            head.append(line)
        else:
            skipped += 1
        if sum(map(len, head)) > 65_536:
            break
    named = DELIMITER_LINE.fullmatch(head[0])
    if named:
        head, skipped = head[1:], skipped + 1
    delimiter, quote = detect_dialect(head, named[1] if named else DELIMITERS, columns)
    separated = "" if delimiter == "," else f" separated by {delimiter!r}"
    blanks = has_blanks_before_quotes(head, delimiter, quote)
    quoted = "" if quote == '"' and not blanks else f" in {quote} quotes"
    notes.append(f"CSV{separated}{quoted}{' behind blanks' if blanks else ''}")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(chain(head, lines), delimiter=delimiter, quotechar=quote, skipinitialspace=blanks, strict=True)
    yield from enumerate(csv_rows(reader, name, skipped, delimiter), start=1)


def split_returns(text):
    """Split a text into lines, also at a lone carriage return, which old spreadsheets write."""
    return re.findall(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+", text)


def detect_dialect(head, delimiters, columns):
    """Return the (delimiter, quote) under which the header holds most known names, else cuts all lines evenly.

    Single quotes count only where they stand around more cells than double quotes do.
    """
    scores = {}
    for quote in "\"'":
        for delimiter in delimiters:
            if quote == "'" and count_quoted(head, delimiter, "'") <= count_quoted(head, delimiter, '"'):
                continue
            try:
                rows = [row for row in csv.reader(head, delimiter=delimiter, quotechar=quote) if row]
            except csv.Error:
                continue
            rows = rows[:-1] if len(rows) > 2 else rows  # the last may be incomplete
            widths = {len(row) for row in rows}
            header = {cell.strip().lower() for cell in rows[0]} if rows else set()
            even = len(widths) == 1 and widths != {1}
            scores[delimiter, quote] = (len(header & set(columns)), even, quote == '"', len(header))
    return max(scores, key=scores.get, default=(",", '"'))


def count_quoted(lines, delimiter, quote):
    """How many cells of these lines stand in quotes of this kind."""
    return count_cells(lines, rf"(?:^|(?<={re.escape(delimiter)}))", delimiter, quote)


def has_blanks_before_quotes(lines, delimiter, quote):
    """Whether more quotes stand behind a delimiter and a blank than behind a delimiter: "a", "b"."""
    behind, end = (rf"(?<={re.escape(delimiter)}){blanks}" for blanks in (" +", ""))
    return count_cells(lines, behind, delimiter, quote) > count_cells(lines, end, delimiter, quote)


def count_cells(lines, before, delimiter, quote):
    """How many cells of these lines stand in quotes of this kind behind a pattern."""
    cell = re.compile(rf"{before}{quote}(?:[^{quote}]|{quote}{quote})*{quote}(?=\s*$|{re.escape(delimiter)})")
    return sum(len(cell.findall(line)) for line in lines)


def csv_rows(reader, name, skipped, delimiter):
    """Yield the rows of a csv.reader as dicts; every row must have as many cells as the header."""
    header = None
    line = skipped + 1  # where the record being read begins
    try:
        for cells in reader:
            if cells and header is None:
                header = read_header(cells, name)
                width = len(cells)
            elif cells:
                if len(cells) == width and not any(cells[len(header) :]):
                    cells = cells[: len(header)]
                if len(cells) != len(header):
                    raise UserError(
                        f"dataset {name}, line {line}: {counted(len(cells), 'cell')}, expected {len(header)} as in the"
                        f" header ({', '.join(header)}); put quotes around texts that hold a {delimiter!r}"
                    )
                yield dict(zip(header, cells, strict=True))
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "unexpected end" in str(error) else error
        raise UserError(
            f"dataset {name}, line {line}: invalid CSV ({reason}); mend the quotes there, and double those inside a"
            ' text: ""'
        ) from None


def read_header(cells, name):
    header = [cell.strip() for cell in cells]
    while header and not header[-1]:  # spreadsheets save empty columns behind the last one
        header.pop()
    if len(set(header)) != len(header):
        raise UserError(f"dataset {name}: the header names a column twice ({', '.join(header)}); rename one")
    return header


READERS = dict(zip(SUFFIXES, [*3 * [read_json_rows], *2 * [read_csv_rows], read_parquet_rows], strict=True))
