"""Decoding of few tokens: what the blocks compute, in the kernels of ops/decode.py, of which a layer takes a dozen.

Activations go from block to block as two tensors, the residual and its norm, since one kernel makes both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.model.attention import LATENT_NORM_EPS, MLA, AttentionContext
from dsv3.model.block import Block
from dsv3.model.layers import Linear, RMSNorm, identity, rope_tables
from dsv3.model.moe import Experts
from dsv3.ops import registry

# Weights are written by other frameworks' kernels, and behind those the embedding runs, which is one too. FP8 copies of them
# are made where `prepare` looks at a block, and behind that the first norm runs.
STATIC = {"static_weights": True}


Weight = Tensor | ops.Quantized


class FewBlock(NamedTuple):
    """A block and its weights, as a step finds them: in FP8 where they are kept so, or where their module multiplies in FP8."""

    block: Block
    attention: dict[str, Weight]  # of the projections q_a, q_b, kv_a and o, or q, kv_a and o
    mlp: dict[str, Weight]  # of the experts, or of the dense MLP, as few_experts names them


def prepare(blocks: Iterable[Block], ctx: AttentionContext, tokens: int) -> list[FewBlock] | None:
    """The blocks for `run`; None where it can not stand for all of them."""
    found = []
    for block in blocks:
        found.append(_prepare(block, ctx, tokens))
        if found[-1] is None:
            return None
    return found


def _prepare(block: Block, ctx: AttentionContext, tokens: int) -> FewBlock | None:
    """Of a block that decodes without gradients, all heads and experts here.

    FP8 weights are multiplied with activations as they are here, and cast to FP8 elsewhere. So that a sequence meets one of
    these alone, with drafts or without, and however many others are left, the most tokens that a step may have decide.
    """
    if ctx.block_table is None or tokens > ops.FEW_TOKENS or torch.is_grad_enabled():
        return None
    weight = block.attn_norm.weight
    if weight.is_cuda and (weight.dtype != torch.bfloat16 or registry.why_no_kernels(weight.device)):
        return None  # their references compute every expert
    split = block.attention, block.moe.shared if block.is_moe else block.mlp
    if any(not (module.gather is module.reduce is identity) for module in split if module is not None):
        return None
    if block.is_moe and (block.moe.buffer.transport, block.moe.buffer.room) != ("local", None):
        return None
    found = FewBlock(block, attention_weights(block.attention), _mlp_weights(block))
    quantized = any(isinstance(weight, ops.Quantized) for weight in (*found.attention.values(), *found.mlp.values()))
    return found if _alike(*found.mlp.values()) and not (quantized and ctx.max_tokens > ops.FEW_TOKENS) else None


def _weight(module: Linear | Experts, name: str = "weight") -> Weight:
    """The weight that has this name."""
    weight = module.fp8_copies.of(name, getattr(module, name)) if module.fp8 else None
    weight = getattr(module, name) if weight is None else weight
    return weight.data if isinstance(weight, ops.Fp8Weight) else weight


def _alike(*weights: Weight) -> bool:
    """Whether one kernel can take them."""
    return len({isinstance(w, ops.Quantized) for w in weights}) == 1


def attention_weights(m: MLA) -> dict[str, Weight]:
    """Those that `attention` takes."""
    names = ("q_a", "q_b", "kv_a", "o") if m.config.q_lora_rank else ("q", "kv_a", "o")
    return {name: _weight(getattr(m, name)) for name in names}


def _mlp_weights(block: Block) -> dict[str, Weight]:
    shared = block.moe.shared if block.is_moe else block.mlp
    weights = {name: _weight(block.moe.experts, name) for name in ("gate_up", "down")} if block.is_moe else {}
    if shared is not None:
        weights |= {"shared_gate_up": _weight(shared.gate_up), "shared_down": _weight(shared.down)}
    return weights


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """norm(x), without the cast that FP8 layers of many tokens want."""
    return ops.rmsnorm(x, norm.weight, eps=norm.eps)


def linear(layer: Linear, x: Tensor) -> Tensor:
    """The output for few tokens of a layer that is never in FP8, or beside a block that is prepared."""
    return _multiply(_weight(layer), x)


def _multiply(weight: Weight, x: Tensor) -> Tensor:
    return ops.few_linear(x, [weight], **STATIC)[0]


def run(blocks: list[FewBlock], norm: RMSNorm, x: Tensor, ctx: AttentionContext, caches: list[Tensor]) -> Tensor:
    """x [T, H] through the blocks, with a cache each, and the norm behind the last -> [T, H]."""
    norms = [*(few.block.attn_norm for few in blocks[1:]), norm]
    h = _norm(blocks[0].block.attn_norm, x)
    for few, cache, following in zip(blocks, caches, norms, strict=True):
        x, y = _mlp(few, attention(few.block.attention, few.attention, h, ctx, cache), x)
        x, h = ops.combine_norm(x, y, following.weight, eps=following.eps)
    return h


def attention(m: MLA, weights: dict[str, Weight], h: Tensor, ctx: AttentionContext, cache: Tensor) -> Tensor:
    """m(h), absorbed: h [T, H] -> [T, H]."""
    compressed = "q_a" in weights
    down = weights["q_a" if compressed else "q"], weights["kv_a"]
    q, kv_a = ops.few_linear(h, list(down), **STATIC) if _alike(*down) else [_multiply(weight, h) for weight in down]
    queries = {"q_a": q, "q_a_norm_weight": m.q_a_norm.weight} if compressed else {}
    if ctx.slot_mapping is not None:
        tables, place = rope_tables(m.rope, h.device), (ctx.positions, ctx.slot_mapping, cache)
        ops.mla_append_kv(kv_a, m.kv_a_norm.weight, *tables, *place, eps=LATENT_NORM_EPS, **queries)
    elif compressed:
        q = _norm(m.q_a_norm, q)
    if compressed:
        q = _multiply(weights["q_b"], q)
    return _multiply(weights["o"], m.absorbed_few(q, ctx, cache).flatten(1))


def _mlp(few: FewBlock, out: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's out [T, H] with its residual, and what is to be added to that: y [T, S, H], to be summed over S, of the
    chosen experts and the shared ones, or of the dense MLP."""
    block, norm = few.block, few.block.mlp_norm
    if not block.is_moe:
        u, x = ops.rmsnorm(out, norm.weight, eps=norm.eps, residual=residual)
        return x, ops.few_experts(u, **few.mlp, **STATIC)
    gate = block.moe.gate
    matrices = norm.weight, gate.weight, gate.bias
    x, u, *choice = ops.few_gate(out, residual, *matrices, eps=norm.eps, **gate.settings, **STATIC)
    return x, ops.few_experts(u, *choice, **few.mlp, **STATIC)
