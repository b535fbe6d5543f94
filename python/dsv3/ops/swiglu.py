"""SwiGLU, times a routing weight a row, and with its output as FP8; forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.ops.grad import Function, apply
from dsv3.ops.quant import check_floats, check_floor, check_offsets, empty_per_token, empty_transposed
from dsv3.ops.registry import check_dtype, define, native
from dsv3.reference import swiglu as reference
from dsv3.reference.quant import TILE


def _supports_swiglu(gate_up: Tensor) -> str | None:
    size = 16 // gate_up.element_size()
    if gate_up.shape[-1] % (2 * size):
        return f"inner {gate_up.shape[-1] // 2} is not a multiple of {size}"
    return check_dtype("gate_up", gate_up, torch.bfloat16, torch.float32)


def _allocate_dweights(dout: Tensor, gate_up: Tensor, weights: Tensor | None) -> Tensor:
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    return dout.new_empty(0 if weights is None else dout.shape[0], dtype=wide)


def _allocate_swiglu_backward(dout: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), _allocate_dweights(dout, gate_up, weights)


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
    return *empty_per_token(gate_up, *gate_up.shape), _allocate_dweights(dout, gate_up, weights)


def _launch_cast_backward(
    outputs: Any, dout: Tensor, gate_up: Tensor, weights: Tensor | None, offsets: Tensor | None, *settings: Any
) -> None:
    data, sf, dweights = outputs
    dweights = None if weights is None else dweights
    if dout.shape[1] % TILE == 0:
        native().swiglu_cast_backward(data, sf, dweights, dout, gate_up, weights, offsets, *settings)
        return
    # A tile holds values of both halves: kernels one after the other.
    dgate_up = torch.empty_like(gate_up)
    native().swiglu_backward(dgate_up, dweights, dout, gate_up, weights)
    native().per_token_cast(data, sf, dgate_up, *settings)


def _allocate_both_casts(
    dout: Tensor, gate_up: Tensor, weights: Tensor | None, offsets: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    transposed = [empty_transposed(x, offsets) for x in (gate_up, dout)]
    return *_allocate_cast_backward(dout, gate_up, weights), *transposed[0], *transposed[1]


def _launch_both_casts(
    outputs: Any, dout: Tensor, gate_up: Tensor, weights: Tensor | None, offsets: Tensor | None, *settings: Any
) -> None:
    data, sf, dweights, *transposed = outputs
    dweights = None if weights is None else dweights
    tokens, inner = dout.shape
    if gate_up.dtype == torch.bfloat16 and inner % TILE == 0:
        parts = None if dweights is None else dweights.new_empty(inner // (TILE // 2), tokens)
        inputs = dout, gate_up, weights, offsets, *settings
        native().swiglu_backward_both_casts(data, sf, *transposed, parts, *inputs)
        if dweights is not None:
            torch.sum(parts, 0, out=dweights)
        return
    dgate_up, out = torch.empty_like(gate_up), torch.empty_like(dout)
    native().swiglu_backward(dgate_up, dweights, dout, gate_up, weights)
    native().swiglu(out, gate_up, weights)
    native().per_token_cast_and_transpose(data, sf, *transposed[:2], dgate_up, offsets, *settings)
    native().cast_transpose(*transposed[2:], out, None, offsets, None, 1, *reference.OUT_CAST)


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
    "swiglu_cast_backward(Tensor dout, Tensor gate_up, Tensor? weights, Tensor? offsets, bool pow2_scale, "
    "float amax_floor) -> (Tensor, Tensor, Tensor)",
    shapes="dout [T,I], gate_up [T,2I] bf16|fp32, I % 16 == 0, weights [T] fp32, offsets int32 [G+1] -> "
    "dgate_up_fp8 [T,2I] e4m3, dgate_up_sf [T,ceil(2I/128)] fp32, dweights [T] fp32",
    reference=reference.swiglu_cast_backward,
    allocate=_allocate_cast_backward,
    launch=_launch_cast_backward,
    supports=lambda dout, gate_up, *args: _supports_swiglu_cast(gate_up),
)
define(
    "swiglu_backward_both_casts(Tensor dout, Tensor gate_up, Tensor? weights, Tensor? offsets, bool pow2_scale, "
    "float amax_floor) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    shapes="dout [T,I], gate_up [T,2I] bf16|fp32, I % 16 == 0, weights [T] fp32, offsets int32 [G+1] -> "
    "dgate_up_fp8, dgate_up_sf, dweights as of swiglu_cast_backward, then dgate_up_t [2I,Tp] and out_t [I,Tp] e4m3, each "
    "with its scales, as of cast_transpose",
    reference=reference.swiglu_backward_both_casts,
    allocate=_allocate_both_casts,
    launch=_launch_both_casts,
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
    dweights: Tensor | None  # fp32 [T], where there are weights


class SwigluBothCastsGradients(NamedTuple):
    """What swiglu_backward_both_casts returns."""

    dgate_up_fp8: Tensor  # as of SwigluCastGradients, and the next two
    dgate_up_sf: Tensor
    dweights: Tensor | None
    dgate_up_t: tuple[Tensor, Tensor]  # e4m3 [2I, Tp] and fp32 [2I, Tp/128]
    out_t: tuple[Tensor, Tensor]  # e4m3 [I, Tp] and fp32 [I, Tp/128]


def swiglu_cast_backward(
    dout: Tensor,
    gate_up: Tensor,
    weights: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
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
        pow2_scale: scales that are powers of two.
        amax_floor: smallest amax of a tile.

    Returns:
        SwigluCastGradients(dgate_up_fp8, dgate_up_sf, dweights).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
        RuntimeError: on a CPU, offsets without sense.
    """
    args = _backward_args("swiglu_cast_backward", dout, gate_up, weights, offsets, pow2_scale, amax_floor)
    data, sf, dweights = torch.ops.dsv3.swiglu_cast_backward(*args)
    return SwigluCastGradients(data, sf, None if weights is None else dweights)


def swiglu_backward_both_casts(
    dout: Tensor,
    gate_up: Tensor,
    weights: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    pow2_scale: bool = False,
    amax_floor: float = 1e-30,
) -> SwigluBothCastsGradients:
    """The gradients of swiglu with all that a layer of FP8 products makes of them, from one read: swiglu_cast_backward, and
    transposed, for the weight gradients on both sides, cast_transpose of gate_up's gradient and of swiglu's output.

    In bf16, with I a multiple of 128, one kernel; the codes agree bit for bit with the native swiglu_backward and swiglu,
    followed by per_token_cast and cast_transpose. dweights is summed in parts of 64 columns, in a fixed order. Otherwise it
    is those kernels.

    Args:
        dout: [T, I] of gate_up's dtype; made contiguous.
        gate_up: [T, 2I], I a multiple of 16; made contiguous.
        weights: fp32 [T] or None.
        offsets: int32 [G+1] on the same device, as for cast_transpose, or None; what rows past offsets[G] hold, or get in
            what is not transposed, means nothing.
        pow2_scale: scales of the gradient that are powers of two.
        amax_floor: smallest amax of a tile of the gradient; that of the output is 1e-4.

    Returns:
        SwigluBothCastsGradients(dgate_up_fp8, dgate_up_sf, dweights, dgate_up_t, out_t).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
        RuntimeError: on a CPU, offsets without sense.
    """
    args = _backward_args("swiglu_backward_both_casts", dout, gate_up, weights, offsets, pow2_scale, amax_floor)
    data, sf, dweights, *transposed = torch.ops.dsv3.swiglu_backward_both_casts(*args)
    dweights = None if weights is None else dweights
    return SwigluBothCastsGradients(data, sf, dweights, tuple(transposed[:2]), tuple(transposed[2:]))


def _backward_args(
    name: str, dout: Tensor, gate_up: Tensor, weights: Tensor | None, offsets: Tensor | None, pow2: bool, floor: float
) -> tuple[Any, ...]:
    _check_swiglu_cast(name, gate_up, weights, floor)
    if dout.shape != (gate_up.shape[0], gate_up.shape[1] // 2) or dout.dtype != gate_up.dtype:
        found = f"{dout.dtype} {tuple(dout.shape)} and {gate_up.dtype} {tuple(gate_up.shape)}".replace("torch.", "")
        raise ValueError(f"{name}: dout must be (T, I) of gate_up's dtype, got {found}")
    weights = None if weights is None else weights.detach().contiguous()
    tensors = dout.detach().contiguous(), gate_up.detach().contiguous(), weights, check_offsets(name, offsets)
    return *tensors, pow2, floor
