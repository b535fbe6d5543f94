"""Decoding of few tokens: what the blocks compute, in the kernels of ops/decode.py, of which a layer takes a dozen.

Activations go from block to block as two tensors, the residual and its norm, since one kernel makes both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.model.attention import LATENT_NORM_EPS, MLA, AttentionContext
from dsv3.model.block import Block
from dsv3.model.layers import Linear, RMSNorm, identity, rope_tables
from dsv3.model.moe import Experts
from dsv3.ops import registry

# Weights are written by other frameworks' kernels, and behind those the embedding runs, which is one too. FP8 copies of them
# are made where `fits` looks at a block, and behind that the first norm runs.
STATIC = {"static_weights": True}


def fits(block: Block, ctx: AttentionContext, tokens: int) -> bool:
    """Whether `run` can stand for the block: decoding without gradients, all heads and experts here.

    FP8 weights are multiplied with activations as they are here, and cast to FP8 elsewhere. So that a sequence meets one of
    these alone, with drafts or without, and however many others are left, the most tokens that a step may have decide.
    """
    if ctx.block_table is None or tokens > ops.FEW_TOKENS or torch.is_grad_enabled():
        return False
    weight = block.attn_norm.weight
    if weight.is_cuda and (weight.dtype != torch.bfloat16 or registry.why_no_kernels(weight.device)):
        return False  # their references compute every expert
    if not (block.attention.gather is block.attention.reduce is identity):
        return False
    if block.is_moe and (block.moe.buffer.transport, block.moe.buffer.room) != ("local", None):
        return False
    mlp = list(_mlp_weights(block).values())
    weights = [*map(_weight, _projections(block.attention)), *mlp]
    quantized = any(isinstance(weight, ops.Quantized) for weight in weights)
    return _alike(mlp) and not (quantized and ctx.max_tokens > ops.FEW_TOKENS)


def _weight(module: Linear | Experts, name: str = "weight") -> Tensor | ops.Quantized:
    """The weight that has this name: in FP8 where it is kept so, or where the module multiplies in FP8."""
    weight = module.fp8_copies.of(name, getattr(module, name)) if module.fp8 else None
    weight = getattr(module, name) if weight is None else weight
    return weight.data if isinstance(weight, ops.Fp8Weight) else weight


def _alike(weights: Iterable[Tensor | ops.Quantized]) -> bool:
    """Whether one kernel can take them."""
    return len({isinstance(w, ops.Quantized) for w in weights}) == 1


def _projections(m: MLA) -> list[Linear]:
    return [m.q_a, m.q_b, m.kv_a, m.o] if m.config.q_lora_rank else [m.q, m.kv_a, m.o]


def _mlp_weights(block: Block) -> dict[str, Tensor | ops.Quantized]:
    """Those of the experts, or of the dense MLP, as few_experts names them."""
    shared = block.moe.shared if block.is_moe else block.mlp
    weights = {name: _weight(block.moe.experts, name) for name in ("gate_up", "down")} if block.is_moe else {}
    if shared is not None:
        weights |= {"shared_gate_up": _weight(shared.gate_up), "shared_down": _weight(shared.down)}
    return weights


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """norm(x), without the cast that FP8 layers of many tokens want."""
    return ops.rmsnorm(x, norm.weight, eps=norm.eps)


def linear(layer: Linear, x: Tensor) -> Tensor:
    """The layer's output for few tokens; in a block that `fits` has seen, or of a layer that is never in FP8."""
    return ops.few_linear(x, [_weight(layer)], **STATIC)[0]


def run(blocks: list[Block], norm: RMSNorm, x: Tensor, ctx: AttentionContext, caches: list[Tensor]) -> Tensor:
    """x [T, H] through the blocks, with a cache each, and the norm behind the last -> [T, H]."""
    norms = [*(block.attn_norm for block in blocks[1:]), norm]
    h = _norm(blocks[0].attn_norm, x)
    for block, cache, following in zip(blocks, caches, norms, strict=True):
        x, y = _mlp(block, attention(block.attention, h, ctx, cache), x)
        x, h = ops.combine_norm(x, y, following.weight, eps=following.eps)
    return h


def attention(m: MLA, h: Tensor, ctx: AttentionContext, cache: Tensor) -> Tensor:
    """m(h), absorbed: h [T, H] -> [T, H]."""
    c = m.config
    layers = m.q_a if c.q_lora_rank else m.q, m.kv_a
    weights = [_weight(layer) for layer in layers]
    q, kv_a = ops.few_linear(h, weights, **STATIC) if _alike(weights) else [linear(layer, h) for layer in layers]
    if ctx.slot_mapping is not None:
        tables, place = rope_tables(m.rope, h.device), (ctx.positions, ctx.slot_mapping, cache)
        ops.mla_append_kv(kv_a, m.kv_a_norm.weight, *tables, *place, eps=LATENT_NORM_EPS)
    if c.q_lora_rank:
        q = linear(m.q_b, _norm(m.q_a_norm, q))
    return linear(m.o, m.absorbed_few(q, ctx, cache).flatten(1))


def _mlp(block: Block, out: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's out [T, H] with its residual, and what is to be added to that: y [T, S, H], to be summed over S, of the
    chosen experts and the shared ones, or of the dense MLP."""
    norm, weights = block.mlp_norm, _mlp_weights(block)
    if not block.is_moe:
        u, x = ops.rmsnorm(out, norm.weight, eps=norm.eps, residual=residual)
        return x, ops.few_experts(u, **weights, **STATIC)
    gate = block.moe.gate
    matrices = norm.weight, gate.weight, gate.bias
    x, u, *choice = ops.few_gate(out, residual, *matrices, eps=norm.eps, **gate.settings, **STATIC)
    return x, ops.few_experts(u, *choice, **weights, **STATIC)
