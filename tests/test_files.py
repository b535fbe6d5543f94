"""Files that are complete or not there; on a disk that fills up: test_bad_input.py."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from dsv3 import files
from dsv3.files import put_back, replace_folder, write_whole


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


def folder_of(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "text").write_text(text)
    return path


def test_a_folder_is_the_old_or_the_new_one_at_every_moment(tmp_path: Path) -> None:
    target, done, missed = folder_of(tmp_path / "a", "0"), threading.Event(), []

    def look() -> None:
        while not done.is_set():
            if not target.exists():
                missed.append(target)

    reader = threading.Thread(target=look)
    reader.start()
    for turn in range(1, 200):
        replace_folder(folder_of(tmp_path / "b", str(turn)), target)
        assert (target / "text").read_text() == str(turn)
    done.set()
    reader.join()
    assert not missed
    assert list(tmp_path.iterdir()) == [target]


def test_where_names_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames; what stops between them is undone, there or by whoever comes next."""
    monkeypatch.setattr(files, "_exchange", lambda *names: False)
    target = tmp_path / "a"
    replace_folder(folder_of(tmp_path / "b", "first"), target)
    replace_folder(folder_of(tmp_path / "b", "second"), target)
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "none", target)
    assert (target / "text").read_text() == "second"
    target.rename(tmp_path / ".a.replaced")  # killed there
    for _ in range(2):
        put_back(target)
        assert (target / "text").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]
