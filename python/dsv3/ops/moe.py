"""Mixture-of-experts routing: the gate, and the way of tokens to expert order and back (report 2.1.2, equations 12 to 16)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.reference import moe as reference


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        index, weights, counts = reference.moe_gate(logits, bias, *settings)
        ctx.save_for_backward(logits, index)
        ctx.settings = settings[3:5] + settings[6:]
        ctx.mark_non_differentiable(index, counts)
        return index, weights, counts

    @staticmethod
    def backward(ctx: Any, dindex: None, dweights: Tensor, dcounts: None) -> tuple[Tensor | None, ...]:
        logits, index = ctx.saved_tensors
        return (reference.moe_gate_backward(dweights, logits, index, *ctx.settings), *[None] * 8)


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    *,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str = "sigmoid",
    group_score: str = "top2_sum",
    normalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the experts of every token; differentiable in the logits, through the weights.

    s = sigmoid or softmax of the logits; s + bias chooses (groups first, those not kept at -inf, then experts, ties to the
    lowest index); s alone weighs: weights = s[idx] (/ their sum if normalize) * route_scale. V3: sigmoid, top2_sum,
    normalised, 2.5; V2: softmax, max, not normalised, 16.0.

    Args:
        logits: fp32 [T, E].
        bias: fp32 [E] or None.
        num_groups: E is split into so many equal groups; 1 means none.
        topk_groups: groups kept.
        topk: experts a token.
        route_scale: factor on the weights.
        score: "sigmoid" or "softmax".
        group_score: "top2_sum" or "max".
        normalize: whether the k weights are divided by their sum.

    Returns:
        topk_idx int64 [T, k] (best first), topk_weights fp32 [T, k], counts int32 [E].

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    if logits.dim() != 2 or (bias is not None and bias.shape != logits.shape[1:]):
        found = f"{tuple(logits.shape)} and {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"moe_gate: logits must be (T, E) and bias (E,) or None, got {found}")
    experts = logits.shape[1]
    if experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise ValueError(f"moe_gate: {topk_groups} of {num_groups} groups do not divide {experts} experts")
    if not 1 <= topk <= topk_groups * (experts // num_groups):
        raise ValueError(f"moe_gate: topk must be in 1..{topk_groups * (experts // num_groups)}, got {topk}")
    if score not in ("sigmoid", "softmax") or group_score not in ("top2_sum", "max"):
        raise ValueError(
            f"moe_gate: score must be sigmoid or softmax, group_score top2_sum or max, got {score}, {group_score}"
        )
    return _Gate.apply(logits, bias, num_groups, topk_groups, topk, route_scale, score, group_score, normalize)


class Permutation(NamedTuple):
    """The stable order of (token, slot) pairs by expert; see reference.moe_permutation."""

    offsets: Tensor  # int32 [E+1]
    source: Tensor  # int64 [T*k]: the pair in a row
    position: Tensor  # int64 [T, k]: the row of a pair


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return reference.moe_permute(x, source, position.shape[1])

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        return reference.moe_unpermute(drows, position, None), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        ctx.topk = position.shape[1]
        return reference.moe_unpermute(y, position, None)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (source,) = ctx.saved_tensors
        return reference.moe_permute(dout, source, ctx.topk), None, None


def moe_permute(x: Tensor, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Permutation]:
    """Copies every token once for each of its experts, in expert order; differentiable in x (summed over the k copies, fp32).

    Args:
        x: [T, H].
        topk_idx: int64 [T, k], experts in 0..num_experts-1.
        num_experts: E.

    Returns:
        rows [T*k, H] and the Permutation, whose `offsets` int32 [E+1] delimit the experts' rows.
    """
    if x.dim() != 2 or topk_idx.dim() != 2 or topk_idx.shape[0] != x.shape[0]:
        raise ValueError(
            f"moe_permute: x must be (T, H) and topk_idx (T, k), got {tuple(x.shape)} and {tuple(topk_idx.shape)}"
        )
    handle = Permutation(*reference.moe_permutation(topk_idx, num_experts))
    return _Permute.apply(x, handle.source, handle.position), handle


def moe_unpermute(y: Tensor, handle: Permutation, weights: Tensor | None = None) -> Tensor:
    """Sums every token's k rows, in fp32 and in the order of its slots; differentiable in y and weights.

    Args:
        y: [T*k, H] in expert order.
        handle: of moe_permute.
        weights: fp32 [T, k], or None for the plain sum.

    Returns:
        [T, H] of y's dtype.
    """
    if y.dim() != 2 or y.shape[0] != handle.position.numel():
        raise ValueError(f"moe_unpermute: y must be (T*k, H) with {handle.position.numel()} rows, got {tuple(y.shape)}")
    if weights is not None:
        return reference.moe_unpermute(y, handle.position, weights)
    return _Unpermute.apply(y, handle.source, handle.position)
