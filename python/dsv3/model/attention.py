"""Multi-head latent attention (arXiv 2405.04434, 2.1): naive over whole sequences, and over what a paged latent cache holds
before them, chunk by chunk; absorbed over the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dsv3 import ops
from dsv3.config import Config
from dsv3.model.layers import Linear, RMSNorm, identity, rope_tables
from dsv3.reference.groups import group_of

ATTENTION_OPS = [
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.dsv3.mla_attention.default,
]
LATENT_NORM_EPS = 1e-6  # fixed in the released model, whatever rms_norm_eps says


@dataclass(frozen=True)
class CachedChunk:
    """K cached tokens that n sequences of a prefill attend to: those of a sequence beside each other, maybe not all it has."""

    slots: Tensor  # int64 [K], rows of the cache
    cu_seqlens: Tensor  # int32 [n+1]
    max_seqlen: int


@dataclass(frozen=True)
class AttentionContext:
    """Where each of the T packed tokens stands. Training and prefill have cu_seqlens; decoding has block_table and seq_lens.

    With `slot_mapping` and a cache the tokens' latents are stored. A decode step has T = B * S tokens, S a sequence.
    cu_seqlens_k counts the new tokens alone: what a prefill finds in the cache before them is in `cached`.
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
    cached: tuple[CachedChunk, ...] = ()
    max_context: int = 0  # of a decode step: tokens that a sequence may ever have; 0: as many as block_table has places
    max_tokens: int = 0  # the most that any decode step of these sequences may have; 0: as many as this one
    balanced: bool = False  # gates sum up what the balance loss is made of, for each sequence of cu_seqlens_q

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
        start = cu_seqlens[group_of(cu_seqlens, tokens)]
        cu_seqlens = cu_seqlens.int()
        return AttentionContext(index - start, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    @staticmethod
    def prefill(
        lengths: Sequence[int], cached: Sequence[int], block_table: Tensor, page: int, *, chunk: int
    ) -> AttentionContext:
        """New tokens of n sequences, to be stored behind the tokens that the cache holds of each. Made once, for all layers,
        without a look at the device; not for training, since the cache is a constant.

        Args:
            lengths: n numbers of new tokens, which come packed; may be 0.
            cached: n numbers of tokens in the cache, where positions go on; may be 0.
            block_table: int32 [n, W], the pages of each sequence; entries past the new tokens are not used.
            page: tokens a page.
            chunk: cached tokens, of all sequences together, whose keys and values exist at a time.

        Raises:
            ValueError: counts that differ or are negative, no sequence, more tokens than the table has places, no chunk.
        """
        places = block_table.shape[1] * page
        if not 0 < len(lengths) == len(cached) == len(block_table) or min(*lengths, *cached) < 0:
            found = f"{list(lengths)}, {list(cached)} and {tuple(block_table.shape)}"
            raise ValueError(
                f"expected lengths and cached tokens of the n sequences of block_table (n, W), got {found}"
            )
        ends = [n + m for n, m in zip(cached, lengths, strict=True)]
        if max(ends) > places:
            raise ValueError(f"expected at most the {places} tokens of a row of block_table, got {max(ends)}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        positions, slots = _places(cached, ends, block_table, page)
        _, past = _places([0] * len(cached), cached, block_table, page)
        chunks, cu_cached = [], [0, *accumulate(cached)]
        for begin in range(0, len(past), chunk):
            cu_seqlens = [min(max(n - begin, 0), chunk) for n in cu_cached]
            longest = max(b - a for a, b in pairwise(cu_seqlens))
            offsets = torch.tensor(cu_seqlens, dtype=torch.int32).to(block_table.device)
            chunks.append(CachedChunk(past[begin : begin + chunk], offsets, longest))
        new = AttentionContext.packed(lengths, block_table.device, slot_mapping=slots)
        return replace(new, positions=positions, cached=tuple(chunks))

    @staticmethod
    def decode(block_table: Tensor, seq_lens: Tensor, slot_mapping: Tensor, steps: int = 1) -> AttentionContext:
        """`steps` new tokens for each of B sequences; seq_lens int32 [B] counts them."""
        back = torch.arange(-steps, 0, device=seq_lens.device)
        positions = (seq_lens.long()[:, None] + back).clamp(min=0).flatten()
        return AttentionContext(positions, block_table=block_table, seq_lens=seq_lens, slot_mapping=slot_mapping)


def _places(begins: Sequence[int], ends: Sequence[int], block_table: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """int64 [T]: positions begins[i] to ends[i] - 1 of every sequence i, packed, and the rows of the cache that hold them."""
    spans = [torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
    row = torch.cat([torch.full_like(span, i) for i, span in enumerate(spans)]).to(block_table.device)
    positions = torch.cat(spans).to(block_table.device)
    return positions, block_table[row, positions // page].long() * page + positions % page


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
        self._dense_kv_b: Tensor | None = None  # of a Quantized kv_b, for the absorbed form
        self._dense_of: tuple[ops.Quantized | None, tuple[int | None, ...]] = (None, ())  # and its versions

    def forward(
        self, x: Tensor, ctx: AttentionContext, cache: Tensor | None = None, wgrad: ops.WgradQueue | None = None
    ) -> Tensor:
        """x [T, H] -> [T, H]; `cache` [pages, page, 1, kv_lora_rank + rope], or the FP8 form of mla_append_kv, is this layer's,
        written and read where ctx says."""
        c = self.config
        x = self.gather(x)
        q_down = self.q_a(x, wgrad) if c.q_lora_rank else x
        kv_a = self.kv_a(x, wgrad)
        if cache is not None and ctx.slot_mapping is not None:
            weight, tables = self.kv_a_norm.weight, rope_tables(self.rope, x.device)
            ops.mla_append_kv(kv_a, weight, *tables, ctx.positions, ctx.slot_mapping, cache, eps=LATENT_NORM_EPS)
        if ctx.block_table is not None and len(x) <= ops.FEW_TOKENS and not torch.is_grad_enabled():
            out = self.absorbed_few(self._unrotated(q_down, wgrad), ctx, cache)
        elif ctx.block_table is not None:
            out = self._absorbed(self._query(q_down, ctx, wgrad), ctx, cache)
        elif self.recompute and torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": _keep_attention}
            # A view has no recipe: the region keeps its inputs as they are.
            out = checkpoint(self._naive, q_down.view_as(q_down), kv_a, ctx, cache, wgrad, **options)
        else:
            out = self._naive(q_down, kv_a, ctx, cache, wgrad)
        return self.reduce(self.o(out.flatten(1), wgrad, shared_input=True))

    def _unrotated(self, q_down: Tensor, wgrad: ops.WgradQueue | None) -> Tensor:
        return self.q_b(self.q_a_norm(q_down), wgrad) if self.config.q_lora_rank else self.q(q_down, wgrad)

    def _query(self, q_down: Tensor, ctx: AttentionContext, wgrad: ops.WgradQueue | None) -> Tensor:
        c = self.config
        q = self._unrotated(q_down, wgrad)
        q = ops.rope_(q, *rope_tables(self.rope, q.device), ctx.positions, head_dim=c.qk_head_dim)
        return q.view(-1, self.num_heads, c.qk_head_dim)

    def _naive(
        self, q_down: Tensor, kv_a: Tensor, ctx: AttentionContext, cache: Tensor | None, wgrad: ops.WgradQueue | None
    ) -> Tensor:
        """Keys and values of every head are made from the latents: the form for many queries a sequence."""
        c = self.config
        assert ctx.cu_seqlens_q is not None
        assert ctx.cu_seqlens_k is not None
        q = self._query(q_down, ctx, wgrad)
        latent, k_rope = kv_a.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        tables = rope_tables(self.rope, q.device)
        k_rope = ops.rope_(k_rope.clone(), *tables, ctx.positions, head_dim=c.qk_rope_head_dim)
        lengths = ctx.cu_seqlens_q, ctx.cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k
        out, lse = self._attend(q, self.kv_a_norm(latent), k_rope, lengths, wgrad=wgrad)
        for chunk in ctx.cached:
            out, lse = ops.mla_merge(out, lse, *self._attend_cached(q, ctx, chunk, cache))
        return out

    def _attend(
        self,
        q: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        lengths: tuple[Tensor, Tensor, int, int],
        *,
        causal: bool = True,
        wgrad: ops.WgradQueue | None = None,
    ) -> tuple[Tensor, Tensor]:
        """mla_attention of q [Tq, heads, D] to the latents [Tk, kv_lora_rank] after their norm and keys [Tk, rope] rotated."""
        c = self.config
        kv = self.kv_b(latent, wgrad).view(-1, self.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        k_nope, v = ops.split_kv(kv, c.qk_nope_head_dim)
        return ops.mla_attention(q, k_nope, k_rope, v, *lengths, causal=causal, softmax_scale=self.softmax_scale)

    @torch.no_grad()
    def _attend_cached(
        self, q: Tensor, ctx: AttentionContext, chunk: CachedChunk, cache: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same for a chunk of the cache, which holds latents normalised and keys rotated; all lie before the queries."""
        c = self.config
        assert cache is not None
        rows = ops.mla_cached_rows(cache, chunk.slots).to(q.dtype)
        lengths = ctx.cu_seqlens_q, chunk.cu_seqlens, ctx.max_seqlen_q, chunk.max_seqlen
        return self._attend(q, *rows.split([c.kv_lora_rank, c.qk_rope_head_dim], -1), lengths, causal=False)

    def attends_few(self, steps: int, ctx: AttentionContext, cache: Tensor) -> bool:
        """Whether ops.few_attention is to be taken for so many queries a sequence, rather than ops.mla_decode. As many as the
        model can draft count in any case, and not this step's lengths, so that the same kernel takes a token whether it was
        drafted or not, and whatever is beside it."""
        assert ctx.block_table is not None
        depth = self.config.num_nextn_predict_layers
        rows = self.num_heads * max(steps, 1 + depth, 2 * depth)
        return ops.attends_few(rows, ctx.max_context or ctx.block_table.shape[1] * cache.shape[1], cache)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MLA:
        self._dense_kv_b = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_dense_kv_b": None}  # a copy makes its own

    @torch.inference_mode(False)  # what an engine makes first must serve others too
    @torch.no_grad()
    def _dequantized(self, weight: ops.Quantized, dtype: torch.dtype) -> Tensor:
        """kv_b's weight, dequantised once and kept so beside it; where torch has changed it since, again and in place, so that
        graphs find it."""
        kept, (made_of, versions) = self._dense_kv_b, self._dense_of
        if kept is None or made_of is not weight or kept.dtype != dtype:
            kept = self._dense_kv_b = weight.dequantize(dtype)
        elif versions != weight.versions:
            kept.copy_(weight.dequantize(dtype))
        self._dense_of = weight, weight.versions
        return kept

    def up_projections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_uk [heads, nope, kv_lora_rank] and W_uv [heads, v, kv_lora_rank] for the absorbed form, as graphs of it may keep
        them while kv_b's weight stays where it is."""
        c, weight = self.config, self.kv_b.weight
        if isinstance(weight, ops.Quantized):
            weight = self._dequantized(weight, dtype)
        w_uk, w_uv = weight.view(self.num_heads, -1, c.kv_lora_rank).split([c.qk_nope_head_dim, c.v_head_dim], 1)
        return w_uk, w_uv

    @torch.no_grad()
    def absorbed_few(self, q: Tensor, ctx: AttentionContext, cache: Tensor | None) -> Tensor:
        """The same as `_absorbed` in the kernels for few tokens, of queries [T, heads * D] that are not rotated."""
        c, tables = self.config, rope_tables(self.rope, q.device)
        assert cache is not None
        assert ctx.block_table is not None
        assert ctx.seq_lens is not None
        w_uk, w_uv = self.up_projections(q.dtype)
        q = ops.mla_absorb(q.view(-1, self.num_heads, c.qk_head_dim), w_uk, *tables, ctx.positions, static_weights=True)
        q = q.view(ctx.seq_lens.shape[0], -1, self.num_heads, c.latent_dim)
        keys = cache, ctx.block_table, ctx.seq_lens
        settings = {"softmax_scale": self.softmax_scale, "kv_lora_rank": c.kv_lora_rank}
        if self.attends_few(q.shape[1], ctx, cache):
            latent = ops.few_attention(q, *keys, static_cache=True, **settings)
        else:
            settings |= {"schedule": ctx.schedule, "batch_invariant": ops.is_batch_invariant()}
            latent, _ = ops.mla_decode(q, *keys, **settings)
        return ops.few_heads(latent.view(-1, self.num_heads, c.kv_lora_rank), w_uv, static_weights=True)

    @torch.no_grad()
    def _absorbed(self, q: Tensor, ctx: AttentionContext, cache: Tensor | None) -> Tensor:
        """W_uk moves into the queries and W_uv behind the attention, which then reads only latents: the form for decoding. Both
        products write their part of a tensor of tokens and heads, so nothing is put together or transposed after them."""
        c = self.config
        assert cache is not None
        assert ctx.block_table is not None
        assert ctx.seq_lens is not None
        w_uk, w_uv = self.up_projections(q.dtype)
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
