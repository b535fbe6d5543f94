"""Training checkpoints: torch.distributed.checkpoint folders that are either complete and checked, or do not exist.

`step-00000100/` holds the ranks' tensors (*.distcp, .metadata), `state.json` (step, token counts, data position, both
configs) and `manifest.json` (size and sha256 of every other file). A checkpoint is written under a temporary name,
synced and renamed, so a process killed at any moment leaves complete checkpoints and at most a temporary folder, which
the next run removes. Reading checks the manifest first: a damaged file is named and the checkpoint before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed.checkpoint as dcp

from dsv3.parallel.data import DataParallel

_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY, _DELETED, _DAMAGED = ".writing-", ".deleting-", "damaged-"
_MANIFEST, _STATE = "manifest.json", "state.json"

log = logging.getLogger(__name__)
State = dict[str, Any]  # nested dict of tensors
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint could not be written, or is not what it should be."""


def save(folder: Path, step: int, state: State, info: dict[str, Any], *, parallel: DataParallel, keep: int) -> Path:
    """Writes `state` (tensors) and `info` (JSON) as folder/step-<step>, then deletes all but the newest `keep`.

    Collective: every rank calls it. Raises CheckpointError on every rank when one of them could not write (a full disk,
    say); then nothing of the new checkpoint is left and the others are as they were.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    if parallel.is_first:
        _attempt(lambda: _make_empty(temporary))  # a folder that cannot be made fails in _write
    parallel.gather(None)
    outcomes = parallel.gather(_attempt(lambda: _write(temporary, state, info, parallel)))
    error = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
    if parallel.is_first:
        error = error or _attempt(lambda: _publish(temporary, final, outcomes, keep))
        if error:
            shutil.rmtree(temporary, ignore_errors=True)
    error = parallel.gather(error)[0]
    if error:
        raise CheckpointError(f"could not save {final}: {error}; earlier checkpoints are intact")
    return final


def complete(folder: Path) -> list[Path]:
    """The folder's finished checkpoints, newest first. Their files are not checked."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def holds_any(folder: Path) -> bool:
    """Whether there are finished checkpoints in the folder, damaged ones that were put aside included."""
    return bool(complete(folder)) or any(folder.glob(f"{_DAMAGED}step-*"))


def model_config(folder: Path) -> dict[str, Any] | None:
    """The model's config in the newest checkpoint that has one to read, other files unchecked; None without such."""
    for checkpoint in complete(folder):
        try:
            return json.loads((checkpoint / _STATE).read_text())["config"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the first bad one; None when every checksum agrees."""
    if not checkpoint.is_dir():
        return f"no such folder: {checkpoint}"
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        for name, expected in files.items():
            path = checkpoint / name
            size = path.stat().st_size if path.is_file() else None
            if size != expected["bytes"]:
                return f"{path} should have {expected['bytes']} bytes and has {size or 'none'}"
            if _sha256(path) != expected["sha256"]:
                return f"{path} does not match its checksum"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{checkpoint / _MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def latest(folder: Path, *, parallel: DataParallel, report: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint whose files are all intact, or None. Collective; the first rank checks.

    Leftovers of killed runs are removed. A damaged checkpoint is reported, naming the file, and put aside as
    `damaged-step-...`, so that it does not count as one of those to keep.
    """
    return parallel.first(lambda: _latest(folder, report))


def _latest(folder: Path, report: Callable[[str], None]) -> Path | None:
    for leftover in [*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_DELETED}*")]:
        shutil.rmtree(leftover)
    for checkpoint in complete(folder):
        trouble = problem(checkpoint)
        if trouble is None:
            return checkpoint
        aside = folder / f"{_DAMAGED}{checkpoint.name}"
        while aside.exists():  # of an earlier checkpoint of this step
            aside = aside.with_name(f"{aside.name}-again")
        checkpoint.rename(aside)
        report(f"damaged checkpoint: {trouble}; put aside as {aside.name}, trying the one before it")
    return None


def find(path: Path) -> Path:
    """`path` itself if it is a checkpoint, or the newest one in it. Raises CheckpointError if there is none."""
    if (path / _MANIFEST).is_file():
        return path
    found = complete(path) if path.is_dir() else []
    if not found:
        raise CheckpointError(f"expected a training checkpoint (step-...) at {path}, found none")
    return found[0]


def check(checkpoint: Path) -> None:
    """Reads all of a checkpoint. Raises CheckpointError, which names one beside it that is, if it is not intact."""
    trouble = problem(checkpoint)
    if trouble is not None:
        others = (c for c in complete(checkpoint.parent) if c != checkpoint and problem(c) is None)
        intact = next((f"; {other} is intact" for other in others), "")
        raise CheckpointError(f"{checkpoint} is not a usable training checkpoint: {trouble}{intact}")


def read_info(checkpoint: Path) -> dict[str, Any]:
    """The `info` of `save`, its file unchecked. Raises CheckpointError if there is none to read."""
    try:
        return json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a usable training checkpoint: {error}") from error


def load(checkpoint: Path, state: State, *, parallel: DataParallel) -> None:
    """Reads the tensors named in `state` into them, in place.

    Raises CheckpointError if one is missing or has another shape.
    """
    try:
        with _quiet():
            dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=parallel.world == 1)
    except (Exception, dcp.api.CheckpointException) as error:
        parallel.gather(None)  # fails where a rank is gone, which is another matter
        raise CheckpointError(f"{checkpoint} does not fit this run: {_reason(error)}") from None


def stored_names(checkpoint: Path) -> set[str]:
    """Names of the tensors in a checkpoint, nested keys joined with dots."""
    return set(dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def _write(temporary: Path, state: State, info: dict[str, Any], parallel: DataParallel) -> dict[str, Any]:
    """Writes this rank's files and returns their manifest entries."""
    with _quiet():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), no_dist=parallel.world == 1)
    mine = list(temporary.glob(f"__{parallel.rank}_*"))
    if parallel.is_first:
        _write_synced(temporary / _STATE, json.dumps(info, indent=1))
        mine += [temporary / _STATE, temporary / ".metadata"]
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in mine}


def _publish(temporary: Path, final: Path, manifests: list[dict[str, Any]], keep: int) -> None:
    """Completes the checkpoint, gives it its name and deletes the oldest ones."""
    files = {name: entry for part in manifests for name, entry in sorted(part.items())}
    _write_synced(temporary / _MANIFEST, json.dumps({"files": files}, indent=1))
    _sync_folder(temporary)
    if final.exists():
        _delete(final)
    temporary.rename(final)
    _sync_folder(final.parent)
    for old in complete(final.parent)[keep:]:
        if error := _attempt(lambda old=old: _delete(old)):
            log.warning("an old checkpoint could not be deleted: %s", error)


def _delete(checkpoint: Path) -> None:
    """Renames before deleting, so that no half-deleted folder bears a checkpoint's name."""
    doomed = checkpoint.with_name(_DELETED + checkpoint.name)
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _attempt(work: Callable[[], T]) -> T | str:
    """What `work` returns, or why it failed in one line."""
    try:
        return work()
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
        return _reason(error)


def _reason(error: BaseException) -> str:
    """The root of an error in one line: torch wraps the errors of ranks, and its zip writer those of the disk."""
    failures = list(getattr(error, "failures", {}).values())
    root: BaseException | None = failures[0][0] if failures else error
    last = root
    while root is not None and not isinstance(root, OSError):
        last, root = root, root.__cause__ or root.__context__
    if root is not None:
        return "the disk is full" if root.errno in (errno.ENOSPC, errno.EDQUOT) else str(root)
    lines = [line for line in str(last).splitlines() if line.strip()] or [type(last).__name__]
    return lines[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _quiet(warnings.catch_warnings):
    """Hides torch's remark that a process on its own is assumed, which is meant."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
