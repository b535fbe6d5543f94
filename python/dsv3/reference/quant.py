"""FP8 casts in plain PyTorch: the specification of csrc/quant, bit for bit, and the implementation on a CPU."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.reference.groups import bounds

TILE = 128  # values that share a scale, in one dimension or in both
E4M3_MAX = 448.0
_SMALLEST_NORMAL = 2.0**-126


def _scale(amax: Tensor, pow2_scale: bool, amax_floor: float) -> Tensor:
    """max(amax, floor) / 448 in fp32, at least 2^-126; the power of two above it on the exponent bits; 1 where 0."""
    bound = amax.clamp(min=amax_floor)
    # A tensor as the divisor: CUDA would multiply by the reciprocal of a number.
    sf = (bound / torch.full_like(bound, E4M3_MAX)).clamp(min=_SMALLEST_NORMAL)
    if pow2_scale:
        above = ((sf.view(torch.int32) + 0x007FFFFF) & ~0x007FFFFF).view(torch.float32)
        sf = torch.where(sf.isfinite(), above, sf)
    return torch.where(bound == 0, 1.0, sf)


def encode(x: Tensor, sf: Tensor) -> Tensor:
    """x * (1 / sf), rounded to nearest even, beyond 448 to 448; every NaN is 0x7f."""
    scaled = (x * sf.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.masked_fill_(scaled.isnan(), float("nan")).to(torch.float8_e4m3fn)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row_scale_strides(rows: int) -> tuple[int, int]:
    """Strides of the scales of rows of tiles: the rows are contiguous, for the tensor memory accelerator."""
    return 1, _round_up(rows, 4)


def empty_row_scales(x: Tensor, rows: int, tiles: int) -> Tensor:
    """fp32 [rows, tiles] with these strides. The last column too has memory for whole 16 bytes, by which it is read."""
    strides = row_scale_strides(rows)
    return x.new_empty_strided((strides[1], tiles), strides, dtype=torch.float32)[:rows]


def per_token_cast(x: Tensor, pow2_scale: bool, amax_floor: float) -> tuple[Tensor, Tensor]:
    """x_fp8 [T, K] and x_sf [T, ceil(K/128)] of x [T, K], in tiles of 1x128."""
    tokens, k = x.shape
    padded = F.pad(x.float(), (0, -k % TILE))
    tiles = padded.view(tokens, -(-k // TILE), TILE)
    sf = empty_row_scales(x, tokens, tiles.shape[1])
    sf.copy_(_scale(tiles.abs().amax(-1), pow2_scale, amax_floor))
    return encode(tiles, sf[..., None]).view(padded.shape)[:, :k].contiguous(), sf


def per_block_cast(w: Tensor, pow2_scale: bool, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_fp8 [G, N, K] and w_sf [G, ceil(N/128), ceil(K/128)] of w [G, N, K], then both transposed (empty where not
    asked for), in blocks of 128x128."""
    g, n, k = w.shape
    padded = F.pad(w.float(), (0, -k % TILE, 0, -n % TILE))
    blocks = padded.view(g, -(-n // TILE), TILE, -(-k // TILE), TILE)
    sf = _scale(blocks.abs().amax((2, 4)), pow2_scale, 0.0)
    data = encode(blocks, sf[:, :, None, :, None]).view(padded.shape)[:, :n, :k].contiguous()
    if not transpose:
        return data, sf, data.new_empty(0), sf.new_empty(0)
    turned = [t.transpose(1, 2).clone(memory_format=torch.contiguous_format) for t in (data, sf)]
    return data, sf, turned[0], turned[1]


def per_block_cast_out(w: Tensor, pow2_scale: bool, data: Tensor, sf: Tensor, data_t: Tensor, sf_t: Tensor) -> None:
    """The same with the transpose, into tensors that are there."""
    for target, value in zip((data, sf, data_t, sf_t), per_block_cast(w, pow2_scale, True), strict=True):
        target.copy_(value)


def cast_transpose(
    x: Tensor,
    x_sf: Tensor | None,
    offsets: Tensor | None,
    pow2_scale: bool,
    amax_floor: float,
    source: Tensor | None = None,
    topk: int = 1,
) -> tuple[Tensor, Tensor]:
    """xt_fp8 [K, Tp] and xt_sf [K, Tp/128] of x [T, K] (dequantised first, where it has scales), in tiles of 128x1.

    Rows offsets[g] to offsets[g+1] go to slots P[g] on, P[g+1] = P[g] + 128 * ceil(length / 128); other slots are 0. With
    source [R] the rows are x[source // topk].
    """
    if source is not None:
        token = source // topk
        x, x_sf = x.view(torch.uint8).index_select(0, token).view(x.dtype), x_sf.index_select(0, token)
    tokens, k = x.shape
    ends = [0, tokens] if offsets is None else bounds(offsets, tokens)
    slots = num_slots(tokens, None if offsets is None else len(ends) - 1)
    padded = torch.zeros(slots, k, dtype=torch.float32, device=x.device)
    at = 0
    for start, end in itertools.pairwise(ends):
        rows = x[start:end].float() if x_sf is None else dequantize(x[start:end], x_sf[start:end])
        padded[at : at + end - start] = rows
        at += _round_up(end - start, TILE)
    tiles = padded.view(slots // TILE, TILE, k)
    sf = _scale(tiles.abs().amax(1), pow2_scale, amax_floor)
    sf[at // TILE :] = 1.0
    data = encode(tiles, sf[:, None]).view(slots, k).t().contiguous()
    xt_sf = empty_row_scales(x, k, slots // TILE)
    xt_sf.copy_(sf.t())
    return data, xt_sf


def per_token_cast_and_transpose(
    x: Tensor, offsets: Tensor | None, pow2_scale: bool, amax_floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of per_token_cast, then those of cast_transpose, of x [T, K]; past row offsets[G] the first two are left
    as they come."""
    data, sf = per_token_cast_first(x[: last_row(x, offsets)], x.shape[0], pow2_scale, amax_floor)
    return data, sf, *cast_transpose(x, None, offsets, pow2_scale, amax_floor)


def last_row(x: Tensor, offsets: Tensor | None) -> int:
    """Where the groups end: offsets[G], or T."""
    return x.shape[0] if offsets is None else bounds(offsets, x.shape[0])[-1]


def first_rows(x: Tensor, rows: int) -> Tensor:
    """x as the first of `rows` rows, the others left as they come."""
    whole = x.new_empty(rows, *x.shape[1:])
    whole[: x.shape[0]] = x
    return whole


def per_token_cast_first(x: Tensor, rows: int, pow2_scale: bool, amax_floor: float) -> tuple[Tensor, Tensor]:
    """per_token_cast of what are the first of `rows` rows, the others left as they come."""
    data, sf = per_token_cast(x, pow2_scale, amax_floor)
    whole_sf = empty_row_scales(sf, rows, sf.shape[1])
    whole_sf[: x.shape[0]] = sf
    return first_rows(data, rows), whole_sf


def num_slots(tokens: int, groups: int | None) -> int:
    """Tp: slots of cast_transpose's output, enough for any split of the tokens into groups."""
    return _round_up(tokens + (TILE - 1) * (groups or 0), TILE)


def dequantize(data: Tensor, sf: Tensor) -> Tensor:
    """fp32 [..., N, K] of e4m3 data [..., N, K] and its scales: fp32 [..., N, ceil(K/128)], one for 1x128 values, or
    [..., ceil(N/128), ceil(K/128)], one for 128x128."""
    n, k = data.shape[-2:]
    if sf.shape[-2] != n:
        sf = sf.repeat_interleave(TILE, -2)[..., :n, :]
    return data.float() * sf.repeat_interleave(TILE, -1)[..., :k]
