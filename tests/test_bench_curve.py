"""The run that compares split experts with whole ones: what differs between its runs, and what counts as agreement."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import expert_curve
from bench.expert_curve import RUNS, WARMUP, WINDOW, Setup, compare, recipe


def losses(**factors: float) -> dict[str, list[float]]:
    """200 losses a run: those of whole times a factor, but in the warm-up, where all differ."""
    plain = [3.0 - step / 100 for step in range(200)]
    return {
        name: [loss * (2 if step < WARMUP else factors.get(name, 1)) for step, loss in enumerate(plain)]
        if name != "whole"
        else plain
        for name in RUNS
    }


def test_differences_after_the_warm_up() -> None:
    """Whole runs are compared with each other, not only with the first."""
    found = compare(losses(split=1.012, control1=0.99, control2=1.005, control4=1.01))
    assert found["max_difference"] == found["mean_difference"] == pytest.approx(0.012)
    assert found["control_difference"] == pytest.approx(1 - 0.99 / 1.01, abs=1e-6)
    assert found["bound"] == pytest.approx(1.5 * (1 - 0.99 / 1.01), abs=2e-6)
    assert found["held"] is True
    assert [len(mean) for mean in found["means"].values()] == [200 // WINDOW] * 6


NAN = float("nan")


@pytest.mark.parametrize(
    ("split", "control", "held"),
    [
        (1.0024, 1.0001, True),
        (1.0026, 1.0001, False),
        (0.9974, 1.0001, False),
        (NAN, 1.0001, False),
        (1.0, NAN, False),
    ],
)
def test_a_curve_that_parts_is_not_held(split: float, control: float, held: bool) -> None:
    """Controls that hardly differ leave a quarter of a percent; one that diverged leaves nothing."""
    for name in ("control1", "control4"):
        assert compare(losses(**{"split": split, name: control}))["held"] is held


CPU, SHARED, SEVERAL = (
    Setup("cpu", 4, "collective", "tiny"), Setup("cuda", 4, "nvshmem", "tiny"), Setup("cuda", 8, "ipc", "mini"),
)  # fmt: skip


@pytest.mark.parametrize("setup", [CPU, SHARED, SEVERAL])
def test_only_the_split_and_the_start_differ(setup: Setup, tmp_path: Path) -> None:
    whole, split = (recipe(setup, tmp_path, tmp_path, 200, split=split) for split in (False, True))
    assert dataclasses.replace(split, ep=1) == whole
    assert (split.ep, split.ep_transport) == (setup.ranks, setup.transport)
    assert (split.precision, split.preset, split.max_steps) == ("bf16", setup.preset, 200)
    assert split.batch == split.micro_batch * setup.ranks
    assert {name: bool(seed) for name, seed in RUNS.items()} == {
        "whole": False, "split": False, "control1": True, "control2": True, "control3": True, "control4": True,
    }  # fmt: skip
    assert len(set(RUNS.values())) == 5
    assert expert_curve.WARMUP % expert_curve.WINDOW == 0


@pytest.mark.parametrize(
    ("gpus", "transport", "expected"),
    [
        (0, None, CPU),
        (1, None, Setup("cuda", 4, "ipc", "tiny")),
        (1, "nvshmem", SHARED),
        (2, None, Setup("cuda", 2, "ipc", "mini")),
        (8, None, SEVERAL),
        (8, "collective", Setup("cuda", 8, "collective", "mini")),
    ],
)
def test_ranks_of_a_machine(gpus: int, transport: str | None, expected: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert Setup.of_this_machine(transport) == expected
    assert expected.nodes == (2 if transport == "nvshmem" else 1)


def test_what_cannot_be_tried_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for gpus, transport, why in ((0, "ipc", "needs a GPU"), (2, "nvshmem", "ranks that share a GPU")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert expert_curve.main(["--transport", transport]) == 2
        assert why in capsys.readouterr().err


def test_what_was_asked_for_reaches_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they found is the exit code."""
    monkeypatch.setattr(Setup, "of_this_machine", lambda transport: CPU._replace(ranks=2))
    started: list[object] = []

    def torchrun(ranks: int, *command: str, nodes: int, **options: object) -> None:
        started.append((nodes, ranks, command))
        (tmp_path / "expert_curve_collective.json").write_text('{"held": false}')

    monkeypatch.setattr(expert_curve, "torchrun", torchrun)
    monkeypatch.chdir(tmp_path)
    assert expert_curve.main(["--out", ".", "--runs", "runs", "--steps", "40", "--commit", "abc"]) == 1
    [(nodes, ranks, command)] = started
    assert (nodes, ranks) == (1, 2)
    assert command[:2] == ("-m", "bench.expert_curve")
    folders = f"--runs {tmp_path / 'runs'} --out {tmp_path}"  # ranks start in another folder
    assert " ".join(command).endswith(f"{folders} --steps 40 --transport collective --commit abc")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "20", "--out", "x"], "--steps must be a multiple of 20, at least 40, got 20"),
        (["--steps", "45", "--out", "x"], "--steps must be a multiple of 20, at least 40, got 45"),
        (["--steps", "40"], "name a folder with --out: bench/results is for 200 steps, got 40"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        expert_curve.main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_folders_that_cannot_be_written_are_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Setup, "of_this_machine", lambda transport: CPU)
    (tmp_path / "file").touch()
    assert expert_curve.main(["--out", str(tmp_path / "file"), "--commit", "abc"]) == 2
    assert f"{tmp_path / 'file'} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("rank 1 says no"), 2)])
def test_a_run_that_ends_early_leaves_no_empty_folder(
    error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Setup, "of_this_machine", lambda transport: CPU)
    monkeypatch.setattr(expert_curve, "torchrun", stop)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    for out in ("new", "kept"):
        arguments = ["--out", str(tmp_path / out), "--runs", str(tmp_path / "runs"), "--commit", "abc", "--steps", "40"]
        assert expert_curve.main(arguments) == code
    assert capsys.readouterr().err.count("stopped, nothing is written" if code == 130 else "rank 1 says no") == 2
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "kept" / "file").exists()
