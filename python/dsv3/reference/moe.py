"""Routing in plain PyTorch: the specification of csrc/moe and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.reference.groups import group_of
from dsv3.reference.quant import empty_row_scales


def scores(logits: Tensor, score: str) -> Tensor:
    """The affinities s of the gate: sigmoid (V3) or softmax (V2) of fp32 logits [T, E]."""
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)


def top(x: Tensor, k: int) -> Tensor:
    """Indices int64 [T, k] of the k largest of each row, largest first, equal values from the lowest index on."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def moe_gate(
    logits: Tensor,
    bias: Tensor | None,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str,
    group_score: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """topk_idx int64 [T, k], topk_weights fp32 [T, k], counts int32 [E] for logits fp32 [T, E].

    The biased score chooses, the unbiased one weighs. Of `num_groups` equal groups the `topk_groups` with the best group
    score (sum of the two best choices, or the best one) stay; the experts of all others are at -inf, so that even a
    negative biased score of a kept group beats them.
    """
    tokens, experts = logits.shape
    s = scores(logits, score)
    choice = s if bias is None else s + bias
    if num_groups > 1:
        groups = choice.view(tokens, num_groups, experts // num_groups)
        best = groups.topk(2, dim=-1).values.sum(-1) if group_score == "top2_sum" else groups.amax(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, top(best, topk_groups), True)
        choice = groups.masked_fill(~keep[:, :, None], float("-inf")).view(tokens, experts)
    index = top(choice, topk)
    weights = s.gather(1, index)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return index, weights * route_scale, _counts(index, experts)


def _counts(index: Tensor, experts: int) -> Tensor:
    """int32 [E]: how often each expert occurs, without asking the device as torch.bincount does."""
    counts = torch.zeros(experts, dtype=torch.int32, device=index.device)
    return counts.scatter_add_(0, index.reshape(-1), torch.ones_like(index, dtype=torch.int32).view(-1))


def moe_gate_backward(
    dweights: Tensor, logits: Tensor, index: Tensor, route_scale: float, score: str, normalize: bool
) -> Tensor:
    """The gradient of the logits [T, E] from that of topk_weights [T, k]; the choice itself is constant."""
    s = scores(logits, score)
    return _through_scores(_weights_gradient(dweights, s, index, route_scale, normalize), s, score)


def _weights_gradient(dweights: Tensor, s: Tensor, index: Tensor, route_scale: float, normalize: bool) -> Tensor:
    """The gradient of the affinities [T, E] from that of topk_weights."""
    ds = dweights * route_scale
    if normalize:
        picked = s.gather(1, index)
        total = picked.sum(-1, keepdim=True) + 1e-20
        ds = (ds - (ds * picked).sum(-1, keepdim=True) / total) / total
    return torch.zeros_like(s).scatter_(1, index, ds)


def _through_scores(ds: Tensor, s: Tensor, score: str) -> Tensor:
    """The gradient of the logits from that of the affinities."""
    return ds * s * (1 - s) if score == "sigmoid" else s * (ds - (ds * s).sum(-1, keepdim=True))


def moe_gate_loads(
    logits: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    num_groups: int,
    topk_groups: int,
    topk: int,
    route_scale: float,
    score: str,
    group_score: str,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What moe_gate gives, and for the n sequences that begin at cu_seqlens int32 [n+1]: chosen int32 [n, E], how many of
    their tokens have the expert among the topk best s, without bias and groups; affinity fp64 [n, E], the sums of
    s_i / sum_j s_j over their tokens. Tokens behind the last sequence count in none."""
    experts, n = logits.shape[1], cu_seqlens.shape[0] - 1
    if cu_seqlens.is_cpu and (cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any() or cu_seqlens[-1] > len(logits)):
        found = cu_seqlens.tolist()
        raise RuntimeError(f"cu_seqlens must begin at 0, not decrease and end at {len(logits)} at most, got {found}")
    routed = moe_gate(logits, bias, num_groups, topk_groups, topk, route_scale, score, group_score, normalize)
    s, sequence = scores(logits, score), group_of(cu_seqlens, len(logits))
    # A row more than there are sequences, for tokens behind them.
    chosen = _counts(sequence[:, None] * experts + top(s, topk), (n + 1) * experts).view(n + 1, experts)
    affinity = torch.zeros(n + 1, experts, dtype=torch.float64, device=logits.device)
    affinity.index_add_(0, sequence, (s / s.sum(-1, keepdim=True)).double())
    return *routed, chosen[:n], affinity[:n]


def moe_gate_loads_backward(
    dweights: Tensor,
    daffinity: Tensor,
    logits: Tensor,
    index: Tensor,
    cu_seqlens: Tensor,
    route_scale: float,
    score: str,
    normalize: bool,
) -> Tensor:
    """The gradient of the logits [T, E] from those of topk_weights [T, k] and affinity [n, E]; choices are constant."""
    s, sequence = scores(logits, score), group_of(cu_seqlens, len(logits))
    ds = _weights_gradient(dweights, s, index, route_scale, normalize)
    total = s.sum(-1, keepdim=True)
    dp = torch.cat([daffinity, daffinity.new_zeros(1, s.shape[1])]).to(s.dtype)[sequence]
    of_affinity = (dp - (dp * s).sum(-1, keepdim=True) / total) / total
    ds = torch.where((sequence < len(daffinity))[:, None], ds + of_affinity, ds)
    return _through_scores(ds, s, score)


def check_experts(topk_idx: Tensor, num_experts: int) -> None:
    """RuntimeError, on a CPU, for an expert that there is not."""
    if topk_idx.is_cpu:
        outside = topk_idx[(topk_idx < 0) | (topk_idx >= num_experts)]
        if outside.numel():
            raise RuntimeError(f"experts must lie in 0..{num_experts - 1}, got {int(outside[0])}")


def moe_permutation(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets int32 [E+1], source int64 [T*k], position int64 [T, k]): the stable order of (token, slot) pairs by expert.

    Row r in expert order is pair source[r] (token source[r] // k); pair p is row position.view(-1)[p]; expert e has the rows
    offsets[e] to offsets[e+1].
    """
    flat = topk_idx.reshape(-1)
    check_experts(flat, num_experts)
    source = torch.sort(flat, stable=True).indices
    position = torch.empty_like(source)
    position[source] = torch.arange(flat.numel(), device=flat.device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = _counts(flat, num_experts).cumsum(0)
    return offsets, source, position.view(topk_idx.shape)


def moe_permute(x: Tensor, source: Tensor, position: Tensor) -> Tensor:
    """Rows [T*k, H] in expert order: row r is x [T, H] at source[r] // k, or row position[t, j] is x[t]."""
    return x.index_select(0, source // position.shape[1])


def moe_permute_cast(data: Tensor, sf: Tensor, source: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The same of e4m3 [T, H] and its scales [T, ceil(H/128)], which keep the strides of per_token_cast."""
    token = source // position.shape[1]
    rows = empty_row_scales(sf, token.shape[0], sf.shape[1])
    return data.view(torch.uint8).index_select(0, token).view(data.dtype), rows.copy_(sf.index_select(0, token))


def moe_unpermute(y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum over slots j of y[position[t, j]] (times weights[t, j]), in fp32, in the order of the slots."""
    tokens, topk = position.shape
    rows = y.index_select(0, position.reshape(-1)).view(tokens, topk, y.shape[1])
    rows = rows.to(torch.promote_types(y.dtype, torch.float32))
    if weights is not None:
        rows = rows * weights[:, :, None]
    out = rows[:, 0]
    for j in range(1, topk):
        out = out + rows[:, j]
    return out.to(y.dtype)
