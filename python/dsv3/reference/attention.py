"""Multi-head latent attention in plain PyTorch: the specification of csrc/attention and the implementation on a CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from dsv3.reference.groups import bounds
from dsv3.reference.norm import rmsnorm
from dsv3.reference.quant import TILE, per_token_cast

# A row of an FP8 cache in bytes: the latent in e4m3, a scale (fp32) for every 128 of it, 64 rotated values in bf16.
FP8_LATENT, FP8_ROPE_AT, FP8_ROW = 512, 528, 656

SCORES = 2**26  # made at once

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
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, Dv] and natural-log lse [Hq, Tq] (fp32 or wider, not differentiable) for q [Tq, Hq, Dn+Dr],
    k_nope [Tk, Hq, Dn], k_rope [Tk, Dr] shared by the heads, v [Tk, Hq, Dv].

    Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i+1] and the keys cu_seqlens_k[i] to [i+1]; its last query sees
    its last key. A query that sees none, or is no sequence's, has out 0 and lse -inf. Sequences of one length run as a batch,
    which a GPU believes where their number and the largest length say so; otherwise a loop reads the lengths on the host.
    """
    settings = causal, softmax_scale
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], -1)
    tensors = q, k, v
    n = cu_seqlens_q.shape[0] - 1
    if n and all(map(_are_equal, (q, k), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))):
        lengths = max_seqlen_q, max_seqlen_k, max_seqlen_k
        parts = [x.view(n, m, *x.shape[1:]).transpose(1, 2) for x, m in zip(tensors, lengths, strict=True)]
        out, lse = _attend(*parts, *settings)
        out, lse = out.transpose(1, 2).reshape(-1, *v.shape[1:]), lse.transpose(0, 1).reshape(q.shape[1], -1)
        return out.contiguous(), lse.contiguous()
    ends = bounds(cu_seqlens_q, q.shape[0]), bounds(cu_seqlens_k, k.shape[0])
    rest = slice(ends[0][-1], None), slice(0, 0)  # the queries of no sequence
    slices = [[slice(a, b) for a, b in pairwise(numbers)] for numbers in ends]
    done = []
    for queries, keys in [*zip(*slices, strict=True), rest]:
        parts = [x[s].transpose(0, 1)[None] for x, s in zip(tensors, (queries, keys, keys), strict=True)]
        done.append(_attend(*parts, *settings))
    out = torch.cat([out[0].transpose(0, 1) for out, _ in done]).contiguous()
    return out, torch.cat([lse[0] for _, lse in done], -1).contiguous()


def _are_equal(rows: Tensor, cu_seqlens: Tensor, length: int) -> bool:
    """Whether all sequences are of this length and leave no row over."""
    n = cu_seqlens.shape[0] - 1
    if rows.shape[0] != n * length:
        return False
    return not rows.is_cpu or cu_seqlens.tolist() == [i * length for i in range(n + 1)]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v and its lse [B, H, S] for [B, H, S, D]; causal is bottom-right."""
    rows, columns, value_dim = q.shape[2], k.shape[2], v.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    if rows == 0 or columns == 0:
        return q @ k.mT @ v, q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    if causal and rows > columns:  # the first rows see no key
        out, lse = _attend(q[:, :, rows - columns :], k, v, causal, scale)
        return pad(out, (0, 0, rows - columns, 0)), pad(lse, (rows - columns, 0), value=-torch.inf)
    mask = None
    if causal and rows != columns:
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1)
        mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    options = {"attn_mask": mask, "scale": scale}
    is_causal = causal and mask is None
    if not q.is_cpu:
        with sdpa_kernel(CUDA_BACKENDS, set_priority=True):
            out = scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options)
        return out, _log_sum_exp(q, k, causal, scale)
    width = max(
        q.shape[3], value_dim
    )  # the fused attention of CPUs, which gives its lse, wants all as wide as each other
    q, k, v = (pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (q, k, v))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(q, k, v, 0.0, is_causal, **options)
    return out[..., :value_dim], lse


@torch.no_grad()
def _log_sum_exp(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[B, H, S], some heads at a time, since the scores of all may not fit in memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, columns = q.shape[2], k.shape[2]
    hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device).triu(columns - rows + 1) if causal else None
    heads, done = max(1, SCORES // (q.shape[0] * rows * columns)), []
    for queries, keys in zip(q.split(heads, 1), k.split(heads, 1), strict=True):
        scores = (queries.to(wide) @ keys.to(wide).mT).mul_(scale)
        done.append((scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)).logsumexp(-1))
    return torch.cat(done, 1)


def mla_merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """o [T, H, D] and lse [H, T] over all keys from those over two parts; 0 and -inf where both lse are -inf."""
    lse = torch.logaddexp(lse1, lse2)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    weights = [torch.exp(part - base).mT[..., None] for part in (lse1, lse2)]
    return (weights[0] * o1 + weights[1] * o2).to(o1.dtype).contiguous(), lse.contiguous()


def unpack_fp8_cache(cache: Tensor) -> Tensor:
    """bf16 [..., 576] of FP8 rows uint8 [..., 656]: exact, since e4m3 times a power of two is a bf16 value."""
    latent = cache[..., :FP8_LATENT].view(torch.float8_e4m3fn).float().unflatten(-1, (-1, TILE))
    sf = cache[..., FP8_LATENT:FP8_ROPE_AT].view(torch.float32)
    rope = cache[..., FP8_ROPE_AT:].view(torch.bfloat16)
    return torch.cat([(latent * sf[..., None]).flatten(-2).bfloat16(), rope], -1)


def pack_fp8_cache(rows: Tensor) -> Tensor:
    """uint8 [T, 656] of bf16 rows [T, 576]: 512 e4m3, the scales of their 4 tiles (fp32, powers of two), 64 bf16."""
    data, sf = per_token_cast(rows[:, :FP8_LATENT], pow2_scale=True, amax_floor=1e-4)
    parts = data, sf.clone(memory_format=torch.contiguous_format), rows[:, FP8_LATENT:].contiguous()
    return torch.cat([part.view(torch.uint8) for part in parts], -1)


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    schedule: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention: out [B, S, Hq, Dc] and natural-log lse fp32 [B, Hq, S] for q [B, S, Hq, Dc+Dr] over a paged cache.

    Keys are the whole cached rows, values their first Dc columns. seq_lens counts the S new tokens, which are stored already.
    Rows of the cache and entries of the table past a sequence's length are not looked at, whatever they hold; length 0 gives
    out 0 and lse -inf. An entry within a length that is no page: RuntimeError on a CPU, elsewhere that sequence gives NaN.
    `schedule` does not change the result.
    """
    batch, steps = q.shape[:2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if seq_lens.is_cpu and batch:  # as wide as the longest sequence needs: time and memory follow the table
        block_table = block_table[:, : -(-max(int(seq_lens.max()), 0) // cache.shape[1])]
    table, bad = _used_pages(block_table, seq_lens, *cache.shape[:2])
    pages = cache[table] if len(cache) else cache.new_zeros(*table.shape, *cache.shape[1:])
    if cache.dtype == torch.uint8:
        pages = unpack_fp8_cache(pages)
    kv = pages.view(batch, table.shape[1] * cache.shape[1], q.shape[3]).to(wide)
    column = torch.arange(kv.shape[1], device=q.device)
    kv = torch.where((column < seq_lens[:, None])[:, :, None], kv, 0.0)
    count = seq_lens[:, None] - (torch.arange(steps - 1, -1, -1, device=q.device) if causal else 0)
    if batch_invariant:
        out, lse = _absorbed_alone(q.to(wide), kv, count.expand(batch, steps).tolist(), softmax_scale, kv_lora_rank)
    else:
        seen = column < count.expand(batch, steps)[..., None]
        out, lse = _absorbed(q.to(wide), kv, seen, softmax_scale, kv_lora_rank)
    bad = bad[:, None, None]
    return out.to(q.dtype).masked_fill_(bad[..., None], torch.nan), lse.masked_fill_(bad, torch.nan)


def _absorbed(q: Tensor, kv: Tensor, seen: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """out [B, S, Hq, rank], lse [B, Hq, S] of q [B, S, Hq, D] and the rows kv [B, L, D], of which seen [B, S, L] count."""
    scores = torch.einsum("bshd,bkd->bhsk", q, kv) * scale
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return torch.einsum("bhsk,bkd->bshd", weights, kv[..., :rank]), lse


def _absorbed_alone(q: Tensor, kv: Tensor, counts: list[list[int]], scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """The same where token s of sequence b sees the first counts[b][s] rows: each by itself, with these rows and no others,
    so that its sums have the same order whatever is beside it."""
    out, lse = q.new_empty(*q.shape[:3], rank), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    for b, row in enumerate(counts):
        for s, n in enumerate(max(n, 0) for n in row):
            one = slice(b, b + 1), slice(s, s + 1)
            out[one], part = _absorbed(q[one], kv[one[0], :n], q.new_ones(1, 1, n).bool(), scale, rank)
            lse[one[0], :, one[1]] = part
    return out, lse


def _used_pages(block_table: Tensor, seq_lens: Tensor, pages: int, page: int) -> tuple[Tensor, Tensor]:
    """int64 [B, W+1]: the pages of every sequence, 0 for what it does not use; and which sequences name no page there. The
    last column stands for whatever the table has no entry for."""
    places = block_table.shape[1] * page
    if seq_lens.is_cpu and (seq_lens > places).any():
        row = int((seq_lens > places).nonzero()[0])
        raise RuntimeError(
            f"seq_lens must be at most the {places} keys that {block_table.shape[1]} pages a row of block_table hold, "
            f"got seq_lens[{row}] = {int(seq_lens[row])}"
        )
    table = pad(block_table.long(), (0, 1), value=-1)
    begin = torch.arange(table.shape[1], device=table.device) * page
    wrong = (begin < seq_lens[:, None]) & ((table < 0) | (table >= pages))
    if wrong.is_cpu and wrong.any():
        row, entry = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"block_table must name one of the {pages} pages for every key of a sequence, "
            f"got block_table[{row}, {entry}] = {int(table[row, entry])}"
        )
    return torch.where((begin < seq_lens[:, None]) & ~wrong, table, 0), wrong.any(-1)


def mla_append_kv(
    kv_a: Tensor,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    eps: float,
    q_a: Tensor | None,
    q_a_norm_weight: Tensor | None,
) -> None:
    """Stores token t's latent at row slot_mapping[t] of the cache [pages, page, 1, Dc+Dr]; a slot of -1 stores nothing.

    kv_a [T, Dc+Dr]: the first Dc values are normalised (RMSNorm with norm_weight [Dc]), the last Dr rotated in interleaved
    pairs by cos and sin [max_positions, Dr/2] at positions [T]. A cache of uint8 holds what pack_fp8_cache makes of the row.
    A slot or a position that there is not: RuntimeError on a CPU, elsewhere nothing is stored for the token. q_a [T, R], where
    it is given, becomes its RMSNorm.
    """
    rank = norm_weight.shape[0]
    if kv_a.shape[0] == 0:
        return
    flat = cache.view(-1, cache.shape[-1])
    keep = _storable(positions, slot_mapping, cos.shape[0], flat.shape[0])
    if q_a is not None:
        q_a.copy_(rmsnorm(q_a, None, q_a_norm_weight, eps)[0])
    if not flat.shape[0] or not cos.shape[0]:
        return
    wide = kv_a.to(torch.promote_types(kv_a.dtype, torch.float32))
    latent, rope = wide[:, :rank], wide[:, rank:]
    latent = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps) * norm_weight
    known = torch.where(keep, positions, 0)
    c, s = cos[known], sin[known]
    even, odd = rope[:, 0::2], rope[:, 1::2]
    rotated = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(1)
    row = torch.cat([latent, rotated], -1)
    row = pack_fp8_cache(row.bfloat16()) if cache.dtype == torch.uint8 else row.to(cache.dtype)
    # A skipped token repeats the first kept one (or, without any, leaves row 0 as it is): shapes do not depend on the data.
    source = torch.where(keep, torch.arange(keep.shape[0], device=keep.device), keep.int().argmax())
    slots = torch.where(keep, slot_mapping, 0)[source]
    flat[slots] = torch.where(keep.any(), row[source], flat[slots])


def _storable(positions: Tensor, slot_mapping: Tensor, max_positions: int, rows: int) -> Tensor:
    """bool [T]: which tokens have a slot and a position among those that there are."""
    used = slot_mapping != -1
    bad_slot, bad_position = (
        used & ((index < 0) | (index >= end)) for index, end in ((slot_mapping, rows), (positions, max_positions))
    )
    for bad, index, text in (
        (bad_slot, slot_mapping, f"slot_mapping must be -1 or one of the {rows} rows of the cache, got slot_mapping"),
        (bad_position, positions, f"positions must lie within the {max_positions} rows of cos and sin, got positions"),
    ):
        if bad.is_cpu and bad.any():
            token = int(bad.nonzero()[0])
            raise RuntimeError(f"{text}[{token}] = {int(index[token])}")
    return used & ~bad_slot & ~bad_position


def mla_attention_backward(
    dout: Tensor,
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [Tq, Hq, Dn+Dr], dkv [Tk, Hq, Dn+Dv] (of k_nope and of v side by side) and dk_rope [Tk, Dr], summed over the heads.

    dout and out [Tq, Hq, Dv], lse [Hq, Tq] natural-log, the rest as of mla_attention. A query that sees no key (lse -inf) has
    no part in any gradient; rows of no sequence get zeros. A head at a time; lengths are read on the host.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk_rope = torch.zeros_like(q, dtype=wide), torch.zeros_like(k_rope, dtype=wide)
    dkv = v.new_zeros(*v.shape[:2], k_nope.shape[2] + v.shape[2], dtype=wide)
    ends = bounds(cu_seqlens_q, q.shape[0]), bounds(cu_seqlens_k, k_nope.shape[0])
    slices = [[slice(a, b) for a, b in pairwise(numbers)] for numbers in ends]
    for queries, keys in zip(*slices, strict=True):
        for head in range(q.shape[1]):
            q_, o, do, v_ = (x[s, head].to(wide) for x, s in ((q, queries), (out, queries), (dout, queries), (v, keys)))
            k = torch.cat([k_nope[keys, head], k_rope[keys]], -1).to(wide)
            base = lse[head, queries, None].to(wide)
            hidden = (base == -torch.inf).expand(-1, k.shape[0])
            if causal:
                hidden = hidden | torch.ones_like(hidden).triu(k.shape[0] - q_.shape[0] + 1)
            weights = torch.exp(q_ @ k.mT * softmax_scale - base).masked_fill_(hidden, 0.0)
            dscores = weights * (do @ v_.mT - (do * o).sum(-1, keepdim=True)) * softmax_scale
            dk, dv = dscores.mT @ q_, weights.mT @ do
            dq[queries, head] = dscores @ k
            dkv[keys, head] = torch.cat([dk[:, : k_nope.shape[2]], dv], -1)
            dk_rope[keys] += dk[:, k_nope.shape[2] :]
    return dq.to(q.dtype), dkv.to(v.dtype), dk_rope.to(k_rope.dtype)
