"""Four gloo processes that share their experts train as one process does, and their checkpoints are like its own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.shared_gpu import descendants, shared_gpu, torchrun
from dsv3 import train
from dsv3.cli import _run
from dsv3.model import is_expert_param
from dsv3.parallel.data import DataParallel
from dsv3.parallel.expert import ranks_per_node
from dsv3.train import checkpoint, launch
from tests.parallel.expert_worker import (
    eight_config,
    first_step,
    fp8_config,
    gpu_config,
    resumed_config,
    run_config,
    trainer_of,
)
from tests.train.common import MODEL, Recorder, make_tokens, micro, same_losses
from tests.train.test_resume import tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes leave: runs ep2, ep4, fp8, whole and parts, and first-<ep>-<rank>.pt."""
    out = tmp_path_factory.mktemp("runs")
    torchrun(4, "-m", "tests.parallel.expert_worker", tokens, out)
    return out


@pytest.fixture(scope="module")
def single(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Recorder]:
    """The first step and the run of one process."""
    config = run_config(tokens, tmp_path_factory.mktemp("single"), 1)
    recorder = Recorder()
    assert train.run(config, callbacks=[recorder]) == 0
    return first_step(trainer_of(config, DataParallel())), recorder


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_first_step(folder: Path, expected: dict[str, Any], ep: int, ranks: int, experts: int) -> None:
    """The same initial weights bit for bit; gradients within 1e-5 of each tensor's norm; experts where they belong."""
    local, norms = experts // ep, set()
    for rank in range(ranks):
        found = torch.load(folder / f"first-{ep}-{rank}.pt")
        norms.add(found["norm"])
        assert found["start"].keys() == expected["start"].keys()
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        held = slice(rank % ep * local, (rank % ep + 1) * local)
        for name, grad in expected["grads"].items():
            part = held if is_expert_param(name) else slice(None)
            assert torch.equal(found["start"][name], expected["start"][name][part]), name
            assert torch.linalg.vector_norm(found["grads"][name] - grad[part]) <= 1e-5 * grad[part].norm(), name
            assert grad[part].norm() > 0, name
    assert len(norms) == 1, "every rank clips by the same bits"


@pytest.mark.parametrize("ep", [2, 4])
def test_the_first_step_is_that_of_one_process(runs: Path, single: tuple[dict[str, Any], Recorder], ep: int) -> None:
    check_first_step(runs, single[0], ep, 4, MODEL["n_routed_experts"])


def test_the_first_step_of_eight_processes(tokens: Path, tmp_path: Path) -> None:
    """An expert a rank."""
    torchrun(8, "-m", "tests.parallel.expert_worker", tokens, tmp_path)
    expected = first_step(trainer_of(eight_config(tokens, tmp_path / "single", 1), DataParallel()))
    check_first_step(tmp_path, expected, 8, 8, 8)


@pytest.mark.parametrize("ep", [2, 4])
def test_losses_are_those_of_one_process(runs: Path, single: tuple[dict[str, Any], Recorder], ep: int) -> None:
    _, recorder = single
    steps = [row for row in rows(runs / f"ep{ep}") if "loss" in row]
    assert [row["loss"] for row in steps] == pytest.approx(recorder.losses, rel=1e-5)
    assert [row["grad_norm"] for row in steps] == pytest.approx([r.grad_norm for r in recorder.steps], rel=1e-4)
    loads = {row["step"]: row["expert_load"] for row in steps if "expert_load" in row}
    assert loads == {r.step: r.expert_load.tolist() for r in recorder.steps if r.step in loads}
    evals = [row["validation"]["bits_per_byte"] for row in rows(runs / f"ep{ep}") if "validation" in row]
    assert evals == pytest.approx([report.bits_per_byte for report in recorder.evals], rel=1e-5)
    assert len(evals) == 2, "in the first, one of the four ranks had nothing to score"


def test_fp8_training_with_an_fp8_wire(runs: Path, tokens: Path, tmp_path: Path) -> None:
    """The first loss is that of one process; later ones differ, since there a gradient is not FP8 before it is transposed."""
    recorder = Recorder()
    assert train.run(fp8_config(tokens, tmp_path / "run", 1), callbacks=[recorder]) == 0
    losses = [row["loss"] for row in rows(runs / "fp8") if "loss" in row]
    assert losses[0] == pytest.approx(recorder.losses[0], rel=1e-5)
    assert losses == pytest.approx(recorder.losses, rel=1e-3)
    assert losses[-1] < losses[0]


def test_resume_is_bit_identical(runs: Path) -> None:
    """Losses, weights, moments, average, bias and random generators."""
    assert [row["loss"] for row in rows(runs / "whole") if "loss" in row] == [
        row["loss"] for row in rows(runs / "parts") if "loss" in row
    ]
    first, second = tensors(runs / "whole"), tensors(runs / "parts")
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} == {
        "master", "exp_avg", "exp_avg_sq", "optimizer", "expert_bias", "ema", "rng_0", "rng_1", "rng_2", "rng_3",
    }  # fmt: skip
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoints_do_not_depend_on_the_split(runs: Path, tokens: Path, tmp_path: Path) -> None:
    """One process loads what four have saved, every tensor whole; saved again and exported, the files are the same."""
    saved = tensors(runs / "whole")
    weight = next(t for name, t in saved.items() if name.startswith("master") and is_expert_param(name))
    assert weight.shape[0] == MODEL["n_routed_experts"]
    config = dataclasses.replace(resumed_config(tokens, runs / "whole"), ep=1)
    trainer = trainer_of(config, DataParallel())
    assert trainer.resume()
    trainer.out, trainer.last_checkpoint = tmp_path / "alone", None
    trainer.save()
    again = tensors(tmp_path / "alone")
    assert all(torch.equal(again[name], saved[name]) for name in again if not name.startswith("rng"))
    for ema in (False, True):
        for name, run in (("split", runs / "whole"), ("alone", tmp_path / "alone")):
            train.export(run, tmp_path / f"{name}-{ema}", ema=ema)
        files = sorted(path.name for path in (tmp_path / f"alone-{ema}").iterdir())
        assert files == sorted(path.name for path in (tmp_path / f"split-{ema}").iterdir())
        for file in files:
            assert (tmp_path / f"split-{ema}" / file).read_bytes() == (tmp_path / f"alone-{ema}" / file).read_bytes()


def test_another_split_continues(runs: Path, tokens: Path, tmp_path: Path) -> None:
    """A single process goes on from the middle of a run of four, with the losses that the four had."""
    out = tmp_path / "run"
    recorder = Recorder()
    config = dataclasses.replace(resumed_config(tokens, out), ep=1)
    out.mkdir()
    (out / "step-00000003").symlink_to(runs / "whole" / "step-00000003")
    assert train.run(config, resume=True, callbacks=[recorder]) == 0
    expected = [row["loss"] for row in rows(runs / "whole") if "loss" in row]
    assert [r.step for r in recorder.steps] == [4, 5, 6]
    assert recorder.losses == pytest.approx(expected[3:], rel=1e-3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_dsv3_train_ep(ranks: int, tokens: Path, tmp_path: Path) -> None:
    """The command itself; and its checkpoint exported."""
    config = micro(tokens, tmp_path / "run", max_steps=2, micro_batch=8 // ranks)
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    torchrun(ranks, "-m", "dsv3", "train", tmp_path / "run.json", "--ep", ranks)
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2]
    assert json.loads((tmp_path / "run" / "train_config.json").read_text())["ep"] == ranks
    found = checkpoint.find(tmp_path / "run")
    first, *others = ((found / f"__{rank}_0.distcp").stat().st_size for rank in range(ranks))
    assert min(others) > 0.4 / ranks * first, "each writes its experts, of which a rank has so much fewer"
    assert _run(["export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.cuda
@pytest.mark.alone
@pytest.mark.parametrize("transport", ["ipc", "nvshmem"])
def test_dsv3_train_ep_on_one_gpu(tokens: Path, tmp_path: Path, transport: str) -> None:
    """The command with four processes that share a GPU, over nvshmem as on two nodes: the losses of one process there."""
    nodes = {"ipc": 1, "nvshmem": 2}[transport]
    same = same_losses(tokens, tmp_path / "run", device="cuda", ep=4, micro_batch=2, max_steps=6)
    config = dataclasses.replace(same, ep_transport=transport)
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    with shared_gpu() as env:
        done = torchrun(4 // nodes, "-m", "dsv3", "train", tmp_path / "run.json", nodes=nodes, env=env)
    assert f"instead of {transport}" not in done.stderr
    recorder = Recorder()
    alone = same_losses(tokens, tmp_path / "alone", device="cuda", max_steps=6)
    assert train.run(alone, callbacks=[recorder]) == 0
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses == pytest.approx(recorder.losses, rel=1e-4)


@pytest.mark.cuda
@pytest.mark.alone
@pytest.mark.parametrize("transport", ["ipc", "nvshmem"])
def test_the_first_step_on_one_gpu(tokens: Path, tmp_path: Path, transport: str) -> None:
    """Four processes that share a GPU, over nvshmem as on two nodes, in fp32."""
    nodes = {"ipc": 1, "nvshmem": 2}[transport]
    with shared_gpu() as env:
        torchrun(4 // nodes, "-m", "tests.parallel.expert_worker", tokens, tmp_path, transport, nodes=nodes, env=env)
    expected = first_step(trainer_of(gpu_config(tokens, tmp_path / "single", 1), DataParallel.start("cuda")))
    check_first_step(tmp_path, expected, 4, 4, MODEL["n_routed_experts"])


def test_dsv3_train_names_a_rank_that_dies(tokens: Path, tmp_path: Path) -> None:
    """Killed in the middle of a run of three: one line says which, torchrun's exit code is 1, and the checkpoint stays."""
    config = micro(tokens, tmp_path / "run", micro_batch=2, batch=6, max_steps=100000, save_every=5, keep=1000)
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*start, "-m", "dsv3", "train", str(tmp_path / "run.json")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 90
        while not (tmp_path / "run" / "step-00000005").is_dir():
            assert run.poll() is None, run.communicate()[1][-3000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        os.kill(worker_of(run.pid, 2), signal.SIGKILL)
        died = time.monotonic()
        _, err = run.communicate(timeout=60)
        assert time.monotonic() - died < 25, "before torchrun kills what has not ended after 30 seconds"
    finally:
        run.kill()
    assert run.returncode == 1
    [said] = [line for line in err.splitlines() if line.startswith("dsv3: ")]
    last = max((tmp_path / "run").glob("step-????????"))
    assert said == f"dsv3: lost rank 2: no sign of life for 5 seconds; last checkpoint: {last}"


def worker_of(launcher: int, rank: int) -> int:
    """The process that a torchrun has started for a rank."""
    for child in descendants(launcher):
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return child
    raise AssertionError(f"no rank {rank} below process {launcher}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--ep", "2"],
            "ep must divide the number of ranks, got ep 2 and 1: start it with torchrun --nproc-per-node 2",
        ),
        (["ep=0"], "ep must be positive, got 0"),
    ],
)
def test_ranks_that_do_not_divide(
    tokens: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(micro(tokens, tmp_path / "run").to_dict()))
    assert _run(["train", str(tmp_path / "run.json"), *arguments]) == 2
    assert capsys.readouterr().err == f"dsv3: {said}\n"
    assert not (tmp_path / "run").exists()


def test_nodes_are_those_of_torchrun(tmp_path: Path) -> None:
    """Two torchruns of two processes each, as on two machines: a group of 4 is 2 x 2, groups of 2 stay in their node."""
    torchrun(2, "-m", "tests.parallel.nodes_worker", tmp_path, nodes=2)
    for rank in range(4):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[2, 2, 1], [4, 2, 2]]


@pytest.mark.parametrize(
    ("nodes", "ep", "expected"),
    [([8], 8, 8), ([8], 4, 4), ([8, 8], 4, 4), ([8, 8], 16, 8), ([6, 6], 4, 2), ([2, 4], 6, 2), ([1, 1, 1], 3, 1)],
)
def test_ranks_per_node(nodes: list[int], ep: int, expected: int) -> None:
    assert ranks_per_node([local for size in nodes for local in range(size)], ep) == expected


def test_experts_that_do_not_divide() -> None:
    from dsv3.parallel.expert import ExpertParallel

    with pytest.raises(ValueError, match="ep must divide the model's routed experts, got ep 4 and 6 experts"):
        ExpertParallel.split(DataParallel(world=4), 4, 6)


@pytest.mark.parametrize(
    "changes", [{"n_routed_experts": 0}, {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}]
)
def test_models_without_experts(changes: dict[str, int], tokens: Path, tmp_path: Path) -> None:
    config = micro(tokens, tmp_path, ep=2, model={**MODEL, **changes})
    with pytest.raises(ValueError, match="ep 2 splits routed experts, and no layer of this model has any"):
        launch._trainer(config, DataParallel(world=2), [])
