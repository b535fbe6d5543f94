"""csrc/moe: SwiGLU at the sizes of V3's experts (inner 2048, with routing weights) and of its dense blocks (18432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, peers
from dsv3.reference import moe as reference


def _weights(tokens: int, device: torch.device, weighted: bool) -> Tensor | None:
    return torch.rand(tokens, device=device) if weighted else None


def _case(tokens: int, inner: int, *, weighted: bool, backward: bool) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        widths = (inner, 2 * inner) if backward else (2 * inner,)
        rows = [torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for width in widths]
        return *rows, _weights(tokens, device, weighted)

    size = tokens * inner
    weight_bytes = 4 * tokens * (1 + backward) if weighted else 0  # the weights, and their gradient
    return Case(
        op="swiglu_backward" if backward else "swiglu",
        case={"tokens": tokens, "hidden": inner, "weights": weighted},
        flops=(14 if backward else 6) * size,
        bytes=2 * size * (5 if backward else 3) + weight_bytes,  # dout, gate, up, dgate, dup; or gate, up, out
        inputs=inputs,
        run=torch.ops.dsv3.swiglu_backward if backward else torch.ops.dsv3.swiglu,
        baselines=peers(reference.swiglu_backward if backward else reference.swiglu),
    )


def cases(tiny: bool) -> list[Case]:
    """`hidden` is the width of the output."""
    expert, dense = ((64, 128), (16, 256)) if tiny else ((32768, 2048), (4096, 18432))
    shapes = [(*expert, True), (*expert, False), (*dense, False)]
    return [
        _case(tokens, inner, weighted=weighted, backward=backward)
        for backward in (False, True)
        for tokens, inner, weighted in shapes
    ]
