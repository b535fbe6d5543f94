"""What a decoding step does with few tokens, in plain PyTorch: the specification of csrc/decode."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.reference.linear import linear
from dsv3.reference.moe import swiglu
from dsv3.reference.norm import rmsnorm, rope_


def few_linear(
    x: Tensor,
    weights: list[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    static_weights: bool,
) -> list[Tensor]:
    """norm(x) [T, K] times each of the weights [N_i, K] transposed; norm is RMSNorm, rounded to x's dtype, or nothing."""
    if norm_weight is not None:
        x = rmsnorm(x, None, norm_weight, eps)[0]
    return [linear(x, weight, out_dtype) for weight in weights]


def few_heads(x: Tensor, weight: Tensor, static_weights: bool) -> Tensor:
    """x [T, G, K] times weight [G, N, K] transposed, head by head -> [T, G, N]."""
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()


def mla_absorb(q: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, static_weights: bool) -> Tensor:
    """[q_nope W_uk | rotated q_rope] for q [T, G, Dn+Dr] and W_uk [G, Dn, Dc] -> [T, G, Dc+Dr]; pairs (2i, 2i+1) rotate."""
    q_nope, q_rope = q.split([weight.shape[1], q.shape[2] - weight.shape[1]], -1)
    latent = torch.bmm(q_nope.transpose(0, 1), weight).transpose(0, 1)
    rotated = q_rope.flatten(1)
    rope_(rotated, cos, sin, positions, q_rope.shape[2], False)
    return torch.cat([latent, rotated.view(q_rope.shape)], -1)


def few_experts(
    x: Tensor,
    topk_idx: Tensor | None,
    topk_weights: Tensor | None,
    gate_up: Tensor | None,
    down: Tensor | None,
    shared_gate_up: Tensor | None,
    shared_down: Tensor | None,
    static_weights: bool,
) -> Tensor:
    """y [T, k (+ 1), H]: what expert topk_idx[t, j] makes of x[t] [H], its SwiGLU times topk_weights[t, j]; last the shared
    experts'. On a CPU only chosen experts run; elsewhere all, for every token, since nothing is asked of the device."""
    slots = []
    if topk_idx is not None:
        y = x.new_zeros(*topk_idx.shape, x.shape[1])
        for e in topk_idx.unique().tolist() if topk_idx.is_cpu else range(gate_up.shape[0]):
            chosen = topk_idx == e
            weight = torch.where(chosen, topk_weights, 0.0).sum(1)
            act = swiglu(linear(x, gate_up[e], x.dtype), weight)
            y = torch.where(chosen[..., None], linear(act, down[e], x.dtype)[:, None], y)
        slots.append(y)
    if shared_gate_up is not None:
        act = swiglu(linear(x, shared_gate_up, x.dtype), None)
        slots.append(linear(act, shared_down, x.dtype)[:, None])
    return torch.cat(slots, 1)


def combine_norm(residual: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """out = residual [T, H] + the sum over the slots of y [T, S, H], rounded once, and rmsnorm(out)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    out = (residual.to(wide) + y.to(wide).sum(1)).to(residual.dtype)
    return out, rmsnorm(out, None, weight, eps)[0]
