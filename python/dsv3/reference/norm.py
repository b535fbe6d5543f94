"""Normalisation in plain PyTorch: the specification of csrc/norm and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (empty without a residual) and rstd, for x [T, H]. Statistics in fp32 at least."""
    summed = x if residual is None else x + residual
    wide = summed.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None] * weight).to(x.dtype)
    return y, x.new_empty(0) if residual is None else summed, rstd


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
