"""The parts of which blocks are made: linear layers, norms, SwiGLU, rotary tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv3 import ops
from dsv3.config import Rope


class QuantizedModule(nn.Module):
    """A module some of whose weights may be ops.Quantized, which move with it from device to device, and keep their dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        super()._apply(fn, recurse)
        for name, value in list(vars(self).items()):
            if isinstance(value, ops.Quantized):
                setattr(self, name, value.to(fn(value.sf.new_empty(0)).device))
        return self


class Linear(QuantizedModule):
    """y = x W^T. `weight` is a parameter [N, K], or an ops.Quantized put in its place by a loader.

    With `fp8` (see DeepSeekV3.set_precision) it multiplies in FP8 where N and K are multiples of 16; others do not.
    """

    def __init__(
        self, in_features: int, out_features: int, *, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.fp8, self.fp8_copies = False, ops.Fp8Weights()

    @property
    def in_fp8(self) -> bool:
        """Whether it multiplies in FP8."""
        return self.fp8 and self.fp8_copies.takes(self.weight)

    def fp8_weight(self) -> ops.Fp8Weight | ops.Quantized | None:
        """The weight in FP8, or None where it is multiplied in the dtype of x."""
        return self.fp8_copies.of("weight", self.weight) if self.fp8 else None

    def forward(self, x: Tensor, wgrad: ops.WgradQueue | None = None, *, shared_input: bool = False) -> Tensor:
        """`shared_input`: x is kept by what made it, so FP8 needs no copy of its own; see ops.fp8_linear."""
        weight = self.fp8_weight()
        if weight is not None:
            # Between what has quantised a weight and its use lie the kernels of the layers before, or of the embedding.
            return ops.fp8_linear(x, weight, wgrad=wgrad, shared_input=shared_input, static_weights=True)
        return ops.linear(x, self.weight, wgrad=wgrad)


class RMSNorm(nn.Module):
    """With `recompute` the linear layers that read the output do not keep it: backward makes it again from the input.
    With `cast` the output carries its FP8 form (where its size is a multiple of 16), which FP8 layers keep instead."""

    def __init__(self, size: int, eps: float, *, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.eps = eps
        self.recompute = self.cast = False
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self._with_recipe(ops.rmsnorm(x, self.weight, eps=self.eps, cast=self._casts(x)), x)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x)"""
        y, summed = ops.rmsnorm(x, self.weight, eps=self.eps, residual=residual, cast=self._casts(x))
        return self._with_recipe(y, summed), summed

    def _casts(self, x: Tensor) -> bool:
        return self.cast and x.shape[1] % 16 == 0

    def _with_recipe(self, y: Tensor, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            y.recipe = ops.Recipe(functools.partial(_norm_again, eps=self.eps), (x, self.weight))
        return y


def _norm_again(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    with torch.no_grad():
        return ops.rmsnorm(x, weight, eps=eps)


def identity(x: Tensor) -> Tensor:
    return x


class MLP(nn.Module):
    """SwiGLU: down(silu(gate) * up), gate and up in one matrix. `gather` and `reduce` are where tensor parallelism attaches."""

    def __init__(self, hidden: int, inter: int, *, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inter, device=device, dtype=dtype)
        self.down = Linear(inter, hidden, device=device, dtype=dtype)
        self.gather = self.reduce = identity

    def forward(self, x: Tensor, wgrad: ops.WgradQueue | None = None) -> Tensor:
        x, gate_up, down = self.gather(x), self.gate_up.fp8_weight(), self.down.fp8_weight()
        if gate_up is not None and down is not None and type(gate_up) is type(down):
            return self.reduce(ops.fp8_mlp(x, gate_up, down, wgrad=wgrad, static_weights=True))
        return self.reduce(self.down(ops.swiglu(self.gate_up(x, wgrad)), wgrad))


@functools.cache
@torch.inference_mode(False)  # tables first made by an engine must serve training too
def rope_tables(rope: Rope, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [max_positions, dim/2], of the angles position * frequency (YaRN, arXiv 2309.00071, section 3.2).

    YaRN divides by `factor` the frequencies that turn less than beta_slow times over the original context, keeps those that
    turn more than beta_fast times, and blends in between. Tables are made once a device; they are no buffers of the model,
    which may be built on the meta device or cast.
    """
    frequency = rope.theta ** -(torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.factor > 1:

        def pair_turning(rotations: float) -> float:
            return (
                rope.dim
                * math.log(rope.original_max_positions / (rotations * 2 * math.pi))
                / (2 * math.log(rope.theta))
            )

        low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        ramp = ((torch.arange(rope.dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency = frequency / rope.factor * ramp + frequency * (1 - ramp)
    angles = torch.outer(torch.arange(rope.max_positions, dtype=torch.float32), frequency)
    return tuple((f(angles) * rope.attention_factor).to(device) for f in (torch.cos, torch.sin))
