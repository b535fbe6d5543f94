"""What a token leaves in the paged latent cache, in bf16 and in FP8, at the sizes of the model."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.reference.attention import pack_fp8_cache, unpack_fp8_cache
from dsv3.testing import check_compile, check_graph, check_registration, relative_error
from tests.ops.casts import SENTINEL

BF16, FP8 = torch.bfloat16, torch.uint8
RANK, ROPE, WIDTH, FP8_WIDTH = 512, 64, 576, 656
POSITIONS = 300
EPS = 1e-6


def tables(device):
    angles = torch.outer(torch.arange(POSITIONS).float(), 10000.0 ** (-torch.arange(ROPE // 2) / (ROPE // 2)))
    return angles.cos().to(device), angles.sin().to(device)


def rows(tokens, device, weight_dtype=BF16, spread=2.0):
    """kv_a with rows and columns of very different sizes, weights, tables, positions."""
    kv_a = torch.randn(tokens, WIDTH, device=device) * torch.exp(spread * torch.randn(tokens, 1, device=device))
    weight = torch.exp(torch.randn(RANK, device=device)).to(weight_dtype)
    return kv_a.to(BF16), weight, *tables(device), torch.randint(POSITIONS, (tokens,), device=device)


def filled_cache(dtype, pages, page, device):
    if dtype == FP8:
        return torch.full((pages, page, 1, FP8_WIDTH), int(SENTINEL), dtype=FP8, device=device)
    return torch.full((pages, page, 1, WIDTH), SENTINEL, dtype=dtype, device=device)


def flat(cache):
    return cache.view(-1, cache.shape[-1])


def exact_rows(kv_a, weight, cos, sin, positions, eps=EPS):
    """The formula in fp64."""
    latent, rope = kv_a[:, :RANK].double(), kv_a[:, RANK:].double()
    latent = latent / (latent.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    turned = torch.view_as_complex(rope.unflatten(-1, (-1, 2)))
    turned = turned * torch.complex(cos[positions].double(), sin[positions].double())
    return torch.cat([latent, torch.view_as_real(turned).flatten(1)], -1)


def parts(packed):
    """Codes, scales and rotated values of FP8 rows."""
    codes = packed[:, :RANK].contiguous().view(torch.float8_e4m3fn)
    scales = packed[:, RANK : RANK + 16].contiguous().view(torch.float32)
    return codes, scales, packed[:, RANK + 16 :].contiguous().view(BF16)


def check_rows(found, expected):
    """Every bf16 value within a unit in the last place: one rounding of a nearly exact result."""
    assert found.dtype == BF16
    error = (found.double() - expected).abs()
    assert (error <= 2.0**-8 * expected.abs() * 1.01 + 1e-6 * expected.abs().amax(-1, keepdim=True)).all()


def some_slots(tokens, rows, device):
    """Distinct rows in any order; every fourth token is skipped."""
    slots = torch.randperm(rows, device=device)[:tokens]
    slots[3::4] = -1
    return slots


@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 128, 333])
@pytest.mark.parametrize("page", [16, 64, 128])
def test_bf16(page, tokens, weight_dtype, device):
    inputs = rows(tokens, device, weight_dtype)
    cache = filled_cache(BF16, -(-tokens * 2 // page) + 1, page, device)
    slots = some_slots(tokens, cache.shape[0] * page, device)
    ops.mla_append_kv(*inputs, slots, cache, eps=EPS)
    kept = slots >= 0
    check_rows(flat(cache)[slots[kept]], exact_rows(*inputs)[kept])
    flat(cache)[slots[kept]] = SENTINEL
    assert (cache == SENTINEL).all()


@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 128, 333])
@pytest.mark.parametrize("page", [16, 64, 128])
def test_fp8_is_the_cast_of_bf16(page, tokens, weight_dtype, device):
    """Bit for bit per_token_cast of what the other cache holds, and the same rotated values."""
    inputs = rows(tokens, device, weight_dtype)
    pages = -(-tokens * 2 // page) + 1
    cache, plain = filled_cache(FP8, pages, page, device), filled_cache(BF16, pages, page, device)
    slots = some_slots(tokens, pages * page, device)
    ops.mla_append_kv(*inputs, slots, cache, eps=EPS)
    ops.mla_append_kv(*inputs, slots, plain, eps=EPS)
    slots = slots[slots >= 0]
    codes, scales, rope = parts(flat(cache)[slots])
    expected = flat(plain)[slots]
    expected_codes, expected_scales = ops.per_token_cast(expected[:, :RANK], pow2_scale=True)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    assert torch.equal(rope, expected[:, RANK:])
    flat(cache)[slots] = int(SENTINEL)
    assert (cache == int(SENTINEL)).all()


def test_unpacked_rows_are_codes_times_scales(device):
    """Exactly, in bf16; and packing what was unpacked changes nothing."""
    latents = torch.randn(64, WIDTH, device=device) * torch.exp(4 * torch.randn(64, 1, device=device))
    latents[3] = 0
    packed = pack_fp8_cache(latents.to(BF16))
    codes, scales, rope = parts(packed)
    assert torch.equal(scales.log2(), scales.log2().round())
    unpacked = unpack_fp8_cache(packed.view(4, 16, 1, FP8_WIDTH)).view(64, WIDTH)
    assert torch.equal(unpacked[:, :RANK].double(), codes.double() * scales.double().repeat_interleave(128, -1))
    assert torch.equal(unpacked[:, RANK:], rope)
    assert torch.equal(unpack_fp8_cache(pack_fp8_cache(unpacked)), unpacked)
    assert relative_error(unpacked, latents) < 2.0**-5


@pytest.mark.parametrize("heads", [4, 128])
def test_every_code_and_scale_decodes_exactly(heads, device):
    """Sequences of one key, which is their result bit for bit: every code with small and large scales; a NaN, code or
    scale, makes its sequence NaN and no other. What lies behind the key is all NaN."""
    codes = (torch.arange(RANK) + 5 * torch.arange(64)[:, None]) % 256
    codes[codes % 128 == 127] = 0
    exponents = torch.tensor([-126, -30, -22, -9, -1, 0, 3, 7, 8, 20, 60, 118])
    scales = exponents[torch.arange(256).view(64, 4) % 12].float().exp2()
    codes[5, 300], codes[6, 17], scales[7, 2] = 127, 255, float("nan")
    codes = codes.to(FP8)
    exact = codes.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(128, -1)
    exact[5:8] = float("nan")
    cache = torch.full((64, 16, 1, FP8_WIDTH), 0xFF, dtype=FP8)
    cache[:, 0, 0] = torch.cat([codes, scales.view(FP8), torch.randn(64, ROPE).to(BF16).view(FP8)], -1)
    queries = torch.zeros(64, 1, heads, WIDTH, dtype=BF16)
    integers = torch.arange(64).int()[:, None], torch.ones(64).int()
    out, lse = ops.mla_decode(*(t.to(device) for t in (queries, cache, *integers)), softmax_scale=1.0)
    expected = exact.to(BF16)[:, None].expand(-1, heads, -1)
    torch.testing.assert_close(out.cpu()[:, 0], expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(lse.cpu()[:, :, 0].isnan(), expected[..., 0].isnan())
    assert not lse.nan_to_num().any()


@pytest.mark.cuda
def test_the_same_bits_as_rmsnorm():
    """So that prefill, which normalises by itself, sees the latents that decoding finds in the cache."""
    inputs = rows(777, "cuda")
    cache = filled_cache(BF16, 8, 128, "cuda")
    ops.mla_append_kv(*inputs, torch.arange(777, device="cuda"), cache, eps=EPS)
    latent = ops.rmsnorm(inputs[0][:, :RANK], inputs[1], eps=EPS)
    assert torch.equal(flat(cache)[:777, :RANK], latent)


def queries(tokens, columns, device, weight_dtype=BF16):
    q_a = torch.randn(tokens, columns, device=device) * torch.exp(torch.randn(tokens, 1, device=device))
    return {"q_a": q_a.to(BF16), "q_a_norm_weight": torch.exp(torch.randn(columns, device=device)).to(weight_dtype)}


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32], ids=["weights bf16", "fp32"])
@pytest.mark.parametrize("columns", [8, 512, 768, 1536, 2048])
@pytest.mark.parametrize("tokens", [0, 1, 5, 130])
def test_queries_in_the_same_kernel(tokens, columns, weight_dtype, dtype, device):
    """What is stored is the same as without them, and they are what rmsnorm makes of them: bit for bit with weights in bf16."""
    inputs, given = rows(tokens, device, weight_dtype), queries(tokens, columns, device, weight_dtype)
    before, weight = given["q_a"].clone(), given["q_a_norm_weight"]
    slots = some_slots(tokens, 384, device)
    caches = [filled_cache(dtype, 6, 64, device) for _ in range(2)]
    ops.mla_append_kv(*inputs, slots, caches[0], eps=EPS)
    ops.mla_append_kv(*inputs, slots, caches[1], eps=EPS, **given)
    assert torch.equal(*caches)
    wide = before.double()
    check_rows(given["q_a"], wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double())
    if weight_dtype == BF16:
        assert torch.equal(given["q_a"], ops.rmsnorm(before, weight, eps=EPS))


def test_queries_that_the_kernel_does_not_take(device):
    """Columns that are no multiple of 8, more than 2048, or weights of another dtype than the latent's: the reference."""
    inputs, slots = rows(3, device), torch.arange(3, device=device)
    for given in (queries(3, 20, device), queries(3, 2056, device), queries(3, 64, device, torch.float32)):
        wide, cache = given["q_a"].double(), filled_cache(BF16, 1, 16, device)
        ops.mla_append_kv(*inputs, slots, cache, eps=EPS, **given)
        check_rows(flat(cache)[:3], exact_rows(*inputs))
        norm = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * given["q_a_norm_weight"].double()
        check_rows(given["q_a"], norm)


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("width", [WIDTH, 2112, 580, 1155], ids=["dense", "fused", "odd rows", "odd"])
def test_kv_a_may_be_columns_of_a_wider_tensor(width, dtype, device):
    """As of a projection that makes queries and latents at once; rows that are no multiple of 16 bytes work too."""
    kv_a, *others = rows(19, device)
    wide = torch.full((19, width), float("nan"), dtype=BF16, device=device)
    wide[:, width - WIDTH :] = kv_a
    slots = some_slots(19, 64, device)
    caches = [filled_cache(dtype, 1, 64, device) for _ in range(2)]
    ops.mla_append_kv(kv_a, *others, slots, caches[0], eps=EPS)
    ops.mla_append_kv(wide[:, width - WIDTH :], *others, slots, caches[1], eps=EPS)
    assert torch.equal(*caches)


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_what_a_skipped_token_holds_does_not_matter(dtype, device):
    kv_a, weight, cos, sin, positions = rows(6, device)
    slots = torch.tensor([4, -1, 0, -1, 9, -1], device=device)
    skipped = slots < 0
    clean, poisoned = (filled_cache(dtype, 1, 16, device) for _ in range(2))
    ops.mla_append_kv(kv_a, weight, cos, sin, positions, slots, clean, eps=EPS)
    kv_a[skipped], positions[skipped] = float("nan"), 2**40
    ops.mla_append_kv(kv_a, weight, cos, sin, positions, slots, poisoned, eps=EPS)
    assert torch.equal(clean, poisoned)
    ops.mla_append_kv(kv_a, weight, cos, sin, positions, torch.full_like(slots, -1), poisoned, eps=EPS)
    assert torch.equal(clean, poisoned)


def test_zeros_and_nan(device):
    """A latent of zeros stays zero in both caches; NaN in one tile of one token stays in that token."""
    kv_a, *others = rows(3, device)
    kv_a[0] = 0
    for dtype in (BF16, FP8):
        clean, cache = (filled_cache(dtype, 1, 16, device) for _ in range(2))
        slots = torch.arange(3, device=device)
        ops.mla_append_kv(kv_a, *others, slots, clean, eps=EPS)
        broken = kv_a.clone()
        broken[1, 200] = float("nan")
        ops.mla_append_kv(broken, *others, slots, cache, eps=EPS)
        values = unpack_fp8_cache(cache) if dtype == FP8 else cache
        assert not values[0, 0].any()
        assert values[0, 1, 0, :RANK].isnan().all()
        assert values[0, 1, 0, RANK:].isfinite().all()
        assert torch.equal(flat(cache)[[0, 2]], flat(clean)[[0, 2]])


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_twice_the_same(dtype, device):
    inputs = rows(128, device)
    slots = some_slots(128, 256, device)
    caches = [filled_cache(dtype, 4, 64, device) for _ in range(2)]
    for cache in caches:
        ops.mla_append_kv(*inputs, slots, cache, eps=EPS)
    assert torch.equal(*caches)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_a_pool_of_more_than_2_to_31_elements(dtype):
    width = FP8_WIDTH if dtype == FP8 else WIDTH
    pages = 2**31 // (64 * width) + 2
    cache = torch.empty(pages, 64, 1, width, dtype=dtype, device="cuda")
    flat(cache)[-65:] = int(SENTINEL)
    last = flat(cache).shape[0] - 1
    inputs = rows(2, "cuda")
    ops.mla_append_kv(*inputs, torch.tensor([last, 0], device="cuda"), cache, eps=EPS)
    small = filled_cache(dtype, 1, 16, "cuda")
    ops.mla_append_kv(*inputs, torch.tensor([1, 0], device="cuda"), small, eps=EPS)
    assert torch.equal(flat(cache)[[last, 0]], flat(small)[[1, 0]])
    assert (flat(cache)[-65:-1] == int(SENTINEL)).all()


# ---- registration, compilation, graphs ----
@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_registration_and_compile(dtype, device):
    inputs, slots = rows(4, device), torch.tensor([4, -1, 7, 2], device=device)
    cache = filled_cache(dtype, 2, 16, device)
    check_registration("mla_append_kv", *inputs, slots, cache, EPS, None, None)

    def append(cache, *inputs):
        cache = cache.clone()
        ops.mla_append_kv(*inputs, cache, eps=EPS)
        return cache

    check_compile(append, cache, *inputs, slots)
    if device.type == "cuda":
        check_graph(append, cache, *inputs, slots)


def test_registration_and_compile_with_queries(device):
    inputs, slots = rows(4, device), torch.tensor([4, -1, 7, 2], device=device)
    cache, given = filled_cache(BF16, 2, 16, device), queries(4, 768, device)
    check_registration("mla_append_kv", *inputs, slots, cache, EPS, *given.values())

    def append(cache, q_a, weight, *inputs):
        cache, q_a = cache.clone(), q_a.clone()
        ops.mla_append_kv(*inputs, cache, eps=EPS, q_a=q_a, q_a_norm_weight=weight)
        return cache, q_a

    check_compile(append, cache, *given.values(), *inputs, slots)
    if device.type == "cuda":
        check_graph(append, cache, *given.values(), *inputs, slots)


# ---- bad input ----
LONG = 2**40


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("slots", 32, r"slot_mapping must be -1 or one of the 32 rows of the cache, got slot_mapping\[2\] = 32"),
        ("slots", -2, r"slot_mapping\[2\] = -2"),
        ("slots", LONG, rf"slot_mapping\[2\] = {LONG}"),
        ("positions", POSITIONS, r"positions must lie within the 300 rows of cos and sin, got positions\[2\] = 300"),
        ("positions", -1, r"positions\[2\] = -1"),
        ("positions", -LONG, rf"positions\[2\] = -{LONG}"),
    ],
)
def test_slots_and_positions_that_there_are_not(name, value, match, dtype, device):
    """On a GPU the next call raises what the kernel found, and the one after that works; the reference raises at once.
    Nothing is stored for the token."""
    inputs, slots = rows(4, device), torch.tensor([4, -1, 7, 2], device=device)
    {"slots": slots, "positions": inputs[-1]}[name][2] = value
    cache = filled_cache(dtype, 2, 16, device)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=match):
            ops.mla_append_kv(*inputs, slots, cache, eps=EPS)
    else:
        ops.mla_append_kv(*inputs, slots, cache, eps=EPS)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=match):
            ops.per_token_cast(torch.ones(1, 128, device=device))
        assert (flat(cache)[[4, 2]] != int(SENTINEL)).any(-1).all()
        flat(cache)[[4, 2]] = int(SENTINEL)
        ops.per_token_cast(torch.ones(1, 128, device=device))
    assert (cache == int(SENTINEL)).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a | {"kv_a": a["kv_a"][:, :570]}, r"got \(4, 570\), \(2, 16, 1, 576\)"),
        (lambda a: a | {"kv_a": a["kv_a"][0]}, r"got \(576,\), \(2, 16, 1, 576\)"),
        (lambda a: a | {"cache": a["cache"].view(2, 16, 576)}, r"got \(4, 576\), \(2, 16, 576\)"),
        (lambda a: a | {"cache": a["cache"].view(2, 8, 2, 576)}, r"got \(4, 576\), \(2, 8, 2, 576\)"),
        (
            lambda a: a | {"cache": a["cache"].to(FP8)},
            r"uint8 \(pages,page,1,656\).* got \(4, 576\), \(2, 16, 1, 576\)",
        ),
        (lambda a: a | {"cache": torch.zeros(2, 16, 1, 656)}, r"got \(4, 576\), \(2, 16, 1, 656\)"),
        (lambda a: a | {"cache": a["cache"].to(torch.int16)}, r"got torch.int16 \(2, 16, 1, 576\)"),
        (lambda a: a | {"cache": a["cache"].view(4, 8, 1, 576)}, r"pages of 16, .* \(4, 8, 1, 576\) beside \(4, 576\)"),
        (
            lambda a: a | {"cache": a["cache"].transpose(0, 1).contiguous().transpose(0, 1)},
            r"strides .* \(2, 16, 1, 576\) .* \(4, 576\)",
        ),
        (lambda a: a | {"slots": a["slots"][:3]}, r"got \(4, 576\), \(2, 16, 1, 576\) and \(3,\)"),
        (lambda a: a | {"slots": a["slots"].int()}, r"torch.int64 \(4,\) and torch.int32 \(4,\)"),
        (lambda a: a | {"positions": a["positions"][:3]}, r"torch.int64 \(3,\) and torch.int64 \(4,\)"),
        (lambda a: a | {"weight": a["weight"][:500]}, r"got \(4, 576\), \(500,\), \(300, 32\), \(300, 32\)"),
        (lambda a: a | {"cos": a["cos"][:, :16]}, r"got \(4, 576\), \(512,\), \(300, 16\), \(300, 32\)"),
        (lambda a: a | {"sin": a["sin"][:9]}, r"got \(4, 576\), \(512,\), \(300, 32\), \(9, 32\)"),
    ],
)
def test_bad_arguments(change, match, device):
    names = "kv_a", "weight", "cos", "sin", "positions", "slots", "cache"
    values = *rows(4, device), torch.tensor([4, -1, 7, 2], device=device), filled_cache(BF16, 2, 16, device)
    arguments = change(dict(zip(names, values, strict=True)))
    before = arguments["cache"].clone()
    with pytest.raises(ValueError, match=rf"mla_append_kv: expected .*{match}"):
        ops.mla_append_kv(*arguments.values(), eps=EPS)
    assert torch.equal(arguments["cache"], before)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: {"q_a": q["q_a"]}, r"\(4, 64\) \(64, 1\) and none"),
        (lambda q: {"q_a_norm_weight": q["q_a_norm_weight"]}, r"none and \(64,\) \(1,\)"),
        (lambda q: q | {"q_a": q["q_a"][:3]}, r"\(3, 64\) \(64, 1\) and \(64,\)"),
        (lambda q: q | {"q_a": q["q_a"][0]}, r"\(64,\) \(1,\) and \(64,\)"),
        (lambda q: q | {"q_a": q["q_a"].t().contiguous().t()}, r"\(4, 64\) \(1, 4\) and \(64,\)"),
        (lambda q: q | {"q_a_norm_weight": q["q_a_norm_weight"][:9]}, r"\(4, 64\) \(64, 1\) and \(9,\)"),
        (lambda q: q | {"q_a_norm_weight": q["q_a_norm_weight"][None]}, r"\(4, 64\) \(64, 1\) and \(1, 64\)"),
    ],
)
def test_bad_queries(change, match, device):
    inputs, slots = rows(4, device), torch.arange(4, device=device)
    cache, given = filled_cache(BF16, 2, 16, device), queries(4, 64, device)
    before = given["q_a"].clone()
    with pytest.raises(
        ValueError, match=rf"expected a contiguous q_a \(4,R\) and q_a_norm_weight \(R,\).* got {match}"
    ):
        ops.mla_append_kv(*inputs, slots, cache, eps=EPS, **change(given))
    assert torch.equal(given["q_a"], before)
    assert (cache == SENTINEL).all()
