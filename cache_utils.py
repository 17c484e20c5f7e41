"""Folders that are built once and found again by a key of everything that shaped them."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

CACHED_FOLDERS = 8  # of each kind and of the newest use; older ones are removed


def digest(text, size=16):
    """A short hash of a text, `size` bytes."""
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def cached_folder(cache_dir, kind, key, build):
    """Return cache_dir/<kind>-<key>, filled by build(folder) unless it is there; it appears only when complete.

    The folders that were used least lately are removed.
    """
    target = Path(cache_dir) / f"{kind}-{key[:24]}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".incomplete", dir=cache_dir))
        try:
            build(staged)
            if not target.is_dir():  # another process may have been quicker
                os.replace(staged, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        kept = sorted(target.parent.glob(f"{kind}-*"), key=lambda folder: folder.stat().st_mtime)
        for old in kept[:-CACHED_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)
    os.utime(target)
    return target


def hash_files(paths, *parts):
    """A hash of files' contents and of further texts."""
    found = hashlib.sha256(json.dumps(parts).encode())
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()
