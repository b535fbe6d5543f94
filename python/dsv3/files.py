"""Files and folders that are complete or not there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it, which then takes its place: who reads it meanwhile, or finds it after a
    kill, has the old one or the new one. Raises OSError that names `path`, and leaves nothing, where there is no room."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error.strerror}") from error


def leftover_of(name: str) -> str | None:
    """What a file or folder was to be called, or had been, that a process killed while it wrote has left under `name`."""
    found = re.fullmatch(r"\.(.+)\.(?:\d+|saving|replaced)", name)
    return found and found[1]


def replace_folder(fresh: Path, target: Path) -> None:
    """`fresh` takes the name of `target`, and an older folder of that name goes: at every moment the name is the old one's or
    the new one's. Where the file system cannot exchange two names it is nobody's between two renames; `put_back` then mends
    what a process killed there has left. Raises OSError with `target` as it was."""
    old = _moved(target)
    if not target.exists():
        fresh.rename(target)
    elif _exchange(fresh, target):
        old = fresh
    else:
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        try:
            fresh.rename(target)
        finally:
            put_back(target)
    shutil.rmtree(old, ignore_errors=True)


def put_back(target: Path) -> None:
    """Gives a folder its name again that `replace_folder` took from it and did not live to give to another."""
    if _moved(target).exists() and not target.exists():
        _moved(target).rename(target)


def _moved(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; whether system and file system can (renameat2(2), which many network file systems lack)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
