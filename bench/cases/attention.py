"""csrc/attention: decoding over the paged latent cache, its schedule, and what stores a token in the cache, in bf16 and FP8.

The shapes of decoding are those of FlashMLA's published figures and of tensor-parallel ranks. A schedule (FlashMLA: its
metadata) is made once a step and shared by all layers, so it is prepared outside the timed part, and timed by itself.
"""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Baseline, Case
from dsv3 import ops
from dsv3.ops import registry
from dsv3.reference import attention as reference

BF16 = torch.bfloat16
LATENT, ROPE, PAGE = 512, 64, 64
WIDTH = LATENT + ROPE
ROW_BYTES = {"bf16": 2 * WIDTH, "fp8": reference.FP8_ROW}
SCALE, EPS = 192**-0.5, 1e-6
SHAPES = [
    *((batch, 1, 128, 4096) for batch in (1, 4, 16, 64)),
    *((128, 1, 128, s_k) for s_k in (1024, 4096, 8192)),
    (64, 1, 128, 16384),
    (128, 2, 128, 4096),
    (128, 1, 64, 4096),
    (128, 1, 16, 4096),
    (32, 1, 16, 4096),
    (64, 1, 16, 8192),
]  # batch, s_q, heads, s_k
FP8_SHAPES = [
    (16, 1, 128, 4096),
    (128, 1, 128, 4096),
    (64, 1, 128, 16384),
    (128, 1, 64, 4096),
    (128, 1, 16, 4096),
    (32, 1, 16, 4096),
    (64, 1, 16, 8192),
]
VARLEN = [(128, 1, 128, 4096), (128, 1, 16, 4096)]
TORCH_TOKENS = 16 * 4096  # the reference makes fp32 copies of all keys: it takes part up to so many
POSITIONS = 4096  # rows of cos and sin


def draw_lengths(batch: int, s_k: int) -> list[int]:
    """Lengths N(s_k, s_k / 2) between 1 and 2 s_k, the same ones every time, with the total batch * s_k."""
    generator = random.Random(batch * s_k)
    lengths = [max(1, min(2 * s_k, round(generator.gauss(s_k, s_k / 2)))) for _ in range(batch)]
    rest = batch * s_k - sum(lengths)
    for i, length in enumerate(lengths):  # each takes its part of what is missing, within the same bounds
        change = max(1 - length, min(2 * s_k - length, round(rest / (batch - i))))
        lengths[i] += change
        rest -= change
    return lengths


def _small(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).div_(10).clamp_(-1, 1).to(BF16)


# ---- decoding ----
def _decode_inputs(lengths: list[int], s_q: int, heads: int, kv: str, device: torch.device) -> tuple[Tensor, ...]:
    """q, a cache whose pages lie in random order, block table, lengths, schedule; for a cache in FP8 also its values in bf16,
    for the peers."""
    counts = [-(-length // PAGE) for length in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, pages in zip(table, torch.randperm(sum(counts)).split(counts), strict=True):
        row[: len(pages)] = pages
    rows = torch.cat([_small(count * PAGE, WIDTH, device=device) for count in counts])
    q = _small(len(lengths), s_q, heads, WIDTH, device=device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    schedule = ops.mla_schedule(seq_lens, s_q, heads)
    others = table.to(device), seq_lens, schedule
    if kv == "bf16":
        return q, rows.view(-1, PAGE, 1, WIDTH), *others
    packed = torch.cat([reference.pack_fp8_cache(part) for part in rows.split(TORCH_TOKENS)])
    for part, to in zip(packed.split(TORCH_TOKENS), rows.split(TORCH_TOKENS), strict=True):
        to.copy_(reference.unpack_fp8_cache(part))
    return q, packed.view(-1, PAGE, 1, reference.FP8_ROW), *others, rows.view(-1, PAGE, 1, WIDTH)


def _decode(q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, schedule: Tensor, _: Tensor | None = None):
    return torch.ops.dsv3.mla_decode(q, cache, table, seq_lens, schedule, SCALE, LATENT, True, False)


def _decode_bf16(q: Tensor, _: Tensor, table: Tensor, seq_lens: Tensor, schedule: Tensor, values: Tensor):
    return _decode(q, values, table, seq_lens, schedule)


def _has_flash_mla() -> bool:
    hopper = torch.cuda.is_available() and registry.is_hopper(torch.device("cuda", torch.cuda.current_device()))
    return hopper and importlib.util.find_spec("flash_mla") is not None


def _flash_mla(
    q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, _: Tensor, values: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """Newer releases fill the metadata in the first call, which is not timed either. Its dense decoding takes bf16 alone."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    metadata, splits = get_mla_metadata(seq_lens, q.shape[1] * q.shape[2], 1)
    settings = {"softmax_scale": SCALE, "causal": True}
    cache = cache if values is None else values
    return lambda: flash_mla_with_kvcache(q, cache, table, seq_lens, LATENT, metadata, splits, **settings)


def _decode_peers(tokens: int, kv: str) -> dict[str, Baseline]:
    found: dict[str, Baseline] = {}
    if tokens <= TORCH_TOKENS:
        found["torch"] = Baseline(lambda *inputs: reference.mla_decode(*inputs[:5], SCALE, LATENT, True, False))
    if kv == "fp8":
        found["dsv3 bf16"] = Baseline(_decode_bf16)
    if _has_flash_mla():
        found["flash_mla" if kv == "bf16" else "flash_mla bf16"] = Baseline(_flash_mla, binds=True)
    return found


def _decode_case(batch: int, s_q: int, heads: int, s_k: int, kv: str = "bf16", varlen: bool = False) -> Case:
    lengths = draw_lengths(batch, s_k) if varlen else [s_k] * batch
    tokens, rows = sum(lengths), batch * s_q * heads
    return Case(
        op="mla_decode",
        case={
            "batch": batch,
            "s_q": s_q,
            "heads": heads,
            "s_k": s_k,
            "kv": kv,
            **({"varlen": True} if varlen else {}),
        },
        flops=2 * tokens * s_q * heads * (WIDTH + LATENT),
        bytes=tokens * ROW_BYTES[kv] + 2 * rows * (WIDTH + LATENT) + 4 * rows,
        inputs=functools.partial(_decode_inputs, lengths, s_q, heads, kv),
        run=_decode,
        baselines=_decode_peers(tokens, kv),
    )


def _schedule_case(batch: int, s_q: int, heads: int, s_k: int) -> Case:
    """The work of one thread block: nobody's floor."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        return (torch.tensor(draw_lengths(batch, s_k), dtype=torch.int32, device=device),)

    return Case(
        op="mla_schedule",
        case={"batch": batch, "s_q": s_q, "heads": heads, "s_k": s_k, "varlen": True},
        flops=0,
        bytes=8 * batch,  # a length and where its keys go
        inputs=inputs,
        run=lambda seq_lens: torch.ops.dsv3.mla_schedule(seq_lens, s_q, heads, False),
    )


# ---- storing ----
def _append_inputs(tokens: int, kv: str, device: torch.device) -> tuple[Tensor, ...]:
    """kv_a, weight, cos, sin, positions, slots in any order, a cache with room for twice as many."""
    angles = torch.rand(POSITIONS, ROPE // 2, device=device).mul_(6.28)
    pages = -(-2 * tokens // PAGE)
    slots = torch.randperm(pages * PAGE, device=device)[:tokens]
    cache = torch.zeros(pages * PAGE, WIDTH, dtype=BF16, device=device)
    if kv == "fp8":
        cache = reference.pack_fp8_cache(cache)
    return (
        torch.randn(tokens, WIDTH, device=device, dtype=BF16),
        torch.rand(LATENT, device=device).add_(0.5).to(BF16),
        *(angles.cos(), angles.sin()),
        torch.randint(POSITIONS, (tokens,), device=device),
        *(slots, cache.view(pages, PAGE, 1, -1)),
    )


def _append_case(tokens: int, kv: str) -> Case:
    def run(*inputs: Tensor) -> Tensor:
        torch.ops.dsv3.mla_append_kv(*inputs, EPS)
        return inputs[-1]

    def plain(*inputs: Tensor) -> Tensor:
        reference.mla_append_kv(*inputs, EPS)
        return inputs[-1]

    # A row of both tables, a position and a slot a token.
    moved = tokens * (2 * WIDTH + ROW_BYTES[kv] + 4 * ROPE + 16) + 2 * LATENT
    return Case(
        op="mla_append_kv",
        case={"tokens": tokens, "hidden": WIDTH, "kv": kv},
        flops=tokens * (4 * LATENT + 3 * ROPE),
        bytes=moved,
        inputs=functools.partial(_append_inputs, tokens, kv),
        run=run,
        # Bytes of an FP8 cache are compared as numbers: sums in another order move a few codes by one.
        baselines={"torch": Baseline(plain, tolerance=2e-2 if kv == "fp8" else 5e-3)},
    )


def cases(tiny: bool) -> list[Case]:
    """`s_k` is the mean length where there is `varlen`, and everybody's otherwise."""

    def size(batch: int, s_q: int, heads: int, s_k: int) -> tuple[int, int, int, int]:
        return (min(batch, 3), s_q, min(heads, 6), min(s_k, 100)) if tiny else (batch, s_q, heads, s_k)

    tokens = (5, 40) if tiny else (128, 4096)
    return [
        *(_decode_case(*size(*shape)) for shape in SHAPES),
        *(_decode_case(*size(*shape), kv="fp8") for shape in FP8_SHAPES),
        *(_decode_case(*size(*shape), varlen=True) for shape in VARLEN),
        _schedule_case(*size(*VARLEN[0])),
        *(_append_case(count, kv) for kv in ("bf16", "fp8") for count in tokens),
    ]
