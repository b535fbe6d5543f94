"""Prefill on top of a paged cache: in chunks of what is cached, it gives what one naive attention over the whole gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsv3 import ops
from dsv3.model import AttentionContext
from dsv3.model.attention import MLA
from dsv3.reference.attention import FP8_ROW
from dsv3.testing import relative_error
from tests.model.cases import BASE, CASES, random_model, tokens_for
from tests.model.test_attention import ATTENTION, plain

PAGE, WIDTH = 16, 12
# No context, no new tokens, neither, ends of pages on either side and inside, very different lengths.
CACHED, NEW = [0, 5, 150, 0, 32, 16, 1], [20, 12, 1, 0, 0, 16, 40]
# Sizes of the released model's heads, which the native kernels and FP8 pages take.
WIDE = replace(
    BASE, hidden_size=64, num_attention_heads=2, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)  # fmt: skip


def make_table(sequences: int, device: torch.device) -> Tensor:
    """Pages in a random order; those that are not needed are none at all."""
    order = torch.randperm(sequences * WIDTH, generator=torch.Generator().manual_seed(5)).view(sequences, WIDTH)
    used = torch.tensor([-(-(n + m) // PAGE) for n, m in zip(CACHED, NEW, strict=True)])[:sequences]
    return torch.where(torch.arange(WIDTH) < used[:, None], order, 10**6).int().to(device)


def make_cache(mla: MLA, sequences: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Nothing but NaN."""
    width = FP8_ROW if dtype == torch.uint8 else mla.config.latent_dim
    fill = 255 if dtype == torch.uint8 else float("nan")
    return torch.full((sequences * WIDTH, PAGE, 1, width), fill, dtype=dtype, device=device)


def in_two_steps(mla: MLA, xs: list[Tensor], cache: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Stores the first CACHED tokens of each sequence, then prefills the rest: its output [T, H] and the rows [P, D] below."""
    table = make_table(len(xs), xs[0].device)
    none = [0] * len(xs)
    before = AttentionContext.prefill(CACHED, none, table, PAGE, chunk=chunk)
    mla(torch.cat([x[:n] for x, n in zip(xs, CACHED, strict=True)]), before, cache)
    rows = ops.mla_cached_rows(cache, before.slot_mapping)
    ctx = AttentionContext.prefill(NEW, CACHED, table, PAGE, chunk=chunk)
    return mla(torch.cat([x[n:] for x, n in zip(xs, CACHED, strict=True)]), ctx, cache), rows


def sequences(hidden: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(n + m, hidden, device=device).to(dtype) for n, m in zip(CACHED, NEW, strict=True)]


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("chunk", [7, 16, 64, 1000])
@torch.no_grad()
def test_on_a_cache_it_is_one_attention_over_the_whole(name, chunk, device):
    mla = random_model(CASES[name], device=device).layers[0].attention
    xs = sequences(BASE.hidden_size, device)
    cache = make_cache(mla, len(xs), torch.float32, device)
    out, _ = in_two_steps(mla, xs, cache, chunk)
    for x, part, cached in zip(xs, out.split(NEW), CACHED, strict=True):
        torch.testing.assert_close(part.double(), plain(mla, x)[cached:], rtol=1e-4, atol=1e-5)
    whole = make_cache(mla, len(xs), torch.float32, device)
    lengths = [len(x) for x in xs]
    ctx = AttentionContext.prefill(lengths, [0] * len(xs), make_table(len(xs), device), PAGE, chunk=chunk)
    mla(torch.cat(xs), ctx, whole)
    torch.testing.assert_close(cache, whole, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("chunk", [50, 1000])
@torch.no_grad()
def test_bf16_and_fp8_pages(dtype, chunk, device):
    """Against fp64 over what the pages hold, it errs at most twice as much as one attention in bf16 over the whole."""
    mla = random_model(replace(WIDE, dtype="bfloat16"), device=device).layers[0].attention
    xs = sequences(WIDE.hidden_size, device, torch.bfloat16)
    out, rows = in_two_steps(mla, xs, make_cache(mla, len(xs), dtype, device), chunk)
    assert rows.dtype == torch.bfloat16
    exact = torch.cat([plain(mla, x[len(past) :], past) for x, past in zip(xs, rows.split(CACHED), strict=True)])
    lengths = [len(x) for x in xs]
    whole = mla(torch.cat(xs), AttentionContext.packed(lengths, device)).split(lengths)
    naive = torch.cat([y[n:] for y, n in zip(whole, CACHED, strict=True)])
    exact_naive = torch.cat([plain(mla, x)[n:] for x, n in zip(xs, CACHED, strict=True)])
    assert relative_error(out, exact) <= 2 * relative_error(naive, exact_naive) + 1e-4
    assert 0 < relative_error(exact, exact_naive) < (0.05 if dtype == torch.uint8 else 0.01)  # what rounded rows change


@torch.no_grad()
def test_weights_in_fp8(device):
    """The latents of the cache are cast as those of new tokens are."""
    model = random_model(WIDE, device=device)
    model.set_precision("fp8")
    mla, xs = model.layers[0].attention, sequences(WIDE.hidden_size, device)
    out, _ = in_two_steps(mla, xs, make_cache(mla, len(xs), torch.float32, device), 50)
    lengths = [len(x) for x in xs]
    whole = mla(torch.cat(xs), AttentionContext.packed(lengths, device)).split(lengths)
    # A value beside the border between two codes may fall on either side.
    assert relative_error(out, torch.cat([y[n:] for y, n in zip(whole, CACHED, strict=True)])) < 5e-3


@torch.no_grad()
def test_the_model_and_mtp_in_pieces(device):
    config = replace(BASE, num_nextn_predict_layers=2)
    model, text = random_model(config, device=device), tokens_for(config, 102).to(device)

    def depths(begin: int, end: int, ctx: AttentionContext, cache: list[Tensor] | None = None) -> Tensor:
        outs = [model.hidden(text[begin:end], ctx, cache)[0]]
        for k, mtp in enumerate(model.mtp, start=1):
            outs.append(mtp(outs[-1], text[begin + k : end + k], ctx, cache)[0])
        return torch.stack(outs)

    mla, table = model.layers[0].attention, torch.randperm(WIDTH).int().to(device)[None]
    cache = [make_cache(mla, 1, torch.float32, device) for _ in range(config.num_blocks)]
    found, bounds = [], [0, 16, 17, 50, 100]
    for begin, end in pairwise(bounds):
        ctx = AttentionContext.prefill([end - begin], [begin], table, PAGE, chunk=20)
        found.append(depths(begin, end, ctx, cache))
    whole = depths(0, 100, AttentionContext.batch(1, 100, device))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_more_than_a_chunk_is_projected_at_a_time(device):
    mla, sizes = random_model(BASE, device=device).layers[0].attention, []
    mla.kv_b.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    xs = sequences(BASE.hidden_size, device)
    in_two_steps(mla, xs, make_cache(mla, len(xs), torch.float32, device), 50)
    assert sizes == [sum(CACHED), sum(NEW), 50, 50, 50, 50, 4]


@torch.no_grad()
def test_nothing_is_read_on_the_host():
    """On the meta device there are no values. One sequence: the reference reads lengths where they differ."""
    mla = random_model(BASE).layers[0].attention.to("meta")
    table = torch.zeros(1, WIDTH, dtype=torch.int32, device="meta")
    ctx = AttentionContext.prefill([30], [100], table, PAGE, chunk=40)
    assert mla(torch.empty(30, BASE.hidden_size, device="meta"), ctx, make_cache(mla, 1, torch.float32, "meta")).is_meta


@torch.no_grad()
def test_no_new_tokens_at_all(device):
    mla, table = (
        random_model(BASE, device=device).layers[0].attention,
        torch.zeros(2, 1, dtype=torch.int32, device=device),
    )
    ctx = AttentionContext.prefill([0, 0], [3, 0], table, PAGE, chunk=2)
    x = torch.empty(0, BASE.hidden_size, device=device)
    assert mla(x, ctx, make_cache(mla, 1, torch.float32, device)).shape == x.shape


def test_context(device):
    table = torch.tensor([[3, 1], [0, 9], [5, 4]], dtype=torch.int32, device=device)
    ctx = AttentionContext.prefill([2, 1, 0], [3, 0, 5], table, 4, chunk=6)
    assert ctx.positions.tolist() == [3, 4, 0]
    assert ctx.slot_mapping.tolist() == [15, 4, 0]
    assert ctx.cu_seqlens_q.tolist() == ctx.cu_seqlens_k.tolist() == [0, 2, 3, 3]
    assert (ctx.max_seqlen_q, ctx.max_seqlen_k) == (2, 2)
    assert [chunk.slots.tolist() for chunk in ctx.cached] == [[12, 13, 14, 20, 21, 22], [23, 16]]
    assert [chunk.cu_seqlens.tolist() for chunk in ctx.cached] == [[0, 3, 3, 6], [0, 0, 0, 2]]
    assert [chunk.max_seqlen for chunk in ctx.cached] == [3, 2]
    assert all(chunk.cu_seqlens.dtype == torch.int32 for chunk in ctx.cached)
    assert AttentionContext.prefill([1], [0], table[:1], 4, chunk=6).cached == ()


@pytest.mark.parametrize(
    ("lengths", "cached", "chunk", "message"),
    [
        ([1], [0, 0], 8, r"of the n sequences of block_table \(n, W\), got \[1\], \[0, 0\] and \(2, 3\)"),
        ([1, 1, 1], [0, 0, 0], 8, r"got \[1, 1, 1\], \[0, 0, 0\] and \(2, 3\)"),
        ([1, -1], [0, 4], 8, r"got \[1, -1\], \[0, 4\]"),
        ([1, 1], [0, -4], 8, r"got \[1, 1\], \[0, -4\]"),
        ([1, 5], [0, 8], 8, "at most the 12 tokens of a row of block_table, got 13"),
        ([1, 1], [0, 8], 0, "chunk must be at least 1, got 0"),
    ],
)
def test_bad_contexts(lengths, cached, chunk, message):
    with pytest.raises(ValueError, match=message):
        AttentionContext.prefill(lengths, cached, torch.zeros(2, 3, dtype=torch.int32), 4, chunk=chunk)


@torch.no_grad()
def test_a_page_that_there_is_not(device):
    """On a CPU it is said at once; on a GPU its sequence gets NaN and the others what they would."""
    mla = random_model(BASE, device=device).layers[0].attention
    x = torch.randn(8, BASE.hidden_size, device=device)
    cache = torch.zeros(4, PAGE, 1, BASE.latent_dim, device=device)
    table = torch.tensor([[0, 1], [7, 2]], dtype=torch.int32, device=device)
    ctx = AttentionContext.prefill([4, 4], [PAGE, PAGE], table, PAGE, chunk=20)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=r"among the 64 rows of the cache, got slots\[16\] = 112"):
            mla(x, ctx, cache)
    else:
        out = mla(x, ctx, cache)
        assert out[:4].isfinite().all()
        assert out[4:].isnan().all()
