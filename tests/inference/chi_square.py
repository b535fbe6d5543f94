"""Pearson's chi-square test."""

from __future__ import annotations

import torch
from torch import Tensor


def chi_square(count: Tensor, expected: Tensor) -> float:
    """p value of the observed counts against the expected ones; cells that expect fewer than 5 are merged into one.

    A count where nothing is expected gives 0.
    """
    count, expected = count.double().flatten(), expected.double().flatten()
    if bool((count[expected == 0] > 0).any()):
        return 0.0
    small = expected < 5
    if bool(small.any()):
        count = torch.cat([count[~small], count[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    count, expected = count[expected > 0], expected[expected > 0]
    statistic = ((count - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(count) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
