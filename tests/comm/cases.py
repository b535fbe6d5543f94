"""Inputs of the buffer tests, which every rank and the single-process reference make alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = 8


@dataclass(frozen=True)
class Case:
    ranks: int
    per_node: int
    kind: str = "random"
    dtype: torch.dtype = torch.float32
    wire: torch.dtype | None = None
    topk: int = 4
    num_experts: int = 16

    @property
    def name(self) -> str:
        wire = "" if self.wire is None else "-wire"
        return f"{self.kind}-{self.ranks}x{self.per_node}-{str(self.dtype).removeprefix('torch.')}{wire}"


BF16 = {"dtype": torch.bfloat16}
SHAPES = [(2, 2), (2, 1), (4, 4), (4, 2), (8, 8), (8, 2)]
CASES = [
    *[Case(*shape, **dtype) for shape in SHAPES for dtype in ({}, BF16)],
    *[Case(*shape, "hot", **BF16) for shape in SHAPES],  # every token to one expert
    *[Case(*shape, "few", num_experts=64) for shape in SHAPES],  # more experts than tokens
    *[Case(*shape, "none", **BF16) for shape in SHAPES],  # no token on any rank
    *[Case(*shape, "wide", topk=9, **BF16) for shape in SHAPES],  # more choices than ranks, and than experts of a rank
    *[Case(*shape, wire=torch.float32, **BF16) for shape in SHAPES],
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
    x, dout = (torch.randn(tokens, HIDDEN, generator=generator).to(case.dtype) for _ in range(2))
    idx = torch.rand(tokens, case.num_experts, generator=generator).argsort(-1)[:, :topk].contiguous()
    weights = torch.rand(tokens, topk, generator=generator)
    return x, torch.full_like(idx, case.num_experts - 2) if case.kind == "hot" else idx, weights, dout


def experts(x: Tensor, weights: Tensor, expert: Tensor) -> Tensor:
    """What expert [R] makes of the rows x [R, H] with their weights [R]; elementwise, so the same bits in any batch."""
    matrix = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(7))
    return (x * matrix[expert] * weights[:, None]).to(x.dtype)
