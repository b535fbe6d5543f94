"""Schedules against the numbers of the published recipe (report 4.2)."""

from __future__ import annotations

import math

import pytest

from dsv3.train.config import TrainConfig
from dsv3.train.schedules import BatchSize, LearningRate

TOTAL = 14.8e12
PUBLISHED = TrainConfig(
    max_tokens=int(TOTAL), batch=15360, batch_start=3072, batch_ramp_tokens=int(469e9), micro_batch=1
)


def published_lr(tokens: float, step: int = 10**6) -> float:
    return PUBLISHED.learning_rate.at(progress=tokens / TOTAL, step=step, tokens=int(tokens))


def test_published_learning_rate() -> None:
    assert published_lr(0, step=0) == pytest.approx(2.2e-4 / 2000)
    assert published_lr(1e9, step=999) == pytest.approx(1.1e-4)
    for tokens, lr in ((1e12, 2.2e-4), (9.99e12, 2.2e-4), (14.31e12, 2.2e-5), (14.63e12, 2.2e-5), (14.64e12, 7.3e-6)):
        assert published_lr(tokens) == pytest.approx(lr), tokens
    assert published_lr(10e12 + 4.3e12 / 2) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    quarter = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi / 4))
    assert published_lr(10e12 + 4.3e12 / 4) == pytest.approx(quarter)


def test_published_mtp_weight_and_gamma() -> None:
    mtp, gamma = PUBLISHED.mtp_schedule, PUBLISHED.gamma_schedule
    assert [mtp.at(t / TOTAL) for t in (0, 9.99e12, 10.01e12, TOTAL)] == [0.3, 0.3, 0.1, 0.1]
    assert [gamma.at(t / TOTAL) for t in (0, 14.29e12, 14.31e12, TOTAL)] == [1e-3, 1e-3, 0, 0]


def test_published_batch_ramp() -> None:
    sizes = PUBLISHED.batch_size(ranks=1)
    assert (sizes.at(0), sizes.at(int(469e9)), sizes.at(int(1e12))) == (3072, 15360, 15360)
    assert sizes.at(int(469e9) // 2) == (3072 + 15360) // 2
    steps = [BatchSize(64, 8, 1000, quantum=8).at(t) for t in range(0, 1200, 10)]
    assert steps == sorted(steps)
    assert {size % 8 for size in steps} == {0}
    assert set(steps) >= {8, 16, 56, 64}


def test_batch_must_fit_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"batch must be a multiple of micro_batch x ranks = 16, got 24"):
        BatchSize(24, quantum=16)


def test_simple_shapes() -> None:
    cosine = LearningRate(1.0, "cosine", final=0.1, warmup_steps=10)
    assert cosine.at(progress=0, step=4, tokens=0) == pytest.approx(0.5)
    assert cosine.at(progress=0.5, step=99, tokens=0) == pytest.approx(0.55)
    assert cosine.at(progress=1.2, step=99, tokens=0) == pytest.approx(0.1)
    wsd = LearningRate(1.0, "wsd", final=0.0, decay_fraction=0.2, warmup_steps=0)
    assert [wsd.at(progress=p, step=0, tokens=0) for p in (0, 0.5, 0.8, 0.9, 1.0)] == pytest.approx([1, 1, 1, 0.5, 0])
    tokens = LearningRate(1.0, "constant", warmup_tokens=1000)
    assert [tokens.at(progress=0.5, step=0, tokens=t) for t in (0, 500, 1000, 5000)] == [0, 0.5, 1, 1]


def test_progress_is_the_largest_fraction() -> None:
    config = TrainConfig(max_steps=100, max_seconds=10)
    assert config.progress(step=50, tokens=10**9, seconds=1) == 0.5
    assert config.progress(step=50, tokens=0, seconds=9) == 0.9
