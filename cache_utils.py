"""Folders that are built once and found again by a key of everything that shaped them."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

CACHED_FOLDERS = 8  # of each kind and of the newest use; older ones are removed
SIZES = "sizes.json"


def digest(text, size=16):
    """A short hash of a text, `size` bytes."""
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


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


def hash_files(paths, *parts):
    """The sha256 of files' contents, one after the other, behind further texts if there are any; in hex digits."""
    found = hashlib.sha256(json.dumps(parts).encode() if parts else b"")
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()
