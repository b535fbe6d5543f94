"""Matrix products in FP8 with block scales (DeepSeek-V3 report, section 3.3): D = A B^T of e4m3 operands whose fp32
scales cover 1x128 or 128x128 values and multiply back. Partial sums are promoted to fp32 every 128 of K, so the error does
not grow with K; the result is rounded once, to bf16 or fp32.

Operands are K-major and come from the casts of `dsv3.ops.quant`; nothing is padded. On a GPU, operands and scales of rows
start at multiples of 16 bytes, as the casts' do; a view of later rows may not, and is then refused with a ValueError.

Where numbers of rows are data (`offsets`, `counts`), they stay on the device. Offsets that start elsewhere than at 0,
decrease or exceed the rows, and counts that exceed them, write nothing: natively the next native call raises RuntimeError
with the numbers, the reference at once (natively an empty result looks at none of them). A NaN in a row of A makes that row
of the result NaN and no other; in B, the columns that share its scale or its row. No op here has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.registry import define, native, refuse
from dsv3.reference import gemm as reference
from dsv3.reference.quant import TILE

_E4M3, _FP32 = torch.float8_e4m3fn, torch.float32
_OUTPUTS = (torch.bfloat16, torch.float32)
_ALIGNMENT = "K must be a multiple of 16 and N of 8"
_ACCUMULATE = "accumulate adds to an out, which must be float32"


def _empty_rows(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, index: Tensor, dtype: torch.dtype, _: bool) -> Tensor:
    """[R, N] or [G, R, N] for b [G, N, K]."""
    return a.new_empty(*a.shape[:-1], b.shape[1], dtype=dtype)


def _launch_dense(out: Tensor, a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, *flags: bool) -> None:
    turns = None
    if b_sf.shape[0] == b.shape[0]:
        turns = a.new_empty(native().fp8_gemm_turns(a.shape[0], b.shape[0]), dtype=torch.int32)
    native().fp8_gemm(out, turns, a, a_sf, b, b_sf, *flags)


def _nothing(*args: Any) -> None:
    """The allocation of an op that writes into an argument."""


def _supports(a: Tensor, a_sf: Tensor, b: Tensor, *rest: Any) -> str | None:
    return None if b.numel() else f"b is empty: {tuple(b.shape)}"


def _supports_dense(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, out: Tensor | torch.dtype, *flags: bool
) -> str | None:
    dtype = out.dtype if isinstance(out, Tensor) else out
    if dtype != _FP32 and b_sf.shape[0] == b.shape[0]:
        return "the output is bfloat16 and b_sf one scale for every 1x128"
    return _supports(a, a_sf, b)


# What arguments break, as a sentence, or None. Calls that the native module does not take pay for these checks, so they
# read each property once.
def _operand_rule(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor) -> str | None:
    if a.dtype != _E4M3 or b.dtype != _E4M3 or a_sf.dtype != _FP32 or b_sf.dtype != _FP32:
        return "operands must be float8_e4m3fn and their scales float32"
    device = a.device
    if b.device != device or a_sf.device != device or b_sf.device != device:
        return "operands and scales must be on one device"
    if not (a.is_contiguous() and b.is_contiguous()):
        return "operands must be contiguous"
    return None


def _up_to_4(rows: int) -> int:
    return (rows + 3) // 4 * 4


def _row_scale_rule(name: str, sf: Tensor, rows: int, tiles: int) -> str | None:
    """Scales of 1x128 tiles have the strides that the casts give them. Where a size is 1, its stride is free."""
    if sf.shape == (rows, tiles):
        first, second = sf.stride()
        if (first == 1 or rows <= 1) and (second == _up_to_4(rows) or tiles <= 1 or rows == 0):
            return None
    return f"{name} must be ({rows}, {tiles}) with strides (1, {_up_to_4(rows)})"


def _masked_scale_rule(sf: Tensor, groups: int, room: int, tiles: int) -> str | None:
    if sf.shape == (groups, room, tiles):
        first, second, third = sf.stride()
        inner = (second == 1 or room <= 1) and (third == _up_to_4(groups * room) or tiles <= 1)
        if (inner and (first == room or groups == 1)) or room == 0:
            return None
    return f"a_sf must be ({groups}, {room}, {tiles}) with strides ({room}, 1, {_up_to_4(groups * room)})"


def _block_scale_rule(b_sf: Tensor, *expected: int) -> str | None:
    return None if b_sf.shape == expected and b_sf.is_contiguous() else f"b_sf must be {expected}, contiguous"


def _index_rule(name: str, index: Tensor, size: int, a: Tensor) -> str | None:
    if index.dtype != torch.int32 or index.shape != (size,) or not index.is_contiguous() or index.device != a.device:
        return f"{name} must be int32 ({size},), contiguous, on the operands' device"
    return None


def _out_rule(out: Tensor | torch.dtype, shape: tuple[int, ...], a: Tensor) -> str | None:
    if isinstance(out, torch.dtype):
        return None if out in _OUTPUTS else f"out_dtype must be bfloat16 or float32, not {out}"
    if out.dtype not in _OUTPUTS or out.shape != shape or not out.is_contiguous() or out.device != a.device:
        return f"out must be bfloat16 or float32 {shape}, contiguous, on the operands' device"
    return None


def _dense_rule(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, out: Tensor | torch.dtype, *flags: bool
) -> str | None:
    rule = _operand_rule(a, a_sf, b, b_sf)
    if rule is not None:
        return rule
    a_shape, b_shape, b_sf_shape = a.shape, b.shape, b_sf.shape
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[1] != b_shape[1]:
        return "a must be (M, K) and b (N, K)"
    (m, k), n = a_shape, b_shape[0]
    if k % 16 or n % 8:
        return _ALIGNMENT
    tiles, blocks = (k + TILE - 1) // TILE, (n + TILE - 1) // TILE
    if b_sf_shape == (n, tiles):
        rule = _row_scale_rule("b_sf", b_sf, n, tiles)
    elif b_sf_shape != (blocks, tiles) or not b_sf.is_contiguous():
        rule = f"b_sf must be ({blocks}, {tiles}), contiguous, or ({n}, {tiles}) with strides (1, {_up_to_4(n)})"
    return rule or _row_scale_rule("a_sf", a_sf, m, tiles) or _out_rule(out, (m, n), a)


def _dense_out_rule(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, out: Tensor, accumulate: bool, *flags: bool
) -> str | None:
    rule = _dense_rule(a, a_sf, b, b_sf, out)
    return _ACCUMULATE if rule is None and accumulate and out.dtype != _FP32 else rule


def _grouped_rule(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, offsets: Tensor, out: Tensor | torch.dtype, _: bool
) -> str | None:
    rule = _operand_rule(a, a_sf, b, b_sf)
    if rule is not None:
        return rule
    a_shape, b_shape = a.shape, b.shape
    if len(a_shape) != 2 or len(b_shape) != 3 or a_shape[1] != b_shape[2] or b_shape[0] < 1:
        return "a must be (R, K) and b (G, N, K) with G at least 1"
    (rows, k), (groups, n, _) = a_shape, b_shape
    if k % 16 or n % 8:
        return _ALIGNMENT
    tiles = (k + TILE - 1) // TILE
    return (
        _block_scale_rule(b_sf, groups, (n + TILE - 1) // TILE, tiles)
        or _row_scale_rule("a_sf", a_sf, rows, tiles)
        or _index_rule("offsets", offsets, groups + 1, a)
        or _out_rule(out, (rows, n), a)
    )


def _masked_rule(
    a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, counts: Tensor, out: Tensor | torch.dtype, _: bool
) -> str | None:
    rule = _operand_rule(a, a_sf, b, b_sf)
    if rule is not None:
        return rule
    a_shape, b_shape = a.shape, b.shape
    if len(a_shape) != 3 or len(b_shape) != 3 or a_shape[::2] != b_shape[::2] or b_shape[0] < 1:
        return "a must be (G, R, K) and b (G, N, K) with G at least 1"
    (groups, room, k), n = a_shape, b_shape[1]
    if k % 16 or n % 8:
        return _ALIGNMENT
    tiles = (k + TILE - 1) // TILE
    return (
        _block_scale_rule(b_sf, groups, (n + TILE - 1) // TILE, tiles)
        or _masked_scale_rule(a_sf, groups, room, tiles)
        or _index_rule("counts", counts, groups, a)
        or _out_rule(out, (groups, room, n), a)
    )


def _wgrad_rule(a_t: Tensor, a_sf: Tensor, b_t: Tensor, b_sf: Tensor, offsets: Tensor, out: Tensor) -> str | None:
    rule = _operand_rule(a_t, a_sf, b_t, b_sf)
    if rule is not None:
        return rule
    a_shape, b_shape = a_t.shape, b_t.shape
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[1] != b_shape[1]:
        return "a_t must be (N, Tp) and b_t (K, Tp)"
    (n, slots), k = a_shape, b_shape[0]
    if slots % TILE or n % 16 or k % 16:
        return "Tp must be a multiple of 128, N and K of 16"
    groups = max(offsets.numel() - 1, 1)
    if out.dtype != _FP32 or out.shape != (groups, n, k) or not out.is_contiguous() or out.device != a_t.device:
        return f"out must be float32 ({groups}, {n}, {k}), contiguous, on the operands' device"
    return (
        _row_scale_rule("a_sf", a_sf, n, slots // TILE)
        or _row_scale_rule("b_sf", b_sf, k, slots // TILE)
        or _index_rule("offsets", offsets, groups + 1, a_t)
    )


define(
    "fp8_gemm(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, ScalarType out_dtype, bool batch_invariant, "
    "bool static_weights) -> Tensor",
    shapes="a [M,K] e4m3, a_sf [M,ceil(K/128)] fp32, strides (1, M up to 4), b [N,K] e4m3, b_sf "
    "[ceil(N/128),ceil(K/128)] or, as a_sf, [N,ceil(K/128)] fp32, K % 16 == 0, N % 8 == 0 -> [M,N] bf16|fp32",
    reference=reference.fp8_gemm,
    allocate=lambda a, a_sf, b, b_sf, dtype, *flags: a.new_empty(a.shape[0], b.shape[0], dtype=dtype),
    launch=lambda out, a, a_sf, b, b_sf, out_dtype, *flags: _launch_dense(out, a, a_sf, b, b_sf, False, *flags),
    supports=_supports_dense,
    rule=_dense_rule,
)
define(
    "fp8_gemm_out(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor(a!) out, bool accumulate, bool batch_invariant, "
    "bool static_weights) -> ()",
    shapes="operands of fp8_gemm, out [M,N] bf16|fp32 (fp32 where the product is added to it)",
    reference=reference.fp8_gemm_out,
    allocate=_nothing,
    launch=lambda _, a, a_sf, b, b_sf, out, *flags: _launch_dense(out, a, a_sf, b, b_sf, *flags),
    supports=_supports_dense,
    rule=_dense_out_rule,
)
define(
    "grouped_fp8_gemm(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor offsets, ScalarType out_dtype, "
    "bool batch_invariant) -> Tensor",
    shapes="a [R,K] e4m3, a_sf [R,ceil(K/128)] fp32, strides (1, R up to 4), b [G,N,K] e4m3, b_sf "
    "[G,ceil(N/128),ceil(K/128)] fp32, offsets [G+1] int32, K % 16 == 0, N % 8 == 0 -> [R,N] bf16|fp32",
    reference=reference.grouped_fp8_gemm,
    allocate=_empty_rows,
    launch=lambda out, a, a_sf, b, b_sf, offsets, out_dtype, batch_invariant: native().grouped_fp8_gemm(
        out, a, a_sf, b, b_sf, offsets, batch_invariant
    ),
    supports=_supports,
    rule=_grouped_rule,
)
define(
    "grouped_fp8_gemm_out(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor offsets, Tensor(a!) out, "
    "bool batch_invariant) -> ()",
    shapes="operands of grouped_fp8_gemm, out [R,N] bf16|fp32",
    reference=reference.grouped_fp8_gemm_out,
    allocate=_nothing,
    launch=lambda _, a, a_sf, b, b_sf, offsets, out, batch_invariant: native().grouped_fp8_gemm(
        out, a, a_sf, b, b_sf, offsets, batch_invariant
    ),
    supports=_supports,
    rule=_grouped_rule,
)
define(
    "masked_grouped_fp8_gemm(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor counts, ScalarType out_dtype, "
    "bool batch_invariant) -> Tensor",
    shapes="a [G,R,K] e4m3, a_sf [G,R,ceil(K/128)] fp32, strides (R, 1, G*R up to 4), b [G,N,K] e4m3, b_sf "
    "[G,ceil(N/128),ceil(K/128)] fp32, counts [G] int32, K % 16 == 0, N % 8 == 0 -> [G,R,N] bf16|fp32",
    reference=reference.masked_grouped_fp8_gemm,
    allocate=_empty_rows,
    launch=lambda out, a, a_sf, b, b_sf, counts, out_dtype, batch_invariant: native().masked_grouped_fp8_gemm(
        out, a, a_sf, b, b_sf, counts, batch_invariant
    ),
    supports=_supports,
    rule=_masked_rule,
)
define(
    "masked_grouped_fp8_gemm_out(Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor counts, Tensor(a!) out, "
    "bool batch_invariant) -> ()",
    shapes="operands of masked_grouped_fp8_gemm, out [G,R,N] bf16|fp32",
    reference=reference.masked_grouped_fp8_gemm_out,
    allocate=_nothing,
    launch=lambda _, a, a_sf, b, b_sf, counts, out, batch_invariant: native().masked_grouped_fp8_gemm(
        out, a, a_sf, b, b_sf, counts, batch_invariant
    ),
    supports=_supports,
    rule=_masked_rule,
)
define(
    "grouped_fp8_wgrad(Tensor a_t, Tensor a_sf, Tensor b_t, Tensor b_sf, Tensor offsets, Tensor(a!) out) -> ()",
    shapes="a_t [N,Tp] e4m3, a_sf [N,Tp/128] fp32, strides (1, N up to 4), b_t [K,Tp] e4m3, b_sf [K,Tp/128] fp32, "
    "strides (1, K up to 4), offsets [G+1] int32, N and K % 16 == 0, out [G,N,K] fp32 (added to)",
    reference=reference.grouped_fp8_wgrad,
    allocate=_nothing,
    launch=lambda _, a_t, a_sf, b_t, b_sf, offsets, out: native().grouped_fp8_wgrad(out, a_t, a_sf, b_t, b_sf, offsets),
    supports=_supports,
    rule=_wgrad_rule,
)


def _detached(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if a.requires_grad or a_sf.requires_grad or b.requires_grad or b_sf.requires_grad:
        return a.detach(), a_sf.detach(), b.detach(), b_sf.detach()
    return a, a_sf, b, b_sf


def fp8_gemm(
    a: Tensor,
    a_sf: Tensor,
    b: Tensor,
    b_sf: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: bool = False,
    batch_invariant: bool = False,
    static_weights: bool = False,
) -> Tensor:
    """A times B transposed. With b_sf of 128x128 blocks: forward and the gradient of the input; with 1x128 tiles, and
    usually accumulated: the gradient of a weight, of two outputs of cast_transpose (native for fp32 alone).

    Args:
        a: e4m3 [M, K], contiguous, K a multiple of 16; M may be 0.
        a_sf: fp32 [M, ceil(K/128)] with strides (1, M rounded up to 4), as per_token_cast and cast_transpose return it.
        b: e4m3 [N, K], contiguous, N a multiple of 8.
        b_sf: fp32 [ceil(N/128), ceil(K/128)], contiguous, as per_block_cast returns it; or as a_sf, [N, ceil(K/128)].
        out: bf16 or fp32 [M, N], contiguous: written, or with `accumulate` added to. None: a new tensor.
        out_dtype: bf16 or fp32, of the new tensor.
        accumulate: out += product; out must be given and fp32.
        batch_invariant: the sums of a row have the same order whatever M is, so its bits do not depend on the others.
            Otherwise that order, the same every time, is a matter of the shape and of the GPU.
        static_weights: b and b_sf were not written by any kernel that may still be running, so they may be read before
            the work in front of this call has finished. The result is the same.

    Returns:
        out, or the new tensor [M, N].

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
    """
    if accumulate and out is None:
        refuse("fp8_gemm", _ACCUMULATE, a=a, a_sf=a_sf, b=b, b_sf=b_sf)
    a, a_sf, b, b_sf = _detached(a, a_sf, b, b_sf)
    if out is None:
        return torch.ops.dsv3.fp8_gemm(a, a_sf, b, b_sf, out_dtype, batch_invariant, static_weights)
    torch.ops.dsv3.fp8_gemm_out(a, a_sf, b, b_sf, out, accumulate, batch_invariant, static_weights)
    return out


def grouped_fp8_gemm(
    a: Tensor,
    a_sf: Tensor,
    b: Tensor,
    b_sf: Tensor,
    offsets: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
) -> Tensor:
    """The products of G experts over rows sorted by expert: groups of any size, also empty, without padding.

    Args:
        a: e4m3 [R, K], contiguous, K a multiple of 16; rows of expert g from offsets[g] to offsets[g+1].
        a_sf: fp32 [R, ceil(K/128)] with strides (1, R rounded up to 4), as per_token_cast returns it.
        b: e4m3 [G, N, K], contiguous, N a multiple of 8, G at least 1.
        b_sf: fp32 [G, ceil(N/128), ceil(K/128)], contiguous.
        offsets: int32 [G+1] on the device, not decreasing, offsets[0] = 0. Rows past offsets[G] are neither read nor
            written.
        out: bf16 or fp32 [R, N], contiguous. None: a new tensor.
        out_dtype: bf16 or fp32, of the new tensor.
        batch_invariant: as in `fp8_gemm`.

    Returns:
        out, or the new tensor [R, N].

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
        RuntimeError: offsets without sense; those on a GPU are told at a later call.
    """
    a, a_sf, b, b_sf = _detached(a, a_sf, b, b_sf)
    if out is None:
        return torch.ops.dsv3.grouped_fp8_gemm(a, a_sf, b, b_sf, offsets, out_dtype, batch_invariant)
    torch.ops.dsv3.grouped_fp8_gemm_out(a, a_sf, b, b_sf, offsets, out, batch_invariant)
    return out


def masked_grouped_fp8_gemm(
    a: Tensor,
    a_sf: Tensor,
    b: Tensor,
    b_sf: Tensor,
    counts: Tensor,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    batch_invariant: bool = False,
) -> Tensor:
    """The products of G experts where each has room for R rows and uses the first counts[g]: the layout of decoding.

    Args:
        a: e4m3 [G, R, K], contiguous, K a multiple of 16.
        a_sf: fp32 [G, R, ceil(K/128)] with strides (R, 1, G*R rounded up to 4): the view of per_token_cast's scales of
            a.view(G*R, K).
        b: e4m3 [G, N, K], contiguous, N a multiple of 8, G at least 1.
        b_sf: fp32 [G, ceil(N/128), ceil(K/128)], contiguous.
        counts: int32 [G] on the device, between 0 and R. Rows from counts[g] on are neither read nor written.
        out: bf16 or fp32 [G, R, N], contiguous. None: a new tensor.
        out_dtype: bf16 or fp32, of the new tensor.
        batch_invariant: as in `fp8_gemm`.

    Returns:
        out, or the new tensor [G, R, N].

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
        RuntimeError: counts beyond R or below 0; those on a GPU are told at a later call.
    """
    a, a_sf, b, b_sf = _detached(a, a_sf, b, b_sf)
    if out is None:
        return torch.ops.dsv3.masked_grouped_fp8_gemm(a, a_sf, b, b_sf, counts, out_dtype, batch_invariant)
    torch.ops.dsv3.masked_grouped_fp8_gemm_out(a, a_sf, b, b_sf, counts, out, batch_invariant)
    return out


def grouped_fp8_wgrad(a_t: Tensor, a_sf: Tensor, b_t: Tensor, b_sf: Tensor, offsets: Tensor, *, out: Tensor) -> None:
    """The weight gradients of G experts: out[g] += dy^T x over the tokens of expert g, in fp32.

    The operands are what `cast_transpose(dy, offsets)` and `cast_transpose(x, offsets)` return, with the same offsets.
    Every element of out has one writer and a fixed order of sums; out[g] of an empty group stays as it is.

    Args:
        a_t: e4m3 [N, Tp], contiguous, N a multiple of 16: dy transposed.
        a_sf: fp32 [N, Tp/128] with strides (1, N rounded up to 4).
        b_t: e4m3 [K, Tp], contiguous, K a multiple of 16: x transposed.
        b_sf: fp32 [K, Tp/128] with strides (1, K rounded up to 4).
        offsets: int32 [G+1] on the device, G at least 1: of the tokens, not of the padded slots; offsets[0] = 0.
        out: fp32 [G, N, K], contiguous; added to.

    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit.
        RuntimeError: offsets without sense; those on a GPU are told at a later call.
    """
    torch.ops.dsv3.grouped_fp8_wgrad(*_detached(a_t, a_sf, b_t, b_sf), offsets, out)
