"""Sequences in a paged latent cache, what attention over them is, and FlashMLA's limits: for the tests of mla_decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3 import ops

BF16 = torch.bfloat16


LATENT, WIDTH, FP8_WIDTH = 512, 576, 656


SCALE = 192**-0.5


NAN, INF = float("nan"), float("inf")


GARBAGE = (-1, -(2**31), 2**31 - 1)  # what unused entries of the block table may be


@dataclass(frozen=True)
class Case:
    """Arguments of mla_decode, and the keys fp32 [B, L, 576] that they stand for (zeros past a length)."""

    q: Tensor
    cache: Tensor
    table: Tensor
    seq_lens: Tensor
    keys: Tensor

    def __call__(self, **settings):
        return ops.mla_decode(self.q, self.cache, self.table, self.seq_lens, softmax_scale=SCALE, **settings)

    def schedule(self, **settings):
        return ops.mla_schedule(self.seq_lens, self.q.shape[1], self.q.shape[2], **settings)

    def take(self, sequences, steps=slice(None)):
        """Some of its sequences (and steps of all of them)."""
        rest = (t[sequences] for t in (self.table, self.seq_lens, self.keys))
        return Case(self.q[sequences][:, steps].contiguous(), self.cache, *(t.contiguous() for t in rest))


def small(*shape, device):
    """FlashMLA's inputs."""
    return (torch.randn(shape, device=device) / 10).clamp(-1, 1).to(BF16)


def fp8_rows(rows):
    """uint8 [N, 656] by the description of the layout, and the values fp32 that they stand for."""
    codes, sf = ops.per_token_cast(rows[:, :LATENT], pow2_scale=True)
    parts = codes, sf.clone(memory_format=torch.contiguous_format), rows[:, LATENT:].contiguous()
    values = codes.float() * sf.repeat_interleave(128, -1)
    assert torch.equal(values, values.to(BF16).float())
    return torch.cat([part.view(torch.uint8) for part in parts], -1), torch.cat([values, rows[:, LATENT:].float()], -1)


def make(lengths, s_q, heads, device, *, page=64, kv="bf16", spare=3, extra_columns=2):
    """Pages in random order in a pool with `spare` others. Whatever no one may look at holds NaN (in FP8 all ones, which is
    NaN in codes, scales and bf16), unused entries of the table garbage."""
    batch, longest = len(lengths), max(lengths, default=0)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    used = (seq_lens.long() + page - 1) // page
    width = -(-longest // page) + extra_columns
    pool = sum(-(-n // page) for n in lengths) + spare
    column = torch.arange(width, device=device)
    is_used = column < used[:, None]
    table = torch.tensor(GARBAGE, device=device)[torch.randint(3, (batch, width), device=device)]
    table[is_used] = torch.randperm(pool, device=device)[: pool - spare]
    slot = (table.clamp(0, pool - 1)[:, :, None] * page + torch.arange(page, device=device)).flatten(1)[:, :longest]
    live = torch.arange(longest, device=device) < seq_lens[:, None]

    rows = small(int(live.sum()), WIDTH, device=device)
    keys = torch.zeros(batch, longest, WIDTH, device=device)
    if kv == "fp8":
        cache = torch.full((pool, page, 1, FP8_WIDTH), 0xFF, dtype=torch.uint8, device=device)
        cache.view(-1, FP8_WIDTH)[slot[live]], keys[live] = fp8_rows(rows)
    else:
        cache = torch.full((pool, page, 1, WIDTH), NAN, dtype=BF16, device=device)
        cache.view(-1, WIDTH)[slot[live]], keys[live] = rows, rows.float()
    return Case(small(batch, s_q, heads, WIDTH, device=device), cache, table.int(), seq_lens, keys)


def varied(batch, s_k, s_q):
    """Lengths N(s_k, s_k / 2), at least the new tokens and at most 2 s_k; where there are several, one is 0."""
    generator = torch.Generator().manual_seed(batch * s_k + s_q)
    lengths = torch.normal(float(s_k), s_k / 2, (batch,), generator=generator).int().clamp(s_q, 2 * s_k).tolist()
    if batch > 1:
        lengths[batch // 2] = 0
    return lengths


def plain(case, causal=True):
    """out fp32 [B, S, H, 512] and lse [B, H, S]."""
    steps, keys = case.q.shape[1], case.keys
    scores = torch.einsum("bshd,bkd->bhsk", case.q.float(), keys) * SCALE
    count = case.seq_lens[:, None] - (torch.arange(steps - 1, -1, -1, device=keys.device) if causal else 0)
    hidden = torch.arange(keys.shape[1], device=keys.device) >= count.expand(-1, steps)[:, :, None]
    scores.masked_fill_(hidden[:, None], -INF)
    lse = torch.logsumexp(scores, -1)
    weights = scores.sub_(lse[..., None]).exp_().nan_to_num_(0.0)  # NaN: -inf - -inf, where no key is seen
    return torch.einsum("bhsk,bkd->bshd", weights, keys[..., :LATENT]), lse


def check(found, exact, kv="bf16"):
    """FlashMLA's limits, twice as wide where the keys came out of FP8."""
    factor = 2 if kv == "fp8" else 1
    (out, lse), (exact_out, exact_lse) = found, exact
    assert (out.dtype, out.shape) == (BF16, exact_out.shape)
    assert (lse.dtype, lse.shape) == (torch.float32, exact_lse.shape)
    error = (out.float() - exact_out).abs()
    near = (error <= factor * 8e-4) | (error <= factor * 2.01 / 128 * exact_out.abs())
    assert near.all(), (
        f"out: {int((~near).sum())} of {near.numel()} differ, by up to {float(error.nan_to_num(INF).max())}"
    )
    x, y = out.double(), exact_out.double()
    square = float((x * x + y * y).sum())
    if square > 0:
        assert 1 - 2 * float((x * y).sum()) / square <= factor * 5e-6
    empty = exact_lse == -INF
    assert torch.equal(lse == -INF, empty)
    off = (lse - exact_lse).abs()[~empty]
    assert (off <= factor * (8.01 / 65536 * exact_lse[~empty].abs()).clamp(min=1e-6)).all(), f"lse: {float(off.max())}"


def same(a, b):
    """Bit for bit."""
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))
