"""Products of experts: rows sorted by expert, rows with room, weight gradients. Also what the device finds wrong."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from tests.ops.fp8 import (
    BF16,
    FP32,
    GRADIENT_FLOOR,
    NAN,
    SENTINEL,
    cast_rows,
    check,
    draw,
    expert_weights,
    masked_operands,
    offsets_of,
    operands,
    product,
    same,
    spans,
    take,
)

LENGTHS = [
    [3, 0, 17, 1, 0],
    [0, 0],
    [127],
    [40, 1, 300],
    [128, 256, 1],
    [0] * 30 + [5] + [0] * 33,
    [0, 0, 500, 0],
    [600, 1, 0, 130],
    [(i * i + i // 5) % 4 for i in range(256)],
]
COLUMNS = 328  # of the last tile of 256 there are 72: one chunk of 128 bytes in bf16, and a part
# (R, counts)
COUNTS = [(4, [0, 4, 1]), (33, [33, 0, 0, 7]), (64, [0, 0]), (128, [128]), (300, [1, 300, 129, 0, 64]), (5, [2] * 40)]


# ---- rows sorted by expert ----
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("trailing", [0, 13])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}groups{sum(lengths)}")
def test_grouped_fp8_gemm(lengths, trailing, dtype, device):
    n, k = (24, 144) if len(lengths) > 10 else (COLUMNS, 272)
    end = sum(lengths)
    a, a_sf = cast_rows(draw(end + trailing, k, device=device))
    b, b_sf = expert_weights(len(lengths), n, k, device)
    a.view(torch.uint8)[end:], a_sf[end:] = 0x7F, NAN
    offsets = offsets_of(lengths, device)
    out = torch.full((end + trailing, n), NAN, dtype=dtype, device=device)
    out[end:] = SENTINEL
    assert ops.grouped_fp8_gemm(a, a_sf, b, b_sf, offsets, out=out) is out
    for g, (start, stop) in enumerate(spans(lengths)):
        if stop > start:
            check(out[start:stop], product((a[start:stop], a_sf[start:stop]), (b[g], b_sf[g])))
    assert not out.isnan().any()
    assert (out[end:] == SENTINEL).all()
    for _ in range(2):
        assert same(ops.grouped_fp8_gemm(a, a_sf, b, b_sf, offsets, out_dtype=dtype)[:end], out[:end])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("n", [200, 520, 776])
def test_ends_of_large_groups(n, dtype):
    """Spans of 256 rows, eight of them a panel, the last ones whole, more than half or less; 1, 3 and 4 tiles of columns."""
    lengths, k = [2148, 2048, 2177, 128, 129, 2432, 0, 300, 1], 272
    room = max(lengths) + 3
    a, b = cast_rows(draw(sum(lengths), k, device="cuda")), expert_weights(len(lengths), n, k, "cuda")
    out = ops.grouped_fp8_gemm(*a, *b, offsets_of(lengths, "cuda"), out_dtype=dtype)
    for g, (start, stop) in enumerate(spans(lengths)):
        if stop > start:
            check(out[start:stop], product(tuple(t[start:stop] for t in a), tuple(t[g] for t in b)))
    x, x_sf, w, w_sf, counts = masked_operands(room, lengths, n, k, "cuda")
    out = torch.full((len(lengths), room, n), SENTINEL, dtype=dtype, device="cuda")
    ops.masked_grouped_fp8_gemm(x, x_sf, w, w_sf, counts, out=out)
    for g, count in enumerate(lengths):
        if count:
            check(out[g, :count], product((x[g, :count], x_sf[g, :count]), (w[g], w_sf[g])))
        assert (out[g, count:] == SENTINEL).all()


# ---- room for R rows an expert ----
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("room", "counts"), COUNTS)
def test_masked_grouped_fp8_gemm(room, counts, dtype, device):
    a, a_sf, b, b_sf, _ = inputs = masked_operands(room, counts, COLUMNS, 272, device)
    out = torch.full((len(counts), room, COLUMNS), NAN, dtype=dtype, device=device)
    for g, count in enumerate(counts):
        out[g, count:] = SENTINEL
    assert ops.masked_grouped_fp8_gemm(*inputs, out=out) is out
    plain = ops.masked_grouped_fp8_gemm(*inputs, out_dtype=dtype)
    for g, count in enumerate(counts):
        if count:
            check(out[g, :count], product((a[g, :count], a_sf[g, :count]), (b[g], b_sf[g])))
        assert (out[g, count:] == SENTINEL).all()
        assert same(plain[g, :count], out[g, :count])
    assert not out.isnan().any()


# ---- both ----
def test_nan_stays_in_its_row_or_expert(device):
    """Rows of one tile, of two experts."""
    x, experts = draw(60, 272, device=device), draw(2, 192, 272, device=device)
    offsets, counts = offsets_of([30, 30], device), torch.tensor([30, 30], dtype=torch.int32, device=device)

    def run(x, experts):
        a, b = ops.per_token_cast(x), ops.per_block_cast(experts)
        rooms = (t.view(2, 30, -1) for t in a)
        return ops.grouped_fp8_gemm(*a, *b, offsets), ops.masked_grouped_fp8_gemm(*rooms, *b, counts).view(60, 192)

    spoiled, spoiled_experts = x.clone(), experts.clone()
    spoiled[31, 200], spoiled_experts[0, 130, 7] = NAN, NAN
    row, block = torch.zeros(2, 60, 192, dtype=torch.bool, device=device)
    row[31], block[:30, 128:] = True, True
    for inputs, where in (((spoiled, experts), row), ((x, spoiled_experts), block)):
        for found, clean in zip(run(*inputs), run(x, experts), strict=True):
            assert torch.equal(found.isnan(), where)
            assert torch.equal(found[~where], clean[~where])


def test_other_rows_do_not_matter(device):
    """A row of a group has the same bits whatever other rows the group and the other groups have."""
    n, k, total = (4096, 7168, 1200) if device.type == "cuda" else (192, 272, 300)
    a, b = cast_rows(draw(total, k, device=device)), expert_weights(2, n, k, device)

    def grouped(rows, split, dtype):
        offsets = offsets_of([split, len(rows) - split], device)
        return ops.grouped_fp8_gemm(*take(a, rows), *b, offsets, batch_invariant=True, out_dtype=dtype)[split:]

    def masked(rows, room, dtype):
        chosen = torch.zeros(2 * room, dtype=torch.int64, device=device)
        chosen[room : room + len(rows)] = rows
        inputs = (t.view(2, room, -1) for t in take(a, chosen))
        counts = torch.tensor([room // 2, len(rows)], dtype=torch.int32, device=device)
        return ops.masked_grouped_fp8_gemm(*inputs, *b, counts, batch_invariant=True, out_dtype=dtype)[1, : len(rows)]

    everything = torch.arange(total, device=device)
    for dtype in (BF16, FP32):
        whole, roomy = grouped(everything, 0, dtype), masked(everything, total, dtype)
        for m in (1, 8, 64, 128, 200, total):
            chosen = torch.randperm(total, device=device)[:m]
            for split in (0, m // 2):
                assert same(grouped(chosen, split, dtype), whole[chosen[split:]]), (m, split)
            for room in (m, total):
                assert same(masked(chosen, room, dtype), roomy[chosen]), (m, room)


# ---- grouped weight gradients ----
@pytest.mark.cuda
def test_grouped_fp8_wgrad_of_large_outputs():
    """In tiles of 256 rows, of which the last has none or half of its rows."""
    lengths, n, k = [700, 0, 130, 513], 4000, 4112
    offsets = offsets_of(lengths, "cuda")
    a, b = (ops.cast_transpose(draw(sum(lengths), width, device="cuda"), offsets) for width in (n, k))
    start = torch.randn(4, n, k, device="cuda")
    out, again = start.clone(), start.clone()
    for target in (out, again):
        ops.grouped_fp8_wgrad(*a, *b, offsets, out=target)
    assert same(out, again)
    for g, (first, end) in enumerate(spans([-(-length // 128) * 128 for length in lengths])):
        part, tiles = slice(first, end), slice(first // 128, end // 128)
        if first == end:
            assert same(out[g], start[g])
        else:
            exact = product((a[0][:, part], a[1][:, tiles]), (b[0][:, part], b[1][:, tiles]))
            check(out[g] - start[g], exact)


@pytest.mark.parametrize("trailing", [0, 13])
@pytest.mark.parametrize("kind", ["normal", "gradient", "positive"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}groups{sum(lengths)}")
def test_grouped_fp8_wgrad(lengths, kind, trailing, device):
    n, k = (48, 16) if len(lengths) > 10 else (272, 192)
    end = sum(lengths)
    dy = draw(end + trailing, n, device=device, kind=kind)
    x = draw(end + trailing, k, device=device, kind="positive" if kind == "positive" else "normal")
    dy[end:], x[end:] = NAN, NAN
    offsets = offsets_of(lengths, device)
    a, b = ops.cast_transpose(dy, offsets, amax_floor=GRADIENT_FLOOR), ops.cast_transpose(x, offsets)
    slots = spans([-(-length // 128) * 128 for length in lengths])
    for data, sf in (a, b):
        data.view(torch.uint8)[:, slots[-1][1] :], sf[:, slots[-1][1] // 128 :] = 0x7F, NAN
    out = torch.randn(len(lengths), n, k, device=device) * (1e-12 if kind == "gradient" else 1.0)
    out[:, 0, :2] = torch.tensor([NAN, -0.0])
    before = out.clone()
    ops.grouped_fp8_wgrad(*a, *b, offsets, out=out)
    again = before.clone()
    ops.grouped_fp8_wgrad(*a, *b, offsets, out=again)
    assert same(out, again)
    for g, (start, stop) in enumerate(slots):
        if stop == start:
            assert same(out[g], before[g])
            continue
        part, tiles = slice(start, stop), slice(start // 128, stop // 128)
        exact = product((a[0][:, part], a[1][:, tiles]), (b[0][:, part], b[1][:, tiles]))
        assert out[g, 0, 0].isnan()
        out[g, 0, 0], before[g, 0, 0] = exact[0, 0].float(), 0
        check(out[g] - before[g], exact, kind)


@pytest.mark.cuda
def test_more_than_2_to_31_values():
    """The weights of 80 experts, and their gradients."""
    (_, one), last = operands(0, 4096, 7168, "cuda"), offsets_of([0] * 79 + [130], "cuda")
    b = [t.expand(80, *t.shape).contiguous() for t in one]
    a = cast_rows(draw(130, 7168, device="cuda"))
    check(ops.grouped_fp8_gemm(*a, *b, last), product(a, one))
    del b
    dy, x = (ops.cast_transpose(draw(130, size, device="cuda"), last) for size in (4096, 7168))
    out = torch.zeros(80, 4096, 7168, device="cuda")
    ops.grouped_fp8_wgrad(*dy, *x, last, out=out)
    check(out[-1], product(dy, x))
    assert not out[:-1].any()


# ---- what is wrong with data that only the device has seen ----
def check_device_error(call, out, match, device):
    """On a GPU the next call raises what a kernel found, and the one after that works; the reference raises at once."""
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=match):
            call()
    else:
        call()
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=match):
            ops.per_token_cast(torch.ones(1, 128, device=device))
        (a, b) = operands(8, 16, 128, device)
        check(ops.fp8_gemm(*a, *b), product(a, b))
    assert ((out == SENTINEL) | out.isnan()).all()


@pytest.mark.parametrize(
    "bounds", [[0, 20, 10, 30], [0, 10, 20, 41], [0, 10, 41, 20], [0, -1, 5, 30], [3, 5, 10, 30], [0, 10, 20, 200]]
)
def test_bad_offsets(bounds, device):
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    a, b = cast_rows(draw(40, 272, device=device)), expert_weights(3, 192, 272, device)
    out = torch.full((40, 192), SENTINEL, device=device)
    check_device_error(lambda: ops.grouped_fp8_gemm(*a, *b, offsets, out=out), out, "offsets", device)


@pytest.mark.parametrize("bounds", [[0, 20, 10, 30], [0, 10, 20, 4100], [0, -1, 5, 30], [0, 129, 258, 386]])
def test_bad_offsets_of_a_weight_gradient(bounds, device):
    """The last ones need 640 slots of the 512 that there are."""
    good = offsets_of([10, 10, 10], device)
    a, b = (ops.cast_transpose(draw(40, n, device=device), good) for n in (48, 64))
    assert a[0].shape[1] == 512
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    out = torch.full((3, 48, 64), SENTINEL, device=device)
    check_device_error(lambda: ops.grouped_fp8_wgrad(*a, *b, offsets, out=out), out, "offsets", device)


@pytest.mark.parametrize(
    ("room", "counts"), [(33, [4, 34, 0]), (33, [-1, 3, 3]), (33, [4, 200, 0]), (300, [4, 301, 0]), (300, [200, -1, 3])]
)
def test_bad_counts(room, counts, device):
    a, a_sf, b, b_sf, _ = masked_operands(room, [room] * 3, 192, 272, device)
    wrong = torch.tensor(counts, dtype=torch.int32, device=device)
    out = torch.full((3, room, 192), SENTINEL, device=device)
    check_device_error(lambda: ops.masked_grouped_fp8_gemm(a, a_sf, b, b_sf, wrong, out=out), out, "counts", device)
