"""Files that are complete or not there; on a disk that fills up: test_bad_input.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dsv3.files import write_whole


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "a.json", os.replace
    write_whole(path, "old")
    seen = []
    monkeypatch.setattr(os, "replace", lambda *names: seen.append(path.read_bytes()) or replace(*names))
    write_whole(path, "né".encode() + b"\xff")
    assert (seen, path.read_bytes()) == ([b"old"], b"n\xc3\xa9\xff")
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match=f"could not write {path}: Is a directory"):
        write_whole(path, "text")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"could not write .*none/a: No such file or directory"):
        write_whole(tmp_path / "none" / "a", "text")
