"""A file of prompts and their answers, which are kept as they come, so that a run that was killed goes on."""

import contextlib
import json
from pathlib import Path

from filelock import FileLock, Timeout

from data_utils import read_unanswered, unanswered
from encoding_utils import encode_prompt
from file_utils import display_path, sha256, storage_errors, whole_file
from generation_utils import build_generation_config, generate_replies, prompt_limit
from message_utils import Stopped, UserError, counted, say
from progress_utils import progress
from prompt_utils import begin_with

REPLY_KEYS = ("reply", "ended", "tokens")  # what is written beside the columns of a row
# The settings that answers depend on
SHAPING = (
    *("base_model_name", "use_4bit_quantization", "use_fp16", "max_new_tokens", "do_sample"),
    *("temperature", "top_p", "repetition_penalty", "seed"),
)


def answer_file(model, tokenizer, settings, adapter_path, rows, target):
    """Answer the rows of a file, and write them to `target` with their answers, in their order, once all are there.

    rows: as read_prompts returns them. A row of the target:
    {"instruction": "Hi", "reply": "Hello!", "ended": true, "tokens": 3}. Until it is whole, each answer is kept in a
    Journal beside it as it comes. adapter_path: the adapter's folder, None for the base model alone.
    """
    prompts = build_prompts(model, tokenizer, settings, rows)
    identity = {"input": sha256([to_json(prompts)]), "adapter": adapter_identity(adapter_path)}
    identity |= {name: getattr(settings, name) for name in SHAPING}
    with Journal(target.with_name(f"{target.name}.unfinished"), identity) as journal:
        missing = [index for index in range(len(rows)) if index not in journal.replies]
        if len(missing) < len(rows):
            say(f"Going on: {len(journal.replies):,} of {counted(len(rows), 'answer')} found")
        try:
            answer_missing(model, tokenizer, settings, prompts, missing, journal)
        except (KeyboardInterrupt, Stopped):
            say(f"\n{len(journal.replies):,} of {counted(len(rows), 'answer')} kept; the same command goes on")
            raise
        if target.exists():
            raise UserError(
                f"{display_path(target)} has come to exist meanwhile; move it away, and the same command writes all"
                " answers there"
            )
        kept = "all answers are kept; mend that, and the same command writes them there"
        with storage_errors("the file of answers", kept), whole_file(target) as file:
            file.writelines(to_json(row | journal.replies[index]) + "\n" for index, (_, row, _) in enumerate(rows))
        journal.remove()
    ended = sum(reply["ended"] for reply in journal.replies.values())
    cut = f", {len(rows) - ended:,} cut at {counted(settings.max_new_tokens, 'token')}" if ended < len(rows) else ""
    say(f"{counted(len(rows), 'answer')}, {ended:,} ended by the model{cut}. Written to {display_path(target)}")


def answer_missing(model, tokenizer, settings, prompts, missing, journal):
    """Answer the prompts with the indexes `missing`, and keep each answer in the journal."""
    with progress("Answering", len(prompts), "prompts", done=len(journal.replies)) as bar:

        def keep(replies):
            journal.add({missing[number]: reply for number, reply in replies.items()})
            bar.update(len(replies))

        generation = build_generation_config(tokenizer, settings)
        unanswered_yet = [prompts[index] for index in missing]
        generate_replies(model, tokenizer, unanswered_yet, generation, on_replies=keep, numbers=missing)


def read_prompts(source, columns, cache_dir):
    """[(where it stands, the row as it was given, its messages)] of a file; UserError for a row without a question.

    It needs no model, so that a mistake in the file is told before one is loaded. columns: DATASET_COLUMNS.
    """
    rows = []
    with progress("Reading prompts", unit="prompts") as bar:
        for number, row, conversation in read_unanswered(source, columns, cache_dir):
            where = f"dataset {source}, row {number}"
            if taken := [key for key in REPLY_KEYS if key in row]:
                raise UserError(f"{where}: a column {taken[0]!r}, where the answer is to be written; rename it")
            rows.append((where, row, conversation))
            bar.update()
    return rows


def build_prompts(model, tokenizer, settings, rows):
    """Of each row that read_prompts found the messages that the model is to answer.

    Raises UserError for the first row that it cannot answer: with a text that the template refuses, or longer than the
    context.
    """
    limit = prompt_limit(model, settings.max_new_tokens)
    prompts = []
    with progress("Checking prompts", len(rows), "prompts") as bar:
        for where, _, conversation in rows:
            prompts.append(unanswered(begin_with(settings.system_prompt, conversation)))
            check_prompt(tokenizer, prompts[-1], limit, where)
            bar.update()
    return prompts


def check_prompt(tokenizer, prompt, limit, where):
    """Raise UserError for a prompt that the template refuses, or of more than `limit` tokens."""
    try:
        tokens = len(encode_prompt(tokenizer, prompt))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if tokens > limit:
        raise UserError(
            f"{where}: a prompt of {counted(tokens, 'token')}, and the model's context has room for {limit:,} beside"
            " the answer; shorten it, or lower --max_new_tokens"
        )


def adapter_identity(adapter_path):
    """A hash of an adapter's weights, configuration, tokenizer and template; None for the base model alone."""
    if adapter_path is None:
        return None
    names = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja")
    return sha256(path for path in (adapter_path / name for name in names) if path.is_file())


def to_json(value):
    """A value as JSON in one line, readable where it can be written as UTF-8."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a column that is no prompt
        return json.dumps(value, default=str)
    return text


class Journal:
    """The answers so far to a file of prompts: a JSON line each, behind one that says what they are answers to.

    replies: {index of the row: {"reply", "ended", "tokens"}}. One process at a time writes it.
    """

    def __init__(self, path, identity):
        """Raises UserError if the file at `path` holds answers to another input, or given with other settings."""
        self.path, self.replies = path, {}
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a link" if path.is_symlink() else "no file"
            raise UserError(
                f"{display_path(path)} is {kind}, expected a file of answers so far; move it away, or give another"
                " --output_file"
            )
        self.lock = FileLock(f"{path}.lock", blocking=False)
        try:
            self.lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is writing {display_path(path)}; wait for it, or name another --output_file"
            ) from None
        try:
            whole = self.read(identity) if path.exists() else 0
        except UserError:
            self.unlock()
            raise
        self.file = open(path, "ab")  # noqa: SIM115 - open as long as this object lives
        self.file.truncate(whole)  # without the line that was being written when the process was killed
        if not whole:
            self.write([identity])

    def read(self, identity):
        """Read the answers of an earlier process; returns how many bytes its whole lines have."""
        first, *lines = self.path.read_bytes().splitlines(keepends=True) or [b""]
        begun = parse_line(first)
        if begun is None:
            return 0
        changed = [name for name in identity if begun.get(name, "unknown") != identity[name]]
        if changed:
            what = ", ".join(describe_change(name, begun.get(name, "unknown"), identity[name]) for name in changed)
            raise UserError(
                f"{display_path(self.path)} holds answers of an unfinished run, which had {what}; give the same again,"
                " or remove that file to begin anew"
            )
        whole = len(first)
        for line in lines:
            entry = parse_line(line)
            if entry is None or {"index", *REPLY_KEYS} != entry.keys():
                break
            self.replies[entry.pop("index")] = entry
            whole += len(line)
        return whole

    def add(self, replies):
        """Keep {index of a row: its Reply}, all or none of them."""
        more = {
            index: {"reply": reply.text, "ended": reply.ended, "tokens": reply.tokens}
            for index, reply in replies.items()
        }
        self.replies |= more
        self.write([{"index": index} | reply for index, reply in more.items()])

    def write(self, entries):
        with storage_errors(display_path(self.path), "mend that, and the same command goes on"):
            self.file.write(b"".join(to_json(entry).encode() + b"\n" for entry in entries))
            self.file.flush()

    def remove(self):
        self.file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):  # a full disk refuses once more what was said to be refused
            self.file.close()
        self.unlock()

    def unlock(self):
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()


def parse_line(line):
    """The object of a whole line, or None for one that was torn."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if line.endswith(b"\n") and isinstance(entry, dict) else None


def describe_change(name, begun, now):
    """'another adapter', or 'temperature 0.7 and not 0.3'."""
    return f"another {name}" if name in ("input", "adapter") else f"{name} {begun!r} and not {now!r}"
