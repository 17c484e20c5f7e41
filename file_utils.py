"""Files and folders that are whole or absent: paths, JSON files, folders, a cache, hashes, disk space."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import zlib
from functools import partial
from pathlib import Path

from message_utils import STORAGE_ERROR_NUMBERS, UserError
from script_utils import BEGUN, STOPPING, SignalHandlers

READ_BYTES = 2**18  # of a file that is hashed, at once


# ---- Paths -----------------------------------------------------------------------------------------------------------
PROJECT_DIR = Path(__file__).resolve().parent


def resolve_path(path):
    """Anchor a relative path at the project's folder, so that scripts work from any folder; ~ is expanded.

    Raises UserError for what is no path: an unknown user's home, an address, a NUL character, links that lead round in
    a circle.
    """
    try:
        return (PROJECT_DIR / expand_home(path)).resolve()
    except RuntimeError:  # before Python 3.13
        raise UserError(f"{path} is a link that leads back to itself; correct it") from None


def expand_home(path):
    """The path with its ~ or ~name expanded; UserError if the system knows no such user, and for what is no path."""
    if "\0" in str(path):
        raise UserError(f"{path} holds a NUL character, which no name has; correct it")
    if re.match(r"\w[\w+.-]+:/", str(path)):  # s3://bucket would become a folder of that name
        raise UserError(
            f"{path} is an address, expected a file or folder of this machine; download it, or give a model or dataset"
            " of the Hub by its name, such as team/name"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path} names the home of a user that this machine does not know; write it out") from None


def resolve_input(path):
    """A file that a run reads: looked for where the user stands, and if it is not there in the project's folder."""
    with contextlib.suppress(FileNotFoundError):  # the folder of the shell was deleted
        here = expand_home(path).absolute()
        if here.exists():
            file = here.resolve()
            return file if file.exists() else here  # a pipe, such as a shell's <(...), has no other name
    return resolve_path(path)


def display_path(path):
    """The path as a user would type it: relative to the project's folder where it lies inside."""
    path = Path(path)
    return str(path.relative_to(PROJECT_DIR)) if path.is_relative_to(PROJECT_DIR) else str(path)


def nearest_existing(folder):
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in [folder, *folder.parents] if parent.exists())


def check_writable(folder, flag):
    """Raise UserError unless the folder can be written to, or made in the nearest folder above it that exists."""
    nearest = nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{display_path(nearest)} cannot be written to; choose another folder with {flag}")


# ---- Files -----------------------------------------------------------------------------------------------------------
def write_json(path, value):
    """Write value as readable JSON. A temporary file and a rename make sure that a reader never meets half a file."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole_file(path):
    """Yield a text file to write. Afterwards it is on the disk under the name `path`; if this fails, nothing changes.

    Until then it has ".tmp" behind its name. A link that lies there, or under the name itself, is not followed.
    """
    unfinished = Path(f"{path}.tmp")
    unfinished.unlink(missing_ok=True)
    try:
        with open(unfinished, "x", encoding="utf-8", newline="\n") as file:
            yield file
        put_in_place(unfinished, Path(path))
    except BaseException as error:
        # a disk that is full does not say of which file, and the unfinished one's name is not what the user gave
        if isinstance(error, OSError) and error.filename in (None, str(unfinished)):
            error.filename = str(path)
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def put_in_place(unfinished, path):
    """Give a written file its name, once its content is on the disk."""
    sync_file(unfinished)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def read_json(path, what):
    """Read a JSON object that this project wrote. `what` names it in the UserError that is raised if it is damaged."""
    if os.path.lexists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
        raise UserError(f"{what} {display_path(path)} is no file; move away what lies there, and restore it")
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{what} {display_path(path)} cannot be read ({error}); train again or restore it") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {display_path(path)} holds no JSON object; train again or restore it")
    return value


def read_json_if_any(path, what):
    """As read_json, and {} where nothing lies under that name."""
    return read_json(path, what) if os.path.lexists(path) else {}


def sync_file(path):
    """Wait until a file's content is on the disk, so that a power cut cannot take it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder):
    """Wait until the names in a folder are on the disk. Windows has no such call and gives no such guarantee."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def files_in(folder):
    """The files in a folder and in the folders inside it, sorted: some tokenizers save a folder of chat templates."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def make_readable(folder):
    """Give a folder's files the usual permissions; safetensors writes weights that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in files_in(folder):
        path.chmod(0o666 & ~umask)


# ---- Folders that appear only when they are whole --------------------------------------------------------------------
@contextlib.contextmanager
def staged_folder(target, staged=None):
    """Yield an empty folder to fill. Afterwards it is on the disk under the name `target`, or removed if this failed.

    Until then it has another name, `staged`, by default the target's with ".incomplete" behind it. Nothing takes a
    folder of that name for a whole one, so that a process that is killed in here leaves nothing that counts; the next
    attempt removes what is left. If the target exists already it must be empty.
    """
    staged = staged or target.with_name(f"{target.name}.incomplete")
    remove(staged)
    undo = partial(remove, staged)
    BEGUN.append(undo)
    try:
        staged.mkdir(parents=True)
        yield staged
        make_readable(staged)
        for path in files_in(staged):
            sync_file(path)
        sync_folder(staged)
        os.replace(staged, target)
        sync_folder(target.parent)
    except BaseException:  # also for a signal, of which a further one must not disturb the removing
        with SignalHandlers(STOPPING, lambda number, frame: None):
            remove(staged)
        raise
    finally:
        BEGUN.remove(undo)


CACHED_FOLDERS = 8  # of each kind are kept, those that were used last
CONTENTS = "contents.json"
LEFT_BEHIND = 3600  # seconds without a write after which an unfinished cached folder is a killed process's


def cached_folder(cache_dir, kind, key, build):
    """Return the folder cache_dir/<kind>-<key>, after filling it by build(folder) if it is not there, or was damaged.

    If build fails, nothing is left, not even a cache_dir that was made for it. Afterwards at most CACHED_FOLDERS of
    this kind are kept.
    """
    target = Path(cache_dir) / f"{kind}-{key[:24]}"
    if not is_complete(target):
        remove(target)
        made = [folder for folder in target.parents if not folder.exists()]
        # a name of its own, because another process may be building the same folder
        staged = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.incomplete")
        try:
            with staged_folder(target, staged):
                build(staged)
                (staged / CONTENTS).write_text(json.dumps(file_contents(staged)), encoding="utf-8")
        except OSError:
            if not target.is_dir():  # if it is there, another process was quicker
                raise
        finally:
            for folder in made:
                with contextlib.suppress(OSError):  # a folder that is not empty stays
                    folder.rmdir()
        remove_oldest(target.parent.glob(f"{kind}-*"))
    os.utime(target)
    return target


def remove_oldest(folders):
    """Remove all but the CACHED_FOLDERS that were used last, and unfinished ones that nobody fills any more."""
    folders = sorted(folders, key=last_use)
    unfinished = [folder for folder in folders if folder.name.endswith(".incomplete")]
    written = [max(map(last_use, [folder, *files_in(folder)])) for folder in unfinished]
    left = [folder for folder, at in zip(unfinished, written, strict=True) if time.time() - at > LEFT_BEHIND]
    for folder in left + [folder for folder in folders if folder not in unfinished][:-CACHED_FOLDERS]:
        remove(folder)


def remove(path):
    """Remove a folder with all that it holds, or whatever else lies there in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def last_use(path):
    """When a cached folder was last used, in seconds; 0 if another process has just removed or renamed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0


def is_complete(folder):
    """Whether a cached folder holds its files as they were written."""
    try:
        return json.loads((folder / CONTENTS).read_text(encoding="utf-8")) == file_contents(folder)
    except (OSError, ValueError, RecursionError):
        return False


def file_contents(folder):
    """{name: [bytes, checksum]} of the files in a cached folder; crc32 reads a gigabyte in a second or less."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)]
        for path in files_in(folder)
        if path.name != CONTENTS
    }


def checksum(path):
    """The crc32 of a file: it tells damage, not intent."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            found = zlib.crc32(block, found)
    return found


# ---- Hashes ----------------------------------------------------------------------------------------------------------
SHOWN_DIGITS = 12  # of a hash: enough to tell two contents apart, short enough for one line


def sha256(pieces):
    """The sha256, as 64 hex digits, of pieces (an iterable of them) one after the other.

    A piece is bytes (or what has a buffer of bytes), a text, which counts as UTF-8, or a Path, which stands for the
    content of its file. Where one piece ends and the next begins does not change the hash.
    """
    found = hashlib.sha256()
    for piece in pieces:
        if isinstance(piece, Path):
            with open(piece, "rb") as file:
                while block := file.read(READ_BYTES):
                    found.update(block)
        else:
            found.update(piece.encode() if isinstance(piece, str) else piece)
    return found.hexdigest()


def short_hash(piece):
    """The first SHOWN_DIGITS of a piece's sha256, by which messages and records name a content."""
    return sha256([piece])[:SHOWN_DIGITS]


def digest(text, size=16):
    """A short blake2b hash of a text, as `size` bytes, for comparing many texts."""
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


# ---- Disk space ------------------------------------------------------------------------------------------------------
def check_space(folder, needed, what, consequence):
    """Raise UserError unless the disk of a folder, which need not exist yet, has `needed` bytes left for `what`."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < needed:
        raise UserError(
            f"{free / 2**20:,.0f} MiB free on the disk of {display_path(folder)}, {what} needs"
            f" {needed / 2**20:,.0f} MiB; {consequence}"
        )


LEFT_FREE = 2**30  # bytes of a disk, or a twentieth of a small one, that rows are not let fill
LOOK_EVERY = 2**20  # bytes written between two looks at the disk


class DiskWatch:
    """Called with the bytes of rows that were written so far, it raises UserError before they fill the disk.

    A small Parquet file whose rows share a long text may unpack to more than any disk holds.
    """

    def __init__(self, folder):
        self.folder, self.due = folder, LOOK_EVERY

    def __call__(self, written):
        if written < self.due:
            return
        self.due = written + LOOK_EVERY
        disk = shutil.disk_usage(self.folder)
        if disk.free < min(LEFT_FREE, disk.total // 20):
            shown = self.folder.parent if self.folder.suffix == ".incomplete" else self.folder
            raise UserError(
                f"the rows take more than {written / 2**20:,.0f} MiB on the disk of {display_path(shown)}, of which"
                f" {disk.free / 2**20:,.0f} MiB are left; give fewer or shorter rows, or a folder on a larger disk with"
                " --output_dir"
            )


def storage_problem(error):
    """The words in which a disk refused to write, if an exception tells of that, else None.

    The libraries' writers in C++ and Rust raise exceptions of other types. Most of them quote the system's words, but
    torch.save names only its own source file, inline_container.cc.
    """
    if isinstance(error, OSError):
        where = f": {display_path(os.fsdecode(error.filename))}" if isinstance(error.filename, (str, bytes)) else ""
        return f"{os.strerror(error.errno)}{where}" if error.errno in STORAGE_ERROR_NUMBERS else None
    for number in STORAGE_ERROR_NUMBERS:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return "it could not be written" if "inline_container" in str(error) else None


@contextlib.contextmanager
def storage_errors(what, consequence):
    """Turn the error of a disk that refuses to write `what` into a UserError; other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        problem = storage_problem(error)
        if problem is None:
            raise
        raise UserError(f"{what} could not be saved: {problem}; {consequence}") from error
