"""csrc/decode: what a decoding step does with few tokens, in the shapes of `mini` and of V3's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Baseline, Case
from dsv3 import ops
from dsv3.reference import decode as reference

BF16 = torch.bfloat16
WEIGHTS = {}, {"weights": "fp8"}  # what a case says of them
# Rows and depth of the matrices that read one input.
LINEAR = {
    "mini q_a, kv_a": ((768, 576), 1024),
    "mini q_b": ((3072,), 768),
    "mini o": ((1024,), 2048),
    "mini head": ((32000,), 1024),
    "V3 q_a, kv_a": ((1536, 576), 7168),
    "V3 q_b": ((24576,), 1536),
    "V3 o": ((7168,), 16384),
}


def _draw(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=BF16) * shape[-1] ** -0.5


def _quantize(weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Codes and scales."""
    data, scales = zip(*map(ops.per_block_cast, weights), strict=True)
    return list(data), list(scales)


def _linear_case(name: str, rows: tuple[int, ...], depth: int, fp8: bool, tokens: int) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        weights = [_draw(n, depth, device=device) for n in rows]
        return _draw(tokens, depth, device=device), *(_quantize(weights) if fp8 else (weights, []))

    def run(x: Tensor, weights: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        return torch.ops.dsv3.few_linear(x, weights, scales, BF16, True)

    def plain(x: Tensor, weights: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
        return reference.few_linear(x, weights, scales, BF16, True)

    size, blocks = 1 if fp8 else 2, sum(-(-n // 128) for n in rows) * -(-depth // 128) if fp8 else 0
    return Case(
        op="few_linear",
        case={"layer": name, "tokens": tokens, "n": sum(rows), "k": depth} | WEIGHTS[fp8],
        flops=2.0 * tokens * sum(rows) * depth,
        bytes=size * sum(rows) * depth + 4 * blocks + 2 * tokens * (depth + sum(rows)),
        inputs=inputs,
        run=run,
        baselines={"torch": Baseline(plain)},
    )


def _head_inputs(tokens: int, heads: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input and kv_b [heads, 256, 512]."""
    return _draw(tokens, heads, width, device=device), _draw(heads, 256, 512, device=device)


def _heads_case(tokens: int, heads: int) -> Case:
    return Case(
        op="few_heads",
        case={"tokens": tokens, "heads": heads, "n": 128, "k": 512},
        flops=2.0 * tokens * heads * 128 * 512,
        bytes=2 * heads * (128 * 512 + tokens * (128 + 512)),
        inputs=functools.partial(_head_inputs, tokens, heads, 512),
        run=lambda x, kv_b: torch.ops.dsv3.few_heads(x, kv_b[:, 128:], True),
        baselines={"torch": Baseline(lambda x, kv_b: reference.few_heads(x, kv_b[:, 128:], True))},
    )


def _absorb_case(tokens: int, heads: int) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        angles = torch.rand(4096, 32, device=device).mul_(6.28)
        positions = torch.randint(4096, (tokens,), device=device)
        return *_head_inputs(tokens, heads, 192, device), angles.cos(), angles.sin(), positions

    return Case(
        op="mla_absorb",
        case={"tokens": tokens, "heads": heads, "n": 512, "k": 128},
        flops=2.0 * tokens * heads * 128 * 512,
        bytes=2 * heads * (128 * 512 + tokens * (192 + 576)),
        inputs=inputs,
        run=lambda q, kv_b, *rest: torch.ops.dsv3.mla_absorb(q, kv_b[:, :128], *rest, True),
        baselines={"torch": Baseline(lambda q, kv_b, *rest: reference.mla_absorb(q, kv_b[:, :128], *rest, True))},
    )


def _experts_case(tokens: int, fp8: bool, experts: int, hidden: int, inner: int) -> Case:
    topk = min(8, experts)
    index = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens)).topk(topk).indices

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        routed = _draw(experts, 2 * inner, hidden, device=device), _draw(experts, hidden, inner, device=device)
        shared = _draw(2 * inner, hidden, device=device), _draw(hidden, inner, device=device)
        weights = [*routed, *shared]
        data, scales = _quantize(weights) if fp8 else (weights, [None] * 4)
        factors = torch.rand(tokens, topk, device=device)
        return _draw(tokens, hidden, device=device), index.to(device), factors, *data, *scales

    chosen, size = len(index.unique()) + 1, 1 if fp8 else 2
    return Case(
        op="few_experts",
        case={"tokens": tokens, "experts": experts, "topk": topk, "hidden": hidden, "inner": inner} | WEIGHTS[fp8],
        flops=6.0 * tokens * (topk + 1) * hidden * inner,
        bytes=3 * size * chosen * hidden * inner + 2 * tokens * hidden * (topk + 2) + 12 * tokens * topk,
        inputs=inputs,
        run=lambda *inputs: torch.ops.dsv3.few_experts(*inputs, True),
        baselines={"torch": Baseline(lambda *inputs: reference.few_experts(*inputs, True), tolerance=2e-2)},
    )


def _attention_case(batch: int, heads: int, length: int) -> Case:
    """Over a cache whose pages lie in any order."""
    pages = -(-length // 64)

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        cache = torch.randn(batch * pages, 64, 1, 576, device=device, dtype=BF16)
        table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        return torch.randn(batch, 1, heads, 576, device=device, dtype=BF16), cache, table, lengths

    return Case(
        op="few_attention",
        case={"batch": batch, "s_q": 1, "heads": heads, "s_k": length, "kv": "bf16"},
        flops=2.0 * batch * length * heads * (576 + 512),
        bytes=2 * batch * (length * 576 + heads * (576 + 512)),
        inputs=inputs,
        run=lambda *inputs: torch.ops.dsv3.few_attention(*inputs, 192**-0.5, 512, True),
        baselines={
            "torch": Baseline(lambda *inputs: reference.few_attention(*inputs, 192**-0.5, 512, True)),
            "mla_decode": Baseline(lambda *x: torch.ops.dsv3.mla_decode(*x, None, 192**-0.5, 512, True, False)[0]),
        },
    )


def _gate_case(tokens: int, experts: int, hidden: int) -> Case:
    """The four groups of eight that are best, of `mini`; fewer at tiny sizes."""
    groups = 8 if experts % 8 == 0 else 1
    settings = groups, -(-groups // 2), min(8, experts // 2), 2.5, "sigmoid", "top2_sum", True, True

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        rows = [torch.randn(tokens, hidden, device=device, dtype=BF16) for _ in range(2)]
        return (
            *rows,
            _draw(hidden, device=device),
            _draw(experts, hidden, device=device),
            torch.rand(experts, device=device),
        )

    def call(f: Callable[..., Any], x: Tensor, residual: Tensor, norm: Tensor, gate: Tensor, bias: Tensor) -> Any:
        return f(x, residual, norm, 1e-6, gate, bias, *settings)[:2]  # choices may differ where two are nearly equal

    return Case(
        op="few_gate",
        case={"tokens": tokens, "hidden": hidden, "experts": experts},
        flops=2.0 * tokens * experts * hidden,
        bytes=2 * hidden * (4 * tokens + experts + 1),
        inputs=inputs,
        run=functools.partial(call, torch.ops.dsv3.few_gate),
        baselines={"torch": Baseline(functools.partial(call, reference.few_gate))},
    )


def _positions_case(batch: int, width: int) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        lengths = torch.arange(batch, device=device) + 40
        return lengths, torch.ones_like(lengths), torch.arange(batch * width, device=device).int().view(batch, width)

    settings = 0, 2, 64, 64 * width - 1
    return Case(
        op="decode_positions",
        case={"batch": batch, "s_q": 2, "width": width},
        flops=0,
        bytes=batch * (16 + 2 * 20 + 4),
        inputs=inputs,
        run=lambda *inputs: torch.ops.dsv3.decode_positions(*inputs, *settings),
        baselines={"torch": Baseline(lambda *inputs: reference.decode_positions(*inputs, *settings))},
    )


def _greedy_case(batch: int, vocab: int) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        state = torch.zeros(batch, 4, dtype=torch.int64, device=device)
        logits = torch.randn(batch, 2, vocab, device=device, dtype=BF16)
        return state[:, :3].clone(), state[:, :2].clone(), state[:, 0].clone(), logits, torch.ones_like(state[:, 0])

    def run(f: Callable[..., None], *inputs: Tensor) -> Tensor:
        f(*inputs)
        return inputs[0]

    return Case(
        op="greedy_round",
        case={"batch": batch, "s_q": 2, "vocab": vocab},
        flops=0,
        bytes=batch * (4 * vocab + 24 + 16 + 8 + 8),
        inputs=inputs,
        run=functools.partial(run, torch.ops.dsv3.greedy_round),
        baselines={"torch": Baseline(functools.partial(run, reference.greedy_round))},
    )


def _combine_case(tokens: int, slots: int, hidden: int) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        rows = _draw(tokens, hidden, device=device), _draw(tokens, slots, hidden, device=device)
        return *rows, _draw(hidden, device=device)

    return Case(
        op="combine_norm",
        case={"tokens": tokens, "slots": slots, "hidden": hidden},
        flops=tokens * hidden * (slots + 4),
        bytes=2 * hidden * (tokens * (slots + 3) + 1),
        inputs=inputs,
        run=lambda *inputs: torch.ops.dsv3.combine_norm(*inputs, 1e-6),
        baselines={"torch": Baseline(lambda *inputs: reference.combine_norm(*inputs, 1e-6))},
    )


def cases(tiny: bool) -> list[Case]:
    """One token and 32."""
    heads, sizes = ((2, 3), (6, 64, 32)) if tiny else ((16, 128), (64, 1024, 512))
    shapes = [(name, (32,) * len(rows), 64) if tiny else (name, rows, depth) for name, (rows, depth) in LINEAR.items()]
    return [
        *(_linear_case(*shape, fp8, n) for shape in shapes for fp8 in (False, True) for n in (1, 32)),
        *(make(tokens, count) for make in (_heads_case, _absorb_case) for count in heads for tokens in (1, 32)),
        *(_experts_case(tokens, fp8, *sizes) for fp8 in (False, True) for tokens in (1, 32)),
        *(_combine_case(tokens, 9, sizes[1]) for tokens in (1, 32)),
        *(_attention_case(batch, heads[0], 70 if tiny else 544) for batch in (1, 32)),
        *(_gate_case(tokens, *sizes[:2]) for tokens in (1, 32)),
        *(_positions_case(batch, 3 if tiny else 64) for batch in ((1, 2) if tiny else (4, 32))),
        *(_greedy_case(batch, 64 if tiny else 32000) for batch in (1, 32)),
    ]
