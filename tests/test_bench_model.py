"""The benchmark of whole steps takes the trainer's own steps, and says how far two runs are apart."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch

from bench import expert_layer, table, timing
from bench.cases import Case, Timing
from bench.cases import model as bench_model
from dsv3 import train
from dsv3.config import Config
from dsv3.model import DeepSeekV3
from dsv3.train.config import TrainConfig
from dsv3.train.data import TokenDataset
from tests.train.common import Recorder, make_tokens, micro

CPU = torch.device("cpu")


def test_its_step_is_the_trainers(tmp_path: Path) -> None:
    """Losses bit for bit, with micro-batches and with every schedule at work: warm-up and decay of the rate, MTP's weight,
    the end of gamma."""
    tokens = make_tokens(tmp_path)
    config = micro(
        tokens, tmp_path / "run", micro_batch=4, max_steps=0, max_tokens=12 * 8 * 32, lr_schedule="v3", warmup_steps=5,
        beta1=0.8, beta2=0.7, eps=1e-6, weight_decay=0.3, clip=0.1, gamma=0.01, balance_alpha=0.01,
    )  # fmt: skip
    recorder = Recorder()
    assert train.run(config, callbacks=[recorder]) == 0
    assert len({(r.lr, r.mtp_weight, r.gamma) for r in recorder.steps}) > 6

    shape = dataclasses.replace(Config.preset("tiny"), **config.model)
    training = bench_model.Training(shape, CPU, torch.float32, recipe=config)
    dataset = TokenDataset(tokens, config.seq_len, seed=config.seed, fim_rate=config.fim_rate)
    losses = [float(training.step(dataset.batch(8 * step, 8))) for step in range(12)]
    assert losses == [r.ce for r in recorder.steps]


def test_its_recipe_is_that_of_a_run_with_defaults() -> None:
    """Nothing but the end of the run is set, to that of the published one: test_recipe.py has what the defaults are."""
    assert TrainConfig.load(None, ["max_tokens=14.8e12"]) == bench_model.RECIPE
    rates = [bench_model.RECIPE.learning_rate.at(progress=0.0, step=step, tokens=0) for step in (0, 199, 1999)]
    assert rates == pytest.approx([1.1e-7, 2.2e-5, 2.2e-4])


def test_differences_of_two_runs() -> None:
    """A single step that is 1% off is the largest difference; of a window's mean it is a twentieth."""
    plain = torch.full((50,), 2.0, dtype=torch.float64)
    native = plain.clone()
    native[30] = 2.02
    found = bench_model.differences(native, plain)
    assert found == {"last_loss": 2.0, "max_loss_difference": 0.01, "max_window_difference": 0.0005}
    native[3] = float("nan")
    worst = bench_model.differences(native, plain)["max_loss_difference"]
    assert not worst <= bench_model.LOSS_TOLERANCE


def test_runs_that_part_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in bench_model.cases(tiny=True) if case.op == "train_losses")
    assert case.measure is not None
    timed = case.measure(torch.device("cpu"), True)
    assert timed.errors == []
    assert timed.time_us > 0
    monkeypatch.setattr(bench_model, "LOSS_TOLERANCE", -1.0)
    assert case.measure(torch.device("cpu"), True).errors == ["losses differ by 0.00% from those of the references"]


# ---- FP8 beside bf16 ----
def test_micro_batches_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    room = 2

    def measured(setup: bench_model.Setup, micro: int, device: torch.device, quick: bool) -> Timing:
        tried.append(micro)
        if micro > room:
            raise torch.OutOfMemoryError("no memory for it")
        return Timing(float(micro), {})

    monkeypatch.setattr(bench_model, "_fp8_beside_bf16", measured)
    setup = bench_model.Setup("2b", 8, 4096, 3)
    assert bench_model.measure_fp8(setup, CPU, False).time_us == 2.0
    assert tried == [8, 4, 2]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        bench_model.measure_fp8(setup, CPU, False)
    assert tried == [8, 4, 2, 8, 4, 2, 1]


def test_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone before the next is made, and both take the same steps."""

    def models() -> int:
        return sum(type(thing) is DeepSeekV3 for thing in gc.get_objects())

    gc.collect()
    before, alive, real = models(), [], bench_model.step_us

    def step_us(*args: object) -> float:
        alive.append(models() - before)
        return real(*args)

    monkeypatch.setattr(bench_model, "step_us", step_us)
    timed = bench_model.measure_fp8(bench_model.Setup("tiny", 4, 32, 3), CPU, True)
    assert alive == [1, 1]
    assert timed.facts["micro_batch"] == 4
    for precision, us in (("fp8", timed.time_us), ("bf16", timed.baselines["dsv3 bf16"])):  # whole tokens
        assert timed.facts[f"tokens_per_s_{precision}"] == pytest.approx(4 * 32 / us * 1e6, rel=1e-2, abs=0.5)


# ---- an expert layer ----
def test_the_expert_layer_does_all_of_its_work() -> None:
    """Both outputs, three gradients of inputs, four of weights; 6 operations a weight and row."""
    case = expert_layer.expert_layer(tiny=True)
    results = case.run(*case.inputs(CPU))
    assert len(results) == 9
    assert all(result.any() for result in results)
    full = expert_layer.expert_layer(tiny=False)
    assert full.flops == 6 * (32768 + 4096) * 3 * 7168 * 2048
    assert full.published == pytest.approx(
        {"published products x 112/132": 9548.4, "published products and casts x 112/132": 13112.1}, abs=0.1
    )


def test_what_is_published_stands_beside_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the row, but never as the best peer."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(timing, "Captured", lambda *args, **options: None)
    monkeypatch.setattr(timing, "in_turn_us", lambda captured, replays: (dict.fromkeys(captured, 50.0), {}))
    published = {"published elsewhere": 10.0}
    case = Case(op="x", case={}, flops=1, bytes=1, inputs=lambda device: (torch.ones(3),), published=published)
    timed = timing.measure_case(case, timing.Ceilings(1.0, 1.0, 1.0, 1.0), timing.QUICK)
    assert timed.baselines == published
    assert table.best_baseline({"baselines": timed.baselines}) is None
    assert table.best_baseline({"baselines": {**timed.baselines, "torch": 60.0}}) == ("torch", 60.0)
