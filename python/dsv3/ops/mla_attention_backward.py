"""The gradients of `mla_attention`: a primitive, which its autograd function calls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3.ops import registry
from dsv3.ops.mla_attention import NOPE, ROPE, by_heads, supports_attention
from dsv3.ops.registry import define
from dsv3.reference import attention as reference

QUERY_TILE, KEY_TILE, WARPS = 64, 128, 8  # csrc/attention/backward.cuh


def _allocate(
    dout: Tensor, q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, *settings: Tensor | int | bool | float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, nope = k_nope.shape
    return q.new_empty(q.shape), v.new_empty(tokens, heads, nope + v.shape[2]), k_rope.new_empty(k_rope.shape)


def _launch(
    outputs: tuple[Tensor, Tensor, Tensor],
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
) -> None:
    n, heads, keys = cu_seqlens_q.shape[0] - 1, q.shape[1], k_nope.shape[0]
    if (
        keys != n * max_seqlen_k
    ):  # keys behind the last sequence are one more, without queries: the kernel gives each row one
        cu_seqlens_q = torch.cat([cu_seqlens_q, cu_seqlens_q[-1:]])
        cu_seqlens_k = pad(cu_seqlens_k, (0, 1), value=keys)
        n += 1
    query_tiles, key_tiles = q.shape[0] // QUERY_TILE + n, keys // KEY_TILE + n
    longest = -(-max_seqlen_q // QUERY_TILE) + 1
    # The tiles of four times as many blocks as run at once, and four of the longest sequences: few enough for the L2 cache
    # where sequences are short, enough for no block to wait for a place.
    ring = max(longest, min(heads * query_tiles, 4 * registry.sm_count(q.device) + 4 * longest))
    sizes = ring * QUERY_TILE * (NOPE + ROPE), key_tiles * KEY_TILE * ROPE, key_tiles + ring * (2 + WARPS) + 1
    dq_sums, rope_sums, counters = q.new_zeros(sum(sizes), dtype=torch.float32).split(sizes)
    registry.native().mla_attention_backward(
        *outputs,
        q.new_empty(heads, query_tiles, 2 * QUERY_TILE, dtype=torch.float32),
        dq_sums.view(ring, QUERY_TILE * (NOPE + ROPE)),
        rope_sums.view(key_tiles, KEY_TILE * ROPE),
        counters.view(torch.int32),
        *(dout.contiguous(), q.contiguous(), by_heads(k_nope), k_rope.contiguous(), by_heads(v)),
        *(out.contiguous(), lse.contiguous(), cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()),
        *(max_seqlen_q, causal, softmax_scale, deterministic),
    )


define(
    "mla_attention_backward(Tensor dout, Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, bool causal, float softmax_scale, "
    "bool deterministic) -> (Tensor, Tensor, Tensor)",
    shapes="dout, out [Tq,Hq,Dv], lse [Hq,Tq] fp32, the rest as of mla_attention -> dq [Tq,Hq,Dn+Dr], dkv [Tk,Hq,Dn+Dv], "
    "dk_rope [Tk,Dr]; native: bf16, Dn 128, Dr 64, Dv 128; reference: any",
    reference=reference.mla_attention_backward,
    allocate=_allocate,
    launch=_launch,
    supports=lambda dout, q, k_nope, k_rope, v, *rest: (
        supports_attention(q, k_nope, k_rope, v, *rest[:-1]) or registry.check_dtype("dout", dout, torch.bfloat16)
    ),
)
