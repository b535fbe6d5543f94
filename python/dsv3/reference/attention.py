"""Multi-head latent attention in plain PyTorch: the specification of csrc/attention and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

# cuDNN first: with keys of 192 and values of 128 it is 4 (forward) to 8 times (backward) as fast as the next on an H100.
CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def mla_attention(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
) -> Tensor:
    """out [Tq, Hq, Dv] for q [Tq, Hq, Dn+Dr], k_nope [Tk, Hq, Dn], k_rope [Tk, Dr] shared by the heads, v [Tk, Hq, Dv].

    Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i+1] and the keys cu_seqlens_k[i] to [i+1]; its last query sees
    its last key. Sequences of one length run as a batch; otherwise a loop reads the lengths on the host.
    """
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], -1)
    n = cu_seqlens_q.shape[0] - 1
    if q.shape[0] == n * max_seqlen_q and k.shape[0] == n * max_seqlen_k:
        lengths = max_seqlen_q, max_seqlen_k, max_seqlen_k
        parts = [x.view(n, m, *x.shape[1:]).transpose(1, 2) for x, m in zip((q, k, v), lengths, strict=True)]
        return _attend(*parts, causal, softmax_scale).transpose(1, 2).reshape(-1, *v.shape[1:])
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = []
    for i in range(n):
        queries, keys = slice(starts[i], starts[i + 1]), slice(ends[i], ends[i + 1])
        parts = [x[s].transpose(0, 1)[None] for x, s in ((q, queries), (k, keys), (v, keys))]
        out.append(_attend(*parts, causal, softmax_scale)[0].transpose(0, 1))
    return torch.cat(out) if out else q.new_empty(0, *v.shape[1:])


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q k^T * scale) v for [B, H, S, D]; causal is bottom-right."""
    rows, columns, value_dim = q.shape[2], k.shape[2], v.shape[3]
    mask = None
    if causal and rows != columns:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
    options = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scale}
    if q.is_cuda:
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
            return scaled_dot_product_attention(q, k, v, **options)
    if value_dim < q.shape[3]:  # torch's fused CPU attention wants values as wide as keys
        v = pad(v, (0, q.shape[3] - value_dim))
    return scaled_dot_product_attention(q, k, v, **options)[..., :value_dim]


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention: out [B, S, Hq, Dc] and natural-log lse fp32 [B, Hq, S] for q [B, S, Hq, Dc+Dr] over a paged cache.

    Keys are the whole cached rows, values their first Dc columns. seq_lens counts the S new tokens, which are stored already.
    Rows of the cache past a sequence's length are not looked at, whatever they hold; length 0 gives out 0 and lse -inf.
    """
    batch, steps = q.shape[:2]
    wide = torch.promote_types(q.dtype, torch.float32)
    kv = cache[block_table.clamp(min=0).long()].view(batch, -1, cache.shape[-1]).to(wide)
    column = torch.arange(kv.shape[1], device=q.device)
    kv = torch.where((column < seq_lens[:, None])[:, :, None], kv, 0.0)
    newest = seq_lens[:, None] - (torch.arange(steps, 0, -1, device=q.device) if causal else 1)
    seen = column <= newest.expand(batch, steps)[:, :, None]
    scores = torch.einsum("bshd,bkd->bhsk", q.to(wide), kv) * softmax_scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = torch.einsum("bhsk,bkd->bshd", weights, kv[..., :kv_lora_rank])
    return out.to(q.dtype), lse


def mla_append_kv(
    kv_a: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    eps: float,
) -> None:
    """Stores token t's latent at row slot_mapping[t] of the cache [pages, page, 1, Dc+Dr]; a slot of -1 stores nothing.

    kv_a [T, Dc+Dr]: the first Dc values are normalised (RMSNorm with norm_weight [Dc]), the last Dr rotated in interleaved
    pairs by cos and sin [max_positions, Dr/2] at positions [T].
    """
    rank = norm_weight.shape[0]
    if kv_a.shape[0] == 0:
        return
    wide = kv_a.to(torch.promote_types(kv_a.dtype, torch.float32))
    latent, rope = wide[:, :rank], wide[:, rank:]
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps) * norm_weight
    c, s = cos[positions], sin[positions]
    even, odd = rope[:, 0::2], rope[:, 1::2]
    rotated = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(1)
    row = torch.cat([latent, rotated], -1).to(cache.dtype)
    # A skipped token repeats the first kept one (or, without any, leaves row 0 as it is): shapes do not depend on the data.
    flat = cache.view(-1, cache.shape[-1])
    keep = slot_mapping >= 0
    source = torch.where(keep, torch.arange(keep.shape[0], device=keep.device), keep.int().argmax())
    slots = slot_mapping[source].clamp(min=0)
    flat[slots] = torch.where(keep.any(), row[source], flat[slots])
