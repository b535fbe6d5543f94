"""The run that compares split experts with whole ones: what differs between its runs, and what counts as agreement."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench import expert_curve
from bench.expert_curve import RUNS, WARMUP, WINDOW, compare, recipe


def losses(**factors: float) -> dict[str, list[float]]:
    """200 losses a run: those of ep1 times a factor, but in the warm-up, where all differ."""
    plain = [3.0 - step / 100 for step in range(200)]
    return {
        name: [loss * (2 if step < WARMUP else factors.get(name, 1)) for step, loss in enumerate(plain)]
        if name != "ep1"
        else plain
        for name in RUNS
    }


def test_differences_after_the_warm_up() -> None:
    found = compare(losses(ep4=1.012, control1=0.99, control2=1.005))
    assert found["max_difference"] == found["mean_difference"] == pytest.approx(0.012)
    assert found["control_difference"] == pytest.approx(0.01)
    assert found["bound"] == pytest.approx(0.015)
    assert found["held"] is True
    assert [len(mean) for mean in found["means"].values()] == [200 // WINDOW] * 4


@pytest.mark.parametrize(("ep4", "held"), [(1.0024, True), (1.0026, False), (0.9974, False)])
def test_a_curve_that_parts_is_not_held(ep4: float, held: bool) -> None:
    """Controls that hardly differ leave a quarter of a percent."""
    assert compare(losses(ep4=ep4, control1=1.0001))["held"] is held


def test_only_the_split_and_the_start_differ(tmp_path: Path) -> None:
    whole, split = (recipe(tmp_path, tmp_path, ep, 200) for ep in (1, 4))
    assert dataclasses.replace(split, ep=1) == whole
    assert (split.precision, split.preset, split.max_steps) == ("bf16", "tiny", 200)
    assert {name: ep for name, (ep, _) in RUNS.items()} == {"ep1": 1, "ep4": 4, "control1": 1, "control2": 1}
    assert [bool(seed) for _, seed in RUNS.values()] == [False, False, True, True]
    assert expert_curve.WARMUP % expert_curve.WINDOW == 0
