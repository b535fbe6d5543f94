"""csrc/moe: SwiGLU at the sizes of V3's experts (inner 2048, with routing weights) and of its dense blocks (18432), also with
its output cast to FP8; the gate over 256 experts, alone and with the loads of a sequence; the way of 4096 tokens to their 8
experts and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, peers
from dsv3.reference import moe as reference
from dsv3.reference import swiglu as swiglu_reference
from dsv3.reference.quant import TILE


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
        baselines=peers(swiglu_reference.swiglu_backward if backward else swiglu_reference.swiglu),
    )


def _cast(tokens: int, inner: int, *, weighted: bool) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        gate_up = torch.randn(tokens, 2 * inner, device=device, dtype=torch.bfloat16)
        return gate_up, _weights(tokens, device, weighted)

    size = tokens * inner
    return Case(
        op="swiglu_cast",
        case={"tokens": tokens, "hidden": inner, "weights": weighted},
        flops=9 * size,
        bytes=5 * size + 4 * size // TILE + 4 * tokens * weighted,  # gate, up; out
        inputs=inputs,
        run=lambda gate_up, weights: torch.ops.dsv3.swiglu_cast(gate_up, weights, None, False, 1e-4),
        baselines=peers(lambda gate_up, weights: swiglu_reference.swiglu_cast(gate_up, weights, None, False, 1e-4)),
    )


def _cast_backward(tokens: int, inner: int, *, weighted: bool, transposes: bool) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        rows = [torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for width in (inner, 2 * inner)]
        return *rows, _weights(tokens, device, weighted)

    op = "swiglu_backward_both_casts" if transposes else "swiglu_cast_backward"
    settings = None, False, 1e-30
    size = tokens * inner
    casts = 5 if transposes else 2  # dgate, dup; both transposed, and out
    reference_op = getattr(swiglu_reference, op)
    return Case(
        op=op,
        case={"tokens": tokens, "hidden": inner, "weights": weighted},
        flops=20 * size,
        bytes=6 * size + casts * (size + 4 * size // TILE) + 8 * tokens * weighted,  # dout, gate, up
        inputs=inputs,
        run=lambda *inputs: getattr(torch.ops.dsv3, op)(*inputs, *settings),
        baselines=peers(lambda *inputs: reference_op(*inputs, *settings)),
    )


_GATE = (8, 4, 8, 2.5, "sigmoid", "top2_sum", True)  # groups, kept, topk, scale, score, group score, normalise


def _gate(tokens: int, experts: int) -> Case:
    return Case(
        op="moe_gate",
        case={"tokens": tokens, "experts": experts, "topk": 8},
        flops=10 * tokens * experts,
        bytes=tokens * (4 * experts + 8 * 12) + 8 * experts,
        inputs=lambda device: (torch.randn(tokens, experts, device=device), torch.rand(experts, device=device) - 0.5),
        run=lambda logits, bias: torch.ops.dsv3.moe_gate(logits, bias, *_GATE),
        baselines=peers(lambda logits, bias: reference.moe_gate(logits, bias, *_GATE)),
    )


def _gate_loads(tokens: int, experts: int) -> Case:
    """One sequence: all blocks add to the same sums."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        return torch.randn(tokens, experts, device=device), torch.rand(experts, device=device) - 0.5, cu_seqlens

    return Case(
        op="moe_gate_loads",
        case={"tokens": tokens, "experts": experts, "topk": 8, "sequences": 1},
        flops=12 * tokens * experts,
        bytes=tokens * (4 * experts + 8 * 12) + 20 * experts + 8,  # bias, counts, chosen, affinity
        inputs=inputs,
        run=lambda *inputs: torch.ops.dsv3.moe_gate_loads(*inputs, *_GATE),
        baselines=peers(lambda *inputs: reference.moe_gate_loads(*inputs, *_GATE)),
    )


def _order(tokens: int, experts: int, topk: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    choice = torch.rand(tokens, experts, device=device).topk(topk, sorted=False).indices
    return reference.moe_permutation(choice, experts)


def _permutation(tokens: int, experts: int, topk: int) -> Case:
    return Case(
        op="moe_permutation",
        case={"tokens": tokens, "experts": experts, "topk": topk},
        flops=0,
        bytes=tokens * topk * 24 + 4 * (experts + 1),
        inputs=lambda device: (torch.rand(tokens, experts, device=device).topk(topk, sorted=False).indices,),
        run=lambda choice: torch.ops.dsv3.moe_permutation(choice, experts),
        baselines=peers(lambda choice: reference.moe_permutation(choice, experts)),
    )


def _permute(tokens: int, hidden: int, topk: int, *, back: bool) -> Case:
    experts = 256 if topk == 8 else 16

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        _, source, position = _order(tokens, experts, topk, device)
        rows = torch.randn(tokens * topk if back else tokens, hidden, device=device, dtype=torch.bfloat16)
        return (rows, position) if back else (rows, source, position)

    def unpermute(rows: Tensor, position: Tensor) -> Tensor:
        return torch.ops.dsv3.moe_unpermute(rows, position, None)

    return Case(
        op="moe_unpermute" if back else "moe_permute",
        case={"tokens": tokens, "hidden": hidden, "topk": topk},
        flops=tokens * hidden * topk if back else 0,
        bytes=2 * tokens * hidden * (topk + 1) + 8 * tokens * topk * (1 if back else 2),  # the order, one way or both
        inputs=inputs,
        run=unpermute if back else torch.ops.dsv3.moe_permute,
        baselines=peers(
            (lambda y, position: reference.moe_unpermute(y, position, None)) if back else reference.moe_permute
        ),
    )


def _permute_cast(tokens: int, hidden: int, topk: int) -> Case:
    experts, row = 256 if topk == 8 else 16, hidden + 4 * (hidden // TILE)

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        _, source, position = _order(tokens, experts, topk, device)
        x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
        return (*torch.ops.dsv3.per_token_cast(x, True, 1e-4), source, position)

    return Case(
        op="moe_permute_cast",
        case={"tokens": tokens, "hidden": hidden, "topk": topk},
        flops=0,
        bytes=tokens * row * (topk + 1) + 8 * tokens * topk * 2,
        inputs=inputs,
        run=torch.ops.dsv3.moe_permute_cast,
        baselines=peers(reference.moe_permute_cast),
    )


def cases(tiny: bool) -> list[Case]:
    """`hidden` is the width of the output."""
    tokens, hidden, topk = (32, 128, 4) if tiny else (4096, 7168, 8)
    sizes = [(16, 64), (32, 64)] if tiny else [(128, 256), (4096, 256)]
    gates = [gate(*size) for gate in (_gate, _gate_loads) for size in sizes]
    moves = [
        *(_permute(tokens, hidden, topk, back=back) for back in (False, True)),
        _permute_cast(tokens, hidden, topk),
    ]
    return [*_swiglu_cases(tiny), *gates, _permutation(tokens, 16 if tiny else 256, topk), *moves]


def _swiglu_cases(tiny: bool) -> list[Case]:
    expert, dense = ((128, 128), (128, 256)) if tiny else ((32768, 2048), (4096, 18432))
    shapes = [(*expert, True), (*expert, False), (*dense, False)]
    plain = [
        _case(tokens, inner, weighted=weighted, backward=backward)
        for backward in (False, True)
        for tokens, inner, weighted in shapes
    ]
    narrow = (256, 256) if tiny else (8 * 32768, 768)  # what the experts of 2b have in a step
    casts = [_cast(*shape, weighted=shape != dense) for shape in (expert, narrow, dense)]
    backward = [
        _cast_backward(*shape, weighted=shape != dense, transposes=transposes)
        for transposes in (False, True)
        for shape in (expert, narrow, dense)
    ]
    return [*plain, *casts, *backward]
