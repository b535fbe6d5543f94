"""RMSNorm (Zhang and Sennrich, 2019; DeepSeek-V3 report, section 2.1), with the residual add fused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.ops.grad import Function, accumulate, apply
from dsv3.ops.quant import check_floats, check_floor, empty_per_token
from dsv3.ops.registry import check_dtype, define, native, sm_count
from dsv3.reference import norm as reference

_MAX_VECTORS = 2048  # 16-byte vectors a row
_AMAX_FLOOR = 1e-4  # of per_token_cast, unless it is told another


def _supports_row(x: Tensor) -> str | None:
    size = 16 // x.element_size()
    if not 0 < x.shape[-1] <= _MAX_VECTORS * size or x.shape[-1] % size:
        return f"hidden {x.shape[-1]} is not a positive multiple of {size} up to {_MAX_VECTORS * size}"
    return check_dtype("x", x, torch.bfloat16, torch.float32)


def _allocate(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    summed = x.new_empty(0) if residual is None else torch.empty_like(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty_like(x), summed, x.new_empty(x.shape[0], dtype=dtype)


def _launch(outputs: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    y, summed, rstd = outputs
    native().rmsnorm(y, None if residual is None else summed, rstd, x, residual, weight, eps)


def _allocate_cast(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep_y: bool, pow2_scale: bool, amax_floor: float
) -> tuple[Tensor, ...]:
    y, summed, rstd = _allocate(x, residual, weight, eps)
    return *empty_per_token(x, *x.shape), y if keep_y else x.new_empty(0), summed, rstd


def _launch_cast(
    outputs: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep_y: bool, *settings: Any
) -> None:
    y_fp8, y_sf, y, summed, rstd = outputs
    y, summed = y if keep_y else None, None if residual is None else summed
    native().rmsnorm_cast(y_fp8, y_sf, y, summed, rstd, x, residual, weight, eps, *settings)


def _supports_forward(x: Tensor, residual: Tensor | None, weight: Tensor, *settings: Any) -> str | None:
    return _supports_row(x) or (None if weight.dtype == x.dtype else "weight and x differ in dtype")


def _supports_cast(x: Tensor, *args: Any) -> str | None:
    return f"hidden {x.shape[1]} is not a multiple of 16" if x.shape[1] % 16 else _supports_forward(x, *args)


def _allocate_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape, dtype=rstd.dtype)


def _launch_backward(
    outputs: Any, dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> None:
    blocks = min(sm_count(x.device), max(1, x.shape[0]))
    partial = x.new_empty(blocks, x.shape[1], dtype=torch.float32)
    native().rmsnorm_backward(*outputs, partial, dy, dresidual, x, weight, rstd)


define(
    "rmsnorm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    shapes="x, residual [T,H], weight [H] bf16|fp32 -> y, x+residual [T,H], rstd [T] fp32",
    reference=reference.rmsnorm,
    allocate=_allocate,
    launch=_launch,
    supports=_supports_forward,
)
define(
    "rmsnorm_cast(Tensor x, Tensor? residual, Tensor weight, float eps, bool keep_y, bool pow2_scale, float amax_floor)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    shapes="x, residual [T,H], weight [H] bf16|fp32, H % 16 == 0 -> y_fp8 [T,H] e4m3, y_sf [T,ceil(H/128)] fp32, y, "
    "x+residual [T,H], rstd [T] fp32",
    reference=reference.rmsnorm_cast,
    allocate=_allocate_cast,
    launch=_launch_cast,
    supports=_supports_cast,
)
define(
    "rmsnorm_backward(Tensor dy, Tensor? dresidual, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    shapes="dy, dresidual, x [T,H], weight [H] bf16|fp32, rstd [T] fp32 -> dx [T,H], dweight [H] fp32",
    reference=reference.rmsnorm_backward,
    allocate=_allocate_backward,
    launch=_launch_backward,
    supports=lambda dy, dresidual, x, weight, rstd: (
        _supports_row(x) or (None if weight.dtype == x.dtype else "weight and x differ in dtype")
    ),
)


def _keep_norm(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, rstd: Tensor) -> None:
    """x: with the residual added. A recomputed region gives other tensors back than it was given, without their main_grad: so
    the weight is kept beside them."""
    ctx.save_for_backward(x, weight, rstd)
    ctx.weight, ctx.has_residual = weight, residual is not None


def _norm_gradients(ctx: Any, dy: Tensor, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    if dresidual is not None:
        dresidual = dresidual.contiguous()
    dx, dweight = torch.ops.dsv3.rmsnorm_backward(dy.contiguous(), dresidual, x, weight, rstd)
    return dx, dx if ctx.has_residual else None, accumulate(ctx.weight, dweight), None


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        y, summed, rstd = torch.ops.dsv3.rmsnorm(x, residual, weight, eps)
        _keep_norm(ctx, x if residual is None else summed, residual, weight, rstd)
        return y if residual is None else (y, summed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dresidual: Tensor | None = None) -> Any:
        return _norm_gradients(ctx, dy, dresidual)


class _RMSNormCast(Function):
    """_RMSNorm that also returns y_fp8 and y_sf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, ...]:
        y_fp8, y_sf, y, summed, rstd = torch.ops.dsv3.rmsnorm_cast(x, residual, weight, eps, True, False, _AMAX_FLOOR)
        _keep_norm(ctx, x if residual is None else summed, residual, weight, rstd)
        ctx.mark_non_differentiable(y_fp8, y_sf)
        ctx.set_materialize_grads(False)
        return y, None if residual is None else summed, y_fp8, y_sf

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual: Tensor | None, *none: None) -> Any:
        return _norm_gradients(ctx, torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy, dresidual)


def rmsnorm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None, cast: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation of the rows of x, after adding a residual where one is given.

    y = r / sqrt(mean_h(r^2) + eps) * weight, with r = x + residual rounded to the dtype of x; statistics in fp32.
    Native on Hopper for bf16 and fp32, H a multiple of 16 bytes up to 32 KiB a row. The gradient of the weight is
    summed in fp32, in a fixed order, and added to `weight.main_grad` where the parameter has one.

    Args:
        x: [T, H], contiguous.
        weight: [H], of x's dtype for the native op.
        eps: added to the mean square.
        residual: [T, H] of x's dtype, or None.
        cast: y gets an attribute `cast`, the pair that per_token_cast(y) returns, made by the same kernel (rmsnorm_cast):
            FP8 linear layers read it instead of casting y. H must be a multiple of 16.

    Returns:
        y [T, H]; with a residual the tuple (y, r).

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes("rmsnorm", x, weight, residual)
    args = x.contiguous(), residual if residual is None else residual.contiguous(), weight, eps
    if cast:
        _check_cast("rmsnorm", x, _AMAX_FLOOR)
    if not cast or torch.compiler.is_compiling():  # Dynamo knows no such attributes: layers cast y themselves
        return apply(_RMSNorm, *args)
    y, summed, y_fp8, y_sf = apply(_RMSNormCast, *args)
    y.cast = y_fp8, y_sf
    return y if residual is None else (y, summed)


def _check_shapes(name: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"{name}: x must be (T, H) and weight (H,), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{name}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if not x.is_floating_point() or (residual is not None and residual.dtype != x.dtype):
        found = x.dtype if residual is None else f"{x.dtype} and {residual.dtype}"
        raise ValueError(
            f"{name}: x must be of a float dtype, and residual of the same, got {found}".replace("torch.", "")
        )


def _check_cast(name: str, x: Tensor, amax_floor: float) -> None:
    if x.shape[1] % 16:
        raise ValueError(f"{name}: H must be a multiple of 16, got {tuple(x.shape)}")
    check_floats(name, x)
    check_floor(name, amax_floor)


class NormCast(NamedTuple):
    """What rmsnorm_cast returns."""

    y_fp8: Tensor  # e4m3 [T, H]
    y_sf: Tensor  # fp32 [T, ceil(H/128)], strides (1, T rounded up to 4)
    y: Tensor | None  # [T, H], what was cast, where asked for
    residual: Tensor | None  # [T, H], x + residual, where there is one
    rstd: Tensor  # fp32 [T], for rmsnorm_backward


def rmsnorm_cast(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    keep_y: bool = False,
    pow2_scale: bool = False,
    amax_floor: float = 1e-4,
) -> NormCast:
    """rmsnorm whose output leaves as FP8 in tiles of 1x128: per_token_cast of y (rounded to x's dtype), in one kernel.

    The native kernel agrees bit for bit with the native rmsnorm followed by per_token_cast. No gradient: the backward is
    `torch.ops.dsv3.rmsnorm_backward` on x (or x + residual) and rstd. Native on Hopper where rmsnorm is.

    Args:
        x: [T, H] bf16 or fp32, H a multiple of 16; made contiguous.
        weight: [H], of x's dtype for the native op.
        eps: added to the mean square.
        residual: [T, H] of x's dtype, or None.
        keep_y: also return y, for what is not computed in FP8 (the gate).
        pow2_scale: scales that are powers of two, for tensors that are cast again in other tiles.
        amax_floor: smallest amax of a tile.

    Returns:
        NormCast(y_fp8, y_sf, y, residual, rstd).

    Raises:
        ValueError: shapes, dtypes or a floor that do not fit.
    """
    _check_shapes("rmsnorm_cast", x, weight, residual)
    _check_cast("rmsnorm_cast", x, amax_floor)
    addend = None if residual is None else residual.detach().contiguous()
    args = x.detach().contiguous(), addend, weight.detach(), eps, keep_y, pow2_scale, amax_floor
    y_fp8, y_sf, y, summed, rstd = torch.ops.dsv3.rmsnorm_cast(*args)
    return NormCast(y_fp8, y_sf, y if keep_y else None, None if residual is None else summed, rstd)


def _supports_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, head_dim: int, inverse: bool) -> str | None:
    width = 2 * cos.shape[1] * x.element_size()
    if width < 16 or width & (width - 1) or width > 4096 or head_dim * x.element_size() % 16:
        return f"the rotated part of {width} bytes a head is not a power of two from 16 to 4096"
    if not x.is_contiguous():
        return "x is not contiguous"
    return check_dtype("x", x, torch.bfloat16, torch.float32)


define(
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor positions, int head_dim, bool inverse) -> ()",
    shapes="x [T,heads*head_dim] bf16|fp32 (rotated in place), cos, sin [P,R/2] fp32, positions [T] int32|int64",
    reference=reference.rope_,
    allocate=lambda *args: None,
    launch=lambda _, *args: native().rope_(*args),
    supports=_supports_rope,
)


class _Rope(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, head_dim: int) -> Tensor:
        torch.ops.dsv3.rope_(x, cos, sin, positions, head_dim, False)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin, positions)
        ctx.head_dim = head_dim
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        # The incoming gradient may be shared with another consumer, so it is rotated in a copy.
        dx = dx.clone(memory_format=torch.contiguous_format)
        torch.ops.dsv3.rope_(dx, *ctx.saved_tensors, ctx.head_dim, True)
        return dx, None, None, None, None


def rope_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, head_dim: int) -> Tensor:
    """Rotary position embedding (Su et al., 2021) in the interleaved form of the released DeepSeek code, in place.

    Of every head, the last R = 2 * cos.shape[1] values are rotated in pairs (2i, 2i+1) by the angle whose cosine and sine
    are entry i of row positions[t]. Differentiable; x must not be a leaf that requires a gradient, nor a view.

    Args:
        x: [T, heads * head_dim], contiguous; native on Hopper for bf16 and fp32, R a power of two of at least 16 bytes.
        cos: fp32 [P, R/2].
        sin: fp32 [P, R/2].
        positions: int32 or int64 [T], each in [0, P); others give NaN.
        head_dim: values a head, at least R.

    Returns:
        x.

    Raises:
        ValueError: shapes that do not fit.
    """
    fits = x.dim() == 2 and head_dim > 0 and x.shape[1] % head_dim == 0 and x.is_floating_point()
    tables = cos.dim() == 2 and cos.shape == sin.shape and 2 * cos.shape[1] <= head_dim and cos.shape[0] > 0
    if not (fits and tables):
        found = f"{tuple(x.shape)}, {tuple(cos.shape)} and {tuple(sin.shape)}"
        raise ValueError(
            f"rope_: x must be floats (T, heads * {head_dim}), cos and sin (P, R/2) with P >= 1 and R <= {head_dim}, got "
            f"{str(x.dtype).removeprefix('torch.')} {found}"
        )
    if positions.shape != x.shape[:1]:
        raise ValueError(f"rope_: positions must be ({x.shape[0]},), got {tuple(positions.shape)}")
    return apply(_Rope, x, cos, sin, positions, head_dim)
