"""Checkpoint folders: complete or absent, checked when read, damaged files named, pruned, safe on a full disk."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv3.parallel.data import DataParallel
from dsv3.train import checkpoint
from dsv3.train.checkpoint import CheckpointError

ALONE = DataParallel()


def state(value: float) -> checkpoint.State:
    flat = torch.full((4096,), value)  # the tensors saved are views of a longer one, as in training
    return {"master": {"a.weight": flat[:6].view(2, 3), "b": flat[64:65]}, "step_count": torch.tensor(value)}


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save(folder, step, state(step), {"step": step}, parallel=ALONE, keep=keep)


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return checkpoint.latest(folder, parallel=ALONE, report=said.append), said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") == (None, [])
    for step in (1, 2, 10, 100):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    found, said = latest(tmp_path)
    assert found == tmp_path / "step-00000100"
    assert said == []
    loaded = state(0)
    checkpoint.load(found, loaded, parallel=ALONE)
    assert loaded["master"]["a.weight"].tolist() == [[100.0] * 3] * 2
    assert loaded["master"]["b"].tolist() == [100.0]
    assert float(loaded["step_count"]) == 100
    assert checkpoint.read_info(found) == {"step": 100}
    assert checkpoint.stored_names(found) == {"master.a.weight", "master.b", "step_count"}
    stored = sum(path.stat().st_size for path in found.glob("*.distcp"))
    assert stored < 4096 * 4, "a view must not drag its whole buffer along"


def test_an_old_one_that_cannot_be_deleted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(old: Path) -> None:
        raise PermissionError(f"{old} is in use")

    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(checkpoint, "_delete", refuse)
    assert save(tmp_path, 2, keep=1) == latest(tmp_path)[0] == tmp_path / "step-00000002"
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert "an old checkpoint could not be deleted" in caplog.text


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    checkpoint.save(tmp_path, 5, state(7), {"step": 5}, parallel=ALONE, keep=3)
    loaded = state(0)
    checkpoint.load(tmp_path / "step-00000005", loaded, parallel=ALONE)
    assert float(loaded["step_count"]) == 7
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json", "manifest.json"])
def test_damage_is_named_and_the_one_before_used(tmp_path: Path, file: str, damage: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    path = tmp_path / "step-00000002" / file
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        position = content.index(b'"sha256": "') + 12 if file == "manifest.json" else len(content) // 2
        content[position] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="is not a usable training checkpoint"):
        checkpoint.check(tmp_path / "step-00000002")
    found, said = latest(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(said) == 1
    # a flipped bit inside the manifest is a file and a checksum that disagree, whichever of the two was hit
    assert ("step-00000002/" if (file, damage) == ("manifest.json", "flip") else str(path)) in said[0]
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]
    save(tmp_path, 2, keep=1)
    assert latest(tmp_path)[0] == tmp_path / "step-00000002"
    (tmp_path / "step-00000002" / "manifest.json").write_text("")
    assert latest(tmp_path)[0] is None
    assert names(tmp_path) == ["damaged-step-00000002", "damaged-step-00000002-again"], "both are kept"


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".writing-step-00000002", ".deleting-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("half")
    assert latest(tmp_path) == (tmp_path / "step-00000001", [])
    assert names(tmp_path) == ["step-00000001"]


def test_find_takes_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a training checkpoint"):
        checkpoint.find(tmp_path)
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.find(tmp_path) == second
    assert checkpoint.find(first) == first


def test_other_shape_or_missing_tensor_is_named(tmp_path: Path) -> None:
    found = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"does not fit this run.*master\.c"):
        checkpoint.load(found, {"master": {"c": torch.zeros(1)}}, parallel=ALONE)
    with pytest.raises(CheckpointError, match=r"does not fit this run.*a\.weight"):
        checkpoint.load(found, {"master": {"a.weight": torch.zeros(3, 3)}}, parallel=ALONE)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from dsv3.parallel.data import DataParallel
from dsv3.train import checkpoint

limit, work = int(sys.argv[1]), Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    big = {"big": torch.zeros(100_000)}
    checkpoint.save(work, 2, big, {"text": "x" * 50_000}, parallel=DataParallel(), keep=3)
    print("saved", end="")
except checkpoint.CheckpointError as error:
    print(error, end="")
"""


def full_disk(limit: int, work: Path) -> str:
    """Saves a checkpoint in a process whose files may not grow beyond `limit` bytes; returns what it said."""
    command = [sys.executable, "-c", FULL_DISK, str(limit), str(work)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("limit", [200_000, 20_000, 0])
def test_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1)
    said = full_disk(limit, tmp_path)
    assert said.startswith(f"could not save {tmp_path / 'step-00000002'}: ")
    assert "earlier checkpoints are intact" in said
    assert "\n" not in said
    assert names(tmp_path) == ["step-00000001"]
    assert latest(tmp_path) == (tmp_path / "step-00000001", [])
    assert full_disk(resource.RLIM_INFINITY, tmp_path) == "saved"


@pytest.mark.parametrize("file", ["__0_0.distcp", "state.json", "manifest.json"])
def test_disk_full_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """The file that does not fit is a link to /dev/full, where every write fails with ENOSPC."""
    save(tmp_path, 1)
    make_empty = checkpoint._make_empty

    def make_full(folder: Path) -> None:
        make_empty(folder)
        (folder / file).symlink_to("/dev/full")

    monkeypatch.setattr(checkpoint, "_make_empty", make_full)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2)
    final = tmp_path / "step-00000002"
    assert str(caught.value) == f"could not save {final}: the disk is full; earlier checkpoints are intact"
    assert names(tmp_path) == ["step-00000001"]


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    found = save(tmp_path, 1)
    listed = json.loads((found / "manifest.json").read_text())["files"]
    assert sorted([*listed, "manifest.json"]) == names(found)
