"""What a decoding step does with few tokens, in plain PyTorch: the specification of csrc/decode."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dsv3.reference.attention import mla_decode
from dsv3.reference.linear import linear
from dsv3.reference.moe import check_experts, moe_gate
from dsv3.reference.norm import rmsnorm, rope_
from dsv3.reference.quant import dequantize
from dsv3.reference.swiglu import swiglu


def few_linear(
    x: Tensor, weights: list[Tensor], scales: list[Tensor], out_dtype: torch.dtype, static_weights: bool
) -> list[Tensor]:
    """x [T, K] times each of the weights [N_i, K] transposed, which are e4m3 where there are scales."""
    return [_product(x, w, sf, out_dtype) for w, sf in itertools.zip_longest(weights, scales)]


def _product(x: Tensor, weight: Tensor, sf: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if sf is None:
        return linear(x, weight, out_dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(wide), dequantize(weight, sf).to(wide), wide).to(out_dtype)


def few_heads(x: Tensor, weight: Tensor, static_weights: bool) -> Tensor:
    """x [T, G, K] times weight [G, N, K] transposed, head by head -> [T, G, N]."""
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()


def mla_absorb(q: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, static_weights: bool) -> Tensor:
    """[q_nope W_uk | rotated q_rope] for q [T, G, Dn+Dr] and W_uk [G, Dn, Dc] -> [T, G, Dc+Dr]; pairs (2i, 2i+1) rotate."""
    q_nope, q_rope = q.split([weight.shape[1], q.shape[2] - weight.shape[1]], -1)
    latent = torch.bmm(q_nope.transpose(0, 1), weight).transpose(0, 1)
    rotated = q_rope.flatten(1).clone()
    rope_(rotated, cos, sin, positions, q_rope.shape[2], False)
    return torch.cat([latent, rotated.view(q_rope.shape)], -1)


def few_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    static_cache: bool,
) -> Tensor:
    """mla_decode's output, causal, for a few rows a sequence."""
    return mla_decode(q, cache, block_table, seq_lens, None, softmax_scale, kv_lora_rank, True, False)[0]


def few_gate(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: Tensor,
    bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str,
    group_score: str,
    normalize: bool,
    static_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + residual, its RMSNorm u, and topk_idx and topk_weights of moe_gate for the logits u gate^T."""
    u, summed, _ = rmsnorm(x, residual, norm_weight, eps)
    logits = linear(u, gate, torch.promote_types(x.dtype, torch.float32))
    settings = num_groups, topk_groups, topk, route_scale, score, group_score, normalize
    return summed, u, *moe_gate(logits, bias, *settings)[:2]


def few_experts(
    x: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    gate_up: Tensor | None,
    down: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    gate_up_sf: Tensor | None,
    down_sf: Tensor | None,
    shared_gate_up_sf: Tensor | None,
    shared_down_sf: Tensor | None,
    static_weights: bool,
) -> Tensor:
    """y [T, k (+ 1), H]: what expert topk_idx[t, j] makes of x[t] [H], its SwiGLU times topk_weights[t, j]; last the shared
    experts'. On a CPU only chosen experts run; elsewhere all, for every token, since nothing is asked of the device."""

    def of(tensor: Tensor | None, expert: int) -> Tensor | None:
        return None if tensor is None else tensor[expert]

    slots = []
    if topk_idx is not None:
        y = x.new_zeros(*topk_idx.shape, x.shape[1])
        check_experts(topk_idx, gate_up.shape[0])
        for e in topk_idx.unique().tolist() if topk_idx.is_cpu else range(gate_up.shape[0]):
            chosen = topk_idx == e
            weight = torch.where(chosen, topk_weights, 0.0).sum(1)
            act = swiglu(_product(x, gate_up[e], of(gate_up_sf, e), x.dtype), weight)
            y = torch.where(chosen[..., None], _product(act, down[e], of(down_sf, e), x.dtype)[:, None], y)
        slots.append(y)
    if shared_gate_up is not None:
        act = swiglu(_product(x, shared_gate_up, shared_gate_up_sf, x.dtype), None)
        slots.append(_product(act, shared_down, shared_down_sf, x.dtype)[:, None])
    return torch.cat(slots, 1)


def combine_norm(residual: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """out = residual [T, H] + the sum over the slots of y [T, S, H], rounded once, and rmsnorm(out)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    out = (residual.to(wide) + y.to(wide).sum(1)).to(residual.dtype)
    return out, rmsnorm(out, None, weight, eps)[0]


def decode_positions(
    lengths: Tensor, active: Tensor, block_table: Tensor, first: int, steps: int, page: int, last_position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """positions, slots int64 [B*S] and seq_lens int32 [B] of the S tokens from lengths + first on, for lengths int64 [B].

    A position is clamped to 0..last_position. A token has no slot (-1) at a negative position, behind the table, and in a row
    that is not active, whose length is 0.
    """
    begin = lengths + first
    positions = begin[:, None] + torch.arange(steps, device=lengths.device)
    entry = positions.clamp(min=0) // page
    slots = block_table.gather(1, entry.clamp(max=block_table.shape[1] - 1)).long() * page + positions % page
    stored = (active[:, None] != 0) & (positions >= 0) & (entry < block_table.shape[1])
    seq_lens = torch.where(active != 0, begin + steps, 0).int()
    return positions.clamp(0, last_position).flatten(), torch.where(stored, slots, -1).flatten(), seq_lens


def greedy_round(result: Tensor, tokens: Tensor, lengths: Tensor, logits: Tensor, active: Tensor) -> None:
    """Takes the best tokens of logits [B, S, V] and as many of the drafts tokens[:, 1:] as equal those before them, a.

    result int64 [B, S+1] = the best tokens, then a; tokens[:, 0] = the last of the a + 1 that count; lengths of active rows
    grow by a + 1.
    """
    best = logits.argmax(-1)
    accepted = (best[:, :-1] == tokens[:, 1:]).long().cumprod(1).sum(1)
    result.copy_(torch.cat([best, accepted[:, None]], 1))
    tokens[:, 0] = best.gather(1, accepted[:, None]).squeeze(1)
    lengths += torch.where(active != 0, accepted + 1, 0)
