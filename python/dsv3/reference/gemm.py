"""Dense and grouped matrix products in plain PyTorch: the specification of csrc/gemm and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(data: Tensor, sf: Tensor) -> Tensor:
    """fp32 [..., N, K] of e4m3 data and one scale factor a 128x128 block, sf fp32 [..., ceil(N/128), ceil(K/128)]."""
    n, k = data.shape[-2:]
    scales = sf.repeat_interleave(128, -2)[..., :n, :].repeat_interleave(128, -1)[..., :k]
    return data.float() * scales


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times weight [N, K] transposed -> [T, N]."""
    return torch.mm(x, weight.t())


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Row r of x [R, K], in group g when offsets[g] <= r < offsets[g+1], times weight[g] [N, K] transposed -> [R, N].

    Rows past offsets[G] are neither read nor written: what they hold is undefined.
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    for w, a, b in _groups(weight, offsets):
        torch.mm(x[a:b], w.t(), out=out[a:b])
    return out


def grouped_linear_dgrad(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of x: dy [R, N] times weight[g] [N, K] -> [R, K]."""
    out = dy.new_empty(dy.shape[0], weight.shape[2])
    for w, a, b in _groups(weight, offsets):
        torch.mm(dy[a:b], w, out=out[a:b])
    return out


def grouped_linear_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[g] += dy[rows of g] transposed times x[rows of g], for out [G, N, K] in its own dtype."""
    for w, a, b in _groups(out, offsets):
        if dy.dtype == out.dtype:
            torch.addmm(w, dy[a:b].t(), x[a:b], out=w)
        else:
            w += torch.mm(dy[a:b].t().to(out.dtype), x[a:b].to(out.dtype))


def _groups(weight: Tensor, offsets: Tensor) -> list[tuple[Tensor, int, int]]:
    bounds = offsets.tolist()
    return [(w, a, b) for w, a, b in zip(weight.unbind(0), bounds, bounds[1:], strict=False) if b > a]
