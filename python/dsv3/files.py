"""Files that are complete or not there."""

from __future__ import annotations

import contextlib
import os
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
