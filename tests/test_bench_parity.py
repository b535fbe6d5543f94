"""The parity run: that its three runs differ in what they are meant to, what counts as agreement, and what it leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as cli
from bench import parity, results
from bench.cases.model import Training
from bench.parity import PLAN, RUNS, TINY
from bench.plot import plot_all
from bench.timing import Ceilings
from dsv3.ops import registry

CPU = torch.device("cpu")
NAN = float("nan")
ENV = results.Environment("NVIDIA H100 80GB HBM3", "580.1", "2.13.0", "13.0", "c" * 40, "2026-11-24T00:00:00+00:00")


# ---- the runs ----
def test_the_plan_is_that_of_the_issue() -> None:
    assert (PLAN.setup.preset, PLAN.setup.rows, PLAN.setup.length, PLAN.window) == ("mini", 8, 512, 100)
    assert PLAN.setup.steps >= 2000
    assert PLAN.warmup_steps <= 500  # the published one is of 2000
    assert PLAN.starts >= 6
    rates = [
        PLAN.recipe.learning_rate.at(progress=PLAN.recipe.progress(step=step, tokens=0, seconds=0), step=step, tokens=0)
        for step in (0, 499, 1300, 1999)
    ]
    assert rates == pytest.approx([4.4e-7, 2.2e-4, 2.2e-4, 7.3e-6])


def test_no_sequence_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = parity.sequences(TINY.setup)
    assert data.shape == (TINY.setup.steps * TINY.setup.rows, TINY.setup.length + 1)
    assert data.dtype == torch.int32
    assert 256 < int(data.max()) < TINY.setup.config(False).vocab_size
    assert len(data.unique(dim=0)) == len(data)
    assert torch.equal(parity.sequences.__wrapped__(TINY.setup), data)
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(f"{name} = 1\n" * 40)
    monkeypatch.setattr(parity, "SOURCE", tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} makes \d+ sequences, and the runs need 24"):
        parity.sequences.__wrapped__(TINY.setup)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbation(dtype: torch.dtype) -> None:
    """Of the master weights, by a millionth of each, the same every time; the weights are what they round to."""

    def start(size: float, seed: int = 1) -> tuple[Training, Tensor]:
        training = Training(TINY.setup.config(False), CPU, dtype, recipe=TINY.recipe)
        parity.perturb(training.buffers, size, seed)
        return training, torch.cat([group.master for group in training.buffers.groups])

    (_, plain), (training, moved), (_, again), (_, other) = start(0.0), start(1e-6), start(1e-6), start(1e-6, 2)
    assert torch.equal(moved, again)
    assert not torch.equal(moved, other)
    noise = ((moved.double() - plain) / plain)[plain != 0]
    assert float(noise.std()) == pytest.approx(1e-6, rel=0.05)
    assert abs(float(noise.mean())) < 2e-8
    for slot, group in training.buffers.slots():
        assert torch.equal(slot.param, slot.view(group.master).to(dtype))


def test_a_run_learns() -> None:
    setup = dataclasses.replace(TINY.setup, steps=60)
    losses, _ = parity.train("bf16", 0, dataclasses.replace(TINY, setup=setup), CPU, lambda line: None)
    assert losses[-10:].mean() < losses[:10].mean() - 0.05


def test_runs_see_the_same_and_differ_in_the_precision() -> None:
    lines: list[str] = []
    losses = {name: parity.train(name, 0, TINY, CPU, lines.append)[0] for name in RUNS}
    assert [line.split(",")[0] for line in lines] == list(RUNS)
    assert lines[0].startswith("bf16, start 1 of 2: step 12 of 12, loss ")
    assert all(loss.shape == (TINY.setup.steps,) for loss in losses.values())
    assert torch.equal(parity.train("bf16", 0, TINY, CPU, lines.append)[0], losses["bf16"])
    other = parity.train("bf16", 1, TINY, CPU, lines.append)[0]
    assert (other - losses["bf16"]).abs().min() > 0  # other weights, the same data
    for name in ("fp8", "control"):
        assert not torch.equal(losses[name], losses["bf16"])
        torch.testing.assert_close(losses[name], losses["bf16"], rtol=1e-3, atol=0)


# ---- what counts ----
def made_up(steps: int, **changes: dict[int, float]) -> dict[str, Tensor]:
    """Losses of 2.0 in both starts of all runs, but for the factors at some steps."""
    losses = {name: torch.full((TINY.starts, steps), 2.0, dtype=torch.float64) for name in RUNS}
    for name, factors in changes.items():
        for step, factor in factors.items():
            losses[name][:, step] *= factor
    return losses


def test_means_count_and_only_after_the_warm_up() -> None:
    """Windows of two steps; the first four steps warm up. A step 0.4% off is 0.2% of its mean."""
    found = parity.compare(made_up(12, fp8={3: 2.0, 6: 1.004, 8: 0.999}), TINY)
    assert found == {
        "starts": 2, "max_difference": 0.002, "control_difference": 0.0, "bound": 0.0025, "mean_difference": 0.000375,
        "control_mean_difference": 0.0, "windows": 4, "windows_within": 4, "fp8_of_starts": [0.002, 0.002],
        "control_of_starts": [0.0, 0.0], "last_loss": 2.0, "held": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fp8", "control", "held"),
    [
        (1.006, 1.0, False),
        (0.994, 1.0, False),
        (1.006, 1.003, False),
        (1.006, 0.995, True),
        (NAN, 1.1, False),
        (1.0, NAN, False),
    ],
)
def test_the_bound(fp8: float, control: float, held: bool) -> None:
    """A quarter of a per cent, or one and a half times what the control differs anywhere."""
    assert parity.compare(made_up(12, fp8={6: fp8}, control={9: control}), TINY)["held"] is held


def test_the_mean_of_the_starts_counts() -> None:
    """What one start loses the other may win, each at another step; the row has both."""
    losses = made_up(12)
    losses["fp8"][0, 6] *= 1.02
    losses["fp8"][1, 6] *= 0.984
    found = parity.compare(losses, TINY)
    assert (found["max_difference"], found["held"]) == (0.001, True)
    assert found["fp8_of_starts"] == [0.01, -0.008]
    losses["fp8"][1, 6] = 2.0
    assert parity.compare(losses, TINY)["held"] is False


def test_windows_apart() -> None:
    """The control's difference in another window does not count."""
    found = parity.compare(made_up(12, fp8={6: 1.01, 8: 1.01, 10: 1.01}, control={8: 1.02, 10: 1.002}), TINY)
    assert (found["windows"], found["windows_within"], found["held"]) == (4, 2, True)


# ---- the command ----
@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Everything around the training, on this machine; what the runs' losses are may be changed."""
    losses = made_up(12, fp8={6: 1.002})
    for loss in losses.values():
        loss[1] *= 1.5  # another start has other losses
    monkeypatch.setattr(cli, "has_hopper", lambda: True)
    monkeypatch.setattr(registry, "NATIVE_ERROR", "")
    monkeypatch.setattr(cli, "environment", lambda commit: dataclasses.replace(ENV, commit=commit or "none"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(parity, "require_native", lambda op: None)
    monkeypatch.setattr(parity, "measure_ceilings", lambda protocol: (Ceilings(3000.0, 3100.0, 800.0, 1600.0), []))
    monkeypatch.setattr(parity, "PLAN", TINY)
    monkeypatch.setattr(parity, "train", lambda name, start, *_: (losses[name][start], 50.0))
    return losses


def run(folder: Path, *words: str) -> int:
    return parity.main([*words, "--runs", str(folder / "runs"), "--out", str(folder), "--commit", "abc"])


def rows(folder: Path) -> list[dict[str, Any]]:
    return results.read_rows(folder / "model.jsonl")


def test_what_it_leaves(measured: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row of its own in the family's file, which outlives the family's own runs; the means, and a picture of them."""
    others = [{"op": "copy", "baselines": {}}, {"op": "train_step", "baselines": {}}]
    results.write_rows(tmp_path / "model.jsonl", others)
    assert run(tmp_path) == 0
    *kept, row = rows(tmp_path)
    assert kept == others
    assert (row["op"], row["commit"], row["csrc_sha"]) == (
        "train_parity",
        "abc",
        results.csrc_sha("model", copied=False),
    )
    assert (row["time_us"], row["baselines"], row["gpu"]) == (50.0, {}, ENV.gpu)
    assert row["case"].items() >= {"model": "tiny", "rows": 2, "steps": 12, "window": 2, "warmup_steps": 4}.items()
    assert row["case"].items() >= {"starts": 2, "max_difference": 0.001, "bound": 0.0025, "held": True}.items()
    record = json.loads((tmp_path / "train_parity.json").read_text())
    assert record["data"] == hashlib.sha256(parity.sequences(TINY.setup).numpy().tobytes()).hexdigest()
    same, fp8 = [[2.0] * 6, [3.0] * 6], [[2.0, 2.0, 2.0, 2.002, 2.0, 2.0], [3.0, 3.0, 3.0, 3.003, 3.0, 3.0]]
    assert record["means"] == {"bf16": same, "fp8": fp8, "control": same}
    assert (tmp_path / "train_parity.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "train_parity.png") in capsys.readouterr().out
    assert run(tmp_path, "join") == 0
    results.write_rows(tmp_path / "model.jsonl", others[:1])
    assert rows(tmp_path) == [others[0], row]
    assert plot_all(tmp_path) == [tmp_path / "train_parity.png"]


def test_runs_of_several_processes(
    measured: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order, joined on a machine without a GPU; not while one is missing or was made of other sources."""
    assert run(tmp_path, "fp8") == 0
    assert run(tmp_path, "join") == 2
    assert f"no {tmp_path}/runs/bf16-0.json: run bf16 first" in capsys.readouterr().err
    assert run(tmp_path, "control") == run(tmp_path, "bf16") == 0
    monkeypatch.setattr(cli, "has_hopper", lambda: False)
    assert run(tmp_path, "join") == 0
    assert run(tmp_path, "bf16") == 2
    path = tmp_path / "runs" / "control-1.json"
    path.write_text(path.read_text().replace('"abc"', '"abd"'))
    capsys.readouterr()
    assert run(tmp_path, "join") == 2
    assert capsys.readouterr().err == f"bench.parity: {tmp_path}/runs: runs fp8-0 and control-1 differ in commit\n"


def test_runs_of_another_plan(
    measured: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == 0
    for change in ({"starts": 1}, {"window": 3}):
        monkeypatch.setattr(parity, "PLAN", dataclasses.replace(TINY, **change))
        capsys.readouterr()
        assert run(tmp_path, "join") == 2
        error = f"{tmp_path}/runs: runs were made by another plan than this version's: run all again"
        assert capsys.readouterr().err == f"bench.parity: {error}\n"


def test_a_run_on_references_is_none(
    measured: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(op: str) -> None:
        raise RuntimeError("ran on its reference: no native kernel")

    monkeypatch.setattr(parity, "require_native", refuse)
    assert run(tmp_path) == 2
    assert capsys.readouterr().err == "bench.parity: fp8_gemm of bf16: ran on its reference: no native kernel\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:9], "fp8-1.json is no run that this version wrote: "),
        (lambda text: "{}", "fp8-1.json is no run that this version wrote: 'plan'"),
        (lambda text: text.replace('"starts": 2, ', "").replace(', "starts": 2', ""), "missing 1 required"),
        (
            lambda text: text.replace('"start": 1', '"start": 0'),
            "fp8-1.json has start 0 of fp8 and 12 steps: run fp8 again",
        ),
        (lambda text: text.replace('"name": "fp8"', '"name": "bf16"'), "has start 1 of bf16 and 12 steps"),
        (lambda text: text.replace('"losses": [3.0, ', '"losses": ['), "has start 1 of fp8 and 11 steps"),
    ],
)
def test_files_that_are_no_runs(
    measured: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[str], str],
    message: str,
) -> None:
    assert run(tmp_path) == 0
    path = tmp_path / "runs" / "fp8-1.json"
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    capsys.readouterr()
    assert run(tmp_path, "join") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench.parity: {path} ")
    assert message in error
    assert error.count("\n") == 1


def test_a_run_that_parts_is_a_failure(
    measured: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured["fp8"][:, 6] = 2.02
    assert run(tmp_path) == 1
    assert "FAILED train_parity" in capsys.readouterr().out
    assert rows(tmp_path)[0]["case"]["held"] is False


def test_dry_run(
    measured: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "has_hopper", lambda: False)
    monkeypatch.setattr(parity, "PLAN", None)
    assert parity.main(["--dry-run"]) == 0
    assert "on cpu: {'starts': 2, 'max_difference': 0.001, " in capsys.readouterr().out


def test_unknown_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parity.main(["fp4"])
    assert error.value.code == 2
    assert "expected bf16, fp8, control, join, got fp4" in capsys.readouterr().err
