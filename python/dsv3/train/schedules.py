"""What changes during training, as functions of progress: learning rate, batch size, MTP weight, bias update speed.

Progress is a fraction of the run, 0 to 1, so one schedule serves a run bounded by tokens, steps or seconds. With
max_tokens = 14.8e12 the defaults are the published recipe (report 4.2): its switching points are these fractions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_TOTAL = 14.8e12  # tokens of the published run
_CONSTANT_UNTIL = 10e12 / _TOTAL  # the learning rate's constant part, and the first MTP weight
_COSINE_UNTIL = 14.3e12 / _TOTAL  # the cosine's end, and the end of bias updates
_FIRST_FINAL_UNTIL = (14.3e12 + 333e9) / _TOTAL
_FINAL_1, _FINAL_2 = 2.2e-5 / 2.2e-4, 7.3e-6 / 2.2e-4  # learning rates of the last two parts, relative to the peak


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0, then one of the shapes

    v3        constant to 10/14.8 of the run, cosine to a tenth until 14.3/14.8, that for 333B/14.8T, then 0.033
    cosine    from the peak to `final` x peak at the end
    wsd       constant, and for the last `decay_fraction` a straight line to `final` x peak
    constant  the peak
    """

    peak: float
    shape: str = "v3"
    final: float = 0.1
    decay_fraction: float = 0.2
    warmup_steps: int = 2000
    warmup_tokens: int = 0  # takes the place of warmup_steps where it is set

    SHAPES = ("v3", "cosine", "wsd", "constant")

    def __post_init__(self) -> None:
        if self.shape not in self.SHAPES:
            raise ValueError(f"lr_schedule must be one of {', '.join(self.SHAPES)}, got {self.shape!r}")

    def at(self, *, progress: float, step: int, tokens: int) -> float:
        """Learning rate of the step that starts after `step` steps and `tokens` tokens, at `progress` of the run."""
        if self.warmup_tokens:
            warm = tokens / self.warmup_tokens
        else:
            warm = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        return self.peak * min(warm, 1.0) * self._factor(min(max(progress, 0.0), 1.0))

    def _factor(self, x: float) -> float:
        if self.shape == "cosine":
            return _cosine(x, self.final)
        if self.shape == "wsd":
            left = (1 - x) / self.decay_fraction if self.decay_fraction else 1.0
            return self.final + (1 - self.final) * min(left, 1.0)
        if self.shape == "constant" or x < _CONSTANT_UNTIL:
            return 1.0
        if x < _COSINE_UNTIL:
            return _cosine((x - _CONSTANT_UNTIL) / (_COSINE_UNTIL - _CONSTANT_UNTIL), _FINAL_1)
        return _FINAL_1 if x < _FIRST_FINAL_UNTIL else _FINAL_2


def _cosine(x: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * x))


@dataclass(frozen=True)
class BatchSize:
    """Sequences a step: from `start` to `final` linearly over `ramp_tokens` tokens, in multiples of `quantum`.

    The published ramp is 3072 to 15360 over the first 469e9 tokens.
    """

    final: int
    start: int = 0  # 0: no ramp
    ramp_tokens: int = 0
    quantum: int = 1  # micro-batch x data-parallel ranks

    def __post_init__(self) -> None:
        for name, size in (("batch", self.final), ("batch_start", self.start)):
            if size % self.quantum:
                raise ValueError(f"{name} must be a multiple of micro_batch x ranks = {self.quantum}, got {size}")

    def at(self, tokens: int) -> int:
        if not self.start or tokens >= self.ramp_tokens:
            return self.final
        size = self.start + (self.final - self.start) * tokens / self.ramp_tokens
        return max(int(size) // self.quantum, 1) * self.quantum


@dataclass(frozen=True)
class Switch:
    """`first` until `until` of the run, then `second`: MTP weight (0.3, 0.1, 10/14.8), gamma (1e-3, 0, 14.3/14.8)."""

    first: float
    second: float
    until: float

    def at(self, progress: float) -> float:
        return self.first if progress < self.until else self.second


MTP_SWITCH = _CONSTANT_UNTIL
GAMMA_UNTIL = _COSINE_UNTIL
