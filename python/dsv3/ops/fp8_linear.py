"""Linear layers that train in FP8 (DeepSeek-V3 report, section 3.3): forward, dgrad and wgrad are FP8 products, what goes
in and out of a layer keeps its dtype.

Activations are cast in tiles of 1x128 and kept for backward as FP8; weights are in blocks of 128x128; the operands of a
weight gradient are in tiles of 128x1, its sum is fp32. Gradients are cast with a floor of 1e-30. The weight part of a
backward, with the transposition of the kept input, can wait in a WgradQueue as in `dsv3.ops.linear`; the gradient waits as
FP8 too. Nothing here asks the device, so all of it can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad
from dsv3.ops.grad import Function, apply
from dsv3.ops.invariance import is_batch_invariant
from dsv3.ops.linear import Quantized, WgradQueue, is_unchanged, now_or_later, version
from dsv3.ops.quant import cast_transpose, per_block_cast, per_token_cast, per_token_cast_and_transpose
from dsv3.ops.swiglu import swiglu_backward_both_casts, swiglu_cast, swiglu_cast_backward

GRADIENT_FLOOR = 1e-30  # smallest amax of a tile of gradients
Cast = tuple[Tensor, Tensor]  # e4m3 data and the scales of its tiles


@dataclass(eq=False)
class Fp8Weight:
    """A parameter [N, K], or [G, N, K] for G experts, with the FP8 copies that stand for it in products."""

    param: Tensor  # whose main_grad, or grad, takes the gradient
    data: Quantized  # [(G,) N, K]: forward
    transposed: Quantized  # [(G,) K, N]: dgrad
    state: tuple[object, ...] | None = field(init=False)  # of the parameter when it was cast, as torch knows it

    def __post_init__(self) -> None:
        self.state = _state(self.param)

    @staticmethod
    def make(param: Tensor) -> Fp8Weight:
        """Casts a parameter; ValueError unless its last two sizes are multiples of 16."""
        if not Fp8Weights.takes(param):
            raise ValueError(f"Fp8Weight: the last two sizes must be multiples of 16, got {tuple(param.shape)}")
        data, sf, data_t, sf_t = per_block_cast(param, transpose=True)
        return Fp8Weight(param, Quantized(data, sf), Quantized(data_t, sf_t))

    def refresh(self) -> None:
        """Casts the parameter again, into the same memory."""
        copies = self.data, self.transposed
        per_block_cast(self.param, transpose=True, out=tuple(t for copy in copies for t in (copy.data, copy.sf)))
        self.state = _state(self.param)

    @property
    def shape(self) -> torch.Size:
        return self.param.shape

    @property
    def is_stale(self) -> bool:
        """Whether torch has changed the parameter since."""
        return not torch.compiler.is_compiling() and self.state != _state(self.param)


def _state(param: Tensor) -> tuple[object, ...] | None:
    """What differs after a change that torch has made; None in a graph that is being compiled, which knows nothing of it."""
    if torch.compiler.is_compiling():
        return None
    return param.data_ptr(), param.dtype, version(param)


@dataclass
class Fp8Weights:
    """The FP8 copies of one layer's parameters, by their names in it: made at first use, rewritten in place by `refresh` after
    each optimizer step, and at their next use where torch knows that the parameter has changed (`optimizer.step`,
    `load_state_dict`, a cast; not what a kernel of ours or of another library has written). They go with the parameter that
    they were made from, and are no state: a copy of the layer, or what is read from its file, makes its own."""

    made: dict[str, Fp8Weight] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"made": {}}

    @staticmethod
    def takes(param: Tensor | Quantized) -> bool:
        """Whether a weight can be multiplied in FP8."""
        return param.shape[-1] % 16 == param.shape[-2] % 16 == 0

    @torch.inference_mode(False)  # copies first made by an engine must serve training too
    def of(self, name: str, param: Tensor | Quantized) -> Fp8Weight | Quantized | None:
        """The copies of the parameter that has this name now, or the weight itself where it is Quantized; None where a size is
        no multiple of 16."""
        if not self.takes(param):
            return None
        if isinstance(param, Quantized):
            return param
        weight = self.made.get(name)
        if weight is None or weight.param is not param or weight.data.device != param.device:
            weight = self.made[name] = Fp8Weight.make(param)
        elif weight.is_stale:
            weight.refresh()
        return weight

    @torch.no_grad()
    def refresh(self) -> None:
        """Casts every parameter again whose copies have been made, but those that have moved to another device since:
        theirs are made anew at the next use."""
        self.made = {name: weight for name, weight in self.made.items() if weight.data.device == weight.param.device}
        for weight in self.made.values():
            weight.refresh()


def _product(a: Cast, weight: Quantized, offsets: Tensor | None, dtype: torch.dtype, *, static: bool = False) -> Tensor:
    """static: no kernel may still be writing the weight."""
    settings = {"out_dtype": dtype, "batch_invariant": is_batch_invariant()}
    if offsets is None:
        return fp8_gemm(*a, weight.data, weight.sf, static_weights=static, **settings)
    return grouped_fp8_gemm(*a, weight.data, weight.sf, offsets, **settings)


def _add_wgrad(dy_t: Cast, x_t: Cast, param: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Adds dy^T x to main_grad and returns None, or returns it where the parameter has no such buffer."""
    main_grad = getattr(param, "main_grad", None)
    out = torch.zeros(param.shape, dtype=torch.float32, device=param.device) if main_grad is None else main_grad
    if offsets is not None:
        grouped_fp8_wgrad(*dy_t, *x_t, offsets, out=out)
    elif dy_t[0].shape[1]:
        fp8_gemm(*dy_t, *x_t, out=out, accumulate=True)
    return out.to(param.dtype) if main_grad is None else None


def _cast_gradient(dy: Tensor, offsets: Tensor | None, transpose: bool, pow2_scale: bool) -> tuple[Cast, Cast | None]:
    """dy in tiles of 1x128, for dgrad, and where asked for transposed in tiles of 128x1, for wgrad, from one read."""
    settings = {"pow2_scale": pow2_scale, "amax_floor": GRADIENT_FLOOR}
    if not transpose and offsets is None:
        return per_token_cast(dy, **settings), None
    data, sf, data_t, sf_t = per_token_cast_and_transpose(dy, offsets, **settings)
    return (data, sf), (data_t, sf_t)


def _transpose_rows(dy: Cast, offsets: Tensor | None, pow2_scale: bool) -> Cast:
    """dy, rows in tiles of 1x128, in tiles of 128x1; from what they are copies of, where that is known."""
    made, settings = Gathered.of(dy), {"pow2_scale": pow2_scale, "amax_floor": GRADIENT_FLOOR}
    if made is None:
        return cast_transpose(dy, offsets, **settings)
    return cast_transpose(made.tokens, offsets, source=made.source, topk=made.topk, **settings)


class _Fp8Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, param: Tensor, weight: Fp8Weight, cast: Cast, wgrad: WgradQueue | None, keep_input: bool
    ) -> Tensor:
        kept = (x,) if keep_input else cast
        ctx.save_for_backward(param, *(kept if ctx.needs_input_grad[1] else ()))  # the parameter: as in ops.linear
        ctx.weight, ctx.wgrad, ctx.keep_input, ctx.dtype = weight, wgrad, keep_input, x.dtype
        return _product(cast, weight.data, None, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, (_, *kept), keep_input, none = ctx.weight, ctx.saved_tensors, ctx.keep_input, (None,) * 4
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dy_cast, dy_t = _cast_gradient(dy, None, need_dw, False)
        dx = _product(dy_cast, weight.transposed, None, ctx.dtype) if need_dx else None
        if not need_dw:
            return dx, None, *none

        def work() -> Tensor | None:
            x_t = cast_transpose(kept[0] if keep_input else tuple(kept), pow2_scale=keep_input)
            return _add_wgrad(dy_t, x_t, weight.param, None)

        return dx, now_or_later(ctx.wgrad, weight.param, work), *none


class _Quantized(Function):
    """Products with weights that have no other form than FP8: there is nothing that a gradient could go to, or come through.
    A graph that is being compiled cannot say so: there it is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, product: Callable[[], Tensor]) -> Tensor:
        ctx.shape = x.shape
        return product()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                "weights in FP8 do not train: keep them in bfloat16, and use precision='fp8' for products in FP8"
            )
        return dy.new_full(ctx.shape, float("nan")), None, None


def fp8_linear(
    x: Tensor,
    weight: Fp8Weight | Quantized,
    *,
    wgrad: WgradQueue | None = None,
    shared_input: bool = False,
    static_weights: bool = False,
) -> Tensor:
    """x times weight transposed, in FP8 forward and backward; differentiable in both.

    Args:
        x: [T, K], bf16 or fp32. With an attribute `cast` (what per_token_cast returns) it is not cast again. Its FP8 form is
            kept for backward, whatever `recipe` it has.
        weight: of a parameter [N, K] of x's dtype; or a Quantized [N, K], N a multiple of 8 and K of 16, whose backward
            raises RuntimeError.
        wgrad: where backward leaves the weight gradient's work; None computes it at once.
        shared_input: x is kept by whatever made it, so backward keeps x itself and casts it again. For the projection after
            attention: the recipe keeps its input in more bits, and gives it scales that are powers of two, since one cast
            must agree with the other.
        static_weights: of a Quantized weight, as in `few_linear`.

    Returns:
        [T, N] of x's dtype. In backward dW goes to `weight.param.main_grad` where the parameter has one.

    Raises:
        ValueError: shapes that do not fit.
    """
    n_k = weight.shape
    if x.dim() != 2 or len(n_k) != 2 or n_k[1] != x.shape[1]:
        raise ValueError(f"fp8_linear: x must be (T, K) and weight (N, K), got {tuple(x.shape)} and {tuple(n_k)}")
    cast = _cast_of(x, pow2_scale=shared_input)
    if isinstance(weight, Quantized):
        return apply(_Quantized, x, None, lambda: _product(cast, weight, None, x.dtype, static=static_weights))
    return apply(_Fp8Linear, x, weight.param, weight, cast, wgrad, shared_input)


def _cast_of(x: Tensor, *, pow2_scale: bool) -> Cast:
    made = None if pow2_scale else getattr(x, "cast", None)
    return made if made is not None and is_unchanged(x) else per_token_cast(x, pow2_scale=pow2_scale)


@dataclass(frozen=True)
class Gathered:
    """What rows in FP8 are copies of. Set as the codes' attribute `gathered`, it lets experts keep the tokens instead of the
    rows, and transpose rows that are gone, or that are larger than the tokens."""

    tokens: Cast
    source: Tensor  # int64 [R]: row r is token source[r] // topk
    topk: int
    sf: Tensor  # the rows' scales
    state: tuple[int | None, ...]  # of the rows, as torch knows it

    @staticmethod
    def note(cast: Cast, tokens: Cast, source: Tensor, topk: int) -> None:
        """Leaves with the rows of a cast what they are copies of; not in a graph that is being compiled."""
        if not torch.compiler.is_compiling():
            cast[0].gathered = Gathered(tokens, source, topk, cast[1], _versions(cast))

    @staticmethod
    def of(cast: Cast) -> Gathered | None:
        """That of a cast that is as it was made; None for others."""
        made = getattr(cast[0], "gathered", None)
        return made if made is not None and cast[1] is made.sf and _versions(cast) == made.state else None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.tokens, self.source


def _versions(cast: Cast) -> tuple[int | None, ...]:
    return tuple(map(version, cast))


@dataclass
class GradientCast:
    """Where a gradient that came as FP8 waits for the experts whose result it belongs to."""

    made: Cast | None = None
    stand_in: Tensor | None = None

    @staticmethod
    def of(y: Tensor) -> GradientCast | None:
        """That of a result of fp8_experts, as it came from them; None for other tensors."""
        return getattr(y.grad_fn, "gradient_cast", None)

    def leave(self, cast: Cast, dtype: torch.dtype) -> Tensor:
        """Keeps the gradient's cast; what stands for it in autograd is NaN that takes no memory."""
        self.made, self.stand_in = cast, torch.full((), float("nan"), dtype=dtype, device=cast[0].device)
        return self.stand_in.expand(cast[0].shape)

    def take(self, dy: Tensor) -> Cast | None:
        """What was left. Raises RuntimeError where dy is not what stands for it."""
        made, stand_in = self.made, self.stand_in
        self.made = self.stand_in = None
        if made is None:
            return None
        gathered = Gathered.of(made)
        for t in (*made, *(() if gathered is None else gathered.tensors)):
            if t.is_cuda:  # made on another stream, perhaps, and autograd knows nothing of it
                t.record_stream(torch.cuda.current_stream(t.device))
        if dy.numel() and dy.data_ptr() != stand_in.data_ptr():
            raise RuntimeError(
                "fp8_experts: the gradient came as FP8 and has been changed, by a second use of the result or by a hook: give "
                "the buffer's combine a clone of the result, whose gradient has values"
            )
        return made


@dataclass(frozen=True)
class _MLP:
    gate_up: Fp8Weight
    down: Fp8Weight
    wgrad: WgradQueue | None
    pow2_scale: bool
    gradient: GradientCast | None = None


class _Fp8MLP(Function):
    """Keeps x in FP8 and what goes into SwiGLU; SwiGLU's output is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        gate_up_param: Tensor,
        down_param: Tensor,
        mlp: _MLP,
        cast: Cast,
        offsets: Tensor | None,
    ) -> Tensor:
        gate_up, made = _product(cast, mlp.gate_up.data, offsets, x.dtype), Gathered.of(cast)
        kept = (*cast, None) if made is None else made.tensors
        kept = kept if ctx.needs_input_grad[2] else (None, None, None)
        ctx.save_for_backward(gate_up_param, down_param, *kept, gate_up, weights, offsets)
        ctx.mlp, ctx.gradient_cast, ctx.topk = mlp, mlp.gradient, 1 if made is None else made.topk
        return _product(swiglu_cast(gate_up, weights, offsets=offsets), mlp.down.data, offsets, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (_, _, *x_cast, source, gate_up, weights, offsets), mlp, topk = ctx.saved_tensors, ctx.mlp, ctx.topk
        need_dx, _, need_first, need_second = ctx.needs_input_grad[:4]
        # What is large is let go as soon as it has been used: here a step's memory is at its highest.
        dy_cast = None if mlp.gradient is None else mlp.gradient.take(dy)
        if dy_cast is None:
            dy_cast, dy_t = _cast_gradient(dy, offsets, need_second, mlp.pow2_scale)
        else:
            dy_t = _transpose_rows(dy_cast, offsets, mlp.pow2_scale) if need_second else None
        da = _product(dy_cast, mlp.down.transposed, offsets, gate_up.dtype)
        del dy_cast

        dgate_up_t = out_t = None
        settings = {"offsets": offsets, "amax_floor": GRADIENT_FLOOR}
        if need_first or need_second:
            dgate_up_fp8, dgate_up_sf, dweights, dgate_up_t, out_t = swiglu_backward_both_casts(
                da, gate_up, weights, **settings
            )
        else:
            dgate_up_fp8, dgate_up_sf, dweights = swiglu_cast_backward(da, gate_up, weights, **settings)
        if not need_first:
            dgate_up_t = None
        del da

        def second(dy_t: Cast | None = dy_t, out_t: Cast | None = out_t) -> Tensor | None:
            return _add_wgrad(dy_t, out_t, mlp.down.param, offsets)

        d_second = now_or_later(mlp.wgrad, mlp.down.param, second) if need_second else None
        del second, dy_t, out_t
        dx = _product((dgate_up_fp8, dgate_up_sf), mlp.gate_up.transposed, offsets, gate_up.dtype) if need_dx else None
        d_first = None
        if need_first:

            def first() -> Tensor | None:
                x_t = cast_transpose(tuple(x_cast), offsets, pow2_scale=mlp.pow2_scale, source=source, topk=topk)
                return _add_wgrad(dgate_up_t, x_t, mlp.gate_up.param, offsets)

            d_first = now_or_later(mlp.wgrad, mlp.gate_up.param, first)
        return dx, dweights, d_first, d_second, None, None, None


def _quantized_mlp(
    x: Tensor,
    weights: Tensor | None,
    cast: Cast,
    gate_up: Quantized,
    down: Quantized,
    offsets: Tensor | None,
    static: bool = False,
) -> Tensor:
    def product() -> Tensor:
        hidden = _product(cast, gate_up, offsets, x.dtype, static=static)
        return _product(swiglu_cast(hidden, weights, offsets=offsets), down, offsets, x.dtype, static=static)

    return apply(_Quantized, x, weights, product)


def fp8_mlp(
    x: Tensor,
    gate_up: Fp8Weight | Quantized,
    down: Fp8Weight | Quantized,
    *,
    wgrad: WgradQueue | None = None,
    static_weights: bool = False,
) -> Tensor:
    """down(silu(gate) * up) with both layers in FP8 forward and backward; differentiable in x and both weights.

    Args:
        x: [T, H] bf16 or fp32, with or without `cast`, as in `fp8_linear`.
        gate_up: of a parameter [2I, H] of x's dtype, the gate half first; or, like `down`, a Quantized, as in `fp8_linear`.
        down: of a parameter [H, I].
        wgrad, static_weights: as in `fp8_linear`.

    Returns:
        [T, H] of x's dtype. Backward keeps x in FP8 and gate_up's output; SwiGLU's output is made again.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_mlp("fp8_mlp", x, gate_up, down, ())
    if isinstance(gate_up, Quantized):
        return _quantized_mlp(x, None, _cast_of(x, pow2_scale=False), gate_up, down, None, static_weights)
    mlp = _MLP(gate_up, down, wgrad, pow2_scale=False)
    return apply(_Fp8MLP, x, None, gate_up.param, down.param, mlp, _cast_of(x, pow2_scale=False), None)


def fp8_experts(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    gate_up: Fp8Weight | Quantized,
    down: Fp8Weight | Quantized,
    *,
    cast: Cast | None = None,
    wgrad: WgradQueue | None = None,
) -> Tensor:
    """The MLPs of G experts over rows sorted by expert, each row times its routing weight, in FP8 forward and backward;
    differentiable in x, the routing weights and both matrices. Nothing is padded and no count is read on the host.

    x, and the gradient of the result, are what moves between ranks: their scales are powers of two. The cast of a row
    depends on nothing else, so cast before it is sent and cast here are the same bits.

    Args:
        x: [R, H] bf16 or fp32, rows of expert g from offsets[g] to offsets[g+1].
        weights: fp32 [R], the routing weights.
        offsets: int32 [G+1] on the device, not decreasing, offsets[0] = 0. Rows past offsets[G] of the result and of the
            gradients are not written.
        gate_up: of a parameter [G, 2I, H] of x's dtype, the gate half first; or, like `down`, a Quantized, as in `fp8_linear`.
        down: of a parameter [G, H, I].
        cast: what per_token_cast(x, pow2_scale=True) returns, where x came as FP8; x's values are not read then.
        wgrad: as in `fp8_linear`.

    Returns:
        [R, H] of x's dtype; what backward keeps is as in `fp8_mlp`. Where an ExpertBuffer brings its gradient as FP8, hooks on
        it see NaN, since the codes do not pass through autograd, and it must have no other use; a clone of it may.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_mlp("fp8_experts", x, gate_up, down, (offsets.numel() - 1,))
    cast = cast or _cast_of(x, pow2_scale=True)
    if isinstance(gate_up, Quantized):
        return _quantized_mlp(x, weights, cast, gate_up, down, offsets)
    gradient = None if torch.compiler.is_compiling() else GradientCast()
    mlp = _MLP(gate_up, down, wgrad, pow2_scale=True, gradient=gradient)
    return apply(_Fp8MLP, x, weights, gate_up.param, down.param, mlp, cast, offsets)


def _check_mlp(
    name: str, x: Tensor, gate_up: Fp8Weight | Quantized, down: Fp8Weight | Quantized, groups: tuple[int, ...]
) -> None:
    if isinstance(gate_up, Quantized) != isinstance(down, Quantized):
        raise ValueError(f"{name}: gate_up and down must both be Quantized or both of parameters")
    first, second = gate_up.shape, down.shape
    inner = second[-1]
    if x.dim() != 2 or first != (*groups, 2 * inner, x.shape[1]) or second != (*groups, x.shape[1], inner):
        g = "G, " if groups else ""
        found = f"{tuple(x.shape)}, {tuple(first)} and {tuple(second)}" + (f" for {groups[0]} groups" if groups else "")
        raise ValueError(f"{name}: x must be (T, H), gate_up ({g}2I, H) and down ({g}H, I), got {found}")
