"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3 report, section 2.1.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.ops.registry import define
from dsv3.reference import attention as reference


def _allocate_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    batch, steps, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, steps, heads, kv_lora_rank), q.new_empty(batch, heads, steps, dtype=wide)


define(
    "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, float softmax_scale, int kv_lora_rank, "
    "bool causal) -> (Tensor, Tensor)",
    shapes="q [B,S,Hq,Dc+Dr], cache [pages,page,1,Dc+Dr], block_table [B,W], seq_lens [B] int32 -> out [B,S,Hq,Dc], "
    "lse [B,Hq,S] fp32",
    reference=reference.mla_decode,
    allocate=_allocate_decode,
)
define(
    "mla_append_kv(Tensor kv_a, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) cache, float eps) -> ()",
    shapes="kv_a [T,Dc+Dr], norm_weight [Dc], cos, sin [P,Dr/2] fp32, positions, slot_mapping [T] int64, "
    "cache [pages,page,1,Dc+Dr] (rows stored)",
    reference=reference.mla_append_kv,
    allocate=lambda *args: None,
)


def mla_attention(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    softmax_scale: float,
) -> Tensor:
    """Attention of packed sequences with one rotated key shared by the heads; differentiable in q, k_nope, k_rope and v.

    o_i = softmax_j(softmax_scale * q_i . [k_nope_j ; k_rope_j]) v_j in each sequence and head. Sequences of one length run as
    one batch without reading lengths on the host; others (reference) read them.

    Args:
        q: [Tq, Hq, Dn+Dr], bf16 or fp32.
        k_nope: [Tk, Hq, Dn], may be strided.
        k_rope: [Tk, Dr].
        v: [Tk, Hq, Dv], may be strided.
        cu_seqlens_q, cu_seqlens_k: int32 [n+1], where each sequence's queries and keys begin.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths; Tq = n * max_seqlen_q means that all are equal.
        causal: bottom-right: the last query of a sequence sees its last key.
        softmax_scale: factor on the scores.

    Returns:
        [Tq, Hq, Dv] of q's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    shapes = tuple(q.shape), tuple(k_nope.shape), tuple(k_rope.shape), tuple(v.shape)
    if [len(s) for s in shapes] != [3, 3, 2, 3] or q.shape[2] != k_nope.shape[2] + k_rope.shape[1]:
        raise ValueError(
            f"mla_attention: expected q (Tq,H,Dn+Dr), k_nope (Tk,H,Dn), k_rope (Tk,Dr), v (Tk,H,Dv), got {shapes}"
        )
    return reference.mla_attention(
        q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
    )


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention over the paged latent cache; not differentiable.

    Args:
        q: [B, S, Hq, Dc+Dr]: q_nope times W_uk, then the rotated part.
        cache: [pages, page, 1, Dc+Dr].
        block_table: int32 [B, W], the pages of each sequence; entries past its length are not used.
        seq_lens: int32 [B], including the S new tokens, which are stored already. Length 0 gives out 0, lse -inf.
        softmax_scale: factor on the scores.
        kv_lora_rank: Dc, the columns of a cached row that are values.
        causal: token s of S sees seq_lens - S + s + 1 keys; False: all.

    Returns:
        out [B, S, Hq, Dc] of q's dtype, and the natural-log lse fp32 [B, Hq, S].

    Raises:
        ValueError: shapes that do not fit.
    """
    if (
        q.dim() != 4
        or cache.dim() != 4
        or cache.shape[2] != 1
        or q.shape[3] != cache.shape[3]
        or block_table.dim() != 2
    ):
        found = f"{tuple(q.shape)}, {tuple(cache.shape)} and {tuple(block_table.shape)}"
        raise ValueError(f"mla_decode: expected q (B,S,H,D), cache (pages,page,1,D) and block_table (B,W), got {found}")
    return torch.ops.dsv3.mla_decode(q, cache, block_table, seq_lens, softmax_scale, kv_lora_rank, causal)


def mla_append_kv(
    kv_a: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    *,
    eps: float = 1e-6,
) -> None:
    """Normalises, rotates and stores one latent row a token in the paged cache, in place.

    Args:
        kv_a: [T, Dc+Dr], the output of the kv_a projection.
        norm_weight: [Dc] of the latent's RMSNorm.
        cos, sin: fp32 [max_positions, Dr/2].
        positions: int64 [T].
        slot_mapping: int64 [T], row of the cache seen as [pages*page, Dc+Dr]; -1 stores nothing.
        cache: [pages, page, 1, Dc+Dr], modified.
        eps: of the RMSNorm.

    Raises:
        ValueError: shapes that do not fit.
    """
    if kv_a.dim() != 2 or cache.dim() != 4 or kv_a.shape[1] != cache.shape[3] or slot_mapping.shape != kv_a.shape[:1]:
        found = f"{tuple(kv_a.shape)}, {tuple(cache.shape)} and {tuple(slot_mapping.shape)}"
        raise ValueError(
            f"mla_append_kv: expected kv_a (T,D), cache (pages,page,1,D) and slot_mapping (T,), got {found}"
        )
    torch.ops.dsv3.mla_append_kv(kv_a, norm_weight, cos, sin, positions, slot_mapping, cache, eps)
