"""Absorbed multi-head latent attention over the paged cache (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops import registry
from dsv3.ops.registry import define
from dsv3.reference import attention as reference

LATENT, ROPE, PAGES = 512, 64, (16, 32, 64, 128)  # what the native kernels take
MAX_QUERY = 2048  # kMaxQuery (csrc/attention/mla_append_kv.cu)
BLOCK_ROWS, INVARIANT_KEYS = 64, 1024  # kBlockRows; kInvariantTiles tiles (csrc/attention/schedule.cuh)


def _workers(seq_lens: Tensor, steps: int, heads: int) -> tuple[int, int, int]:
    """As csrc/attention/schedule.cuh has it: blocks of a cluster, clusters, sequences (groups of rows counted apart)."""
    cluster = 2 if steps * heads > BLOCK_ROWS else 1
    multiprocessors = registry.sm_count(seq_lens.device) if seq_lens.is_cuda else cluster
    return cluster, multiprocessors // cluster, seq_lens.shape[0] * -(-steps * heads // (BLOCK_ROWS * cluster))


def _schedule_size(seq_lens: Tensor, steps: int, heads: int) -> int:
    _, workers, sequences = _workers(seq_lens, steps, heads)
    return 4 + 3 * (workers + 1) + 2 * sequences + 1


def _allocate_schedule(seq_lens: Tensor, steps: int, heads: int, batch_invariant: bool) -> Tensor:
    return seq_lens.new_empty(_schedule_size(seq_lens, steps, heads), dtype=torch.int32)


def _allocate_decode(
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
    batch, steps, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, steps, heads, kv_lora_rank), q.new_empty(batch, heads, steps, dtype=wide)


def _supports_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    schedule: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    *flags: bool,
) -> str | None:
    if kv_lora_rank != LATENT or q.shape[3] != LATENT + ROPE:
        return f"rows are of {kv_lora_rank} + {q.shape[3] - kv_lora_rank} columns, not {LATENT} + {ROPE}"
    if cache.shape[1] not in PAGES:
        return f"a page has {cache.shape[1]} rows"
    if cache.shape[0] == 0 or softmax_scale <= 0:
        return "the cache is empty" if cache.shape[0] == 0 else f"softmax_scale is {softmax_scale}"
    return registry.check_dtype("q", q, torch.bfloat16) or registry.check_dtype(
        "cache", cache, torch.bfloat16, torch.uint8
    )


def _launch_decode(
    outputs: tuple[Tensor, Tensor],
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    schedule: Tensor | None,
    softmax_scale: float,
    kv_lora_rank: int,
    causal: bool,
    batch_invariant: bool,
) -> None:
    steps, heads = q.shape[1:3]
    cluster, workers, sequences = _workers(seq_lens, steps, heads)
    if schedule is None:
        schedule = _allocate_schedule(seq_lens, steps, heads, batch_invariant)
        registry.native().mla_schedule(schedule, seq_lens, steps, heads, batch_invariant)
    keys = block_table.shape[1] * cache.shape[1]
    partials = max(1, sequences * -(-keys // INVARIANT_KEYS)) if batch_invariant else 2 * workers
    partial = q.new_empty(partials, cluster * BLOCK_ROWS, LATENT, dtype=torch.float32)
    partial_lse = q.new_empty(partials, cluster * BLOCK_ROWS, dtype=torch.float32)
    registry.native().mla_decode(
        *outputs, partial, partial_lse, q, cache, block_table, seq_lens, schedule, softmax_scale, causal
    )


define(
    "mla_schedule(Tensor seq_lens, int steps, int heads, bool batch_invariant) -> Tensor",
    shapes="seq_lens [B] int32 -> int32 of a size that depends on B, steps * heads and the device",
    reference=lambda *args: _allocate_schedule(*args).zero_(),  # there the keys of a sequence are not divided
    allocate=_allocate_schedule,
    launch=lambda out, *args: registry.native().mla_schedule(out, *args),
)
define(
    "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor seq_lens, Tensor? schedule, float softmax_scale, "
    "int kv_lora_rank, bool causal, bool batch_invariant) -> (Tensor, Tensor)",
    shapes="q [B,S,Hq,Dc+Dr], cache [pages,page,1,Dc+Dr] or uint8 [pages,page,1,656], block_table [B,W], seq_lens [B] int32 -> "
    "out [B,S,Hq,Dc], lse [B,Hq,S] fp32; native: q bf16, cache bf16|uint8, Dc 512, Dr 64, pages of 16, 32, 64, 128; "
    "reference: any",
    reference=reference.mla_decode,
    allocate=_allocate_decode,
    launch=_launch_decode,
    supports=_supports_decode,
)


def _supports_append(
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
) -> str | None:
    if norm_weight.shape[0] != LATENT or kv_a.shape[1] != LATENT + ROPE:
        return f"rows are of {norm_weight.shape[0]} + {kv_a.shape[1] - norm_weight.shape[0]} columns, not {LATENT} + {ROPE}"
    return (
        registry.check_dtype("kv_a", kv_a, torch.bfloat16)
        or registry.check_dtype("norm_weight", norm_weight, torch.bfloat16, torch.float32)
        or registry.check_dtype("cos", cos, torch.float32)
        or registry.check_dtype("cache", cache, torch.bfloat16, torch.uint8)
        or _supports_queries(q_a, q_a_norm_weight, norm_weight)
    )


def _supports_queries(q_a: Tensor | None, weight: Tensor | None, latent_weight: Tensor) -> str | None:
    if q_a is None or weight is None:
        return None
    if q_a.shape[1] % 8 or q_a.shape[1] > MAX_QUERY:
        return f"q_a has {q_a.shape[1]} columns, not a multiple of 8 up to {MAX_QUERY}"
    return registry.check_dtype("q_a", q_a, torch.bfloat16) or registry.check_dtype(
        "q_a_norm_weight", weight, latent_weight.dtype
    )


def _launch_append(_: None, kv_a: Tensor, *args: Any) -> None:
    *others, cache, eps, q_a, q_a_norm_weight = args
    if kv_a.stride(1) != 1 or kv_a.stride(0) % 8 or kv_a.data_ptr() % 16:  # it is read by 16 bytes
        kv_a = kv_a.contiguous()
    registry.native().mla_append_kv(cache, kv_a, *others, q_a, q_a_norm_weight, eps)


define(
    "mla_append_kv(Tensor kv_a, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions, Tensor slot_mapping, "
    "Tensor(a!) cache, float eps, Tensor(b!)? q_a, Tensor? q_a_norm_weight) -> ()",
    shapes="kv_a [T,Dc+Dr], norm_weight [Dc], cos, sin [P,Dr/2] fp32, positions, slot_mapping [T] int64, "
    "cache [pages,page,1,Dc+Dr] or uint8 [pages,page,1,656] (rows stored), q_a [T,R] (normalised), q_a_norm_weight [R]; "
    "native: kv_a, q_a bf16, Dc 512, Dr 64, R up to 2048, cache bf16|uint8",
    reference=reference.mla_append_kv,
    allocate=lambda *args: None,
    launch=_launch_append,
    supports=_supports_append,
)


def mla_schedule(seq_lens: Tensor, s_q: int, heads: int, *, batch_invariant: bool = False) -> Tensor:
    """How `mla_decode` divides the keys of a batch among the multiprocessors; made once a step, for all layers.

    Args:
        seq_lens: int32 [B], including the new tokens.
        s_q: new tokens a sequence.
        heads: query heads.
        batch_invariant: as of mla_decode, which must get the same.

    Returns:
        int32 of a size that depends on B, s_q * heads and the device, not on the lengths: a captured graph that makes it
        anew serves any lengths. What it holds is csrc/attention/schedule.cuh's.

    Raises:
        ValueError: seq_lens that are not int32 [B], s_q or heads below 1.
    """
    if seq_lens.dim() != 1 or seq_lens.dtype != torch.int32:
        raise ValueError(f"mla_schedule: expected seq_lens int32 (B,), got {seq_lens.dtype} {tuple(seq_lens.shape)}")
    if s_q < 1 or heads < 1:
        raise ValueError(f"mla_schedule: expected s_q and heads of at least 1, got {s_q} and {heads}")
    schedule = torch.ops.dsv3.mla_schedule(seq_lens.contiguous(), s_q, heads, batch_invariant)
    schedule.batch_invariant = batch_invariant  # both kinds have one size: mla_decode takes no other than it was told
    return schedule


def mla_decode(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    softmax_scale: float,
    kv_lora_rank: int = LATENT,
    causal: bool = True,
    schedule: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention over the paged latent cache; not differentiable.

    From an FP8 cache the native kernel multiplies codes times relative scales in fp16: exactly what they mean where a key's
    scales lie within 2^15 of its largest and, of the values, within 2^18 of the largest so far of the same 128 columns; what is
    2^-25 of those does not count.

    Args:
        q: [B, S, Hq, Dc+Dr]: q_nope times W_uk, then the part that rope_ has rotated in interleaved pairs.
        cache: [pages, page, 1, Dc+Dr] of q's dtype, or uint8 [pages, page, 1, 656] as mla_append_kv fills it (Dc 512,
            Dr 64): 512 e4m3, 4 fp32 power-of-two scales, 64 bf16. Rows of 576 or 656 come in pages of 16, 32, 64 or 128.
        block_table: int32 [B, W], the pages of each sequence; entries past its length are not used.
        seq_lens: int32 [B], including the S new tokens, which are stored already. Length 0 gives out 0, lse -inf; what is
            negative counts as 0.
        softmax_scale: factor on the scores, before lse.
        kv_lora_rank: Dc, the columns of a cached row that are values.
        causal: token s of S sees seq_lens - S + s + 1 keys; False: all.
        schedule: of mla_schedule(seq_lens, S, Hq, batch_invariant=...), which layers of a step can share; None: made here.
        batch_invariant: the order of sums of a token does not depend on the other sequences nor on S: keys are taken in
            pieces of 1024 from the beginning. Otherwise they are divided so that all multiprocessors have as much to do.

    Returns:
        out [B, S, Hq, Dc] of q's dtype, and the natural-log lse fp32 [B, Hq, S].

    Raises:
        ValueError: shapes or dtypes that do not fit, integers that are not int32, a cache that is not contiguous.
        RuntimeError: a page within a length that the pool does not have, a length beyond the table; on a CPU at once, on a
            GPU at the next native call of any op, since no call waits for the device.
    """
    found = f"{tuple(q.shape)}, {cache.dtype} {tuple(cache.shape)} and {tuple(block_table.shape)}"
    fp8 = cache.dtype == torch.uint8
    width = reference.FP8_ROW if fp8 else q.shape[-1]
    if q.dim() != 4 or block_table.dim() != 2 or cache.dim() != 4 or tuple(cache.shape[2:]) != (1, width):
        wanted = "q (B,S,H,D), cache (pages,page,1,D), or uint8 (pages,page,1,656), and block_table (B,W)"
        raise ValueError(f"mla_decode: expected {wanted}, got {found}")
    if not 1 <= kv_lora_rank <= q.shape[3]:
        raise ValueError(f"mla_decode: expected kv_lora_rank from 1 to D, got {kv_lora_rank} and {found}")
    if len({t.device for t in (q, cache, block_table, seq_lens)}) > 1:
        where = ", ".join(str(t.device) for t in (q, cache, block_table, seq_lens))
        raise ValueError(f"mla_decode: expected q, cache, block_table and seq_lens on one device, got {where}")
    if fp8 and (q.shape[3], kv_lora_rank) != (LATENT + ROPE, LATENT):
        raise ValueError(
            f"mla_decode: expected q of {LATENT + ROPE} columns, {LATENT} of them values, for an FP8 cache, got {found}"
        )
    if not fp8 and cache.dtype != q.dtype:
        raise ValueError(f"mla_decode: expected a cache of q's {q.dtype}, or uint8, got {found}")
    if q.shape[3] == LATENT + ROPE and cache.shape[1] not in PAGES:
        raise ValueError(f"mla_decode: expected pages of {', '.join(map(str, PAGES))} rows, got {found}")
    if not cache.is_contiguous():
        raise ValueError(
            f"mla_decode: expected a contiguous cache, got strides {cache.stride()} of {tuple(cache.shape)}"
        )
    batch = q.shape[:1]
    if block_table.shape[:1] != batch or seq_lens.shape != batch:
        found = f"{tuple(q.shape)}, {tuple(block_table.shape)} and {tuple(seq_lens.shape)}"
        raise ValueError(f"mla_decode: expected q (B,S,H,D), block_table (B,W) and seq_lens (B,), got {found}")
    if block_table.dtype != torch.int32 or seq_lens.dtype != torch.int32:
        found = f"{block_table.dtype} and {seq_lens.dtype}"
        raise ValueError(f"mla_decode: expected block_table and seq_lens of int32, got {found}")
    if q.shape[1] < 1 or q.shape[2] < 1 or cache.shape[1] < 1:
        found = f"{tuple(q.shape)} and {tuple(cache.shape)}"
        raise ValueError(
            f"mla_decode: expected q (B,S,H,D) of at least a token and a head, and pages of rows, got {found}"
        )
    if schedule is not None:
        _check_schedule(schedule, seq_lens, q, batch_invariant)
    if block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    settings = softmax_scale, kv_lora_rank, causal, batch_invariant
    lengths = seq_lens.contiguous()
    return torch.ops.dsv3.mla_decode(q.detach().contiguous(), cache.detach(), block_table, lengths, schedule, *settings)


def _check_schedule(schedule: Tensor, seq_lens: Tensor, q: Tensor, batch_invariant: bool) -> None:
    size = _schedule_size(seq_lens, *q.shape[1:3])
    if schedule.dtype != torch.int32 or tuple(schedule.shape) != (size,) or schedule.device != seq_lens.device:
        found = f"{schedule.dtype} {tuple(schedule.shape)} on {schedule.device} beside q {tuple(q.shape)} on {q.device}"
        raise ValueError(f"mla_decode: expected a schedule of these sequences, int32 ({size},), got {found}")
    if getattr(schedule, "batch_invariant", batch_invariant) != batch_invariant:
        found = f"{not batch_invariant} and {batch_invariant}"
        raise ValueError(f"mla_decode: expected batch_invariant as of the schedule, got {found}")


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
    q_a: Tensor | None = None,
    q_a_norm_weight: Tensor | None = None,
) -> None:
    """Normalises, rotates and stores one latent row a token in the paged cache, in place; not differentiable.

    Rotation is in interleaved pairs, as in rope_.

    The row is [rmsnorm(latent) | rotated part], in the cache's dtype. An FP8 cache holds, in bytes, 512 e4m3, the fp32 scales
    of their 4 tiles of 128 (powers of two; what per_token_cast makes of the bf16 row with pow2_scale) and 64 bf16.

    Args:
        kv_a: [T, Dc+Dr], the output of the kv_a projection; may be some columns of a wider one.
        norm_weight: [Dc] of the latent's RMSNorm.
        cos, sin: fp32 [max_positions, Dr/2].
        positions: int64 [T].
        slot_mapping: int64 [T], row of the cache seen as [pages*page, Dc+Dr]; -1 stores nothing. No two tokens the same.
        cache: [pages, page, 1, Dc+Dr], or uint8 [pages, page, 1, 656] with Dc 512 and Dr 64; modified. Rows of 576 or 656 come
            in pages of 16, 32, 64 or 128.
        eps: of the RMSNorm.
        q_a: [T, R], the output of the q_a projection, contiguous; where it is given it becomes rmsnorm(q_a, q_a_norm_weight,
            eps), in the same kernel, whatever slots and positions are (but nothing where a CPU finds one wrong).
        q_a_norm_weight: [R].

    Raises:
        ValueError: shapes that do not fit, integers that are not int64, a cache or q_a that is not contiguous.
        RuntimeError, at a later call: a slot that the cache or a position that the tables do not have. Nothing is stored for
            such a token.
    """
    fp8, rank = cache.dtype == torch.uint8, norm_weight.numel()
    width = reference.FP8_ROW if fp8 else kv_a.shape[-1]
    if (
        kv_a.dim() != 2
        or cache.dim() != 4
        or cache.shape[2:] != (1, width)
        or (fp8 and (rank, kv_a.shape[1]) != (LATENT, LATENT + ROPE))
        or slot_mapping.shape != kv_a.shape[:1]
    ):
        found = f"{tuple(kv_a.shape)}, {tuple(cache.shape)} and {tuple(slot_mapping.shape)}"
        rows = f"uint8 (pages,page,1,{width}) for D = {LATENT + ROPE}" if fp8 else "(pages,page,1,D)"
        raise ValueError(f"mla_append_kv: expected kv_a (T,D), cache {rows} and slot_mapping (T,), got {found}")
    if kv_a.shape[1] == LATENT + ROPE and cache.shape[1] not in PAGES:
        found = f"{tuple(cache.shape)} beside {tuple(kv_a.shape)}"
        raise ValueError(f"mla_append_kv: expected pages of {', '.join(map(str, PAGES))} rows, got {found}")
    if norm_weight.dim() != 1 or cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] != kv_a.shape[1] - rank:
        found = ", ".join(str(tuple(t.shape)) for t in (kv_a, norm_weight, cos, sin))
        raise ValueError(
            f"mla_append_kv: expected kv_a (T,Dc+Dr), norm_weight (Dc,), cos and sin (P,Dr/2), got {found}"
        )
    if positions.shape != slot_mapping.shape or (positions.dtype, slot_mapping.dtype) != (torch.int64, torch.int64):
        found = " and ".join(f"{t.dtype} {tuple(t.shape)}" for t in (positions, slot_mapping))
        raise ValueError(f"mla_append_kv: expected positions and slot_mapping of int64 ({kv_a.shape[0]},), got {found}")
    if not (fp8 or cache.is_floating_point()):
        raise ValueError(f"mla_append_kv: expected a cache of floats or uint8, got {cache.dtype} {tuple(cache.shape)}")
    if not cache.is_contiguous():
        found = f"strides {cache.stride()} of {tuple(cache.shape)} beside {tuple(kv_a.shape)}"
        raise ValueError(f"mla_append_kv: expected a contiguous cache, got {found}")
    queries = [None if t is None else t.detach() for t in (q_a, q_a_norm_weight)]
    _check_queries(*queries, kv_a.shape[0])
    integers = positions.contiguous(), slot_mapping.contiguous()
    torch.ops.dsv3.mla_append_kv(
        kv_a.detach(), norm_weight.detach(), cos.contiguous(), sin.contiguous(), *integers, cache, eps, *queries
    )


def _check_queries(q_a: Tensor | None, weight: Tensor | None, tokens: int) -> None:
    given = [t for t in (q_a, weight) if t is not None]
    if not given:
        return
    if len(given) == 1 or weight.dim() != 1 or q_a.shape != (tokens, *weight.shape) or not q_a.is_contiguous():
        found = " and ".join("none" if t is None else f"{tuple(t.shape)} {t.stride()}" for t in (q_a, weight))
        wanted = f"a contiguous q_a ({tokens},R) and q_a_norm_weight (R,), or neither"
        raise ValueError(f"mla_append_kv: expected {wanted}, got {found}")


def mla_cached_rows(cache: Tensor, slots: Tensor) -> Tensor:
    """Latent rows as `mla_append_kv` stored them; not differentiable.

    Args:
        cache: [pages, page, 1, D] of floats, or uint8 [pages, page, 1, 656]; contiguous.
        slots: int64 [T], rows of the cache seen as [pages*page, D].

    Returns:
        [T, D] of the cache's dtype; bf16 [T, 576] from an FP8 cache, exactly what its codes and scales mean.

    Raises:
        ValueError: shapes or dtypes that do not fit, a cache that is not contiguous.
        RuntimeError: a slot that the cache does not have, on a CPU; on a GPU, and compiled, it gives a row of NaN, and nothing
            is read for it.
    """
    fp8 = cache.dtype == torch.uint8
    if cache.dim() != 4 or cache.shape[2] != 1 or (fp8 and cache.shape[3] != reference.FP8_ROW):
        wanted = f"cache (pages,page,1,D), or uint8 (pages,page,1,{reference.FP8_ROW})"
        raise ValueError(f"mla_cached_rows: expected {wanted}, got {cache.dtype} {tuple(cache.shape)}")
    if slots.dim() != 1 or slots.dtype != torch.int64:
        raise ValueError(f"mla_cached_rows: expected slots int64 (T,), got {slots.dtype} {tuple(slots.shape)}")
    if not cache.is_contiguous():
        found = f"strides {cache.stride()} of {tuple(cache.shape)}"
        raise ValueError(f"mla_cached_rows: expected a contiguous cache, got {found}")
    rows = cache.detach().view(-1, cache.shape[3])
    known = (slots >= 0) & (slots < len(rows))
    if known.is_cpu and not torch.compiler.is_compiling() and not known.all():
        token = int((~known).nonzero()[0])
        raise RuntimeError(
            f"slots must be among the {len(rows)} rows of the cache, got slots[{token}] = {int(slots[token])}"
        )
    found = rows.index_select(0, torch.where(known, slots, 0))
    found = reference.unpack_fp8_cache(found) if fp8 else found
    return found.masked_fill_(~known[:, None], torch.nan)
