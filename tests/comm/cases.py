"""Inputs of the buffer tests, which every rank and the single-process reference make alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.comm import Dispatched
from dsv3.ops import per_token_cast
from dsv3.reference.quant import dequantize

FP8 = torch.float8_e4m3fn
MAX_TOKENS = 5 + 3 * 7  # of any rank


@dataclass(frozen=True)
class Case:
    ranks: int
    per_node: int
    kind: str = "random"
    dtype: torch.dtype = torch.float32
    wire: torch.dtype | None = None
    topk: int = 4
    num_experts: int = 16
    static: bool = False

    @property
    def name(self) -> str:
        wire = {None: "", FP8: "-fp8"}.get(self.wire, "-wire") + "-static" * self.static
        return f"{self.kind}-{self.ranks}x{self.per_node}-{str(self.dtype).removeprefix('torch.')}{wire}"

    @property
    def hidden(self) -> int:
        return 272 if self.wire == FP8 else 8  # two tiles and a rest

    @property
    def settings(self) -> dict[str, Any]:
        """Of the buffer. In static mode the rows are fewer than the worst case, but for one hot expert."""
        room = {"max_recv": 8 * MAX_TOKENS, "max_tokens": MAX_TOKENS} if self.static else {}
        low_latency = {"low_latency": MAX_TOKENS, "hidden": self.hidden}
        wire = {"ranks_per_node": self.per_node, "wire_dtype": self.wire}
        return {"num_experts": self.num_experts, **wire, **low_latency, **room}


BF16 = {"dtype": torch.bfloat16}
SHAPES = [(2, 2), (2, 1), (4, 4), (4, 2), (8, 8), (8, 2)]
CASES = [
    *[Case(*shape, **dtype) for shape in SHAPES for dtype in ({}, BF16)],
    *[Case(*shape, "hot", **BF16) for shape in SHAPES],  # every token to one expert
    *[Case(*shape, "few", num_experts=64) for shape in SHAPES],  # more experts than tokens
    *[Case(*shape, "none", **BF16) for shape in SHAPES],  # no token on any rank
    *[Case(*shape, "wide", topk=9, **BF16) for shape in SHAPES],  # more choices than ranks, and than experts of a rank
    *[Case(*shape, wire=torch.float32, **BF16) for shape in SHAPES],
    *[Case(*shape, wire=FP8, **dtype) for shape in SHAPES[:4] for dtype in ({}, BF16)],
    *[Case(*shape, "none", wire=FP8, **BF16) for shape in SHAPES[2:4]],
    *[Case(*shape, kind, static=True, **BF16) for shape in SHAPES[1:4] for kind in ("random", "hot", "none")],
    *[Case(*shape, "few", static=True, num_experts=64) for shape in SHAPES[2:4]],
    *[Case(*shape, "wide", topk=9, static=True, **BF16) for shape in SHAPES[2:4]],
    *[Case(*shape, wire=FP8, static=True, **BF16) for shape in SHAPES[1:4]],
    Case(8, 2, wire=FP8, static=True, **BF16),
]


def num_tokens(case: Case, rank: int) -> int:
    """Ranks differ; the second has none."""
    if case.kind == "none" or rank == 1:
        return 0
    return 1 if case.kind == "few" else 5 + 3 * rank


def inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, H], topk_idx [T, k], topk_weights [T, k] and the gradient of the output [T, H] of a rank."""
    generator = torch.Generator().manual_seed(1000 * case.ranks + rank)
    tokens, topk = num_tokens(case, rank), 1 if case.kind == "hot" else case.topk
    x, dout = (torch.randn(tokens, case.hidden, generator=generator).to(case.dtype) for _ in range(2))
    if case.wire == FP8:  # gradients as small as a training's
        dout *= 1e-9
    idx = torch.rand(tokens, case.num_experts, generator=generator).argsort(-1)[:, :topk].contiguous()
    weights = torch.rand(tokens, topk, generator=generator)
    return x, torch.full_like(idx, case.num_experts - 2) if case.kind == "hot" else idx, weights, dout


def experts(x: Tensor, weights: Tensor, expert: Tensor) -> Tensor:
    """What expert [R] makes of the rows x [R, H] with their weights [R]; elementwise, so the same bits in any batch."""
    matrix = torch.randn(64, x.shape[1], generator=torch.Generator().manual_seed(7)).to(x.device)
    return (x * matrix[expert] * weights[:, None]).to(x.dtype)


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, x: Tensor, x_sf: Tensor) -> Tensor:
        return dequantize(x, x_sf).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        return drows, None, None


def arrived(handle: Dispatched) -> Tensor:
    """The rows' values, whose gradients are those of handle.rows."""
    return _Arrived.apply(handle.rows, *handle.cast) if handle.cast else handle.rows


def over_wire(case: Case, x: Tensor, amax_floor: float = 1e-4) -> Tensor:
    """What is left of x [T, H] on the way there, cast after it."""
    if case.wire != FP8:
        return x
    return dequantize(*per_token_cast(x, pow2_scale=True, amax_floor=amax_floor)).to(x.dtype)
