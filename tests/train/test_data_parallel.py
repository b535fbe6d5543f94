"""Two processes against one, on gloo and, where there are two GPUs, on NCCL: the same losses, one agreement on when to
stop, checkpoints that either can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench.shared_gpu import torchrun
from dsv3 import train
from dsv3.parallel.data import DataParallel, ranks_share_gpus
from dsv3.terminal import command
from dsv3.train import checkpoint, launch
from tests.train.common import Recorder, same_losses


def rows(out: Path) -> list[dict]:
    parsed = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in parsed if "loss" in row]


@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=pytest.mark.two_gpus)])
def test_two_processes_train_as_one(on: str, token_folder: Path, tmp_path: Path) -> None:
    done = torchrun(2, "-m", "tests.train.parallel_worker", token_folder, tmp_path, on)
    for rank in (0, 1):
        assert (tmp_path / f"codes-{rank}").read_text() == "[130, 0, 0, 'NotADirectoryError']"
    stopped = [line for line in done.stdout.splitlines() if line.startswith("saved ")]
    assert len(stopped) == 1
    run = command("torchrun", "torch.distributed.run")
    assert f"resume with: {run} --nproc-per-node 2 -m dsv3 train " in stopped[0]
    two = rows(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(1, 51))

    single = Recorder()
    assert train.run(same_losses(token_folder, tmp_path / "one", device=on), callbacks=[single]) == 0
    assert [row["loss"] for row in two] == pytest.approx(single.losses, rel=1e-5)
    assert [row["grad_norm"] for row in two] == pytest.approx([r.grad_norm for r in single.steps], rel=1e-4)
    loads = [row["expert_load"] for row in two if "expert_load" in row]
    assert loads == [r.expert_load.tolist() for r in single.steps if r.step in (1, 50)]
    evals = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()][-1]
    assert evals["validation"]["bits_per_byte"] == pytest.approx(single.evals[-1].bits_per_byte, rel=1e-5)
    assert evals["validation"]["full"]

    files = {path.name for path in checkpoint.find(tmp_path / "two").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "manifest.json"} == files
    alone = Recorder()  # one process continues what two have saved
    longer = same_losses(token_folder, tmp_path / "two", max_steps=52, device=on)
    assert train.run(longer, resume=True, callbacks=[alone]) == 0
    assert [r.step for r in alone.steps] == [51, 52]
    assert alone.losses[0] == pytest.approx(single.losses[-1], rel=0.2)


@pytest.mark.parametrize(
    ("ranks", "world", "gpus", "share"),
    [("1", 1, 1, False), ("8", 8, 8, False), ("4", 4, 1, True), (None, 1, 1, False), (None, 2, 8, True)],
)
def test_ranks_share_gpus(
    ranks: str | None, world: int, gpus: int, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: a process group that torchrun has not made."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_initialized", lambda: world > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    assert ranks_share_gpus() == share


@pytest.mark.parametrize("share", [False, True])
def test_steps_are_captured_unless_ranks_share_a_gpu(
    share: bool, token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.train.trainer.why_no_graphs", lambda *args: None)
    monkeypatch.setattr("dsv3.train.trainer.ranks_share_gpus", lambda: share)
    trainer = launch._trainer(same_losses(token_folder, tmp_path / "run"), DataParallel(), [])
    assert (trainer.gradients._graphs is None) == share


@pytest.mark.cuda
@pytest.mark.two_gpus
def test_steps_in_graphs_are_the_steps_without(token_folder: Path, tmp_path: Path) -> None:
    torchrun(2, "-m", "tests.train.graph_worker", token_folder, tmp_path)
