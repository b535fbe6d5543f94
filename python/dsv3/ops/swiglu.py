"""SwiGLU, times a routing weight a row, and with its output as FP8; forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.ops.grad import Function, apply
from dsv3.ops.quant import check_floats, check_floor, check_offsets, empty_per_token
from dsv3.ops.registry import check_dtype, define, native
from dsv3.reference import swiglu as reference
from dsv3.reference.quant import TILE


def _supports_swiglu(gate_up: Tensor) -> str | None:
    size = 16 // gate_up.element_size()
    if gate_up.shape[-1] % (2 * size):
        return f"inner {gate_up.shape[-1] // 2} is not a multiple of {size}"
    return check_dtype("gate_up", gate_up, torch.bfloat16, torch.float32)


def _allocate_swiglu_backward(dout: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    return torch.empty_like(gate_up), dout.new_empty(0 if weights is None else dout.shape[0], dtype=wide)


def _launch_swiglu_backward(outputs: Any, dout: Tensor, gate_up: Tensor, weights: Tensor | None) -> None:
    native().swiglu_backward(outputs[0], None if weights is None else outputs[1], dout, gate_up, weights)


define(
    "swiglu(Tensor gate_up, Tensor? weights) -> Tensor",
    shapes="gate_up [T,2I] bf16|fp32, weights [T] fp32 -> [T,I]",
    reference=reference.swiglu,
    allocate=lambda gate_up, weights: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    launch=lambda out, *args: native().swiglu(out, *args),
    supports=lambda gate_up, weights: _supports_swiglu(gate_up),
)
define(
    "swiglu_backward(Tensor dout, Tensor gate_up, Tensor? weights) -> (Tensor, Tensor)",
    shapes="dout [T,I], gate_up [T,2I] bf16|fp32, weights [T] fp32 -> dgate_up [T,2I], dweights [T] fp32",
    reference=reference.swiglu_backward,
    allocate=_allocate_swiglu_backward,
    launch=_launch_swiglu_backward,
    supports=lambda dout, gate_up, weights: _supports_swiglu(gate_up),
)


def _allocate_cast_backward(
    dout: Tensor, gate_up: Tensor, weights: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    _, keep, keep_out, *_ = settings
    dgate_up, dweights = _allocate_swiglu_backward(dout, gate_up, weights)
    kept = dgate_up if keep else dout.new_empty(0)
    out = empty_per_token(gate_up, *(dout.shape if keep_out else (0, 0)))
    return *empty_per_token(gate_up, *gate_up.shape), kept, dweights, *out


def _launch_cast_backward(
    outputs: Any,
    dout: Tensor,
    gate_up: Tensor,
    weights: Tensor | None,
    offsets: Tensor | None,
    keep: bool,
    keep_out: bool,
    *settings: Any,
) -> None:
    data, sf, dgate_up, dweights, *out = outputs
    dweights = None if weights is None else dweights
    if dout.shape[1] % TILE == 0:
        dgate_up, again = dgate_up if keep else None, out if keep_out else (None, None)
        native().swiglu_cast_backward(data, sf, dgate_up, dweights, *again, dout, gate_up, weights, offsets, *settings)
        return
    # A tile holds values of both halves: kernels one after the other.
    dgate_up = dgate_up if keep else torch.empty_like(gate_up)
    native().swiglu_backward(dgate_up, dweights, dout, gate_up, weights)
    native().per_token_cast(data, sf, dgate_up, *settings)
    if keep_out:
        native().swiglu_cast(*out, gate_up, weights, offsets, *reference.OUT_CAST)


def _supports_swiglu_cast(gate_up: Tensor) -> str | None:
    inner = gate_up.shape[1] // 2
    return f"inner {inner} is not a multiple of 16" if inner % 16 else _supports_swiglu(gate_up)


define(
    "swiglu_cast(Tensor gate_up, Tensor? weights, Tensor? offsets, bool pow2_scale, float amax_floor)"
    " -> (Tensor, Tensor)",
    shapes="gate_up [T,2I] bf16|fp32, I % 16 == 0, weights [T] fp32, offsets int32 [G+1] -> out_fp8 [T,I] e4m3, "
    "out_sf [T,ceil(I/128)] fp32",
    reference=reference.swiglu_cast,
    allocate=lambda gate_up, *args: empty_per_token(gate_up, gate_up.shape[0], gate_up.shape[1] // 2),
    launch=lambda outputs, *args: native().swiglu_cast(*outputs, *args),
    supports=lambda gate_up, *args: _supports_swiglu_cast(gate_up),
)
define(
    "swiglu_cast_backward(Tensor dout, Tensor gate_up, Tensor? weights, Tensor? offsets, bool keep_dgate_up, "
    "bool keep_out, bool pow2_scale, float amax_floor) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    shapes="dout [T,I], gate_up [T,2I] bf16|fp32, I % 16 == 0, weights [T] fp32, offsets int32 [G+1] -> "
    "dgate_up_fp8 [T,2I] e4m3, dgate_up_sf [T,ceil(2I/128)] fp32, dgate_up [T,2I], dweights [T] fp32, out_fp8 [T,I] "
    "e4m3, out_sf [T,ceil(I/128)] fp32",
    reference=reference.swiglu_cast_backward,
    allocate=_allocate_cast_backward,
    launch=_launch_cast_backward,
    supports=lambda dout, gate_up, *args: _supports_swiglu_cast(gate_up),
)


class _Swiglu(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        return torch.ops.dsv3.swiglu(gate_up, weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, weights = ctx.saved_tensors
        dgate_up, dweights = torch.ops.dsv3.swiglu_backward(dout.contiguous(), gate_up, weights)
        return dgate_up, None if weights is None else dweights


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """SwiGLU (Shazeer, 2020) of fused projections: silu(gate) * up, times a routing weight a row.

    Computed in fp32 and rounded once. Only the inputs are kept for the backward. Native on Hopper for bf16 and fp32, I a
    multiple of 16 bytes.

    Args:
        gate_up: [T, 2I], the gate half first, contiguous.
        weights: fp32 [T] or None.

    Returns:
        [T, I] of gate_up's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_swiglu("swiglu", gate_up, weights)
    return apply(_Swiglu, gate_up.contiguous(), weights)


def _check_swiglu(name: str, gate_up: Tensor, weights: Tensor | None) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or (weights is not None and weights.shape != gate_up.shape[:1]):
        found = f"{tuple(gate_up.shape)} and {None if weights is None else tuple(weights.shape)}"
        raise ValueError(f"{name}: gate_up must be (T, 2I) and weights (T,) or None, got {found}")
    if not gate_up.is_floating_point():
        raise ValueError(f"{name}: gate_up must be of a float dtype, got {gate_up.dtype}".replace("torch.", ""))


def _check_swiglu_cast(name: str, gate_up: Tensor, weights: Tensor | None, amax_floor: float) -> None:
    _check_swiglu(name, gate_up, weights)
    if gate_up.shape[1] % 32:
        raise ValueError(f"{name}: I must be a multiple of 16, got gate_up {tuple(gate_up.shape)}")
    check_floats(name, gate_up)
    check_floor(name, amax_floor)


def swiglu_cast(
    gate_up: Tensor,
    weights: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    pow2_scale: bool = False,
    amax_floor: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """swiglu whose output leaves as FP8 in tiles of 1x128: per_token_cast of it (rounded to gate_up's dtype), in one kernel.

    The native kernel agrees bit for bit with the native swiglu followed by per_token_cast. No gradient: that is
    swiglu_cast_backward. Native on Hopper for bf16 and fp32.

    Args:
        gate_up: [T, 2I], the gate half first, I a multiple of 16; made contiguous.
        weights: fp32 [T] or None.
        offsets: int32 [G+1] on the same device, or None; rows past offsets[G] are neither read nor written.
        pow2_scale: scales that are powers of two.
        amax_floor: smallest amax of a tile.

    Returns:
        out_fp8 [T, I] e4m3 and out_sf [T, ceil(I/128)] fp32 with strides (1, T rounded up to 4).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
        RuntimeError: on a CPU, offsets without sense.
    """
    _check_swiglu_cast("swiglu_cast", gate_up, weights, amax_floor)
    weights = None if weights is None else weights.detach().contiguous()
    offsets = check_offsets("swiglu_cast", offsets)
    return torch.ops.dsv3.swiglu_cast(gate_up.detach().contiguous(), weights, offsets, pow2_scale, amax_floor)


class SwigluCastGradients(NamedTuple):
    """What swiglu_cast_backward returns."""

    dgate_up_fp8: Tensor  # e4m3 [T, 2I]
    dgate_up_sf: Tensor  # fp32 [T, ceil(2I/128)], strides (1, T rounded up to 4)
    dgate_up: Tensor | None  # [T, 2I], what was cast, where asked for
    dweights: Tensor | None  # fp32 [T], where there are weights
    out: tuple[Tensor, Tensor] | None  # what swiglu_cast(gate_up, weights, offsets=offsets) returns, where asked for


def swiglu_cast_backward(
    dout: Tensor,
    gate_up: Tensor,
    weights: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    keep_dgate_up: bool = False,
    keep_out: bool = False,
    pow2_scale: bool = False,
    amax_floor: float = 1e-30,
) -> SwigluCastGradients:
    """The gradients of swiglu, with that of gate_up as FP8 in tiles of 1x128: the operand of dgrad, in one kernel.

    The native kernel agrees bit for bit with the native swiglu_backward followed by per_token_cast; where I is not a
    multiple of 128, so that a tile holds values of both halves, it is these two.

    Args:
        dout: [T, I] of gate_up's dtype; made contiguous.
        gate_up: [T, 2I], I a multiple of 16; made contiguous.
        weights: fp32 [T] or None.
        offsets: int32 [G+1] on the same device, or None; what rows past offsets[G] hold or get means nothing.
        keep_dgate_up: also return what was cast, for cast_transpose.
        keep_out: also return the forward output as swiglu_cast gives it, for the weight gradient of what followed: made
            again from the same read of gate_up.
        pow2_scale: scales that are powers of two.
        amax_floor: smallest amax of a tile.

    Returns:
        SwigluCastGradients(dgate_up_fp8, dgate_up_sf, dgate_up, dweights, out).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
        RuntimeError: on a CPU, offsets without sense.
    """
    _check_swiglu_cast("swiglu_cast_backward", gate_up, weights, amax_floor)
    if dout.shape != (gate_up.shape[0], gate_up.shape[1] // 2) or dout.dtype != gate_up.dtype:
        found = f"{dout.dtype} {tuple(dout.shape)} and {gate_up.dtype} {tuple(gate_up.shape)}".replace("torch.", "")
        raise ValueError(f"swiglu_cast_backward: dout must be (T, I) of gate_up's dtype, got {found}")
    weights = None if weights is None else weights.detach().contiguous()
    offsets = check_offsets("swiglu_cast_backward", offsets)
    tensors = dout.detach().contiguous(), gate_up.detach().contiguous(), weights, offsets
    settings = keep_dgate_up, keep_out, pow2_scale, amax_floor
    data, sf, dgate_up, dweights, *out = torch.ops.dsv3.swiglu_cast_backward(*tensors, *settings)
    kept, dweights = dgate_up if keep_dgate_up else None, None if weights is None else dweights
    return SwigluCastGradients(data, sf, kept, dweights, tuple(out) if keep_out else None)
