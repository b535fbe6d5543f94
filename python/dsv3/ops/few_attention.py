"""Attention over the paged latent cache for few rows a sequence and short sequences: what a decoding step of few tokens has in
place of mla_decode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.registry import check_dtype, define, native
from dsv3.reference import decode as reference

ROWS_A_SEQUENCE, KEYS = 32, 4096  # kMaxRows (csrc/decode/few_attention.cu); with longer sequences mla_decode is faster
LATENT, ROPE, PAGE = 512, 64, 64


def _supports_attention(q: Tensor, cache: Tensor, *args: Any) -> str | None:
    if q.shape[1] * q.shape[2] > ROWS_A_SEQUENCE:
        return f"{q.shape[1]} steps of {q.shape[2]} heads are more than {ROWS_A_SEQUENCE} rows"
    if (q.shape[3], args[3], cache.shape[1]) != (LATENT + ROPE, LATENT, PAGE):
        return f"rows of {args[3]} of {q.shape[3]} columns in pages of {cache.shape[1]}"
    if cache.shape[0] == 0:
        return "the cache is empty"
    return check_dtype("q", q, torch.bfloat16) or check_dtype("cache", cache, torch.bfloat16)


def _launch_attention(
    out: Tensor, q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float, rank: int, static: bool
) -> None:
    batch, steps, heads, _ = q.shape
    pieces = native().few_attention_pieces(batch, block_table.shape[1])
    partial = q.new_empty(batch, pieces, steps * heads, LATENT, dtype=torch.float32)
    state = q.new_empty(batch, pieces, steps * heads, 2, dtype=torch.float32)
    native().few_attention(out, partial, state, q, cache, block_table, seq_lens, scale, static)


define(
    "few_attention(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, float softmax_scale, int kv_lora_rank, "
    "bool static_cache) -> Tensor",
    shapes="q [B,S,G,Dc+Dr], cache [pages,page,1,Dc+Dr], block_table [B,W] int32, seq_lens [B] int32 -> [B,S,G,Dc]; native: "
    "bf16, S G <= 32, Dc 512, Dr 64, pages of 64",
    reference=reference.few_attention,
    allocate=lambda q, cache, table, lengths, scale, rank, static: q.new_empty(*q.shape[:3], rank),
    launch=_launch_attention,
    supports=_supports_attention,
)


def attends_few(rows: int, tokens: int, cache: Tensor) -> bool:
    """Whether few_attention is to be preferred to mla_decode, for so many rows (steps times heads) a sequence, sequences of up
    to `tokens` and this cache. An FP8 cache is read by mla_decode alone."""
    return rows <= ROWS_A_SEQUENCE and tokens <= KEYS and cache.dtype != torch.uint8


def few_attention(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int = LATENT,
    static_cache: bool = False,
) -> Tensor:
    """Causal mla_decode for few rows a sequence and short sequences, without a schedule; not differentiable.

    A token's bits depend neither on the other sequences nor on S: what is added to what is fixed.

    Args:
        q: [B, S, G, Dc+Dr], made contiguous; native on Hopper for bf16, S * G up to 32, Dc 512, Dr 64.
        cache: [pages, page, 1, Dc+Dr] of q's dtype, contiguous; native for pages of 64.
        block_table: int32 [B, W].
        seq_lens: int32 [B], including the S new tokens, which are stored already; length 0 gives 0.
        softmax_scale: factor on the scores.
        kv_lora_rank: Dc, the columns of a cached row that are values.
        static_cache: cache, block_table and seq_lens are as `static_weights` of `few_linear` says.

    Returns:
        [B, S, G, Dc] of q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        RuntimeError: as mla_decode, for pages that there are not, and lengths beyond the table.
    """
    if (
        q.dim() != 4
        or cache.dim() != 4
        or cache.shape[2:] != (1, q.shape[3])
        or block_table.dim() != 2
        or (*block_table.shape[:1], *seq_lens.shape) != (q.shape[0], q.shape[0])
        or cache.shape[1] < 1
        or not 1 <= kv_lora_rank <= q.shape[3]
    ):
        found = ", ".join(str(tuple(t.shape)) for t in (q, cache, block_table, seq_lens))
        raise ValueError(
            "few_attention: expected q (B, S, G, D), cache (pages, page, 1, D), block_table (B, W), seq_lens (B,) and "
            f"kv_lora_rank in 1..D, got {found} and {kv_lora_rank}"
        )
    if cache.dtype != q.dtype or (block_table.dtype, seq_lens.dtype) != (torch.int32, torch.int32):
        found = ", ".join(str(t.dtype).removeprefix("torch.") for t in (q, cache, block_table, seq_lens))
        raise ValueError(
            f"few_attention: expected a cache of q's dtype and int32 block_table and seq_lens, got {found}"
        )
    if not cache.is_contiguous():
        raise ValueError(f"few_attention: expected a contiguous cache, got strides {cache.stride()}")
    table, lengths = (t if t.stride(-1) == 1 else t.contiguous() for t in (block_table, seq_lens))
    settings = softmax_scale, kv_lora_rank, static_cache and table is block_table and lengths is seq_lens
    return torch.ops.dsv3.few_attention(q.detach().contiguous(), cache.detach(), table, lengths, *settings)
