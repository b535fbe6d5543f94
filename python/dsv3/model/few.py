"""Decoding of few tokens: what the blocks compute, in the kernels of ops/decode.py, of which a layer takes a dozen.

Activations go from block to block as two tensors, the residual and its norm, since one kernel makes both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv3 import ops
from dsv3.model.attention import LATENT_NORM_EPS, MLA, AttentionContext
from dsv3.model.block import Block
from dsv3.model.layers import Linear, RMSNorm, identity, rope_tables
from dsv3.model.moe import Experts
from dsv3.ops import registry

# Weights are written by other frameworks' kernels, and behind those the embedding runs, which is one too.
STATIC = {"static_weights": True}


def fits(block: Block, ctx: AttentionContext, tokens: int) -> bool:
    """Whether `run` can stand for the block: decoding without gradients, all heads and experts here, weights not FP8."""
    if ctx.block_table is None or tokens > ops.FEW_TOKENS or torch.is_grad_enabled():
        return False
    weight = block.attn_norm.weight
    if weight.is_cuda and (weight.dtype != torch.bfloat16 or registry.why_no_kernels(weight.device)):
        return False  # their references compute every expert
    if not (block.attention.gather is block.attention.reduce is identity):
        return False
    if block.is_moe and (block.moe.buffer.transport, block.moe.buffer.room) != ("local", None):
        return False
    return all(map(_plain, block.modules()))


def _plain(module: nn.Module) -> bool:
    if isinstance(module, Linear):
        return not module.fp8 and isinstance(module.weight, Tensor)
    if isinstance(module, Experts):
        return not module.fp8 and isinstance(module.gate_up, Tensor) and isinstance(module.down, Tensor)
    return True


def linear(layer: Linear, x: Tensor) -> Tensor:
    """The layer's output for few tokens."""
    return ops.few_linear(x, [layer.weight], **STATIC)[0]


def run(blocks: list[Block], norm: RMSNorm, x: Tensor, ctx: AttentionContext, caches: list[Tensor]) -> Tensor:
    """x [T, H] through the blocks, with a cache each, and the norm behind the last -> [T, H]."""
    norms = [*(block.attn_norm for block in blocks[1:]), norm]
    h = blocks[0].attn_norm(x)
    for block, cache, following in zip(blocks, caches, norms, strict=True):
        x, y = _mlp(block, attention(block.attention, h, ctx, cache), x)
        x, h = ops.combine_norm(x, y, following.weight, eps=following.eps)
    return h


def attention(m: MLA, h: Tensor, ctx: AttentionContext, cache: Tensor) -> Tensor:
    """m(h), absorbed: h [T, H] -> [T, H]."""
    c = m.config
    q, kv_a = ops.few_linear(h, [(m.q_a if c.q_lora_rank else m.q).weight, m.kv_a.weight], **STATIC)
    if ctx.slot_mapping is not None:
        tables, place = rope_tables(m.rope, h.device), (ctx.positions, ctx.slot_mapping, cache)
        ops.mla_append_kv(kv_a, m.kv_a_norm.weight, *tables, *place, eps=LATENT_NORM_EPS)
    if c.q_lora_rank:
        q = linear(m.q_b, m.q_a_norm(q))
    return linear(m.o, m.absorbed_few(q, ctx, cache).flatten(1))


def _mlp(block: Block, out: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's out [T, H] with its residual, and what is to be added to that: y [T, S, H], to be summed over S, of the
    chosen experts and the shared ones, or of the dense MLP."""
    norm = block.mlp_norm
    if not block.is_moe:
        u, x = norm.add(out, residual)
        dense = {"shared_gate_up": block.mlp.gate_up.weight, "shared_down": block.mlp.down.weight}
        return x, ops.few_experts(u, **dense, **STATIC)
    moe, gate = block.moe, block.moe.gate
    weights = {"gate_up": moe.experts.gate_up, "down": moe.experts.down}
    if moe.shared is not None:
        weights |= {"shared_gate_up": moe.shared.gate_up.weight, "shared_down": moe.shared.down.weight}
    matrices = norm.weight, gate.weight, gate.bias
    x, u, *choice = ops.few_gate(out, residual, *matrices, eps=norm.eps, **gate.settings, **STATIC)
    return x, ops.few_experts(u, *choice, **weights, **STATIC)
