"""From a user's file to what the model trains on: rows -> conversations -> prompts -> token ids and labels -> passes.

A conversation is a list of messages, {"role": "user", "content": "..."}. Every format that is read becomes one.
"""

import csv
import io
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch

from run_utils import UserError, display_path, say

IGNORED = -100  # label of a token that is not trained, as in torch's cross_entropy
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

    def line(self):
        """One dense line: 'data/demo.json: 200 rows, 199 kept, 1 dropped: duplicate (first: row 7)'."""
        parts = [f"{self.rows} rows", f"{self.kept} kept"]
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
        problem = f"invalid JSON ({error.msg}, column {error.colno})"
        raise UserError(f"{where(error.lineno)}: {problem}; mend it there") from None
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
            elif len(cells) != len(header):
                raise UserError(
                    f"dataset {name}, line {reader.line_num}: {len(cells)} cells, expected {len(header)} as in the"
                    f" header ({', '.join(header)}); put quotes around texts that hold a {delimiter!r}"
                )
            else:
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
def find_columns(row, mapping, name):
    """Return {"messages": column} or {"instruction": column, "response": column, perhaps "input": column}.

    `mapping` is DATASET_COLUMNS; without it the usual names are looked for, in any case ("Question" is question).
    """
    if mapping:
        check_mapping(row, mapping, name)
        return dict(mapping)
    by_lower = {column.strip().lower(): column for column in row}
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
            f"dataset {name}: columns found: {', '.join(row) or 'none'}; expected instruction and response (or prompt/"
            "question and output/answer/completion), messages, or conversations; map others with --dataset_columns"
        )
    return columns


def check_mapping(row, mapping, name):
    """Raise UserError unless DATASET_COLUMNS names known parts of a row and columns that exist."""
    missing = [column for column in mapping.values() if not isinstance(column, str) or column not in row]
    problem = f"missing {', '.join(map(str, missing))}" if missing else None
    if set(mapping) != {"messages"} and not {"instruction", "response"} <= set(mapping) <= set(COLUMN_NAMES):
        problem = "expected the keys instruction and response, perhaps input; or messages alone"
    if problem:
        raise UserError(f"dataset {name}: --dataset_columns {mapping}: {problem}; columns found: {', '.join(row)}")


def require_text(value, what):
    """Return value if it is a text that can be written as UTF-8, else raise UserError."""
    if not isinstance(value, str):
        raise UserError(f"{what}: {json.dumps(value)[:40]} is no text; put it in quotes or remove the row")
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
    columns = find_columns(rows[0][1], mapping, name)
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


def write_conversations(path, conversations):
    """Write [(row number, conversation), ...] as JSONL that load_conversations reads."""
    rows = ({"row": number, "messages": messages} for number, messages in conversations)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- Prompts: one renderer, the tokenizer's chat template ------------------------------------------------------------
def render(tokenizer, messages, add_generation_prompt):
    """Render messages as text by the tokenizer's chat template; what the template refuses is a UserError."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the model's chat template refuses a conversation of {roles}: {error}") from None


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
    """Put stand-ins for the control tokens in users' texts, so that only the template's own are left after rendering."""
    pattern, stand_ins = control_tokens(tokenizer)
    return [
        message | {"content": pattern.sub(lambda found: stand_ins[found[0]], message["content"])}
        for message in messages
    ]


def encode(tokenizer, text, cuts=()):
    """Encode a rendered text; returns its ids and their (start, end) character offsets.

    The template's control tokens become control tokens; the users', of which stand-ins are left in the text, become
    plain text. No token spans a character position in `cuts`, where answers start: what stands before is encoded as it
    is when it stands alone, so that a prompt's ids are the same in training and at inference.
    """
    pattern, stand_ins = control_tokens(tokenizer)
    used = [token for token, stand_in in stand_ins.items() if stand_in in text]
    if used:
        ids, offsets = encode_around_control_tokens(
            tokenizer, text, pattern, {token: stand_ins[token] for token in used}
        )
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for cut in cuts:
        if any(start < cut < end for start, end in offsets):
            left_ids, left_offsets = encode(tokenizer, text[:cut], [c for c in cuts if c < cut])
            right_ids, right_offsets = encode(tokenizer, text[cut:], [c - cut for c in cuts if c > cut])
            return left_ids + right_ids, left_offsets + [(start + cut, end + cut) for start, end in right_offsets]
    return ids, offsets


def encode_around_control_tokens(tokenizer, text, pattern, stand_ins):
    """Encode the stretches between the template's control tokens as plain text, stand-ins turned back; as encode()."""
    ids, offsets, position = [], [], 0
    for found in [*pattern.finditer(text), None]:
        stretch = text[position : found.start() if found else len(text)]
        for token, stand_in in stand_ins.items():
            stretch = stretch.replace(stand_in, token)
        if stretch:
            encoded = tokenizer(
                stretch, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
            )
            ids += encoded["input_ids"]
            offsets += [(position + start, position + end) for start, end in encoded["offset_mapping"]]
        if found:
            ids.append(tokenizer.convert_tokens_to_ids(found[0]))
            offsets.append(found.span())
            position = found.end()
    return ids, offsets


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
            raise UserError(
                f"the model's chat template renders message {index + 1} differently once others follow, so the answer"
                " cannot be located; use single-turn rows, or a base model with another template"
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
        trained = [index for index, (begin, stop) in enumerate(offsets) if begin >= start and stop <= end]
        for index in trained:
            labels[index] = ids[index]
        last_start = min(trained, default=len(ids))
    return ids, labels, last_start


# ---- Examples --------------------------------------------------------------------------------------------------------
def fit_to_length(ids, labels, last_start, max_seq_length):
    """Cut an example to max_seq_length tokens; returns (ids, labels, status).

    The oldest part of the prompt goes first (after the first token, which is BOS). Only an answer that would leave less
    than a quarter of the length to its prompt loses its tail, and then gets no end token: the model must not learn to
    stop in mid-sentence.
    """
    if len(ids) <= max_seq_length:
        return ids, labels, "kept"
    keep_prompt = min(last_start, max_seq_length // 4)
    answer_end = min(len(ids), last_start + max_seq_length - keep_prompt)
    prompt_start = last_start - (max_seq_length - (answer_end - last_start)) + 1
    cut = slice(prompt_start, answer_end)
    status = "shortened" if answer_end == len(ids) else "answer_cut"
    return [ids[0], *ids[cut]], [labels[0], *labels[cut]], status


def check_example(tokenizer, example, end_id, where):
    """The promises made of every example: no doubled BOS, both kinds of label, a trained end token.

    Some templates (Llama 2's) write a BOS for each question, so only two in a row are wrong.
    """
    ids, labels, bos = example["input_ids"], example["labels"], tokenizer.bos_token_id
    trained = [label for label in labels if label != IGNORED]
    doubled = bos not in (None, end_id) and any(a == b == bos for a, b in pairwise(ids))
    assert not doubled, f"{where}: two BOS tokens in a row"
    assert 0 < len(trained) < len(ids), f"{where}: {len(trained)} of {len(ids)} tokens trained"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True)), f"{where}: labels differ"
    assert example["status"] == "answer_cut" or trained[-1] == end_id, f"{where}: the end token is not trained"


def tokenize_conversations(tokenizer, conversations, max_seq_length, source):
    """Turn [(row number, conversation), ...] into examples: dicts of input_ids, labels, row and status.

    Returns them and a report of what was kept, shortened, cut or dropped; `source` names the rows in it.
    """
    report = DataReport(source, len(conversations))
    end_token = find_end_token(tokenizer)
    end_id = tokenizer.convert_tokens_to_ids(end_token)
    examples = []
    for number, conversation in conversations:
        try:
            ids, labels, last_start = encode_conversation(tokenizer, conversation, end_token)
        except UserError as error:
            raise UserError(f"{source}, row {number}: {error}") from None
        ids, labels, status = fit_to_length(ids, labels, last_start, max_seq_length)
        if all(label == IGNORED for label in labels):
            report.drop("no trainable token", number)
            continue
        example = {"input_ids": ids, "labels": labels, "row": number, "status": status}
        check_example(tokenizer, example, end_id, f"{source}, row {number}")
        setattr(report, status, getattr(report, status) + 1)
        examples.append(example)
    if conversations and not examples:
        raise UserError(f"{report.line()}; nothing is left to train on, raise --max_seq_length")
    return examples, report


def mark_trained_tokens(tokenizer, example, start="[", end="]"):
    """Decode an example with its trained stretches between `start` and `end`, so that a user can check the mask."""
    pieces, stretch, trained = [], [], False
    for token, label in [*zip(example["input_ids"], example["labels"], strict=True), (None, None)]:
        if token is None or (label != IGNORED) != trained:
            text = tokenizer.decode(stretch)
            pieces.append(f"{start}{text}{end}" if trained else text)
            stretch, trained = [], label != IGNORED
        stretch.append(token)
    return "".join(pieces)


# ---- Batches: rows laid end to end -----------------------------------------------------------------------------------
def pack_rows(lengths, max_tokens):
    """Cut one optimizer step's rows into few passes of at most max_tokens tokens; returns lists of indices.

    First-fit decreasing. A row longer than max_tokens gets a pass of its own.
    """
    passes, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((p for p, free in enumerate(room) if lengths[index] <= free), None)
        if fitting is None:
            passes.append([])
            room.append(max_tokens)
            fitting = len(passes) - 1
        passes[fitting].append(index)
        room[fitting] -= lengths[index]
    return passes


def build_pass(rows):
    """Lay rows end to end, without padding, as one batch of size 1 for a causal LM.

    input_ids and position_ids have shape (1, tokens); positions restart at 0 with each row, which is how transformers'
    masks keep the rows apart (it needs attention_mask=None and use_cache=False; masking_utils.py). `predicting` holds
    the positions whose next token is trained, `targets` that token, `row_of_target` the row's index: (targets,) each.
    """
    ids, positions, predicting, targets, row_of_target = [], [], [], [], []
    for index, row in enumerate(rows):
        for position, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                predicting.append(len(ids) + position)
                targets.append(label)
                row_of_target.append(index)
        ids += row["input_ids"]
        positions += range(len(row["input_ids"]))
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "predicting": torch.tensor(predicting, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "row_of_target": torch.tensor(row_of_target, dtype=torch.long),
    }


def count_trained_tokens(rows):
    """Number of tokens whose prediction is trained: labels other than IGNORED, without a row's first token."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
