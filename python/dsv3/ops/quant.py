"""Casts to FP8 (e4m3) with one fp32 scale a tile of 128 (DeepSeek-V3 report, section 3.3): activations and gradients
1x128, weights 128x128, weight-gradient operands 128x1. A scale multiplies back: dequantised = fp8 * sf.

With amax the largest absolute value of a tile, sf = max(amax, amax_floor) / 448 in fp32, or with pow2_scale the
smallest power of two not below it; the code is that of x * (1 / sf), rounded to nearest even, saturating. All of it is
IEEE arithmetic: native and reference agree in every bit. Where everything is 0 (with a floor of 0) sf is 1; sf is never
below 2^-126. A tile with a NaN or an infinity has that as its scale, so that it dequantises to nothing but NaN; other
tiles do not change. The casts have no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.registry import check_dtype, define, native
from dsv3.reference import quant as reference
from dsv3.reference.quant import TILE, empty_row_scales, num_slots, row_scale_strides

_FLOATS = (torch.bfloat16, torch.float32)


def _empty_fp8(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float8_e4m3fn)


def _tiles(n: int) -> int:
    return (n + TILE - 1) // TILE


def empty_per_token(x: Tensor, tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """What per_token_cast of a [tokens, k] on x's device fills."""
    return _empty_fp8(x, tokens, k), empty_row_scales(x, tokens, _tiles(k))


def _allocate_per_block(w: Tensor, pow2_scale: bool, transpose: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, n, k = w.shape
    data, sf = _empty_fp8(w, g, n, k), w.new_empty(g, _tiles(n), _tiles(k), dtype=torch.float32)
    if not transpose:
        return data, sf, _empty_fp8(w, 0), sf.new_empty(0)
    return data, sf, _empty_fp8(w, g, k, n), sf.new_empty(g, _tiles(k), _tiles(n))


def _launch_per_block(outputs: Any, w: Tensor, pow2_scale: bool, transpose: bool) -> None:
    data, sf, data_t, sf_t = outputs
    native().per_block_cast(data, sf, data_t if transpose else None, sf_t if transpose else None, w, pow2_scale)


def _supports_per_block(w: Tensor, pow2_scale: bool, transpose: bool) -> str | None:
    if w.shape[2] % 16 or (transpose and w.shape[1] % 16):
        return f"w is {tuple(w.shape)}, not a multiple of 16"
    return check_dtype("w", w, *_FLOATS)


def empty_transposed(x: Tensor, offsets: Tensor | None, source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What cast_transpose of x [T, K] fills."""
    tokens, k = len(x) if source is None else len(source), x.shape[1]
    slots = num_slots(tokens, None if offsets is None else offsets.shape[0] - 1)
    return _empty_fp8(x, k, slots), empty_row_scales(x, k, slots // TILE)


def _allocate_both(
    x: Tensor, offsets: Tensor | None, pow2_scale: bool, amax_floor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_per_token(x, *x.shape), *empty_transposed(x, offsets)


define(
    "per_token_cast(Tensor x, bool pow2_scale, float amax_floor) -> (Tensor, Tensor)",
    shapes="x [T,K] bf16|fp32, K % 16 == 0 -> x_fp8 [T,K] e4m3, x_sf [T,ceil(K/128)] fp32, strides (1, T up to 4)",
    reference=reference.per_token_cast,
    allocate=lambda x, pow2_scale, amax_floor: empty_per_token(x, *x.shape),
    launch=lambda outputs, *args: native().per_token_cast(*outputs, *args),
)
define(
    "per_block_cast(Tensor w, bool pow2_scale, bool transpose) -> (Tensor, Tensor, Tensor, Tensor)",
    shapes="w [G,N,K] bf16|fp32 -> w_fp8 [G,N,K] e4m3, w_sf [G,ceil(N/128),ceil(K/128)] fp32, the same of w^T or empty",
    reference=reference.per_block_cast,
    allocate=_allocate_per_block,
    launch=_launch_per_block,
    supports=_supports_per_block,
)
define(
    "per_block_cast_out(Tensor w, bool pow2_scale, Tensor(a!) data, Tensor(b!) sf, Tensor(c!) data_t, Tensor(d!) sf_t)"
    " -> ()",
    shapes="w [G,N,K] bf16|fp32, then per_block_cast's outputs with the transpose, of [G,N,K] and of [G,K,N] (written)",
    reference=reference.per_block_cast_out,
    allocate=lambda *args: None,
    launch=lambda _, w, pow2_scale, *out: native().per_block_cast(*out, w, pow2_scale),
    supports=lambda w, pow2_scale, *out: _supports_per_block(w, pow2_scale, True),
)
define(
    "cast_transpose(Tensor x, Tensor? x_sf, Tensor? offsets, bool pow2_scale, float amax_floor, Tensor? source=None, "
    "int topk=1) -> (Tensor, Tensor)",
    shapes="x [T,K] bf16|fp32, or e4m3 with x_sf [T,ceil(K/128)] fp32, offsets int32 [G+1], source int64 [R] (e4m3) -> xt_fp8 "
    "[K,Tp] e4m3, xt_sf [K,Tp/128] fp32, strides (1, K up to 4); Tp = T, or R (+ 127 G) up to 128",
    reference=reference.cast_transpose,
    allocate=lambda x, x_sf, offsets, pow2_scale, amax_floor, source=None, topk=1: empty_transposed(x, offsets, source),
    launch=lambda outputs, x, x_sf, offsets, pow2_scale, amax_floor, source=None, topk=1: native().cast_transpose(
        *outputs, x, x_sf, offsets, source, topk, pow2_scale, amax_floor
    ),
)
define(
    "per_token_cast_and_transpose(Tensor x, Tensor? offsets, bool pow2_scale, float amax_floor)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    shapes="x [T,K] bf16|fp32, offsets int32 [G+1] -> x_fp8, x_sf as of per_token_cast, xt_fp8, xt_sf as of cast_transpose",
    reference=reference.per_token_cast_and_transpose,
    allocate=_allocate_both,
    launch=lambda outputs, *args: native().per_token_cast_and_transpose(*outputs, *args),
)


def check_floats(name: str, x: Tensor) -> None:
    """A ValueError unless x can be cast."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected bfloat16 or float32, got {x.dtype}".replace("torch.", ""))


def check_floor(name: str, amax_floor: float) -> None:
    """A ValueError unless it can be the smallest amax."""
    if not 0 <= amax_floor < math.inf:
        raise ValueError(f"{name}: amax_floor must be at least 0 and finite, got {amax_floor}")


def check_offsets(name: str, offsets: Tensor | None) -> Tensor | None:
    """offsets, contiguous; a ValueError unless they are int32 [G+1]."""
    if offsets is None:
        return None
    if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.dtype != torch.int32:
        found = f"{str(offsets.dtype).removeprefix('torch.')} {tuple(offsets.shape)}"
        raise ValueError(f"{name}: offsets must be int32 (G+1,) with G >= 1, got {found}")
    return offsets.contiguous()


def per_token_cast(x: Tensor, *, pow2_scale: bool = False, amax_floor: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Cast of activations to FP8 in tiles of 1x128.

    Args:
        x: [T, K] bf16 or fp32, K a multiple of 16; made contiguous.
        pow2_scale: scales that are powers of two, for tensors that are cast again in other tiles.
        amax_floor: smallest amax; gradients need 1e-30, since 1e-4 flushes them to zero.

    Returns:
        x_fp8 [T, K] e4m3 and x_sf [T, ceil(K/128)] fp32 with strides (1, T rounded up to 4).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
    """
    if x.dim() != 2 or x.shape[1] % 16:
        raise ValueError(f"per_token_cast: x must be (T, K) with K a multiple of 16, got {tuple(x.shape)}")
    check_floats("per_token_cast", x)
    check_floor("per_token_cast", amax_floor)
    return torch.ops.dsv3.per_token_cast(x.detach().contiguous(), pow2_scale, amax_floor)


def per_block_cast(
    w: Tensor, *, pow2_scale: bool = False, transpose: bool = False, out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """Cast of weights to FP8 in blocks of 128x128, and of the transposed weights (which dgrad uses) from the same read.

    Native on Hopper where K, and N for the transpose, are multiples of 16. There is no floor on amax.

    Args:
        w: [N, K], or [G, N, K] for the weights of G experts; bf16 or fp32; made contiguous.
        pow2_scale: scales that are powers of two.
        transpose: also cast w^T. Blocks are square, so its values are the same bytes.
        out: what a call with `transpose` returned for a w of this shape: written again. None: new tensors.

    Returns:
        w_fp8 [(G,) N, K] e4m3 and w_sf [(G,) ceil(N/128), ceil(K/128)] fp32, the checkpoint's weight_scale_inv; with
        transpose also wt_fp8 [(G,) K, N] and wt_sf [(G,) ceil(K/128), ceil(N/128)].

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    if w.dim() not in (2, 3):
        raise ValueError(f"per_block_cast: w must be (N, K) or (G, N, K), got {tuple(w.shape)}")
    check_floats("per_block_cast", w)
    batch = w.detach().contiguous().view(-1, *w.shape[-2:]) if w.dim() == 3 else w.detach().contiguous()[None]
    if out is not None:
        _check_per_block_out(w, transpose, out)
        torch.ops.dsv3.per_block_cast_out(batch, pow2_scale, *(t if w.dim() == 3 else t[None] for t in out))
        return out
    outputs = torch.ops.dsv3.per_block_cast(batch, pow2_scale, transpose)[: 4 if transpose else 2]
    return tuple(t if w.dim() == 3 else t[0] for t in outputs)


def _check_per_block_out(w: Tensor, transpose: bool, out: tuple[Tensor, ...]) -> None:
    *groups, n, k = w.shape
    sizes = (n, k), (_tiles(n), _tiles(k)), (k, n), (_tiles(k), _tiles(n))
    expected = [(t, (*groups, *size)) for t, size in zip((torch.float8_e4m3fn, torch.float32) * 2, sizes, strict=True)]
    fits = transpose and [(t.dtype, t.shape) for t in out] == expected
    if not fits or not all(t.is_contiguous() and t.device == w.device for t in out):
        found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in out).replace("torch.", "")
        raise ValueError(
            f"per_block_cast: out must be what it returns with transpose for w {tuple(w.shape)}, got {found}"
        )


def cast_transpose(
    x: Tensor | tuple[Tensor, Tensor],
    offsets: Tensor | None = None,
    *,
    pow2_scale: bool = False,
    amax_floor: float = 1e-4,
    source: Tensor | None = None,
    topk: int = 1,
) -> tuple[Tensor, Tensor]:
    """Cast to FP8 in tiles of 128x1 and transpose: the operands of a weight gradient, K-major over the tokens.

    Group g (rows offsets[g] to offsets[g+1]) starts at slot P[g], P[g+1] = P[g] + 128 * ceil(length / 128), so no tile
    mixes groups; slots without a token are 0, tiles without one have scale 1. Tp = 128 * ceil((T + 127 G) / 128) is
    known without the counts (128 * ceil(T / 128) without offsets). Rows past offsets[G] are not read; the host reads
    nothing. An already cast x is dequantised in fp32 and cast again; with powers of two on both sides that loses only
    what falls below e4m3's smallest normal number.

    Args:
        x: [T, K] bf16 or fp32, K a multiple of 16, or the pair (x_fp8, x_sf) from per_token_cast; made contiguous.
        offsets: int32 [G+1] on x's device, not decreasing, offsets[0] = 0; None is one group of all rows.
        pow2_scale: scales that are powers of two.
        amax_floor: smallest amax; 1e-30 for gradients.
        source: int64 [R], with a cast x: its R rows in expert order are transposed, row r a copy of token source[r] // topk, as
            `Permutation.source` of moe_permute has it; they need not exist. T is R then. A token that there is not means, on
            a GPU, the nearest.
        topk: of source.

    Returns:
        xt_fp8 [K, Tp] e4m3 and xt_sf [K, Tp/128] fp32 with strides (1, K rounded up to 4).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
        RuntimeError: on a CPU, offsets without sense.
    """
    x, x_sf = (x, None) if isinstance(x, Tensor) else x
    if x.dim() != 2 or x.shape[1] % 16:
        raise ValueError(f"cast_transpose: x must be (T, K) with K a multiple of 16, got {tuple(x.shape)}")
    offsets = check_offsets("cast_transpose", offsets)
    check_floor("cast_transpose", amax_floor)
    if x_sf is None:
        check_floats("cast_transpose", x)
    else:
        x_sf = row_scales("cast_transpose", x, x_sf)
    if source is not None:
        fits = source.dtype == torch.int64 and source.dim() == 1 and source.device == x.device and 1 <= topk < 2**31
        if x_sf is None or not fits:
            found = (
                f"{source.dtype} {tuple(source.shape)} on {source.device}, topk {topk} and x {x.dtype} on {x.device}"
            )
            raise ValueError(
                "cast_transpose: source must be int64 (R,) on x's device, topk at least 1 and x a cast with its scales, got "
                + found.replace("torch.", "")
            )
        source = source.contiguous()
    settings = pow2_scale, amax_floor, source, topk
    return torch.ops.dsv3.cast_transpose(x.detach().contiguous(), x_sf, offsets, *settings)


def per_token_cast_and_transpose(
    x: Tensor, offsets: Tensor | None = None, *, pow2_scale: bool = False, amax_floor: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both casts of x from one read, bit for bit: per_token_cast(x) and cast_transpose(x, offsets). What the gradient of a
    linear layer's output needs, 1x128 for dgrad and 128x1 for wgrad.

    Args:
        x: [T, K] bf16 or fp32, K a multiple of 16; made contiguous.
        offsets: int32 [G+1] on x's device, as for cast_transpose. Rows past offsets[G] are not read, and those of x_fp8
            and x_sf not written.
        pow2_scale: scales that are powers of two, in both.
        amax_floor: smallest amax, in both; 1e-30 for gradients.

    Returns:
        x_fp8 [T, K] e4m3 and x_sf [T, ceil(K/128)] fp32 with strides (1, T rounded up to 4); xt_fp8 [K, Tp] e4m3 and
        xt_sf [K, Tp/128] fp32 with strides (1, K rounded up to 4).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
        RuntimeError: on a CPU, offsets without sense.
    """
    name = "per_token_cast_and_transpose"
    if x.dim() != 2 or x.shape[1] % 16:
        raise ValueError(f"{name}: x must be (T, K) with K a multiple of 16, got {tuple(x.shape)}")
    check_floats(name, x)
    check_floor(name, amax_floor)
    offsets = check_offsets(name, offsets)
    return torch.ops.dsv3.per_token_cast_and_transpose(x.detach().contiguous(), offsets, pow2_scale, amax_floor)


def row_scales(name: str, x: Tensor, x_sf: Tensor) -> Tensor:
    """The scales of a cast x, in the strides that the native op reads."""
    tokens, tiles = x.shape[0], _tiles(x.shape[1])
    if x.dtype != torch.float8_e4m3fn or x_sf.dtype != torch.float32 or x_sf.shape != (tokens, tiles):
        found = f"{x.dtype} {tuple(x.shape)} with {x_sf.dtype} {tuple(x_sf.shape)}".replace("torch.", "")
        raise ValueError(f"{name}: expected float8_e4m3fn (T, K) with float32 (T, ceil(K/128)), got {found}")
    x_sf = x_sf.detach()
    return x_sf if x_sf.stride() == row_scale_strides(tokens) else empty_row_scales(x_sf, tokens, tiles).copy_(x_sf)
