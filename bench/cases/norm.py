"""csrc/norm: RMSNorm and its fused residual add, forward (also with its output cast to FP8) and backward; rotary embedding
in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Baseline, Case, peers
from dsv3.reference import norm as reference
from dsv3.reference.quant import TILE

EPS = 1e-6
FLOOR = 1e-4


def _rows(tokens: int, hidden: int, count: int) -> Callable[[torch.device], tuple[Any, ...]]:
    def draw(device: torch.device) -> tuple[Any, ...]:
        rows = [torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(count)]
        return *rows, torch.rand(hidden, device=device).add(0.5).bfloat16()

    return draw


def _torch_forward(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def _torch_forward_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return F.rms_norm(summed, weight.shape, weight, EPS), summed


def _torch_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = F.rms_norm(leaves[0], weight.shape, leaves[1], EPS)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _forward(tokens: int, hidden: int, residual: bool) -> Case:
    def run(*inputs: Tensor) -> Any:
        x, *rest, weight = inputs
        return torch.ops.dsv3.rmsnorm(x, rest[0] if rest else None, weight, EPS)

    def plain(*inputs: Tensor) -> Any:
        x, *rest, weight = inputs
        return reference.rmsnorm(x, rest[0] if rest else None, weight, EPS)

    moved = 4 if residual else 2  # x, y; residual, residual out
    return Case(
        op="rmsnorm",
        case={"tokens": tokens, "hidden": hidden, "residual": residual},
        flops=(5 if residual else 4) * tokens * hidden,
        bytes=2 * moved * tokens * hidden + 2 * hidden + 4 * tokens,
        inputs=_rows(tokens, hidden, 1 + residual),
        run=run,
        baselines=peers(plain, **{"F.rms_norm": Baseline(_torch_forward_residual if residual else _torch_forward)}),
    )


def _cast(tokens: int, hidden: int, residual: bool, keep_y: bool) -> Case:
    def run(*inputs: Tensor) -> Any:
        x, *rest, weight = inputs
        return torch.ops.dsv3.rmsnorm_cast(x, rest[0] if rest else None, weight, EPS, keep_y, False, FLOOR)

    def plain(*inputs: Tensor) -> Any:
        x, *rest, weight = inputs
        return reference.rmsnorm_cast(x, rest[0] if rest else None, weight, EPS, keep_y, False, FLOOR)

    size = tokens * hidden
    moved = 1 + 2 * residual + keep_y  # tensors of bf16: x; residual, residual out; y
    return Case(
        op="rmsnorm_cast",
        case={"tokens": tokens, "hidden": hidden, "residual": residual, "keep_y": keep_y},
        flops=(8 if residual else 7) * size,
        bytes=2 * moved * size + size + 4 * size // TILE + 2 * hidden + 4 * tokens,
        inputs=_rows(tokens, hidden, 1 + residual),
        run=run,
        baselines=peers(plain),
    )


def _backward(tokens: int, hidden: int, residual: bool) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        *gradients, x, weight = _rows(tokens, hidden, 2 + residual)(device)
        return *gradients, x, weight, torch.rsqrt(x.float().square().mean(-1) + EPS)

    def run(*inputs: Tensor) -> Any:
        dy, *rest, x, weight, rstd = inputs
        return torch.ops.dsv3.rmsnorm_backward(dy, rest[0] if rest else None, x, weight, rstd)

    def plain(*inputs: Tensor) -> Any:
        dy, *rest, x, weight, rstd = inputs
        return reference.rmsnorm_backward(dy, rest[0] if rest else None, x, weight, rstd)

    moved = 4 if residual else 3  # dy, x, dx; the residual stream's gradient
    return Case(
        op="rmsnorm_backward",
        case={"tokens": tokens, "hidden": hidden, "residual": residual},
        flops=(10 + residual) * tokens * hidden,
        bytes=2 * moved * tokens * hidden + 6 * hidden + 4 * tokens,
        inputs=inputs,
        run=run,
        baselines=peers(plain, **({} if residual else {"F.rms_norm": Baseline(_torch_backward, binds=True)})),
    )


def _rope(tokens: int, heads: int, head_dim: int, rope_dim: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        angles = torch.rand(tokens, rope_dim // 2, device=device).mul_(6.28)
        x = torch.randn(tokens, heads * head_dim, device=device, dtype=torch.bfloat16)
        return x, angles.cos(), angles.sin(), torch.arange(tokens, device=device)

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        torch.ops.dsv3.rope_(x, cos, sin, positions, head_dim, False)
        return x

    def plain(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        reference.rope_(x, cos, sin, positions, head_dim, False)
        return x

    rotated = tokens * heads * rope_dim
    # Only the 32-byte sectors of the rotated part are read and written; then a row of both tables and a position a token.
    moved = 2 * 2 * rotated + tokens * (4 * rope_dim + 8)
    return Case(
        op="rope_",
        case={"tokens": tokens, "hidden": heads * head_dim, "heads": heads, "head_dim": head_dim, "rope_dim": rope_dim},
        flops=3 * rotated,
        bytes=moved,
        inputs=inputs,
        run=run,
        baselines=peers(plain),
    )


def cases(tiny: bool) -> list[Case]:
    """4096 tokens of V3's hidden size; q of 128 heads of 192 values, of which 64 are rotated."""
    tokens, hidden = (32, 512) if tiny else (4096, 7168)
    forward = [_forward(tokens, hidden, residual) for residual in (False, True)]
    casts = [_cast(tokens, hidden, *flags) for flags in ((False, False), (True, False), (True, True))]
    backward = [_backward(tokens, hidden, residual) for residual in (False, True)]
    return [*forward, *casts, *backward, _rope(tokens, 4 if tiny else 128, 192, 64)]
