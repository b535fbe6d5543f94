"""Block-scaled FP8 products in plain PyTorch: the specification of csrc/gemm, and the implementation on a CPU.

The operands are dequantised to fp32 and multiplied in fp32; what comes out is rounded once, to the output's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.reference.groups import groups
from dsv3.reference.quant import TILE, dequantize


def product(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, batch_invariant: bool = False) -> Tensor:
    """fp32 [M, N] of a [M, K] and b [N, K]. Batch-invariant: a row's sums have the same order whatever rows are beside
    it, so each row is a product of its own here."""
    x, w = dequantize(a, a_sf), dequantize(b, b_sf)
    if not batch_invariant:
        return torch.mm(x, w.t())
    out = x.new_empty(x.shape[0], w.shape[0])
    for row, target in zip(x.unbind(0), out.unbind(0), strict=True):
        torch.mv(w, row, out=target)
    return out


def fp8_gemm(
    a: Tensor,
    a_sf: Tensor,
    b: Tensor,
    b_sf: Tensor,
    out_dtype: torch.dtype,
    batch_invariant: bool,
    static_weights: bool,
) -> Tensor:
    """a [M, K] with a_sf [M, ceil(K/128)] times b [N, K] transposed -> [M, N] of out_dtype; b_sf is
    [ceil(N/128), ceil(K/128)] or [N, ceil(K/128)]. static_weights does not change the result."""
    return product(a, a_sf, b, b_sf, batch_invariant).to(out_dtype)


def fp8_gemm_out(
    a: Tensor,
    a_sf: Tensor,
    b: Tensor,
    b_sf: Tensor,
    out: Tensor,
    accumulate: bool,
    batch_invariant: bool,
    static_weights: bool,
) -> None:
    """The same into out [M, N], or added to it."""
    result = product(a, a_sf, b, b_sf, batch_invariant)
    if accumulate:
        out += result
    else:
        out.copy_(result)


def grouped_fp8_gemm(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, offsets: Tensor, out_dtype: torch.dtype, batch_invariant: bool
) -> Tensor:
    """Row r of a [R, K], in group g when offsets[g] <= r < offsets[g+1], times b[g] [N, K] transposed -> [R, N].

    Rows past offsets[G] are neither read nor written: what they hold is undefined.
    """
    out = a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype)
    grouped_fp8_gemm_out(a, a_sf, b, b_sf, offsets, out, batch_invariant)
    return out


def grouped_fp8_gemm_out(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, offsets: Tensor, out: Tensor, batch_invariant: bool
) -> None:
    """The same into out [R, N]."""
    for g, rows in groups(offsets, a.shape[0]):
        out[rows] = product(a[rows], a_sf[rows], b[g], b_sf[g], batch_invariant).to(out.dtype)


def masked_grouped_fp8_gemm(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, counts: Tensor, out_dtype: torch.dtype, batch_invariant: bool
) -> Tensor:
    """The first counts[g] rows of a[g], a [G, R, K], times b[g] [N, K] transposed -> [G, R, N]; the other rows are
    neither read nor written."""
    out = a.new_empty(*a.shape[:2], b.shape[1], dtype=out_dtype)
    masked_grouped_fp8_gemm_out(a, a_sf, b, b_sf, counts, out, batch_invariant)
    return out


def masked_grouped_fp8_gemm_out(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, counts: Tensor, out: Tensor, batch_invariant: bool
) -> None:
    """The same into out [G, R, N]."""
    room = a.shape[1]
    valid = counts.tolist()
    for g, count in enumerate(valid):
        if not 0 <= count <= room:
            raise RuntimeError(f"counts must lie between 0 and the {room} rows of a group, got counts[{g}] = {count}")
    for g, count in enumerate(valid):
        if count:
            rows = product(a[g, :count], a_sf[g, :count], b[g], b_sf[g], batch_invariant)
            out[g, :count] = rows.to(out.dtype)


def grouped_fp8_wgrad(a_t: Tensor, a_sf: Tensor, b_t: Tensor, b_sf: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[g] [N, K] += a_t [N, Tp] times b_t [K, Tp] transposed over group g's slots P[g] to P[g+1], where P[g+1] =
    P[g] + 128 * ceil(length / 128): cast_transpose's layout. Empty groups leave out[g] alone."""
    slots, tile = a_t.shape[1], 0
    pieces = []
    for g, rows in groups(offsets, slots):
        end = tile + -(-(rows.stop - rows.start) // TILE)
        pieces.append((g, slice(tile * TILE, end * TILE), slice(tile, end)))
        tile = end
    if tile * TILE > slots:
        raise RuntimeError(f"offsets must stay within the {slots} slots, got groups that need {tile * TILE}")
    for g, part, tiles in pieces:
        out[g] += product(a_t[:, part], a_sf[:, tiles], b_t[:, part], b_sf[:, tiles])
