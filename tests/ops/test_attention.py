from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dsv3 import ops
from dsv3.testing import check_compile, check_op, check_registration

SCALE = 0.2


def sequence(q, k_nope, k_rope, v, causal):
    """One sequence by the formula, q [Sq,H,D]; the last query sees the last key."""
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], -1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(k.shape[0] - q.shape[0] + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def case(device, lengths_q, lengths_k, dims=(3, 8, 4, 6), dtype=torch.float32):
    """Arguments of mla_attention; k_nope and v are views of one tensor, as the model has them."""
    heads, nope, rope, value = dims
    tq, tk = sum(lengths_q), sum(lengths_k)
    q, kv, k_rope = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((tq, heads, nope + rope), (tk, heads, nope + value), (tk, rope))
    )
    cu = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lengths_q, lengths_k)]
    return (q, kv, k_rope), (*cu, max(lengths_q), max(lengths_k)), nope


def split_by(cu, *tensors):
    bounds = cu.tolist()
    return [[t[a:b] for t in tensors] for a, b in pairwise(bounds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(3, 8, 4, 6), (2, 16, 16, 32), (1, 8, 8, 24)], ids=["narrow v", "equal", "wide v"])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [([16, 16, 16], [16, 16, 16]), ([5, 1, 17], [5, 1, 17]), ([4, 4], [9, 9]), ([1, 6, 2], [8, 6, 5])],
    ids=["equal", "packed", "equal with past", "packed with past"],
)
def test_mla_attention(lengths_q, lengths_k, dims, causal, dtype, device):
    tensors, lengths, nope = case(device, lengths_q, lengths_k, dims, dtype)

    def ours(q, kv, k_rope):
        k_nope, v = kv.split([nope, dims[3]], -1)
        return ops.mla_attention(q, k_nope, k_rope, v, *lengths, causal=causal, softmax_scale=SCALE)[0]

    def plain(q, kv, k_rope):
        k_nope, v = kv.split([nope, dims[3]], -1)
        parts = zip(split_by(lengths[0], q), split_by(lengths[1], k_nope, k_rope, v), strict=True)
        return torch.cat([sequence(*queries, *keys, causal) for queries, keys in parts])

    check_op(ours, plain, *tensors)


def test_sequences_do_not_see_each_other(device):
    (q, kv, k_rope), lengths, nope = case(device, [7, 9], [7, 9])

    def out(kv):
        k_nope, v = kv.split([nope, 6], -1)
        return ops.mla_attention(q, k_nope, k_rope, v, *lengths, softmax_scale=SCALE)[0]

    changed = kv.clone()
    changed[7:] = float("nan")
    assert torch.equal(out(kv)[:7], out(changed)[:7])


# ---- decoding ----
PAGE, RANK, ROPE, HEADS = 8, 16, 4, 3


def decode_case(device, lengths, steps, dtype=torch.float32):
    """A cache in which everything that must not be read is NaN, and the latents of each sequence."""
    width = max(1, max(-(-n // PAGE) for n in lengths))
    pages = torch.randperm(len(lengths) * width)
    cache = torch.full((len(pages) + 2, PAGE, 1, RANK + ROPE), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    latents = []
    for i, n in enumerate(lengths):
        latent = torch.randn(n, RANK + ROPE).to(dtype)
        used = -(-n // PAGE)
        table[i, :used] = pages[i * width : i * width + used].int()
        for j in range(n):
            cache[table[i, j // PAGE], j % PAGE, 0] = latent[j]
        latents.append(latent.to(device))
    q = torch.randn(len(lengths), steps, HEADS, RANK + ROPE).to(dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return q.to(device), cache.to(device), table.to(device), seq_lens.to(device), latents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "steps"), [([1, 8, 9, 30], 1), ([3, 16, 29], 3), ([5], 5)])
def test_mla_decode(lengths, steps, causal, dtype, device):
    q, cache, table, seq_lens, latents = decode_case(device, lengths, steps, dtype)
    out, lse = ops.mla_decode(q, cache, table, seq_lens, softmax_scale=SCALE, kv_lora_rank=RANK, causal=causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for i, n in enumerate(lengths):
        scores = torch.einsum("shd,kd->hsk", q[i].double(), latents[i].double()) * SCALE
        if causal:
            hidden = torch.ones(steps, n, dtype=torch.bool, device=device).triu(n - steps + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        exact = torch.einsum("hsk,kd->shd", scores.softmax(-1), latents[i][:, :RANK].double())
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
        assert (out[i] - exact).norm() < tolerance * exact.norm()
        torch.testing.assert_close(lse[i].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_decode_of_an_empty_sequence(device):
    q, cache, table, seq_lens, _ = decode_case(device, [0, 4], 1)
    out, lse = ops.mla_decode(q, cache, table, seq_lens, softmax_scale=SCALE, kv_lora_rank=RANK)
    assert not out[0].any()
    assert (lse[0] == float("-inf")).all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[5, -1, 0, 31], [-1, -1, 3, -1], [-1] * 4, []])
def test_mla_append_kv(slots, dtype, device):
    tokens = len(slots)
    kv_a = torch.randn(tokens, RANK + ROPE, device=device).to(dtype)
    weight = (torch.rand(RANK, device=device) + 0.5).to(dtype)
    positions = torch.arange(tokens, device=device) * 7
    angles = torch.rand(40, ROPE // 2, device=device)
    cache = torch.randn(4, PAGE, 1, RANK + ROPE, device=device).to(dtype)
    expected = cache.clone()
    latent = ops.rmsnorm(kv_a[:, :RANK], weight, eps=1e-6)
    rope = ops.rope_(kv_a[:, RANK:].clone(), angles.cos(), angles.sin(), positions, head_dim=ROPE)
    for t, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // PAGE, slot % PAGE, 0] = torch.cat([latent[t], rope[t]])
    where = torch.tensor(slots, dtype=torch.int64, device=device)
    ops.mla_append_kv(kv_a, weight, angles.cos(), angles.sin(), positions, where, cache, eps=1e-6)
    torch.testing.assert_close(cache, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    untouched = [row for row in range(4 * PAGE) if row not in slots]
    assert torch.equal(cache.view(-1, RANK + ROPE)[untouched], expected.view(-1, RANK + ROPE)[untouched])


# ---- registration, compilation, errors ----
def test_registration_and_compile(device):
    q, cache, table, seq_lens, _ = decode_case(device, [3, 9], 1)
    cache = cache.nan_to_num()
    check_registration("mla_decode", q, cache, table, seq_lens, None, SCALE, RANK, True, False)
    kv_a, weight = torch.randn(2, RANK + ROPE, device=device), torch.ones(RANK, device=device)
    tables = torch.rand(2, 16, ROPE // 2, device=device)
    positions, slots = torch.tensor([2, 8], device=device), torch.tensor([4, -1], device=device)
    check_registration("mla_append_kv", kv_a, weight, *tables, positions, slots, cache, 1e-6, None, None)

    def decode(q, cache, table, seq_lens):
        return ops.mla_decode(q, cache, table, seq_lens, softmax_scale=SCALE, kv_lora_rank=RANK)

    check_compile(decode, q, cache, table, seq_lens)


def test_bad_arguments():
    x, cu = torch.zeros(2, 1, 8), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"mla_attention: .* got \(\(2, 1, 8\), \(2, 1, 8\), \(2, 4\), \(2, 1, 8\)\)"):
        ops.mla_attention(x, x, x[:, 0, :4], x, cu, cu, 2, 2, softmax_scale=1.0)
    cache, table, one = torch.zeros(2, 4, 1, 9), torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(
        ValueError, match=r"mla_decode: .* got \(1, 1, 1, 8\), torch.float32 \(2, 4, 1, 9\) and \(1, 2\)"
    ):
        ops.mla_decode(x[:1, None], cache, table, one, softmax_scale=1.0, kv_lora_rank=4)
    with pytest.raises(ValueError, match=r"mla_append_kv: .* got \(2, 9\), \(2, 4, 1, 9\) and \(3,\)"):
        ops.mla_append_kv(torch.zeros(2, 9), one, one, one, torch.zeros(2), torch.zeros(3), cache)
