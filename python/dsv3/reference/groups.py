"""Groups of rows, by their offsets."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def bounds(offsets: Tensor, rows: int) -> list[int]:
    """offsets [G+1] on the host; RuntimeError where they make no sense, as the kernels that read them report it."""
    numbers = offsets.tolist()
    for i, (first, second) in enumerate(pairwise(numbers)):
        if (i == 0 and first) or second < first or second > rows:
            found = f"got offsets[{i}] = {first} before {second}"
            raise RuntimeError(f"offsets must start at 0, not decrease and stay within the {rows} rows, {found}")
    return numbers


def groups(offsets: Tensor, rows: int) -> list[tuple[int, slice]]:
    """The number and the rows of every group that has rows."""
    return [(g, slice(a, b)) for g, (a, b) in enumerate(pairwise(bounds(offsets, rows))) if b > a]


def group_of(offsets: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the group that each row belongs to, G behind the last; without a look at the device."""
    index = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), index, right=True)
