"""The way there in FP8: rows are cast once, by their sender, and travel as codes and scales; the way back stays as it is.

Scales are powers of two, so that a row can be cast again in other tiles (weight gradients) without another rounding of its
mantissa. The cast of a row depends on nothing else: cast before it travels and cast on arrival are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.comm.steps import Copies, Step, Sum, back
from dsv3.ops.fp8_linear import GRADIENT_FLOOR, Cast, Gathered, GradientCast
from dsv3.ops.grad import Function
from dsv3.ops.quant import per_token_cast
from dsv3.reference.quant import dequantize, empty_row_scales

DTYPES = (torch.bfloat16, torch.float32)  # of rows that can be cast


def cast_there(x: Tensor, steps: Sequence[Step], **settings: float) -> Cast:
    """x [T, H] in tiles of 1x128 -> e4m3 [R, H] and fp32 [R, ceil(H/128)], laid out as per_token_cast does."""
    cast = per_token_cast(x, pow2_scale=True, **settings)
    for step in steps:
        if isinstance(step, Copies):
            tokens, cast = cast, step.spread_cast(*cast)
            Gathered.note(cast, tokens, step.source, step.position.shape[1])
        else:
            cast = _spread_in_turn(step, *cast)
    return cast


def _spread_in_turn(step: Step, data: Tensor, sf: Tensor) -> Cast:
    """Codes, then scales, by steps that know only rows of whole 16 bytes."""
    words = step.spread(data.view(torch.float32))  # four codes a word: bits are moved, no number is read
    tiles = sf.shape[1]
    sf = step.spread(F.pad(sf, (0, -tiles % 4)).contiguous())[:, :tiles]
    return words.view(torch.float8_e4m3fn), empty_row_scales(sf, *sf.shape).copy_(sf)


class _SpreadCast(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Sequence[Step]) -> tuple[Tensor, Tensor, Tensor]:
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        data, sf = cast_there(x, steps)
        ctx.mark_non_differentiable(data, sf)
        return x.new_full((), float("nan")).expand(data.shape), data, sf

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, *none: None) -> tuple[Tensor | None, None]:
        return None if drows is None else back(drows.contiguous(), ctx.steps), None


class _SumCast(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, steps: Sequence[Step], gradient: GradientCast | None) -> Tensor:
        ctx.gradient = gradient
        return Sum.forward(ctx, y, steps)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        cast = cast_there(dout, ctx.steps, amax_floor=GRADIENT_FLOOR)
        if ctx.gradient is None or torch.is_anomaly_enabled():  # which takes NaN for a mistake
            return dequantize(*cast).to(dout.dtype), None, None
        return ctx.gradient.leave(cast, dout.dtype), None, None


def spread_cast(x: Tensor, steps: Sequence[Step]) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], bf16 or fp32, H a multiple of 16 -> (rows, data, sf); differentiable through rows.

    rows [R, H] of x's dtype stands for the FP8 rows in autograd: its gradient is theirs, its values are NaN, it takes no
    memory. data e4m3 [R, H] and sf fp32 [R, ceil(H/128)] are what arrived.
    """
    return _SpreadCast.apply(x, steps)


def add_up_cast(y: Tensor, steps: Sequence[Step]) -> Tensor:
    """steps.add_up whose backward casts the gradient and sends it as FP8. A y that comes from fp8_experts gets it so; another
    gets it in its own dtype, which holds every product of a code and its scale exactly: who casts it again loses nothing."""
    return _SumCast.apply(y, steps, GradientCast.of(y))
