"""Dense and grouped linear layers in plain PyTorch, on every device: torch's own products where they are good."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsv3.reference.groups import groups


def linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x [T, K] times weight [N, K] transposed -> [T, N] of out_dtype, summed in it at least."""
    if out_dtype == x.dtype:
        return torch.mm(x, weight.t())
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=out_dtype)
    return torch.mm(x.to(out_dtype), weight.t().to(out_dtype))


def linear_dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x, of weight's dtype: dy [T, N], of that dtype or wider, times weight [N, K]."""
    if dy.dtype == weight.dtype:
        return torch.mm(dy, weight)
    if _multiplies_halves(dy, weight):
        return torch.mm(_halves(dy), torch.cat([weight, weight]))
    return torch.mm(dy, weight.to(dy.dtype)).to(weight.dtype)


def linear_wgrad(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of weight, of dy's dtype: dy [T, N] transposed times x [T, K], of that dtype or narrower."""
    if _multiplies_halves(dy, x):
        return torch.mm(_halves(dy).t(), x, out_dtype=dy.dtype).view(2, dy.shape[1], -1).sum(0)
    return torch.mm(dy.t(), x.to(dy.dtype))


def _multiplies_halves(dy: Tensor, x: Tensor) -> bool:
    return dy.is_cuda and dy.dtype == torch.float32 and x.dtype == torch.bfloat16


def _halves(dy: Tensor) -> Tensor:
    """fp32 [T, N] -> bf16 [T, 2N]: rounded values, then what they lack, rounded. The sum of both is within 2^-17 of dy, and
    tensor cores multiply them 20 times as fast as fp32."""
    high = dy.bfloat16()
    return torch.cat([high, (dy - high).bfloat16()], 1)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Row r of x [R, K], in group g when offsets[g] <= r < offsets[g+1], times weight[g] [N, K] transposed -> [R, N].

    Rows past offsets[G] are neither read nor written: what they hold is undefined.
    """
    if _grouped_mm(x):
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:])
    out = x.new_empty(x.shape[0], weight.shape[1])
    for g, rows in groups(offsets, x.shape[0]):
        torch.mm(x[rows], weight[g].t(), out=out[rows])
    return out


def grouped_linear_dgrad(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of x: dy [R, N] times weight[g] [N, K] -> [R, K]."""
    if _grouped_mm(dy):
        return torch.nn.functional.grouped_mm(dy, weight, offs=offsets[1:])
    out = dy.new_empty(dy.shape[0], weight.shape[2])
    for g, rows in groups(offsets, dy.shape[0]):
        torch.mm(dy[rows], weight[g], out=out[rows])
    return out


def grouped_linear_wgrad_(dy: Tensor, x: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[g] += dy[rows of g] transposed times x[rows of g], for out [G, N, K] of dy's dtype or fp32."""
    if _grouped_mm(x):
        out += torch.nn.functional.grouped_mm(dy.t(), x, offs=offsets[1:])
        return
    for g, rows in groups(offsets, x.shape[0]):
        add_product_(out[g], dy[rows], x[rows])


def add_product_(out: Tensor, dy: Tensor, x: Tensor) -> None:
    """out [N, K] += dy [T, N] transposed times x [T, K], summed in out's dtype. dy may be wider than x."""
    if dy.dtype != x.dtype:
        out += linear_wgrad(dy, x)
    elif out.dtype == dy.dtype:
        torch.addmm(out, dy.t(), x, out=out)
    elif not dy.is_cuda:
        out += torch.mm(dy.t().to(out.dtype), x.to(out.dtype))
    elif torch.compiler.is_compiling() or not _adds_to_wide_sums():
        out += torch.mm(dy.t(), x, out_dtype=out.dtype)
    else:
        torch.addmm(out, dy.t(), x, out_dtype=out.dtype, out=out)


@functools.cache
def _adds_to_wide_sums() -> bool:
    """Whether this torch's addmm adds bf16 products to an fp32 tensor, in place; some refuse, before they launch anything."""
    x, out = (torch.empty(8, 8, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(out, x, x, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def _grouped_mm(x: Tensor) -> bool:
    """torch has a grouped product, with offsets that stay on the device, for bf16 on CUDA."""
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[0] > 0
