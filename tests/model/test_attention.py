"""MLA: against the formula, naive against absorbed, rotary tables, contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv3 import ops
from dsv3.config import Rope
from dsv3.model import AttentionContext
from dsv3.model.attention import MLA
from dsv3.model.layers import rope_tables
from dsv3.reference.groups import group_of
from tests.model.cases import BASE, CASES, random_model, tokens_for

ATTENTION = ["groups and q_lora", "without q_lora", "yarn", "yarn with two mscales", "yarn without mscales"]


def rotate(x, positions, rope: Rope):
    """Pairs (2i, 2i+1) as complex numbers, times e^(i * angle): the released code's form, for x [T, ..., dim]."""
    cos, sin = rope_tables(rope, x.device)
    turn = torch.complex(cos.double(), sin.double())[positions]
    turn = turn.view(len(positions), *[1] * (x.dim() - 2), x.shape[-1] // 2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def plain(mla: MLA, x: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
    """One sequence x [T, H] by the equations of arXiv 2405.04434, section 2.1.2, in fp64, behind `past` tokens whose latents
    (normalised) and keys (rotated) are [P, kv_lora_rank + rope]."""
    c = mla.config
    past = x.new_zeros(0, c.latent_dim) if past is None else past
    positions = torch.arange(len(past), len(past) + len(x), device=x.device)
    w = {name: param.double() for name, param in mla.named_parameters()}
    x = x.double()
    q = (
        norm(x @ w["q_a.weight"].t(), w["q_a_norm.weight"]) @ w["q_b.weight"].t()
        if c.q_lora_rank
        else x @ w["q.weight"].t()
    )
    q = q.view(len(x), c.num_attention_heads, c.qk_head_dim)
    q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    latent, k_rope = (x @ w["kv_a.weight"].t()).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    past_latent, past_rope = past.double().split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    latent = torch.cat([past_latent, norm(latent, w["kv_a_norm.weight"])])
    kv = (latent @ w["kv_b.weight"].t()).view(len(latent), c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim)
    k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
    q_rope, k_rope = rotate(q_rope, positions, c.rope), torch.cat([past_rope, rotate(k_rope, positions, c.rope)])
    scores = torch.einsum("qhd,khd->hqk", q_nope, k_nope) + torch.einsum("qhd,kd->hqk", q_rope, k_rope)
    future = torch.ones(len(x), len(latent), device=x.device).triu(1 + len(past)).bool()
    weights = (scores * c.softmax_scale).masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ w["o.weight"].t()


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_against_the_formula(name):
    mla = random_model(CASES[name]).layers[0].attention
    x = torch.randn(50, BASE.hidden_size)
    exact = plain(mla, x)
    out = mla(x, AttentionContext.batch(1, 50))
    assert (out - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_absorbed_agrees_with_naive(name, steps, device):
    c = CASES[name]
    mla = random_model(c, device=device).layers[0].attention
    lengths = [40, 3, 17]
    xs = [torch.randn(n, c.hidden_size, device=device) for n in lengths]
    cache = torch.full((12, 8, 1, c.latent_dim), float("nan"), device=device)
    table = torch.tensor([[7, 3, 0, 9, 11], [5, 1, 1, 1, 1], [2, 10, 8, 1, 1]], dtype=torch.int32, device=device)

    def slots(i, positions):
        return table[i, positions // 8].long() * 8 + positions % 8

    mapping = torch.cat([slots(i, torch.arange(n, device=device)) for i, n in enumerate(lengths)])
    ctx = AttentionContext.packed(lengths, device, slot_mapping=mapping)
    naive = mla(torch.cat(xs), ctx, cache).split(lengths)

    last = [torch.arange(n - steps, n, device=device) for n in lengths]
    stored = cache.clone()
    for i, positions in enumerate(last):
        stored.view(-1, c.latent_dim)[slots(i, positions)] = float("nan")  # the step must store them again
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    mapping = torch.cat([slots(i, positions) for i, positions in enumerate(last)])
    ctx = AttentionContext.decode(table, seq_lens, mapping, steps)
    out = mla(torch.cat([x[-steps:] for x in xs]), ctx, stored).split(steps)
    for absorbed, whole in zip(out, naive, strict=True):
        torch.testing.assert_close(absorbed, whole[-steps:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored, cache, equal_nan=True, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_packed_sequences_are_separate(device):
    mla = random_model(BASE, device=device).layers[0].attention
    lengths = [5, 1, 30]
    xs = [torch.randn(n, BASE.hidden_size, device=device) for n in lengths]
    packed = mla(torch.cat(xs), AttentionContext.packed(lengths, device)).split(lengths)
    for x, out in zip(xs, packed, strict=True):
        torch.testing.assert_close(mla(x, AttentionContext.batch(1, len(x), device)), out, rtol=1e-4, atol=1e-5)


def test_rotation_is_interleaved(device):
    """The first pair is (0, 1): rotating (0, R/2), the other form in use, gives something else."""
    cos, sin = rope_tables(Rope(dim=4, theta=100.0, max_positions=8), device)
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]], device=device)
    out = ops.rope_(x, cos, sin, torch.tensor([3], device=device), head_dim=4)
    expected = torch.tensor([[3.0]]).cos().item(), torch.tensor([[3.0]]).sin().item()
    torch.testing.assert_close(out, torch.tensor([[*expected, 0.0, 0.0]], device=device))


def test_tables():
    rope = Rope(dim=64, theta=10000.0, max_positions=5000)
    cos, sin = rope_tables(rope, torch.device("cpu"))
    assert cos.shape == sin.shape == (5000, 32)
    assert cos.dtype == torch.float32
    angles = 4999 * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    torch.testing.assert_close(cos[-1].double(), angles.cos(), rtol=0, atol=1e-3)  # 4999 radians in fp32

    yarn = replace(rope, factor=40.0, original_max_positions=4096)
    cos, sin = rope_tables(yarn, torch.device("cpu"))
    slowdown = torch.atan2(*(t[1].double() for t in rope_tables(rope, torch.device("cpu"))[::-1]))
    slowdown = slowdown / torch.atan2(sin[1].double(), cos[1].double())
    # 4096 positions turn pair 10 32.6 times and pair 23 once: pairs up to 10 stay, pairs from 23 are 40 times slower.
    torch.testing.assert_close(slowdown[:11], torch.ones(11).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(slowdown[23:], torch.full((9,), 40.0).double(), rtol=1e-3, atol=0)
    assert (slowdown[11:23].diff() > 0).all()

    scaled = rope_tables(replace(yarn, attention_factor=1.5), torch.device("cpu"))
    torch.testing.assert_close(scaled[0], 1.5 * cos)


def test_tables_made_in_inference_mode_serve_training():
    config = replace(BASE, rope_theta=777.0)
    model, tokens = random_model(config), tokens_for(config, 1, 9)
    with torch.inference_mode():
        model(tokens)
    model(tokens).sum().backward()
    assert model.layers[0].attention.kv_a.weight.grad.isfinite().all()


def test_contexts(device):
    ctx = AttentionContext.batch(2, 3, device)
    packed = AttentionContext.packed([3, 3], device)
    segments = AttentionContext.segments(torch.tensor([0, 3, 6], device=device), 6, 3)
    for other in (packed, segments):
        assert torch.equal(ctx.positions, other.positions)
        assert torch.equal(ctx.cu_seqlens_q, other.cu_seqlens_q)
        assert other.cu_seqlens_q.dtype == torch.int32
        assert (other.max_seqlen_q, other.max_seqlen_k) == (3, 3)
    ragged = AttentionContext.segments(torch.tensor([0, 1, 4, 4, 6], device=device), 6, 3)
    assert ragged.positions.tolist() == [0, 0, 1, 2, 0, 1]
    assert group_of(torch.tensor([0, 1, 4, 4, 6], device=device), 6).tolist() == [0, 1, 1, 1, 3, 3]
    seq_lens = torch.tensor([5, 2], dtype=torch.int32, device=device)
    decode = AttentionContext.decode(torch.zeros(2, 1, device=device), seq_lens, torch.zeros(4, device=device), 2)
    assert decode.positions.tolist() == [3, 4, 0, 1]
