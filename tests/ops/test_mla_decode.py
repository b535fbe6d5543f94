"""Absorbed attention over the paged latent cache at the sizes of the model: FlashMLA's matrix and limits, the FP8 cache,
what must not matter (pages of others, tails, schedules), captured graphs, invariance, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv3 import ops
from dsv3.ops.attention import _workers
from dsv3.testing import check_compile, check_registration
from tests.ops.paged import (
    BF16,
    FP8_WIDTH,
    INF,
    LATENT,
    NAN,
    SCALE,
    WIDTH,
    Case,
    check,
    fp8_rows,
    make,
    plain,
    same,
    small,
    varied,
)

# ---- inputs ----


# ---- the formula, and the limits ----


# ---- values ----
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("lengths", "s_q", "heads", "page"),
    [
        ([20, 0, 1, 47], 1, 3, 16),
        ([17, 2, 0], 2, 9, 32),
        ([4, 64, 65], 4, 2, 64),
        ([140], 8, 1, 128),
        ([0, 0], 1, 16, 64),
        ([129], 1, 65, 64),
    ],
)
def test_small(lengths, s_q, heads, page, kv, causal, device):
    case = make(lengths, s_q, heads, device, page=page, kv=kv)
    exact = plain(case, causal)
    check(case(causal=causal), exact, kv)
    check(case(causal=causal, batch_invariant=True), exact, kv)


@pytest.mark.cuda
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 3, 9, 63, 64, 126, 128])
def test_matrix(heads, s_q, causal, kv):
    for i, batch in enumerate((1, 2, 6, 64)):
        for j, s_k in enumerate((20, 140, 4096)):
            page = (16, 32, 64, 128)[(i + j + heads) % 4]
            for lengths in ([s_k] * batch, varied(batch, s_k, s_q)):
                case = make(lengths, s_q, heads, "cuda", page=page, kv=kv)
                check(case(causal=causal), plain(case, causal), kv)


@pytest.mark.cuda
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize(("s_q", "heads"), [(1, 16), (3, 128), (8, 8), (8, 128)])
def test_pages_and_ends(s_q, heads, page, kv):
    """Lengths around the ends of tiles, pages and the pieces of a batch-invariant order; one far longer than the others."""
    ends = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 1023, 1024, 1025, 2048, 2049, 20000]
    case = make([0 if n == 0 else max(n, s_q) for n in ends], s_q, heads, "cuda", page=page, kv=kv)
    for causal in (True, False):
        exact = plain(case, causal)
        check(case(causal=causal), exact, kv)
        check(case(causal=causal, batch_invariant=True), exact, kv)


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_large_scores(kv, device):
    """Attention that all but one key a head and token lose; scores of several hundreds do not overflow."""
    case = make([130, 70], 2, 4, device, kv=kv)
    wanted = torch.randint(60, (2, 2, 4), device=device)
    q = 800 * torch.stack([case.keys[b][wanted[b]] for b in range(2)])
    case = Case(q.to(BF16), *(getattr(case, name) for name in ("cache", "table", "seq_lens", "keys")))
    out, lse = case()
    exact_out, exact_lse = plain(case)
    torch.testing.assert_close(out.float(), exact_out, rtol=2.0**-7, atol=8e-4)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 16, 64, 128])
@pytest.mark.parametrize("sizes", ["up", "down", "columns", "tiny", "zero"])
def test_fp8_scales_of_all_sizes(sizes, heads, device):
    """Latents that grow or shrink along a sequence, or differ between the four parts of a key that have a scale each: within
    the limits, measured by the largest latent."""
    length = 700
    exponents = {
        "up": torch.arange(length) // 24 - 15,
        "down": 15 - torch.arange(length) // 24,
        "columns": torch.randint(-12, 12, (length, 4)),
        "tiny": torch.full((length,), -20),
        "zero": torch.where(torch.arange(length) % 3 == 0, 0, -200),  # codes of 0, whose scale is 1
    }[sizes]
    size = torch.exp2(exponents.float()).view(length, -1).expand(length, 4).repeat_interleave(128, -1).to(device)
    case = make([length, 300], 1, heads, device, kv="fp8")
    rows = small(2 * length, WIDTH, device=device)
    rows[:, :LATENT] *= size.repeat(2, 1)
    packed, values = fp8_rows(rows)
    place = torch.arange(length, device=device)
    for i, n in enumerate(case.seq_lens.tolist()):
        at = case.table[i].long()[place[:n] // 64] * 64 + place[:n] % 64
        case.cache.view(-1, FP8_WIDTH)[at], case.keys[i, :n] = packed[i * length :][:n], values[i * length :][:n]
        # Scores that matter but do not leave one key alone.
        case.q[i, ..., :LATENT] = (case.q[i, ..., :LATENT].float() / case.keys[i].abs().max()).to(BF16)
    largest = case.keys[..., :LATENT].abs().amax((1, 2))[:, None, None, None]
    (out, lse), (exact, exact_lse) = case(), plain(case)
    check(((out.float() / largest).to(BF16), lse), (exact / largest, exact_lse), "fp8")


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_a_head_does_not_see_the_others(kv, device):
    """Queries of any size, infinite or no number: other heads of the block are bit for bit the same."""
    case = make([200, 64], 2, 8, device, kv=kv)
    found = case()
    case.q[:, :, 1] *= 1e30
    case.q[:, :, 3] *= 1e-30
    case.q[:, :, 4] = INF
    case.q[:, :, 6, 7] = NAN
    out, lse = case()
    for head in (0, 2, 5, 7):
        assert torch.equal(out[:, :, head], found[0][:, :, head]), head
        assert torch.equal(lse[:, head], found[1][:, head]), head
    exact, exact_lse = plain(case)
    assert out[:, :, 6].isnan().all()
    check((out[:, :, 3:4], lse[:, 3:4]), (exact[:, :, 3:4], exact_lse[:, 3:4]), kv)


# ---- what must not matter ----
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("page", [16, 64, 128])
def test_what_is_not_used_does_not_matter(page, kv, device):
    """Bit for bit the same with other garbage: the tails of pages, other pages, unused entries of the table."""
    heads = 128 if device.type == "cuda" else 3
    case = make([70, 0, 5, 333], 2, heads, device, page=page, kv=kv)
    found = case()
    pages = torch.arange(case.table.shape[1], device=device)
    unused = pages >= ((case.seq_lens + page - 1) // page)[:, None]
    flat = case.cache.view(-1, case.cache.shape[-1])
    poison = (flat == 0xFF).all(-1) if kv == "fp8" else flat.isnan().any(-1)
    assert int((~poison).sum()) == int(case.seq_lens.sum())
    flat[poison] = 0x7F if kv == "fp8" else -INF
    for entry in (0, 1, case.cache.shape[0], -7, 2**31 - 1):
        case.table[unused] = entry
        assert same(case(), found)


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_repetition_and_schedules(kv, device):
    """The same bits again; with a schedule made before or not; the schedule's shape is known without the lengths."""
    heads, lengths = (128, [5000, 3, 0, 700, 64, 4096]) if device.type == "cuda" else (3, [90, 3, 0])
    for s_q, h in ((1, heads), (2, heads), (1, max(heads // 8, 1))):
        case = make(lengths, s_q, h, device, kv=kv)
        for settings in ({}, {"batch_invariant": True}):
            found, schedule = case(**settings), case.schedule(**settings)
            assert schedule.dtype == torch.int32
            assert schedule.shape == ops.mla_schedule(torch.zeros_like(case.seq_lens), s_q, h, **settings).shape
            before = schedule.clone()
            for _ in range(3):
                assert same(case(**settings), found)
                assert same(case(schedule=schedule, **settings), found)
            assert torch.equal(schedule, before)


@pytest.mark.cuda
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("s_q", [1, 2])
def test_whole_sequences_in_another_order(s_q, kv):
    """Of many sequences none is cut, whatever their lengths: workers take them by length."""
    device = "cuda"
    case = make(varied(200, 400, s_q), s_q, 128, device, kv=kv)
    schedule = case.schedule()
    _, workers, sequences = _workers(case.seq_lens, s_q, 128)
    splits, _, ordered, _ = schedule[:4].tolist()
    assert (splits, ordered) == (0, 1)
    begins, order = schedule[4 : 7 + 3 * workers].view(-1, 3), schedule[-sequences:]
    assert torch.equal(order.sort().values, torch.arange(sequences, dtype=torch.int32, device=device))
    assert (begins[0, 0], begins[-1, 0]) == (0, sequences)
    assert (begins[:, 0].diff() >= 0).all()
    tiles = (case.seq_lens[order.long() % 200] + 63) // 64 + 2
    shares = torch.stack([part.sum() for part in tiles.tensor_split(begins[1:-1, 0].cpu().long())])
    assert shares.max() <= -(-int(tiles.sum()) // workers) + 8
    check(case(schedule=schedule), plain(case), kv)


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_views(kv, device):
    """Columns of a wider block table, a slice of queries of more heads."""
    case = make([33, 80], 2, 6, device, kv=kv)
    found = case()
    wide = torch.full((2, 20), -5, dtype=torch.int32, device=device)
    wide[:, 7 : 7 + case.table.shape[1]] = case.table
    more = torch.full((2, 2, 9, WIDTH), NAN, dtype=BF16, device=device)
    more[:, :, 2:8] = case.q
    view = Case(more[:, :, 2:8], case.cache, wide[:, 7 : 7 + case.table.shape[1]], case.seq_lens, case.keys)
    assert same(view(), found)


def test_no_sequences(device):
    case = make([], 2, 4, device)
    out, lse = case(schedule=case.schedule())
    assert (out.shape, lse.shape) == ((0, 2, 4, LATENT), (0, 4, 2))


# ---- the order of sums ----
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("heads", [3, 64, 128])
def test_batch_invariant(heads, kv, device):
    """A token's bits depend neither on the other sequences nor on whether it is decoded alone or as one of several."""
    if device.type == "cuda":
        lengths, s_q = [3000, 17, 0, 1024, 9000, 1, 64, 1025, *([2000] * 60)], 4
    else:
        lengths, s_q = [41, 4, 0], 4
    lengths = [n if n == 0 else max(n, s_q) for n in lengths]
    case = make(lengths, s_q, heads, device, kv=kv)
    settings = {"batch_invariant": True}
    out, lse = case(schedule=case.schedule(**settings), **settings)
    for few in ([0], [2, 1], list(range(min(len(lengths), 9)))):
        part = case.take(few)
        assert same(part(**settings), (out[few], lse[few]))
    for step in range(s_q):
        one = case.take(slice(None), slice(step, step + 1))
        back = torch.where(case.seq_lens > 0, case.seq_lens - (s_q - 1 - step), 0).int()
        one = Case(one.q, one.cache, one.table, back, one.keys)
        assert same(one(**settings), (out[:, step : step + 1], lse[:, :, step : step + 1].contiguous()))


# ---- graphs, registration, compilation ----
@pytest.mark.cuda
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(("s_q", "heads"), [(1, 16), (2, 128)])
def test_graph(s_q, heads, batch_invariant, kv):
    """The schedule and two layers in a graph, replayed with other lengths, tables, queries and caches."""
    drawn = ([4000, 7, 0, 300], [0, 0, 0, 0], [5, 6000, 2, 65], [70, 70, 70, 70], [6000, 6000, 6000, 6000])
    cases = [make(lengths, s_q, heads, "cuda", kv=kv) for lengths in drawn]
    pages, width = (max(sizes) for sizes in zip(*((len(c.cache), c.table.shape[1]) for c in cases), strict=True))

    def padded(case):
        """In the shapes of the largest."""
        cache = case.cache.new_full((pages, *case.cache.shape[1:]), 0xFF if kv == "fp8" else NAN)
        table = case.table.new_full((4, width), -3)
        cache[: len(case.cache)], table[:, : case.table.shape[1]] = case.cache, case.table
        return Case(case.q, cache, table, case.seq_lens, case.keys)

    cases = [padded(case) for case in cases]
    static = Case(*(t.clone() for t in (cases[0].q, cases[0].cache, cases[0].table, cases[0].seq_lens)), cases[0].keys)
    second = static.q.flip(-1).contiguous()

    def layers():
        settings = {"schedule": static.schedule(batch_invariant=batch_invariant), "batch_invariant": batch_invariant}
        other = Case(second, static.cache, static.table, static.seq_lens, static.keys)
        return *static(**settings), *other(**settings)

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for case in (*cases, cases[0]):
        for target, source in zip(
            (static.q, static.cache, static.table, static.seq_lens, second),
            (case.q, case.cache, case.table, case.seq_lens, case.q.flip(-1)),
            strict=True,
        ):
            target.copy_(source)
        for t in captured:
            t.fill_(7.0)
        graph.replay()
        check(captured[:2], plain(case), kv)
        assert same(captured, layers())


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_registration_and_compile(kv, device):
    case = make([3, 0, 20], 2, 4, device, kv=kv)
    if kv == "bf16":
        case.cache.nan_to_num_()  # the check compares inputs before and after, and NaN differs from itself
    arguments = case.q, case.cache, case.table, case.seq_lens
    check_registration("mla_schedule", case.seq_lens, 2, 4, False)
    for batch_invariant in (False, True):
        schedule = case.schedule(batch_invariant=batch_invariant)
        check_registration("mla_decode", *arguments, schedule, SCALE, LATENT, True, batch_invariant)
    check_registration("mla_decode", *arguments, None, SCALE, LATENT, False, False)

    def decode(q, cache, table, seq_lens):
        schedule = ops.mla_schedule(seq_lens, q.shape[1], q.shape[2])
        return ops.mla_decode(q, cache, table, seq_lens, softmax_scale=SCALE, schedule=schedule)

    check_compile(decode, *arguments)


# ---- sizes ----
@pytest.mark.cuda
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize(("heads", "s_q"), [(16, 1), (128, 2)])
def test_a_million_tokens_in_a_pool_of_more_than_2_to_31_elements(heads, s_q, kv):
    """The table repeats pages from both ends of the pool, the only ones that hold anything."""
    width = FP8_WIDTH if kv == "fp8" else WIDTH
    pages, length = 2**31 // (64 * width) + 200, 2**20 - 5
    cache = torch.empty(pages, 64, 1, width, dtype=torch.uint8 if kv == "fp8" else BF16, device="cuda")
    assert cache.numel() > 2**31
    ends = torch.cat([torch.arange(130), torch.arange(pages - 130, pages)]).cuda()
    rows = small(len(ends) * 64, WIDTH, device="cuda")
    packed, values = fp8_rows(rows) if kv == "fp8" else (rows, rows.float())
    cache[ends] = packed.view(len(ends), 64, 1, width)
    chosen = torch.randint(len(ends), (2**20 // 64,), device="cuda")
    keys = values.view(len(ends), 64, WIDTH)[chosen].view(1, -1, WIDTH)[:, :length]
    seq_lens = torch.tensor([length], dtype=torch.int32, device="cuda")
    q = small(1, s_q, heads, WIDTH, device="cuda")
    case = Case(q, cache, ends[chosen][None].int(), seq_lens, keys)
    exact = plain(case)
    for settings in ({}, {"batch_invariant": True}):
        check(case(**settings), exact, kv)


# ---- bad input ----
def check_device_error(case, match, device, **settings):
    """Of sequence 1. On a GPU it alone gives NaN, the next call raises what the kernel found, and the one after that works;
    the reference raises at once."""
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=match):
            case(**settings)
        return
    out, lse = case(**settings)
    torch.cuda.synchronize()
    for result in (out, lse):
        assert result.isnan().flatten(1).all(1).tolist() == [i == 1 for i in range(len(out))]
        assert not result[0].isnan().any()
    with pytest.raises(RuntimeError, match=match):
        ops.per_token_cast(torch.ones(1, 128, device=device))
    good = make([20, 90], 1, 4, device)
    check(good(), plain(good))
    torch.cuda.synchronize()
    ops.per_token_cast(torch.ones(1, 128, device=device))  # and nothing more is reported


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("entry", [-1, 2**31 - 1, -(2**31), "pages"])
def test_a_page_beyond_the_pool(entry, kv, device):
    """The last page of a sequence, of which one key counts."""
    case = make([30, 65, 0], 1, 4, device, kv=kv)
    pages = case.cache.shape[0]
    case.table[1, 1] = pages if entry == "pages" else entry
    text = rf"block_table must name one of the {pages} pages .* got block_table\[1, 1\] = {int(case.table[1, 1])}"
    check_device_error(case, text, device)


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("heads", [4, 128])
@pytest.mark.parametrize("entry", [-(2**31), "pages"])
def test_a_page_beyond_the_pool_in_a_long_sequence(entry, heads, page, kv, device):
    """In the middle of a sequence that several blocks share."""
    case = make([30, 2000, 0], 1, heads if device.type == "cuda" else 2, device, page=page, kv=kv)
    pages, column = case.cache.shape[0], 700 // page
    case.table[1, column] = pages if entry == "pages" else entry
    found = int(case.table[1, column])
    text = rf"block_table must name one of the {pages} pages .* got block_table\[1, {column}\] = {found}"
    check_device_error(case, text, device)


@pytest.mark.parametrize("kv", ["bf16", "fp8"])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("heads", [4, 128])
@pytest.mark.parametrize("length", [129, 100_000, 2**31 - 1])
def test_a_length_beyond_the_table(length, heads, batch_invariant, kv, device):
    """A table of two pages. The number of keys decides how long a kernel runs, so not even 2^31 may hang it."""
    case = make([30, 128], 1, heads if device.type == "cuda" else 2, device, kv=kv, extra_columns=0)
    assert case.table.shape == (2, 2)
    case.seq_lens[1] = length
    said = rf"at most the 128 keys that 2 pages .* got seq_lens\[1\] = {length}"
    said = said if device.type == "cpu" else r"block_table\[1, \d+\]|seq_lens"
    check_device_error(case, said, device, batch_invariant=batch_invariant)


def test_a_cache_without_pages(device):
    case = make([0, 0], 1, 4, device)
    out, lse = dataclasses.replace(case, cache=case.cache[:0])()
    assert not out.any()
    assert (lse == -INF).all()


def test_a_negative_length_is_an_empty_sequence(device):
    case = make([30, 0], 1, 4, device)
    case.seq_lens[1] = -3
    out, lse = case()
    assert not out[1].any()
    assert (lse[1] == -INF).all()
    check((out[:1], lse[:1]), plain(case.take([0])))


def arguments_of(device):
    case = make([20, 3], 2, 4, device)
    return {"q": case.q, "cache": case.cache.nan_to_num(), "block_table": case.table, "seq_lens": case.seq_lens}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a | {"q": a["q"][0]}, r"\(2, 4, 576\).*\(5, 64, 1, 576\)"),
        (lambda a: a | {"q": a["q"][..., :512]}, r"\(2, 2, 4, 512\).*\(5, 64, 1, 576\)"),
        (lambda a: a | {"cache": a["cache"][..., :570].contiguous()}, r"\(2, 2, 4, 576\).*\(5, 64, 1, 570\)"),
        (lambda a: a | {"cache": a["cache"].view(5, 32, 2, 576)}, r"\(2, 2, 4, 576\).*\(5, 32, 2, 576\)"),
        (lambda a: a | {"cache": a["cache"].view(5, 64, 576)}, r"\(2, 2, 4, 576\).*\(5, 64, 576\)"),
        (lambda a: a | {"cache": a["cache"].view(-1)[: 6 * 48 * 576].view(6, 48, 1, 576)}, r"\(6, 48, 1, 576\)"),
        (lambda a: a | {"cache": a["cache"].view(torch.uint8)}, r"\(2, 2, 4, 576\).*\(5, 64, 1, 1152\)"),
        (lambda a: a | {"cache": a["cache"].half()}, r"float16.*\(5, 64, 1, 576\)|\(5, 64, 1, 576\).*float16"),
        (lambda a: a | {"cache": a["cache"].int()}, r"int32.*\(5, 64, 1, 576\)|\(5, 64, 1, 576\).*int32"),
        (lambda a: a | {"cache": a["cache"].transpose(0, 1).contiguous().transpose(0, 1)}, r"\(5, 64, 1, 576\)"),
        (lambda a: a | {"block_table": a["block_table"][0]}, r"\(3,\)"),
        (lambda a: a | {"block_table": a["block_table"][:1]}, r"\(2, 2, 4, 576\).*\(1, 3\)"),
        (lambda a: a | {"block_table": a["block_table"].long()}, "int64"),
        (lambda a: a | {"seq_lens": a["seq_lens"][:1]}, r"\(2, 2, 4, 576\).*\(1,\)"),
        (lambda a: a | {"seq_lens": a["seq_lens"].long()}, "int64"),
        (lambda a: a | {"q": a["q"][:, :0]}, r"\(2, 0, 4, 576\)"),
    ],
)
def test_bad_arguments(change, match, device):
    arguments = change(arguments_of(device))
    with pytest.raises(ValueError, match=rf"mla_decode: expected .*({match})"):
        ops.mla_decode(*arguments.values(), softmax_scale=SCALE)


def test_autocast_changes_nothing_and_nothing_is_differentiable(device):
    case = make([20, 3], 2, 4, device)
    plain_out, plain_lse = case()
    with torch.autocast(torch.device(device).type, dtype=BF16):
        out, lse = dataclasses.replace(case, q=case.q.clone().requires_grad_())()
    assert same((out, lse), (plain_out, plain_lse))
    assert lse.dtype == torch.float32
    assert not out.requires_grad


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s.long(), lambda s: s[None], lambda s: s.float()])
def test_what_is_no_schedule(change, device):
    case = make([20, 3], 2, 4, device)
    with pytest.raises(ValueError, match="mla_decode: expected a schedule of these sequences, int32"):
        case(schedule=change(case.schedule()))


def test_a_schedule_of_the_other_kind(device):
    case = make([20, 3], 2, 4, device)
    for batch_invariant in (False, True):
        with pytest.raises(ValueError, match="mla_decode: expected batch_invariant as of the schedule, got"):
            case(schedule=case.schedule(batch_invariant=batch_invariant), batch_invariant=not batch_invariant)


@pytest.mark.parametrize(
    ("seq_lens", "s_q", "heads", "match"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 1, 4, r"int32 \(2, 2\)"),
        (torch.zeros(2, dtype=torch.int64), 1, 4, r"int64 \(2,\)"),
        (torch.zeros(2, dtype=torch.int32), 0, 4, "got 0 and 4"),
        (torch.zeros(2, dtype=torch.int32), 1, -1, "got 1 and -1"),
    ],
)
def test_bad_arguments_of_a_schedule(seq_lens, s_q, heads, match, device):
    with pytest.raises(ValueError, match=rf"mla_schedule: expected .*{match}"):
        ops.mla_schedule(seq_lens.to(device), s_q, heads)
