"""csrc/quant: casts to FP8 with a scale for every 1x128, 128x128 or 128x1 values, plain and transposing, and two of them
from one read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, peers
from dsv3.reference import quant as reference

FLOOR = 1e-4
TILE = reference.TILE


def _draw(*shape: int) -> Callable[[torch.device], tuple[Tensor]]:
    return lambda device: (torch.randn(shape, device=device, dtype=torch.bfloat16),)


def _with(function: Callable[..., Any], *settings: Any) -> Callable[..., Any]:
    return lambda *inputs: function(*inputs, *settings)


def _per_token(tokens: int, hidden: int) -> Case:
    size = tokens * hidden
    return Case(
        op="per_token_cast",
        case={"tokens": tokens, "hidden": hidden},
        flops=3 * size,
        bytes=3 * size + 4 * size // TILE,
        inputs=_draw(tokens, hidden),
        run=_with(torch.ops.dsv3.per_token_cast, False, FLOOR),
        baselines=peers(_with(reference.per_token_cast, False, FLOOR)),
    )


def _per_block(rows: int, columns: int, transpose: bool) -> Case:
    size = rows * columns
    return Case(
        op="per_block_cast",
        case={"tokens": rows, "hidden": columns, "transpose": transpose},
        flops=3 * size,
        bytes=2 * size + (1 + transpose) * (size + 4 * size // TILE**2),
        inputs=_draw(1, rows, columns),
        run=_with(torch.ops.dsv3.per_block_cast, False, transpose),
        baselines=peers(_with(reference.per_block_cast, False, transpose)),
    )


def _transpose(tokens: int, hidden: int, from_fp8: bool) -> Case:
    """From FP8 with scales that are powers of two on both sides, as such tensors have them."""

    def inputs(device: torch.device) -> tuple[Tensor, Tensor | None]:
        (x,) = _draw(tokens, hidden)(device)
        return torch.ops.dsv3.per_token_cast(x, True, FLOOR) if from_fp8 else (x, None)

    size = tokens * hidden
    scales = 4 * size // TILE
    return Case(
        op="cast_transpose",
        case={"tokens": tokens, "hidden": hidden, "from_fp8": from_fp8, "pow2_scale": from_fp8},
        flops=(4 if from_fp8 else 3) * size,
        bytes=(size + scales if from_fp8 else 2 * size) + size + scales,
        inputs=inputs,
        run=_with(torch.ops.dsv3.cast_transpose, None, from_fp8, FLOOR),
        baselines=peers(_with(reference.cast_transpose, None, from_fp8, FLOOR)),
    )


def _both(tokens: int, hidden: int) -> Case:
    """1x128 and 128x1: what the gradient of a linear layer's output needs."""
    size = tokens * hidden
    return Case(
        op="per_token_cast_and_transpose",
        case={"tokens": tokens, "hidden": hidden},
        flops=6 * size,
        bytes=2 * size + 2 * (size + 4 * size // TILE),
        inputs=_draw(tokens, hidden),
        run=_with(torch.ops.dsv3.per_token_cast_and_transpose, None, False, FLOOR),
        baselines=peers(_with(reference.per_token_cast_and_transpose, None, False, FLOOR)),
    )


def cases(tiny: bool) -> list[Case]:
    """V3's hidden size, and the rows that an expert layer gets. For weights `tokens` and `hidden` are rows and columns."""
    made = []
    for rows, columns in ((128, 256), (256, 128)) if tiny else ((4096, 7168), (32768, 2048)):
        made.append(_per_token(rows, columns))
        made += [_per_block(rows, columns, transpose) for transpose in (False, True)]
        made += [_transpose(rows, columns, from_fp8) for from_fp8 in (False, True)]
        made.append(_both(rows, columns))
    return made
