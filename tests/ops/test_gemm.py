"""FP8 products against the fp64 product of what their operands stand for."""

from __future__ import annotations

import re

import pytest
import torch

from dsv3 import ops
from dsv3.reference.quant import empty_row_scales
from dsv3.testing import check_compile, check_graph, check_registration, reference_ops
from tests.ops.fp8 import (
    BF16,
    FP32,
    GRADIENT_FLOOR,
    KINDS,
    NAN,
    cast_rows,
    check,
    draw,
    expert_weights,
    masked_operands,
    offsets_of,
    operands,
    product,
    same,
    take,
    values,
)

F8 = torch.float8_e4m3fn
# (M, N, K)
SHAPES = [
    *((m, 192, 272) for m in (0, 1, 7, 8, 33, 64, 127, 128, 129, 200, 300, 4001)),
    *((m, n, k) for m in (1, 130) for n, k in ((8, 16), (24, 144), (576, 512))),
    (65, 2112, 1536),
    (3, 128, 10944),
    (40, 1000, 128),
]


# ---- the product ----
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_fp8_gemm(m, n, k, dtype, rows, device):
    a, b = operands(m, n, k, device, rows)
    out = torch.full((m, n), NAN, dtype=dtype, device=device)
    assert ops.fp8_gemm(*a, *b, out=out) is out
    check(out, product(a, b))
    for _ in range(2):
        assert same(ops.fp8_gemm(*a, *b, out_dtype=dtype), out)
    assert ops.fp8_gemm(*a, *b).dtype == BF16


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [48, 300])
def test_inputs_of_every_kind(m, kind, dtype, rows, device):
    x = draw(m, 1040, device=device, kind=kind)
    w = draw(576, 1040, device=device, kind="positive" if kind == "positive" else "normal")
    a = cast_rows(x, amax_floor=GRADIENT_FLOOR if kind == "gradient" else 1e-4)
    b = cast_rows(w) if rows else ops.per_block_cast(w)
    out = ops.fp8_gemm(*a, *b, out_dtype=dtype)
    check(out, product(a, b), kind)
    found, wanted = out.double(), x.double() @ w.double().t()
    assert 1 - 2 * (found * wanted).sum() / (found.square() + wanted.square()).sum() < 1e-3


def test_zeros_are_exact(device):
    x, w = draw(200, 384, device=device), draw(272, 384, device=device)
    x[7], x[100:], w[128:256] = 0, 0, 0
    x[:, 128:256] = 0
    out = ops.fp8_gemm(*ops.per_token_cast(x, amax_floor=0.0), *ops.per_block_cast(w), out_dtype=FP32)
    assert not out[7].any()
    assert not out[100:].any()
    assert not out[:, 128:256].any()
    assert (out[:7, :128] != 0).float().mean() > 0.99


@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [40, 300])
def test_nan_and_infinity_stay_in_their_row_or_columns(m, bad, device):
    """A cast tile with an infinity stands for NaN, as one with a NaN does."""
    x, w = draw(m, 272, device=device), draw(320, 272, device=device)
    clean = ops.fp8_gemm(*ops.per_token_cast(x), *ops.per_block_cast(w))
    clean_rows = ops.fp8_gemm(*ops.per_token_cast(x), *ops.per_token_cast(w), out_dtype=FP32)
    spoiled, spoiled_w = x.clone(), w.clone()
    spoiled[31, 200], spoiled_w[130, 7] = bad, bad
    row, block, column = torch.zeros(3, m, 320, dtype=torch.bool, device=device)
    row[31], block[:, 128:256], column[:, 130] = True, True, True
    for found, expected, where in (
        (ops.fp8_gemm(*ops.per_token_cast(spoiled), *ops.per_block_cast(w)), clean, row),
        (ops.fp8_gemm(*ops.per_token_cast(x), *ops.per_block_cast(spoiled_w)), clean, block),
        (ops.fp8_gemm(*ops.per_token_cast(x), *ops.per_token_cast(spoiled_w), out_dtype=FP32), clean_rows, column),
    ):
        assert torch.equal(found.isnan(), where)
        assert torch.equal(found[~where], expected[~where])


def test_static_weights_change_nothing(device):
    for m in (1, 64, 300):
        a, b = operands(m, 576, 512, device)
        if device.type == "cuda":
            torch.cuda.synchronize()  # static: the kernel just ahead must not be the one that writes the weights
        assert same(ops.fp8_gemm(*a, *b, static_weights=True), ops.fp8_gemm(*a, *b))
        invariant = ops.fp8_gemm(*a, *b, batch_invariant=True)
        assert same(ops.fp8_gemm(*a, *b, batch_invariant=True, static_weights=True), invariant)


def test_other_rows_do_not_matter(device):
    """batch_invariant: a row has the same bits in the product of any rows."""
    sizes = [(576, 7168), (2112, 7168), (7168, 2048)] if device.type == "cuda" else [(192, 272)]
    total = 4096 if device.type == "cuda" else 300
    for n, k in sizes:
        a, b = operands(total, n, k, device)
        for dtype in (BF16, FP32):
            whole = ops.fp8_gemm(*a, *b, batch_invariant=True, out_dtype=dtype)
            check(whole, product(a, b))
            for m in (1, 8, 64, 128, 200, total):
                chosen = torch.randperm(total, device=device)[:m]
                part = ops.fp8_gemm(*take(a, chosen), *b, batch_invariant=True, out_dtype=dtype)
                assert same(part, whole[chosen]), (m, n, k)


V3_SHAPES = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
# Tiles of 144 columns at every distance from a block of scales, and of 192 of which the last is not whole.
TILE_SHAPES = [(2048, 1152, 272), (4096, 2176, 272)]


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("m", "n", "k"), [*((m, *nk) for m in (1, 24, 64, 72, 100, 128, 4096) for nk in V3_SHAPES), *TILE_SHAPES]
)
def test_v3_shapes(m, n, k, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    a, b = operands(m, n, k, "cuda")
    exact = values(*a).float() @ values(*b).float().t()
    for settings in ({}, {"static_weights": True}, {"batch_invariant": True}, {"out_dtype": FP32}):
        out = ops.fp8_gemm(*a, *b, **settings)
        check(out, exact)
        assert same(out, ops.fp8_gemm(*a, *b, **settings))


@pytest.mark.cuda
def test_more_than_2_to_31_values():
    a, b = operands(300032, 7168, 128, "cuda")
    last = torch.arange(300032 - 130, 300032, device="cuda")
    check(ops.fp8_gemm(*a, *b)[last], product(take(a, last), b))


# ---- registration, compilation, graphs ----
def small_calls(device):
    """Arguments of every primitive."""
    a, b = operands(36, 24, 272, device)
    experts, offsets = expert_weights(3, 24, 272, device), offsets_of([20, 0, 16], device)
    masked = masked_operands(12, [12, 12, 12], 24, 272, device)
    dy, x = (ops.cast_transpose(draw(36, n, device=device), offsets) for n in (32, 48))
    return {
        "fp8_gemm": (*a, *b, BF16, False, False),
        "fp8_gemm_out": (*a, *b, torch.zeros(36, 24, device=device), True, False, True),
        "grouped_fp8_gemm": (*a, *experts, offsets, FP32, False),
        "grouped_fp8_gemm_out": (*a, *experts, offsets, torch.zeros(36, 24, device=device), False),
        "masked_grouped_fp8_gemm": (*masked, BF16, True),
        "masked_grouped_fp8_gemm_out": (*masked, torch.zeros(3, 12, 24, device=device), False),
        "grouped_fp8_wgrad": (*dy, *x, offsets, torch.zeros(3, 32, 48, device=device)),
    }


def test_registration(device):
    calls = small_calls(device)
    check_registration("fp8_gemm", *calls.pop("fp8_gemm"))
    check_registration("fp8_gemm_out", *calls.pop("fp8_gemm_out"))
    check_registration("grouped_fp8_gemm", *calls.pop("grouped_fp8_gemm"))
    check_registration("grouped_fp8_gemm_out", *calls.pop("grouped_fp8_gemm_out"))
    check_registration("masked_grouped_fp8_gemm", *calls.pop("masked_grouped_fp8_gemm"))
    check_registration("masked_grouped_fp8_gemm_out", *calls.pop("masked_grouped_fp8_gemm_out"))
    check_registration("grouped_fp8_wgrad", *calls.pop("grouped_fp8_wgrad"))
    assert not calls


def chain(x, w, v):
    """cast -> gemm -> cast -> gemm."""
    y = ops.fp8_gemm(*ops.per_token_cast(x), *ops.per_block_cast(w))
    return y, ops.fp8_gemm(*ops.per_token_cast(y), *ops.per_block_cast(v), out_dtype=FP32)


def functions(device):
    """Every public function on bf16 tensors, casts included, with what they take."""
    offsets, counts = offsets_of([20, 0, 16], device), torch.tensor([12, 0, 5], dtype=torch.int32, device=device)
    x, w, v = draw(36, 272, device=device), draw(144, 272, device=device), draw(24, 144, device=device)
    experts = draw(3, 144, 272, device=device)

    def grouped(x, experts):
        return ops.grouped_fp8_gemm(*ops.per_token_cast(x), *ops.per_block_cast(experts), offsets)

    def masked(x, experts):
        a = [t.view(3, 12, -1) for t in ops.per_token_cast(x)]
        out = torch.zeros(3, 12, 144, device=device)
        return ops.masked_grouped_fp8_gemm(*a, *ops.per_block_cast(experts), counts, out=out)

    def wgrad(x, dy):
        a, b = ops.cast_transpose(dy, offsets), ops.cast_transpose(x, offsets)
        out, dense = torch.ones(3, 48, 272, device=device), torch.ones(48, 272, device=device)
        ops.grouped_fp8_wgrad(*a, *b, offsets, out=out)
        return out, ops.fp8_gemm(*ops.cast_transpose(dy), *ops.cast_transpose(x), out=dense, accumulate=True)

    dy = draw(36, 48, device=device)
    return [(chain, (x, w, v)), (grouped, (x, experts)), (masked, (x, experts)), (wgrad, (x, dy))]


def test_compile(device):
    for function, args in functions(device):
        check_compile(function, *args)


def test_compile_for_any_number_of_rows(device):
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend="aot_eager")
    w, v = draw(144, 272, device=device), draw(24, 144, device=device)
    for m in (36, 50, 131):
        x = draw(m, 272, device=device)
        for found, expected in zip(compiled(x, w, v), chain(x, w, v), strict=True):
            assert same(found, expected)


@pytest.mark.cuda
def test_graph():
    for function, args in functions(torch.device("cuda")):
        check_graph(function, *args)
    for m in (1, 64, 700):
        check_graph(chain, *(draw(*shape, device="cuda") for shape in ((m, 7168), (2112, 7168), (7168, 2112))))


@pytest.mark.cuda
@pytest.mark.parametrize("m", [1, 64, 128, 700])
def test_a_chain_is_its_links_one_by_one(m):
    """In a graph each kernel may start while the one before it ends; alone, each has the device to itself."""
    x, w, v = (draw(*shape, device="cuda") for shape in ((m, 7168), (2112, 7168), (7168, 2112)))

    def alone(f, *args, **options):
        torch.cuda.synchronize()
        found = f(*args, **options)
        torch.cuda.synchronize()
        return found

    first, second = alone(ops.per_block_cast, w), alone(ops.per_block_cast, v)
    y = alone(ops.fp8_gemm, *alone(ops.per_token_cast, x), *first)
    expected = alone(ops.fp8_gemm, *alone(ops.per_token_cast, y), *second, out_dtype=FP32)
    chain(x, w, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(x, w, v)
    for _ in range(20):
        for t in found:
            t.zero_()
        graph.replay()
        assert same(found[0], y)
        assert same(found[1], expected)


@pytest.mark.cuda
def test_graph_follows_offsets_and_counts():
    device = torch.device("cuda")
    a, b = operands(300, 192, 272, device)[0], expert_weights(3, 192, 272, device)
    rooms = [t.view(3, 100, -1) for t in a]
    offsets, counts = offsets_of([0, 0, 0], device), torch.zeros(3, dtype=torch.int32, device=device)

    def run():
        out = torch.zeros(300, 192, device=device)
        ops.grouped_fp8_gemm(*a, *b, offsets, out=out)
        other = torch.zeros(3, 100, 192, device=device)
        return out, ops.masked_grouped_fp8_gemm(*rooms, *b, counts, out=other)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for lengths in ([100, 100, 100], [0, 1, 99], [300, 0, 0], [128, 64, 1]):
        offsets.copy_(offsets_of(lengths, device))
        counts.copy_(torch.tensor(lengths).clamp(max=100))
        graph.replay()
        for found, expected in zip(captured, run(), strict=True):
            assert same(found, expected)


def test_no_gradient(device):
    a, b = operands(4, 16, 128, device)
    scales = [t[1].clone().requires_grad_() for t in (a, b)]
    out = ops.fp8_gemm(a[0], empty_row_scales(a[1], *a[1].shape).copy_(a[1]).requires_grad_(), b[0], scales[1])
    assert not out.requires_grad


# ---- bad input ----
def dense(**changed):
    (a, a_sf), (b, b_sf) = operands(5, 136, 272, torch.device("cpu"))
    return ops.fp8_gemm, {"a": a, "a_sf": a_sf, "b": b, "b_sf": b_sf, **changed}


def dense_rows(**changed):
    call = dense(**changed)
    return call[0], call[1] | dict(zip(("b", "b_sf"), cast_rows(draw(136, 272, device="cpu")), strict=True)) | changed


def grouped(**changed):
    (a, a_sf), (b, b_sf) = cast_rows(draw(5, 272, device="cpu")), expert_weights(2, 136, 272, "cpu")
    values = {"a": a, "a_sf": a_sf, "b": b, "b_sf": b_sf, "offsets": offsets_of([2, 3], "cpu")}
    return ops.grouped_fp8_gemm, values | changed


def masked(**changed):
    names = ("a", "a_sf", "b", "b_sf", "counts")
    values = dict(zip(names, masked_operands(5, [2, 3], 136, 272, torch.device("cpu")), strict=True))
    return ops.masked_grouped_fp8_gemm, values | changed


def wgrad(**changed):
    offsets = offsets_of([2, 3], "cpu")
    a, b = (ops.cast_transpose(draw(5, n, device="cpu"), offsets) for n in (48, 64))
    values = dict(zip(("a_t", "a_sf", "b_t", "b_sf"), (*a, *b), strict=True))
    return ops.grouped_fp8_wgrad, values | {"offsets": offsets, "out": torch.zeros(2, 48, 64)} | changed


def fp8(*shape, device="cpu"):
    return torch.zeros(shape, device=device).to(torch.float8_e4m3fn)


def rows_of(*shape):
    return empty_row_scales(torch.empty(0), *shape)


def moved(x, device):
    """The same strides on another device, of a CPU tensor."""
    on_cpu = isinstance(x, torch.Tensor) and x.is_cpu
    return x.new_empty_strided(x.shape, x.stride(), device=device).copy_(x) if on_cpu else x


BAD = [
    (dense, {"a": torch.zeros(5, 272)}, "operands must be float8_e4m3fn"),
    (dense, {"b": torch.zeros(136, 272, dtype=BF16)}, "operands must be float8_e4m3fn"),
    (dense, {"a_sf": torch.zeros(5, 3, dtype=torch.float64)}, "scales float32"),
    (dense, {"a": fp8(5, 1, 272)}, r"a must be \(M, K\) and b \(N, K\)"),
    (dense, {"b": fp8(136, 256)}, r"a must be \(M, K\) and b \(N, K\)"),
    (dense, {"a": fp8(5, 264), "b": fp8(136, 264)}, "K must be a multiple of 16"),
    (dense, {"b": fp8(132, 272)}, "K must be a multiple of 16 and N of 8"),
    (dense, {"a": fp8(272, 5).t()}, "operands must be contiguous"),
    (dense, {"b": fp8(136, 544)[:, ::2]}, "operands must be contiguous"),
    (dense, {"a": fp8(5, 272, device="meta")}, "must be on one device"),
    (dense, {"b_sf": torch.zeros(2, 3, device="meta")}, "must be on one device"),
    (dense, {"a_sf": torch.zeros(5, 3)}, r"a_sf must be \(5, 3\) with strides \(1, 8\)"),
    (dense, {"a_sf": rows_of(3, 5)}, r"a_sf must be \(5, 3\)"),
    (dense, {"a_sf": torch.zeros(2, 3)}, r"a_sf must be \(5, 3\)"),
    (
        dense,
        {"b_sf": torch.zeros(3, 2).t()},
        r"b_sf must be \(2, 3\), contiguous, or \(136, 3\) with strides \(1, 136\)",
    ),
    (dense, {"b_sf": torch.zeros(3, 2)}, r"b_sf must be \(2, 3\), contiguous"),
    (dense_rows, {"b_sf": torch.zeros(136, 3)}, r"b_sf must be \(136, 3\) with strides \(1, 136\)"),
    (dense, {"out_dtype": torch.float16}, "out_dtype must be bfloat16 or float32, not torch.float16"),
    (dense, {"out": torch.zeros(5, 136, dtype=torch.float16)}, r"out must be bfloat16 or float32 \(5, 136\)"),
    (dense, {"out": torch.zeros(136, 5)}, r"out must be bfloat16 or float32 \(5, 136\)"),
    (dense, {"out": torch.zeros(136, 5).t()}, "contiguous, on the operands' device"),
    (dense, {"out": torch.zeros(5, 136, device="meta")}, "contiguous, on the operands' device"),
    (
        dense,
        {"out": torch.zeros(5, 136, dtype=BF16), "accumulate": True},
        "accumulate adds to an out, which must be float",
    ),
    (dense, {"accumulate": True}, "accumulate adds to an out"),
    (grouped, {"b": fp8(136, 272)}, r"a must be \(R, K\) and b \(G, N, K\) with G at least 1"),
    (grouped, {"b": fp8(0, 136, 272)}, "with G at least 1"),
    (grouped, {"b": fp8(2, 132, 272)}, "K must be a multiple of 16 and N of 8"),
    (grouped, {"a_sf": torch.zeros(5, 3)}, r"a_sf must be \(5, 3\) with strides \(1, 8\)"),
    (grouped, {"b_sf": torch.zeros(2, 3)}, r"b_sf must be \(2, 2, 3\), contiguous"),
    (grouped, {"b_sf": torch.zeros(2, 3, 2).mT}, r"b_sf must be \(2, 2, 3\), contiguous"),
    (grouped, {"offsets": torch.tensor([0, 2, 5])}, r"offsets must be int32 \(3,\)"),
    (grouped, {"offsets": torch.tensor([2, 3], dtype=torch.int32)}, r"offsets must be int32 \(3,\)"),
    (grouped, {"offsets": torch.zeros(3, dtype=torch.int32, device="meta")}, "on the operands' device"),
    (grouped, {"out": torch.zeros(5, 272)}, r"out must be bfloat16 or float32 \(5, 136\)"),
    (masked, {"a": fp8(10, 272)}, r"a must be \(G, R, K\) and b \(G, N, K\)"),
    (masked, {"a": fp8(3, 5, 272)}, r"a must be \(G, R, K\) and b \(G, N, K\)"),
    (masked, {"a_sf": torch.zeros(2, 5, 3)}, r"a_sf must be \(2, 5, 3\) with strides \(5, 1, 12\)"),
    (masked, {"a_sf": rows_of(10, 3)}, r"a_sf must be \(2, 5, 3\)"),
    (masked, {"counts": torch.tensor([2, 3])}, r"counts must be int32 \(2,\)"),
    (masked, {"counts": offsets_of([2, 3], "cpu")}, r"counts must be int32 \(2,\)"),
    (masked, {"out": torch.zeros(10, 136)}, r"out must be bfloat16 or float32 \(2, 5, 136\)"),
    (wgrad, {"a_t": fp8(48, 256)}, r"a_t must be \(N, Tp\) and b_t \(K, Tp\)"),
    (wgrad, {"a_t": fp8(48, 272), "b_t": fp8(64, 272)}, "Tp must be a multiple of 128, N and K of 16"),
    (wgrad, {"a_t": fp8(40, 384)}, "N and K of 16"),
    (wgrad, {"a_sf": torch.zeros(48, 3)}, r"a_sf must be \(48, 3\) with strides \(1, 48\)"),
    (wgrad, {"b_sf": torch.zeros(64, 3)}, r"b_sf must be \(64, 3\) with strides \(1, 64\)"),
    (wgrad, {"offsets": torch.tensor([0, 2, 5])}, r"offsets must be int32 \(3,\)"),
    (wgrad, {"offsets": torch.zeros(4, dtype=torch.int32)}, r"out must be float32 \(3, 48, 64\)"),
    (wgrad, {"out": torch.zeros(2, 48, 64, dtype=BF16)}, r"out must be float32 \(2, 48, 64\)"),
    (wgrad, {"out": torch.zeros(2, 64, 48).mT}, r"out must be float32 \(2, 48, 64\), contiguous"),
]


@pytest.mark.parametrize(("make", "changed", "match"), BAD)
def test_bad_arguments(make, changed, match, device):
    """A ValueError that says the rule and prints every tensor's dtype and shape. On a GPU the native op refuses first."""
    function, values = make(**changed)
    values = {name: moved(x, device) for name, x in values.items()}
    with pytest.raises(ValueError, match=match) as error:
        function(**values)
    assert str(error.value).startswith(f"{function.__name__}: ")
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            found = f"{name} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
            assert re.search(re.escape(found), str(error.value)), found


@pytest.mark.cuda
def test_errors_pass_through_the_dispatcher():
    """Its kernels hand on what they refuse, and the types of Python's exceptions stay what they were."""
    a, b = operands(4, 384, 640, "cuda")
    rest = BF16, False, False
    assert same(torch.ops.dsv3.fp8_gemm(*a, *b, *rest), ops.fp8_gemm(*a, *b))
    with pytest.raises(ValueError, match=r"operands must be .*; got a float8_e4m3fn \(4, 640\).* b uint8 \(384, 640\)"):
        torch.ops.dsv3.fp8_gemm(*a, b[0].view(torch.uint8), b[1], *rest)
    large = fp8(2**22, 16, device="cuda"), rows_of(2**22, 1).cuda(), fp8(2**20, 16, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.ops.dsv3.fp8_gemm(*large, large[1].new_empty(2**13, 1), *rest)
    with pytest.raises(ValueError, match="must be on one device"):
        torch.ops.dsv3.fp8_gemm(a[0].cpu(), a[1], *b, *rest)
    with reference_ops(), pytest.raises(ValueError, match="must be on one device"):
        torch.ops.dsv3.fp8_gemm(*a, b[0].cpu(), b[1], *rest)
    assert same(torch.ops.dsv3.fp8_gemm(*a, *b, *rest), ops.fp8_gemm(*a, *b))


@pytest.mark.cuda
def test_views_that_begin_between_16_bytes():
    """Of row scales they are refused, whose bulk copies would fault; of block scales they are as good as any."""
    a, b = operands(4, 384, 640, "cuda")
    stacked, scales = expert_weights(2, 384, 640, "cuda")
    assert scales[1].data_ptr() % 16
    check(ops.fp8_gemm(*a, stacked[1], scales[1]), product(a, (stacked[1], scales[1])))

    offsets = offsets_of([1], "cuda")
    last = a[0][3:], a[1][3:]
    with pytest.raises(ValueError, match="a_sf must be 16-byte aligned"):
        ops.fp8_gemm(*last, *b)
    with pytest.raises(ValueError, match="a_sf must be 16-byte aligned"):
        ops.grouped_fp8_gemm(*last, stacked[:1], scales[:1], offsets)
    shallow, rows = operands(8, 24, 128, "cuda", True)
    with pytest.raises(ValueError, match="b_sf must be 16-byte aligned"):
        ops.fp8_gemm(*shallow, rows[0][1:17], rows[1][1:17], out_dtype=FP32)
    check(
        ops.fp8_gemm(*shallow, rows[0][8:16], rows[1][8:16], out_dtype=FP32), product(shallow, take(rows, slice(8, 16)))
    )
