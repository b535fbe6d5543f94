"""csrc/attention: attention of whole sequences and its gradients; decoding over the paged latent cache, its schedule, what
stores a token in the cache, in bf16 and FP8, and a whole layer.

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import Baseline, Case, peers
from bench.decode_layer import decode_layer
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


NOPE, VALUE = 128, 128
SEQUENCES = [[4096], [8192], [512, 1024, 3072, 128, 2048, 1408]]  # lengths; the last are 8192 tokens too


def _small(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).div_(10).clamp_(-1, 1).to(BF16)


# ---- whole sequences ----
def _forward_inputs(lengths: list[int], heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """q, the output of kv_b, k_rope, offsets."""
    tokens = sum(lengths)
    shapes = (tokens, heads, NOPE + ROPE), (tokens, heads, NOPE + VALUE), (tokens, ROPE)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return (*(torch.randn(shape, device=device, dtype=BF16) for shape in shapes), offsets.to(device))


def _attend(q: Tensor, kv: Tensor, k_rope: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    k_nope, v = kv.split([NOPE, VALUE], -1)
    return torch.ops.dsv3.mla_attention(q, k_nope, k_rope, v, offsets, offsets, longest, longest, True, SCALE)


def _sdpa(backend: SDPBackend, lengths: list[int]) -> Callable[..., Callable[[], Tensor]]:
    """torch's, on keys that have been put together before; a call a sequence. Odd lengths, which cuDNN refuses, are computed
    step by step."""

    def bind(q: Tensor, kv: Tensor, k_rope: Tensor, _: Tensor) -> Callable[[], Tensor]:
        k_nope, v = kv.split([NOPE, VALUE], -1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, q.shape[1], -1)], -1)
        parts = [
            [x.transpose(0, 1)[None] for x in part] for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ]
        backends = backend if q.is_cuda and not any(n % 64 for n in lengths) else SDPBackend.MATH

        def call() -> Tensor:
            with sdpa_kernel(backends):
                out = [scaled_dot_product_attention(*part, is_causal=True, scale=SCALE) for part in parts]
            out = [x[0].transpose(0, 1) for x in out]
            return out[0] if len(out) == 1 else torch.cat(out)

        return call

    return bind


def _forward_case(lengths: list[int], heads: int) -> Case:
    tokens, varlen = sum(lengths), {"varlen": True} if len(lengths) > 1 else {}
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION}
    return Case(
        op="mla_attention",
        case={"tokens": tokens, "heads": heads, "direction": "fwd", **varlen},
        flops=sum(n * (n + 1) // 2 for n in lengths) * heads * 2 * (NOPE + ROPE + VALUE),
        bytes=tokens * (heads * (2 * (2 * NOPE + ROPE + 2 * VALUE) + 4) + 2 * ROPE) + 4 * (len(lengths) + 1),
        inputs=functools.partial(_forward_inputs, lengths, heads),
        run=functools.partial(_attend, longest=max(lengths)),
        # The probabilities of both are rounded to bf16 before their product, here and there to another maximum.
        baselines={name: Baseline(_sdpa(x, lengths), binds=True, tolerance=1e-2) for name, x in backends.items()},
    )


# ---- their gradients ----
def _backward_inputs(lengths: list[int], heads: int, device: torch.device) -> tuple[Tensor, ...]:
    """Those of the forward pass, its results, and a gradient."""
    q, kv, k_rope, offsets = _forward_inputs(lengths, heads, device)
    out, lse = _attend(q, kv, k_rope, offsets, max(lengths))
    return q, kv, k_rope, offsets, out, lse, torch.randn_like(out)


def _differentiate(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *settings: int | bool,
) -> tuple[Tensor, ...]:
    k_nope, v = kv.split([NOPE, VALUE], -1)
    *lengths, deterministic = settings
    tensors = dout, q, k_nope, k_rope, v, out, lse, offsets, offsets
    return torch.ops.dsv3.mla_attention_backward(*tensors, *lengths, True, SCALE, deterministic)


def _cudnn_backward(lengths: list[int]) -> Callable[..., Callable[[], Tensor]]:
    """Its backward pass alone, on keys that have been put together before; dq is compared. A call a sequence."""

    def one(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], Tensor]:
        if not q.is_cuda or q.shape[2] % 64:  # odd lengths: cuDNN refuses them
            leaf = q.detach().requires_grad_()
            out = scaled_dot_product_attention(leaf, k, v, is_causal=True, scale=SCALE)
            return lambda: torch.autograd.grad(out, leaf, dout, retain_graph=True)[0]
        forward = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, *offsets, seed, offset, _ = forward(q, k, v, None, True, 0.0, True, False, scale=SCALE)
        backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        args = dout, q, k, v, out, lse, seed, offset, None, *offsets, 0.0, True
        return lambda: backward(*args, scale=SCALE)[0]

    def bind(q: Tensor, kv: Tensor, k_rope: Tensor, *rest: Tensor) -> Callable[[], Tensor]:
        k_nope, v = kv.split([NOPE, VALUE], -1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, q.shape[1], -1)], -1)
        parts = zip(*(x.split(lengths) for x in (q, k, v, rest[-1])), strict=True)
        calls = [one(*(x.transpose(0, 1)[None] for x in part)) for part in parts]

        def call() -> Tensor:
            dq = [call()[0].transpose(0, 1) for call in calls]
            return dq[0] if len(dq) == 1 else torch.cat(dq)

        return call

    return bind


def _backward_case(lengths: list[int], heads: int, deterministic: bool = False) -> Case:
    """2.6 times the operations of the forward pass, as everybody counts them."""
    tokens, options = sum(lengths), {"varlen": len(lengths) > 1, "deterministic": deterministic}
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return Case(
        op="mla_attention_backward",
        case={"tokens": tokens, "heads": heads, "direction": "bwd", **{k: x for k, x in options.items() if x}},
        flops=pairs * heads * 2 * (3 * (NOPE + ROPE) + 2 * VALUE),
        # q, kv, k_rope and their gradients; out, dout, lse.
        bytes=tokens * (heads * (4 * (2 * NOPE + ROPE + VALUE) + 4 * VALUE + 4) + 4 * ROPE) + 4 * (len(lengths) + 1),
        inputs=functools.partial(_backward_inputs, lengths, heads),
        run=lambda *inputs: _differentiate(*inputs, max(lengths), max(lengths), deterministic),
        baselines={} if deterministic else {"cudnn": Baseline(_cudnn_backward(lengths), binds=True, tolerance=1e-2)},
    )


def _merge_case(tokens: int, heads: int) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        o1, o2 = (torch.randn(tokens, heads, VALUE, device=device, dtype=BF16) for _ in range(2))
        lse1, lse2 = torch.randn(2, heads, tokens, device=device)
        return o1, lse1, o2, lse2

    return Case(
        op="mla_merge",
        case={"tokens": tokens, "heads": heads},
        flops=tokens * heads * 3 * VALUE,
        bytes=tokens * heads * 3 * (2 * VALUE + 4),
        inputs=inputs,
        run=torch.ops.dsv3.mla_merge,
        baselines=peers(reference.mla_merge),
    )


# ---- decoding ----
def decode_inputs(
    lengths: list[int], s_q: int, heads: int, kv: str, device: torch.device, page: int = PAGE
) -> tuple[Tensor, ...]:
    """q, a cache whose pages lie in random order, block table, lengths, schedule; for a cache in FP8 also its values in bf16,
    for the peers."""
    counts = [-(-length // page) for length in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, pages in zip(table, torch.randperm(sum(counts)).split(counts), strict=True):
        row[: len(pages)] = pages
    rows = torch.cat([_small(count * page, WIDTH, device=device) for count in counts])
    q = _small(len(lengths), s_q, heads, WIDTH, device=device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    schedule = ops.mla_schedule(seq_lens, s_q, heads)
    others = table.to(device), seq_lens, schedule
    if kv == "bf16":
        return q, rows.view(-1, page, 1, WIDTH), *others
    packed = torch.cat([reference.pack_fp8_cache(part) for part in rows.split(TORCH_TOKENS)])
    for part, to in zip(packed.split(TORCH_TOKENS), rows.split(TORCH_TOKENS), strict=True):
        to.copy_(reference.unpack_fp8_cache(part))
    return q, packed.view(-1, page, 1, reference.FP8_ROW), *others, rows.view(-1, page, 1, WIDTH)


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
        inputs=functools.partial(decode_inputs, lengths, s_q, heads, kv),
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
        torch.ops.dsv3.mla_append_kv(*inputs, EPS, None, None)
        return inputs[-1]

    def plain(*inputs: Tensor) -> Tensor:
        reference.mla_append_kv(*inputs, EPS, None, None)
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
    heads = 2 if tiny else 128
    return [
        *(_forward_case([-(-n // 64) for n in lengths] if tiny else lengths, heads) for lengths in SEQUENCES),
        *(_backward_case([-(-n // 64) for n in lengths] if tiny else lengths, heads) for lengths in SEQUENCES),
        *(_backward_case([64] if tiny else lengths, heads, deterministic=True) for lengths in SEQUENCES[:2]),
        *(_merge_case(count, heads) for count in tokens),
        *(_decode_case(*size(*shape)) for shape in SHAPES),
        *(_decode_case(*size(*shape), kv="fp8") for shape in FP8_SHAPES),
        *(_decode_case(*size(*shape), varlen=True) for shape in VARLEN),
        _schedule_case(*size(*VARLEN[0])),
        *(_append_case(count, kv) for kv in ("bf16", "fp8") for count in tokens),
        *(decode_layer(batch, tiny) for batch in (1, 32, 128)),
    ]
