"""The benchmark of whole steps takes the trainer's own steps, and says how far two runs are apart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench.cases import model as bench_model
from dsv3 import train
from dsv3.config import Config
from dsv3.train.config import TrainConfig
from dsv3.train.data import TokenDataset
from tests.train.common import Recorder, make_tokens, micro


def test_its_step_is_the_trainers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses bit for bit, with every schedule at work: warm-up and decay of the rate, MTP's weight, the end of gamma."""
    tokens = make_tokens(tmp_path)
    config = micro(
        tokens, tmp_path / "run", micro_batch=8, max_steps=0, max_tokens=12 * 8 * 32, lr_schedule="v3", warmup_steps=5,
        beta1=0.8, beta2=0.7, eps=1e-6, weight_decay=0.3, clip=0.1, gamma=0.01, balance_alpha=0.01,
    )  # fmt: skip
    recorder = Recorder()
    assert train.run(config, callbacks=[recorder]) == 0
    assert len({(r.lr, r.mtp_weight, r.gamma) for r in recorder.steps}) > 6

    monkeypatch.setattr(bench_model, "RECIPE", config)
    monkeypatch.setattr(bench_model, "BETAS", (config.beta1, config.beta2))
    shape = dataclasses.replace(Config.preset("tiny"), **config.model)
    training = bench_model.Training(shape, torch.device("cpu"), torch.float32)
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
