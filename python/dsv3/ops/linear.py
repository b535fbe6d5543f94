"""Linear layers: dense, grouped by expert, and the output head fused with its cross-entropy.

The backward of a linear layer has an input part and a weight part. The weight part adds to `weight.main_grad` (fp32) where
the parameter has one, so it can run at any time: a WgradQueue keeps it for later (zero-bubble pipelines, DualPipe).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.grad import Function, apply
from dsv3.ops.quant import check_offsets
from dsv3.ops.registry import define, require_dtype
from dsv3.reference import linear as reference
from dsv3.reference.quant import dequantize


@dataclass(frozen=True)
class Quantized:
    """A weight in FP8: data e4m3 [..., N, K], sf fp32 [..., ceil(N/128), ceil(K/128)]; dequantised = data * sf of its block."""

    data: Tensor
    sf: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def versions(self) -> tuple[int | None, int | None]:
        """What differs after a change that torch has made to it in place."""
        return version(self.data), version(self.sf)

    def to(self, device: torch.device) -> Quantized:
        """The same on a device; itself where it is there."""
        if self.data.device == self.sf.device == device:
            return self
        return Quantized(self.data.to(device), self.sf.to(device))

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight as a dense tensor [..., N, K] of `dtype`."""
        return dequantize(self.data, self.sf).to(dtype)


def dense(weight: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor that a product with activations of `dtype` can take."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight


@dataclass
class WgradQueue:
    """Weight gradients that wait. Without main_grad a flushed gradient is added to `weight.grad`, the weight being a leaf."""

    pending: list[Callable[[], None]] = field(default_factory=list)

    def put(self, weight: Tensor, work: Callable[[], Tensor | None]) -> None:
        """Keeps `work`, which returns the weight's gradient, or None where it added it to main_grad itself. ValueError for a
        weight that is no leaf and has no main_grad: its gradient would reach nothing."""
        if not weight.is_leaf and getattr(weight, "main_grad", None) is None:
            raise ValueError(
                "WgradQueue: a weight that was computed from others needs its gradient at once, without a queue"
            )

        def run() -> None:
            grad = work()
            if grad is not None:
                weight.grad = grad if weight.grad is None else weight.grad + grad

        self.pending.append(run)

    @torch.no_grad()
    def flush(self) -> None:
        """Computes every queued weight gradient, in the order in which backward queued them."""
        pending, self.pending = self.pending, []
        for run in pending:
            run()


def now_or_later(wgrad: WgradQueue | None, weight: Tensor, work: Callable[[], Tensor | None]) -> Tensor | None:
    """The gradient of the weight from `work`; None where the queue keeps the work."""
    if wgrad is None:
        return work()
    wgrad.put(weight, work)
    return None


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again. Set as its attribute `recipe`, it lets `linear` keep the recipe's inputs, which backward
    needs anyway, instead of the tensor."""

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def _linear_wgrad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return reference.linear_wgrad(dy, x).to(weight.dtype)
    reference.add_product_(main_grad, dy, x)
    return None


def version(x: Tensor) -> int | None:
    """How often torch has changed x in place; None where it does not count."""
    return None if x.is_inference() else x._version


def is_unchanged(x: Tensor) -> bool:
    """Whether x still holds what the op that made it wrote, so that what it carries (a recipe, a cast) stands for it; in a
    graph that is being compiled, and in inference mode, that is taken for granted."""
    return torch.compiler.is_compiling() or not version(x)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, wgrad: WgradQueue | None, out_dtype: torch.dtype, recipe: Recipe | None
    ) -> Tensor:
        kept = (x,) if recipe is None else recipe.inputs
        # NOTE: the weight twice: autograd notices what has changed it since, the object has its main_grad.
        ctx.save_for_backward(weight, *(kept if ctx.needs_input_grad[1] else ()))
        ctx.weight, ctx.wgrad, ctx.make = weight, wgrad, recipe and recipe.make
        return reference.linear(x, weight, out_dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (_, *kept), weight, none = ctx.saved_tensors, ctx.weight, (None,) * 4
        dx = reference.linear_dgrad(dy, weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, *none
        x = kept[0] if ctx.make is None else ctx.make(*kept)
        return dx, now_or_later(ctx.wgrad, weight, lambda: _linear_wgrad(dy, x, weight)), *none[1:]


def linear(
    x: Tensor, weight: Tensor | Quantized, *, wgrad: WgradQueue | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x times weight transposed; differentiable in both.

    Args:
        x: [T, K], bf16 or fp32. With an attribute `recipe` (a Recipe) it is made again in backward instead of being kept.
        weight: [N, K] of x's dtype, or Quantized (inference only: dequantised to x's dtype).
        wgrad: where backward leaves the weight gradient's work; None computes it at once.
        out_dtype: of the output and of the products in backward; None: x's dtype. The gate's logits are fp32.

    Returns:
        [T, N]. In backward dW goes to `weight.main_grad` where the parameter has one.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 2 or len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"linear: x must be (T, K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if isinstance(weight, Quantized):
        return reference.linear(x, weight.dequantize(x.dtype), out_dtype or x.dtype)
    recipe = getattr(x, "recipe", None)
    if recipe is not None and not is_unchanged(x):
        recipe = None
    return apply(_Linear, x, weight, wgrad, out_dtype or x.dtype, recipe)


define(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    shapes="x [R,K], weight [G,N,K], offsets [G+1] int32 -> [R,N]",
    reference=reference.grouped_linear,
    allocate=lambda x, weight, offsets: x.new_empty(x.shape[0], weight.shape[1]),
)
define(
    "grouped_linear_dgrad(Tensor dy, Tensor weight, Tensor offsets) -> Tensor",
    shapes="dy [R,N], weight [G,N,K], offsets [G+1] int32 -> [R,K]",
    reference=reference.grouped_linear_dgrad,
    allocate=lambda dy, weight, offsets: dy.new_empty(dy.shape[0], weight.shape[2]),
)
define(
    "grouped_linear_wgrad_(Tensor dy, Tensor x, Tensor offsets, Tensor(a!) out) -> ()",
    shapes="dy [R,N], x [R,K], offsets [G+1] int32, out [G,N,K] fp32 or dy's dtype (added to)",
    reference=reference.grouped_linear_wgrad_,
    allocate=lambda dy, x, offsets, out: None,
)


def _grouped_wgrad(dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor | None:
    main_grad = getattr(weight, "main_grad", None)
    out = torch.zeros_like(weight) if main_grad is None else main_grad
    torch.ops.dsv3.grouped_linear_wgrad_(dy, x, offsets, out)
    return out if main_grad is None else None


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, wgrad: WgradQueue | None) -> Tensor:
        ctx.save_for_backward(weight, offsets, x if ctx.needs_input_grad[1] else None)  # the weight: as in _Linear
        ctx.weight, ctx.wgrad = weight, wgrad
        return torch.ops.dsv3.grouped_linear(x, weight, offsets)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (_, offsets, x), weight, dy = ctx.saved_tensors, ctx.weight, dy.contiguous()
        dx = torch.ops.dsv3.grouped_linear_dgrad(dy, weight, offsets) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        return dx, now_or_later(ctx.wgrad, weight, lambda: _grouped_wgrad(dy, x, weight, offsets)), None, None


def grouped_linear(
    x: Tensor, weight: Tensor | Quantized, offsets: Tensor, *, wgrad: WgradQueue | None = None
) -> Tensor:
    """The linear layers of G experts over rows sorted by expert; differentiable in x and weight.

    bf16 on CUDA uses torch's grouped product and never reads the offsets on the host; elsewhere a loop over the groups does.

    Args:
        x: [R, K], rows of expert g from offsets[g] to offsets[g+1].
        weight: [G, N, K] of x's dtype, or Quantized (inference only).
        offsets: int32 [G+1], not decreasing, offsets[0] = 0. Rows past offsets[G] are neither read nor written.
        wgrad: as in `linear`.

    Returns:
        [R, N] of x's dtype.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: on a CPU, offsets without sense.
    """
    offsets = check_offsets("grouped_linear", offsets)
    fits = x.dim() == 2 and len(weight.shape) == 3 and weight.shape[2] == x.shape[1]
    if not fits or offsets.shape[0] != weight.shape[0] + 1:
        found = f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(offsets.shape)}"
        raise ValueError(f"grouped_linear: x must be (R, K), weight (G, N, K) and offsets (G+1,), got {found}")
    return apply(_GroupedLinear, x, dense(weight, x.dtype), offsets, wgrad)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        need_h, need_w = ctx.needs_input_grad[:2]
        wide = torch.promote_types(h.dtype, torch.float32)
        nats = torch.empty(h.shape[0], dtype=wide, device=h.device)
        dh = torch.empty_like(h) if need_h else None
        dw = torch.zeros(weight.shape, dtype=wide, device=h.device) if need_w else None
        buffer = h.new_empty(min(chunk, h.shape[0]), weight.shape[0])
        for start in range(0, h.shape[0], chunk):
            part = slice(start, start + chunk)
            rows = h[part]
            logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
            nats[part] = torch.ops.dsv3.cross_entropy_(logits, targets[part], need_h or need_w)
            if dh is not None:
                torch.mm(logits, weight, out=dh[part])
            if dw is not None:
                reference.add_product_(dw, logits, rows)
        ctx.weight, ctx.dh, ctx.dw = weight, dh, dw
        return nats.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dh, dw, weight = ctx.dh, ctx.dw, ctx.weight
        if dh is not None:
            # NOTE: with dimensions, so that it multiplies in its own dtype; a number would be rounded to that of dh first.
            dh = (dh * dloss.view(1, 1)).to(dh.dtype)
        if dw is not None:
            main_grad = getattr(weight, "main_grad", None)
            if main_grad is not None:
                main_grad.addcmul_(dw, dloss)
            dw = (dw * dloss).to(weight.dtype) if main_grad is None else None
        return dh, dw, None, None


def _chunk(weight: Tensor) -> int:
    """Tokens at a time. On a GPU as many as 256 MiB of logits hold: every chunk adds to the whole of dW once. On a CPU fewer,
    whose logits stay in its caches."""
    if weight.device.type != "cuda":
        return 1024
    return max(128, 2**28 // (weight.shape[0] * weight.element_size()) // 128 * 128)


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Sum over the targets of -log softmax(h W^T)[target] in nats, without holding more logits than of a chunk of tokens.

    Works on `chunk` tokens at a time: logits, fp32 softmax, then (where a gradient is wanted) dh and an fp32 dW, which
    backward only scales; dW is added to `weight.main_grad` where the parameter has one. Backward runs once.

    Args:
        h: [T, H] bf16 or fp32.
        weight: [V, H] of h's dtype.
        targets: int64 [T]; -100 is ignored.
        chunk: tokens whose logits exist at a time. None: as many as 256 MiB of logits hold, at least 128; on a CPU 1024.

    Returns:
        fp32 [] (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes that do not fit.
    """
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or targets.shape != h.shape[:1]:
        found = f"{tuple(h.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"linear_cross_entropy: h must be (T, H), weight (V, H) and targets (T,), got {found}")
    require_dtype("linear_cross_entropy", "targets of int64", torch.int64, targets)
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk must be at least 1, got {chunk}")
    return apply(_LinearCrossEntropy, h, weight, targets, chunk or _chunk(weight))
