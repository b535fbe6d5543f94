"""What a decoding round does besides the model: where its tokens stand, and which tokens it has found."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.ops.registry import check_dtype, define, native, require_dtype
from dsv3.reference import decode as reference


def _allocate_positions(
    lengths: Tensor, active: Tensor, block_table: Tensor, first: int, steps: int, page: int, last_position: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch = lengths.shape[0]
    flat = lengths.new_empty(batch * steps)
    return flat, torch.empty_like(flat), lengths.new_empty(batch, dtype=torch.int32)


def _supports_greedy(result: Tensor, tokens: Tensor, lengths: Tensor, logits: Tensor, active: Tensor) -> str | None:
    if logits.shape[1] > 32 or logits.shape[2] % 8:
        return f"{logits.shape[1]} steps are more than 32, or a vocabulary of {logits.shape[2]} is not a multiple of 8"
    return check_dtype("logits", logits, torch.bfloat16)


define(
    "decode_positions(Tensor lengths, Tensor active, Tensor block_table, int first, int steps, int page, int last_position)"
    " -> (Tensor, Tensor, Tensor)",
    shapes="lengths, active [B] int64, block_table [B,W] int32 -> positions, slots [B*S] int64, seq_lens [B] int32",
    reference=reference.decode_positions,
    allocate=_allocate_positions,
    launch=lambda outputs, *args: native().decode_positions(*outputs, *args),
)
define(
    "greedy_round(Tensor(a!) result, Tensor(b!) tokens, Tensor(c!) lengths, Tensor logits, Tensor active) -> ()",
    shapes="result [B,S+1], tokens [B,S], lengths, active [B] int64, logits [B,S,V]; native: bf16, S <= 32, V % 8 == 0",
    reference=reference.greedy_round,
    allocate=lambda *args: None,
    launch=lambda _, *args: native().greedy_round(*args),
    supports=_supports_greedy,
)


def decode_positions(
    lengths: Tensor, active: Tensor, block_table: Tensor, *, first: int, steps: int, page: int, last_position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tokens of a decoding step stand.

    Args:
        lengths: int64 [B], tokens in the cache.
        active: int64 [B], 0 for a row without a sequence.
        block_table: int32 [B, W].
        first: of the step's positions, relative to lengths.
        steps: S, tokens a sequence.
        page: tokens a page.
        last_position: the largest that there is; what lies behind stands there too.

    Returns:
        positions int64 [B*S]; their slots in the cache int64 [B*S], -1 for rows without a sequence, negative positions and
        places behind the table; int32 [B], how many tokens each sequence has with these.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    good = lengths.dim() == 1 and active.shape == lengths.shape and block_table.dim() == 2 and block_table.shape[1] > 0
    if not good or len(block_table) != len(lengths):
        found = ", ".join(str(tuple(t.shape)) for t in (lengths, active, block_table))
        raise ValueError(f"decode_positions: expected lengths and active (B,) and block_table (B, W), got {found}")
    require_dtype("decode_positions", "tensors of int64", torch.int64, lengths, active)
    require_dtype("decode_positions", "a block_table of int32", torch.int32, block_table)
    if page < 1 or steps < 1:
        raise ValueError(f"decode_positions: expected page and steps of at least 1, got {page} and {steps}")
    table = block_table.contiguous()
    return torch.ops.dsv3.decode_positions(lengths, active, table, first, steps, page, last_position)


def greedy_round(result: Tensor, tokens: Tensor, lengths: Tensor, logits: Tensor, active: Tensor) -> None:
    """Takes the best tokens, and as many drafts as equal those before them; in place.

    Args:
        result: int64 [B, S+1], written: the best token at each of the S places, then the number of accepted drafts, a.
        tokens: int64 [B, S], the newest token and the S - 1 drafts behind it; the first becomes the last of the a + 1 new.
        lengths: int64 [B]; those of active rows grow by a + 1.
        logits: [B, S, V]; of equal ones the first is best.
        active: int64 [B].

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    shapes = [tuple(t.shape) for t in (result, tokens, lengths, active)]
    batch, steps = logits.shape[:2] if logits.dim() == 3 and min(logits.shape[1:]) > 0 else (-1, -1)
    if shapes != [(batch, steps + 1), (batch, steps), (batch,), (batch,)]:
        raise ValueError(
            f"greedy_round: expected result (B, S+1), tokens (B, S), lengths and active (B,) and logits (B, S, V), got "
            f"{shapes} and {tuple(logits.shape)}"
        )
    require_dtype("greedy_round", "tensors of int64", torch.int64, result, tokens, lengths, active)
    if not logits.is_floating_point():
        raise ValueError(f"greedy_round: expected logits of a floating dtype, got {logits.dtype}")
    torch.ops.dsv3.greedy_round(result, tokens, lengths, logits.contiguous(), active)
