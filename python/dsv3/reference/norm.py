"""Normalisation in plain PyTorch: the specification of csrc/norm and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.reference.quant import per_token_cast


def rmsnorm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (empty without a residual) and rstd, for x [T, H]. Statistics in fp32 at least."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None] * weight).to(x.dtype)
    return y, x.new_empty(0) if residual is None else summed, rstd


def rmsnorm_cast(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    keep_y: bool,
    pow2_scale: bool,
    amax_floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y_fp8 and y_sf as per_token_cast makes them of rmsnorm's y, then what rmsnorm returns (y empty unless keep_y)."""
    y, summed, rstd = rmsnorm(x, residual, weight, eps)
    y_fp8, y_sf = per_token_cast(y, pow2_scale, amax_floor)
    return y_fp8, y_sf, y if keep_y else x.new_empty(0), summed, rstd


def rmsnorm_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx = rstd * (w*dy - xhat * mean(w*dy*xhat)) + dresidual and dweight = sum_t dy * xhat, where x is the normalised
    tensor (after the residual add) and xhat = x * rstd."""
    xhat = x * rstd[:, None]
    scaled = dy * weight.to(rstd.dtype)
    dx = torch.addcmul(scaled, xhat, (scaled * xhat).mean(-1, keepdim=True), value=-1).mul_(rstd[:, None])
    if dresidual is not None:
        dx += dresidual
    return dx.to(x.dtype), (dy * xhat).sum(0)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, head_dim: int, inverse: bool) -> None:
    """Rotates, in place, the interleaved pairs of the last 2 * cos.shape[1] values of every head of x [T, heads * head_dim]
    by the angles of row `positions[t]` of the tables; a position outside the tables gives NaN."""
    valid = (positions >= 0) & (positions < cos.shape[0])
    rows = positions.clamp(0, cos.shape[0] - 1)
    nan = torch.where(valid, 1.0, torch.nan)[:, None, None]
    c, s = cos[rows][:, None] * nan, sin[rows][:, None] * (-nan if inverse else nan)
    pairs = x.view(x.shape[0], x.shape[1] // head_dim, head_dim)[..., head_dim - 2 * cos.shape[1] :].unflatten(
        -1, (-1, 2)
    )
    even, odd = pairs.unbind(-1)
    rotated = torch.stack((even * c - odd * s, even * s + odd * c), -1)
    pairs.copy_(rotated)
