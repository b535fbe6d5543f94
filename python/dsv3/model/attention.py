"""Multi-head latent attention: naive over whole sequences, absorbed over the paged latent cache (arXiv 2405.04434, 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dsv3 import ops
from dsv3.config import Config
from dsv3.model.layers import Linear, RMSNorm, identity, rope_tables

ATTENTION_OPS = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.dsv3.mla_attention.default,
]
LATENT_NORM_EPS = 1e-6  # fixed in the released model, whatever rms_norm_eps says


@dataclass(frozen=True)
class AttentionContext:
    """Where each of the T packed tokens stands. Training and prefill have cu_seqlens; decoding has block_table and seq_lens.

    With `slot_mapping` and a cache the tokens' latents are stored. A decode step has T = B * S tokens, S a sequence.
    """

    positions: Tensor  # int64 [T]
    cu_seqlens_q: Tensor | None = None  # int32 [n+1]
    cu_seqlens_k: Tensor | None = None  # int32 [n+1]
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    block_table: Tensor | None = None  # int32 [B, W]
    seq_lens: Tensor | None = None  # int32 [B], with the new tokens
    slot_mapping: Tensor | None = None  # int64 [T], -1: not stored
    schedule: Tensor | None = (
        None  # of ops.mla_schedule, for all layers of a decode step; None: each layer makes its own
    )

    @staticmethod
    def batch(batch: int, seq_len: int, device: torch.device | str = "cpu") -> AttentionContext:
        """`batch` whole sequences of `seq_len` tokens each."""
        positions = torch.arange(seq_len, device=device).repeat(batch)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seq_len
        return AttentionContext(positions, cu_seqlens, cu_seqlens, seq_len, seq_len)

    @staticmethod
    def packed(
        lengths: Sequence[int], device: torch.device | str = "cpu", *, slot_mapping: Tensor | None = None
    ) -> AttentionContext:
        """Whole sequences of these lengths, one after the other."""
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        longest = max(lengths)
        return AttentionContext(positions, cu_seqlens, cu_seqlens, longest, longest, slot_mapping=slot_mapping)

    @staticmethod
    def segments(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> AttentionContext:
        """Sequences bounded by cu_seqlens int [n+1], known on the device only; none is longer than max_seqlen."""
        index = torch.arange(tokens, device=cu_seqlens.device)
        start = cu_seqlens[segment_of(cu_seqlens, tokens)]
        cu_seqlens = cu_seqlens.int()
        return AttentionContext(index - start, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    @staticmethod
    def decode(block_table: Tensor, seq_lens: Tensor, slot_mapping: Tensor, steps: int = 1) -> AttentionContext:
        """`steps` new tokens for each of B sequences; seq_lens int32 [B] counts them."""
        back = torch.arange(-steps, 0, device=seq_lens.device)
        positions = (seq_lens.long()[:, None] + back).clamp(min=0).flatten()
        return AttentionContext(positions, block_table=block_table, seq_lens=seq_lens, slot_mapping=slot_mapping)


def segment_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [tokens]: the sequence that each packed token belongs to."""
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)


def _keep_attention() -> Any:
    """What a recomputed region keeps: the outputs of the attention itself."""
    return create_selective_checkpoint_contexts(ATTENTION_OPS)


class MLA(nn.Module):
    """Attention with low-rank joint compression of keys and values, and of queries where q_lora_rank is not 0.

    num_heads: local heads, config.num_attention_heads unless parallel/ splits them. With `recompute` backward makes queries,
    keys and values again from the latents, and keeps only the attention's output.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_heads: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at = {"device": device, "dtype": dtype}
        self.config, self.rope, self.softmax_scale = config, config.rope, config.softmax_scale
        self.num_heads = heads = num_heads or config.num_attention_heads
        hidden, q_rank, rank = config.hidden_size, config.q_lora_rank, config.kv_lora_rank
        if q_rank:
            self.q_a = Linear(hidden, q_rank, **at)
            self.q_a_norm = RMSNorm(q_rank, LATENT_NORM_EPS, **at)
            self.q_b = Linear(q_rank, heads * config.qk_head_dim, **at)
        else:
            self.q = Linear(hidden, heads * config.qk_head_dim, **at)
        self.kv_a = Linear(hidden, config.latent_dim, **at)
        self.kv_a_norm = RMSNorm(rank, LATENT_NORM_EPS, **at)
        self.kv_b = Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim), **at)
        self.o = Linear(heads * config.v_head_dim, hidden, **at)
        self.gather = self.reduce = identity
        self.recompute = False

    def forward(
        self, x: Tensor, ctx: AttentionContext, cache: Tensor | None = None, wgrad: ops.WgradQueue | None = None
    ) -> Tensor:
        """x [T, H] -> [T, H]; `cache` [pages, page, 1, kv_lora_rank + rope] is this layer's, written where ctx says."""
        c = self.config
        x = self.gather(x)
        q_down = self.q_a(x, wgrad) if c.q_lora_rank else x
        kv_a = self.kv_a(x, wgrad)
        if cache is not None and ctx.slot_mapping is not None:
            weight, tables = self.kv_a_norm.weight, rope_tables(self.rope, x.device)
            ops.mla_append_kv(kv_a, weight, *tables, ctx.positions, ctx.slot_mapping, cache, eps=LATENT_NORM_EPS)
        if ctx.block_table is not None:
            out = self._absorbed(self._query(q_down, ctx, wgrad), ctx, cache)
        elif self.recompute and torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": _keep_attention}
            # A view has no recipe: the region keeps its inputs as they are.
            out = checkpoint(self._naive, q_down.view_as(q_down), kv_a, ctx, wgrad, **options)
        else:
            out = self._naive(q_down, kv_a, ctx, wgrad)
        return self.reduce(self.o(out.reshape(x.shape[0], -1), wgrad, shared_input=True))

    def _query(self, q_down: Tensor, ctx: AttentionContext, wgrad: ops.WgradQueue | None) -> Tensor:
        c = self.config
        q = self.q_b(self.q_a_norm(q_down), wgrad) if c.q_lora_rank else self.q(q_down, wgrad)
        q = ops.rope_(q, *rope_tables(self.rope, q.device), ctx.positions, head_dim=c.qk_head_dim)
        return q.view(-1, self.num_heads, c.qk_head_dim)

    def _naive(self, q_down: Tensor, kv_a: Tensor, ctx: AttentionContext, wgrad: ops.WgradQueue | None) -> Tensor:
        """Keys and values of every head are made from the latents: the form for many queries a sequence."""
        c = self.config
        assert ctx.cu_seqlens_q is not None
        assert ctx.cu_seqlens_k is not None
        q = self._query(q_down, ctx, wgrad)
        latent, k_rope = kv_a.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        tables = rope_tables(self.rope, q.device)
        k_rope = ops.rope_(k_rope.clone(), *tables, ctx.positions, head_dim=c.qk_rope_head_dim)
        kv = self.kv_b(self.kv_a_norm(latent), wgrad).view(q.shape[0], self.num_heads, -1)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        lengths = ctx.cu_seqlens_q, ctx.cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k
        out, _ = ops.mla_attention(q, k_nope, k_rope, v, *lengths, softmax_scale=self.softmax_scale)
        return out

    @torch.no_grad()
    def _absorbed(self, q: Tensor, ctx: AttentionContext, cache: Tensor | None) -> Tensor:
        """W_uk moves into the queries and W_uv behind the attention, which then reads only latents: the form for decoding. Both
        products write their part of a tensor of tokens and heads, so nothing is put together or transposed after them."""
        c = self.config
        assert cache is not None
        assert ctx.block_table is not None
        assert ctx.seq_lens is not None
        kv_b = ops.dense(self.kv_b.weight, q.dtype).view(self.num_heads, -1, c.kv_lora_rank)
        w_uk, w_uv = kv_b.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        query = q.new_empty(*q.shape[:2], c.latent_dim)
        torch.bmm(q_nope.transpose(0, 1), w_uk, out=query[..., : c.kv_lora_rank].transpose(0, 1))
        query[..., c.kv_lora_rank :] = q_rope
        query = query.view(ctx.seq_lens.shape[0], -1, *query.shape[1:])
        settings = {"softmax_scale": self.softmax_scale, "kv_lora_rank": c.kv_lora_rank, "schedule": ctx.schedule}
        latent, _ = ops.mla_decode(query, cache, ctx.block_table, ctx.seq_lens, **settings)
        latent = latent.view(-1, self.num_heads, c.kv_lora_rank).transpose(0, 1)
        out = q.new_empty(*q.shape[:2], c.v_head_dim)
        torch.bmm(latent, w_uv.transpose(1, 2), out=out.transpose(0, 1))
        return out
