"""Files and folders that are whole or absent: paths, records, staged and cached folders, hashes, disk space."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from message_utils import STORAGE_ERRORS, UserError

# ---- Paths -----------------------------------------------------------------------------------------------------------


PROJECT_DIR = Path(__file__).resolve().parent


def resolve_path(path):
    """Anchor a relative path at the project's folder, so that scripts work from any folder; ~ is expanded."""
    return (PROJECT_DIR / Path(path).expanduser()).resolve()


def display_path(path):
    """The path as a user would type it: relative to the project's folder where it lies inside."""
    path = Path(path)
    return str(path.relative_to(PROJECT_DIR)) if path.is_relative_to(PROJECT_DIR) else str(path)


def check_writable(folder, flag):
    """Raise UserError unless the folder, or the nearest one above it that exists, can be written to."""
    nearest = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{display_path(nearest)} cannot be written to; choose another folder with {flag}")


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_json(path, value):
    """Write value as readable JSON, by a temporary file and a rename, so that a reader never meets half a file."""
    staged = Path(f"{path}.tmp")
    staged.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_file(staged)
    os.replace(staged, path)


def read_json(path, what):
    """Read a JSON object that a run of ours wrote; `what` names it in the message if it is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {display_path(path)} cannot be read ({error}); train again or restore it") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} {display_path(path)} holds no JSON object; train again or restore it")
    return value


def sync_file(path):
    """Wait until a file's content is on the disk, so that a power cut cannot take it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder):
    """The same for the names in a folder; Windows keeps no such promise and offers no such call."""
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def make_readable(folder):
    """Give a folder's files the usual permissions; safetensors writes weights that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


# ---- Folders that appear only when they are whole --------------------------------------------------------------------


@contextmanager
def staged_folder(target):
    """Yield an empty folder to fill beside target; it takes target's name only if nothing failed."""
    staged = target.with_name(target.name + ".incomplete")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    make_readable(staged)
    for path in staged.iterdir():
        sync_file(path)
    sync_folder(staged)
    os.replace(staged, target)
    sync_folder(target.parent)


CACHED_FOLDERS = 8  # of each kind and of the newest use; older ones are removed


SIZES = "sizes.json"


def cached_folder(cache_dir, kind, key, build):
    """Return cache_dir/<kind>-<key>, filled by build(folder) unless it is there; it appears only when complete.

    The folders that were used least lately are removed. A build that fails leaves nothing, not even cache_dir.
    """
    target = Path(cache_dir) / f"{kind}-{key[:24]}"
    if not is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".incomplete", dir=cache_dir))
        try:
            build(staged)
            (staged / SIZES).write_text(json.dumps(file_sizes(staged)), encoding="utf-8")
            os.replace(staged, target)
        except OSError:
            if not target.is_dir():  # else another process was quicker
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            with suppress(OSError):  # those that hold something stay
                for folder in made:
                    folder.rmdir()
        for old in sorted(target.parent.glob(f"{kind}-*"), key=last_use)[:-CACHED_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
    os.utime(target)
    return target


def is_whole(folder):
    """Whether a folder is there with all that was written to it: a power cut can leave files short."""
    try:
        return json.loads((folder / SIZES).read_text(encoding="utf-8")) == file_sizes(folder)
    except (OSError, ValueError):
        return False


def file_sizes(folder):
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != SIZES}


def last_use(folder):
    """When a folder was last used; 0 if another process has just removed or renamed it."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0


# ---- Hashes ----------------------------------------------------------------------------------------------------------


def digest(text, size=16):
    """A short hash of a text, `size` bytes."""
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def hash_files(paths, *parts):
    """The sha256 of files' contents, one after the other, behind further texts if there are any; in hex digits."""
    found = hashlib.sha256(json.dumps(parts).encode() if parts else b"")
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()


SHOWN_DIGITS = 12  # of a hash: enough to tell two apart, short enough for one line


def short_hash(content):
    """The first digits of a text's or bytes' sha256."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:SHOWN_DIGITS]


# ---- Disk space ------------------------------------------------------------------------------------------------------


def check_space(folder, needed, what, consequence):
    """Raise UserError unless the disk of a folder, or of the nearest above it that exists, has the needed bytes."""
    nearest = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise UserError(
            f"{free / 2**20:,.0f} MiB free on the disk of {display_path(folder)}, {what} needs"
            f" {needed / 2**20:,.0f} MiB; {consequence}"
        )


def storage_problem(error):
    """Say what the disk refused, if that is what an exception tells of, else None.

    The libraries' writers in C++ and Rust raise exceptions of other types that quote the system's words.
    """
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in STORAGE_ERRORS else None
    for number in STORAGE_ERRORS:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return "it could not be written" if "PytorchStreamWriter" in str(error) else None


@contextlib.contextmanager
def saving(what, consequence):
    """Turn a disk's refusal while something is saved into one line; other errors are ours and stay as they are."""
    try:
        yield
    except Exception as error:
        problem = storage_problem(error)
        if problem is None:
            raise
        raise UserError(f"{what} could not be saved: {problem}; {consequence}") from error
