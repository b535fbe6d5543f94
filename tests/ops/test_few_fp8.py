"""few_linear and few_experts with weights in FP8: tokens stay bf16, so the result is that of the dequantised weights."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.testing import check_compile, check_graph, check_registration
from tests.ops.few import BF16, draw

TOKENS = [0, 1, 7, 8, 9, 16, 17, 32, 33, 64, 65]
CODES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)


def quantize(weight):
    """In blocks whose scales differ, and are no powers of two."""
    factors = torch.rand(*weight.shape[:-1], 1, device=weight.device) * 3 + 0.1
    return ops.Quantized(*ops.per_block_cast((weight * factors).to(weight.dtype)))


def exact(x, weight):
    return x.double() @ weight.dequantize(torch.float64).transpose(-1, -2)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


# ---- few_linear ----
@pytest.mark.parametrize(("rows", "depth"), [((16, 208), 48), ((576, 144), 1024), ((144,), 400), ((7216,), 416)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_few_linear(tokens, rows, depth, device):
    """Several matrices, and one of many rows; depths that end within a block. In fp32 nothing is rounded on the way."""
    x, weights = draw(tokens, depth, device=device), [quantize(draw(n, depth, device=device)) for n in rows]
    outs, wide = ops.few_linear(x, weights), ops.few_linear(x, weights, out_dtype=torch.float32)
    for out, fp32, weight in zip(outs, wide, weights, strict=True):
        assert out.shape == fp32.shape == (tokens, weight.shape[0])
        assert (out.dtype, fp32.dtype) == (BF16, torch.float32)
        assert torch.equal(out, fp32.to(BF16))
        if tokens:
            assert relative(fp32, exact(x, weight)) < 2e-6


@pytest.mark.parametrize("rows", [144, 7296])
def test_every_code(rows, device):
    """Each of the 254 numbers of e4m3, smallest ones too, meets a one in a row of zeros; a code of NaN gives NaN to its row
    alone, and a scale of NaN to its block of 128 rows."""
    codes = CODES.to(device).view(torch.uint8).repeat(rows, 1)
    scales = torch.full((-(-rows // 128), 2), 0.75, device=device)
    good = codes.clone()
    good[:, (codes[0] & 0x7F) == 0x7F] = 0
    weight = ops.Quantized(good.view(torch.float8_e4m3fn), scales)
    x = torch.eye(256, device=device, dtype=BF16)
    for first in range(0, 256, 64):
        (found,) = ops.few_linear(x[first : first + 64], [weight], out_dtype=torch.float32)
        assert torch.equal(found, weight.dequantize(torch.float32)[:, first : first + 64].t())
    one = good.clone()
    one[5, 255] = 0x7F
    ones = torch.ones(3, 256, device=device, dtype=BF16)
    (found,) = ops.few_linear(ones, [ops.Quantized(one.view(torch.float8_e4m3fn), scales)])
    assert found.isnan().nonzero()[:, 1].tolist() == [5] * 3
    scales[1, 0] = torch.nan
    (found,) = ops.few_linear(ones, [weight])
    assert found.isnan().any(0).nonzero().flatten().tolist() == list(range(128, min(256, rows)))


def test_scales_may_begin_anywhere(device):
    """As those of one expert among others do, whose codes are aligned."""
    experts, x = quantize(draw(3, 144, 304, device=device)), draw(9, 304, device=device)
    assert experts.sf[1].data_ptr() % 16
    (found,) = ops.few_linear(x, [of_expert(experts, 1)], out_dtype=torch.float32)
    assert relative(found, exact(x, of_expert(experts, 1))) < 2e-6
    shared = {"shared_gate_up": of_expert(quantize(draw(3, 320, 304 + 16, device=device)), 1)}
    shared["shared_down"] = of_expert(quantize(draw(3, 320, 160, device=device)), 1)
    wide = draw(9, 320, device=device)
    assert relative(ops.few_experts(wide, **shared)[:, 0], mlp(wide, *shared.values())) < 6e-3


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "depth"), [(96, 2048), (7200, 1088), (40016, 304)])
def test_a_token_is_the_same_alone(rows, depth):
    """Also of blocks that go through several tiles, whose depth is an odd number of blocks of 128."""
    device = torch.device("cuda")
    x, weight = draw(64, depth, device=device), quantize(draw(rows, depth, device=device))
    (whole,) = ops.few_linear(x, [weight])
    assert relative(whole, exact(x, weight)) < 4e-3
    for part in (slice(3, 4), slice(9, 17), slice(9, 21), slice(17, 49)):
        for static in (False, True):
            assert torch.equal(ops.few_linear(x[part], [weight], static_weights=static)[0], whole[part])


# ---- few_experts ----
def experts_of(experts, hidden, inner, shared, device):
    shapes = {"gate_up": (experts, 2 * inner, hidden), "down": (experts, hidden, inner)} if experts else {}
    if shared:
        shapes |= {"shared_gate_up": (2 * shared, hidden), "shared_down": (hidden, shared)}
    return {name: quantize(draw(*s, device=device, scale=s[-1] ** -0.5)) for name, s in shapes.items()}


def choose(tokens, experts, device):
    scores = torch.rand(tokens, experts, device=device)
    return scores.topk(4, dim=1).indices, torch.rand(tokens, 4, device=device) + 0.1


def mlp(x, gate_up, down, weight=1.0):
    """In fp64, gate, up and act rounded as on the way."""
    gate, up = exact(x, gate_up).to(BF16).double().chunk(2, -1)
    act = (gate / (1 + (-gate).exp()) * up * weight).to(BF16)
    return exact(act, down)


def of_expert(weight, e):
    return ops.Quantized(weight.data[e], weight.sf[e])


@pytest.mark.parametrize(
    "sizes", [(12, 256, 96, 64), (64, 512, 256, 256), (0, 1024, 0, 1408), (9, 160, 32, 0), (64, 1312, 160, 288)]
)
@pytest.mark.parametrize("tokens", TOKENS)
def test_few_experts(tokens, sizes, device):
    experts = sizes[0]
    weights, x = experts_of(*sizes, device), draw(tokens, sizes[1], device=device)
    index, factors = choose(tokens, experts, device) if experts else (None, None)
    found = ops.few_experts(x, index, factors, **weights)
    assert found.shape == (tokens, (4 if experts else 0) + ("shared_down" in weights), sizes[1])
    expected = torch.empty(found.shape, dtype=torch.float64, device=device)
    for e in range(experts):
        one = mlp(x[:, None], *(of_expert(weights[name], e) for name in ("gate_up", "down")), factors[..., None])
        expected[:, :4] = torch.where((index == e)[..., None], one, expected[:, :4])
    if "shared_down" in weights:
        expected[:, -1] = mlp(x, weights["shared_gate_up"], weights["shared_down"])
    if tokens:
        assert relative(found, expected) < 6e-3


def test_all_tokens_for_the_same_experts(device):
    """More passes than one for every expert; those without tokens are not looked at."""
    weights = experts_of(64, 128, 64, 0, device)
    for weight in weights.values():
        weight.sf[4:] = torch.nan
    x, factors = draw(64, 128, device=device), torch.rand(64, 4, device=device) + 0.1
    found = ops.few_experts(x, torch.arange(4, device=device).repeat(64, 1), factors, **weights)
    for e in range(4):
        one = mlp(x, *(of_expert(weights[name], e) for name in ("gate_up", "down")), factors[:, e : e + 1])
        assert relative(found[:, e], one) < 6e-3


@pytest.mark.cuda
def test_a_token_of_experts_is_the_same_alone():
    device = torch.device("cuda")
    weights = experts_of(24, 256, 96, 64, device)
    inputs = draw(64, 256, device=device), *choose(64, 24, device)
    whole = ops.few_experts(*inputs, **weights)
    for part in (slice(5, 6), slice(9, 21), slice(17, 50)):
        assert torch.equal(ops.few_experts(*(x[part] for x in inputs), **weights), whole[part])


# ---- once an op ----
@pytest.mark.parametrize("name", ["few_linear", "few_experts"])
def test_registration_compile_and_graph(name, device):
    x, weight = draw(5, 64, device=device), quantize(draw(32, 64, device=device))
    if name == "few_linear":
        args = [weight.data] * 2, [weight.sf] * 2, BF16, False
    else:
        weights = experts_of(12, 64, 32, 64, device).values()
        args = *choose(5, 12, device), *(w.data for w in weights), *(w.sf for w in weights), False
    check_registration(name, x, *args)
    op = getattr(torch.ops.dsv3, name)
    check_compile(lambda x: op(x, *args), x)
    if device.type == "cuda":
        check_graph(lambda x: op(x, *args), x)


def bad_scales(weight, rows=0, dtype=torch.float32):
    return ops.Quantized(weight.data, torch.ones(weight.sf.shape[0] + rows, weight.sf.shape[1], dtype=dtype))


BAD = [
    (lambda x, w, q: ops.few_linear(x, q), r"few_linear: expected x \(T, K\) and a list of weights"),
    (
        lambda x, w, q: ops.few_linear(x, [w, q]),
        "few_linear: expected weights that are all Quantized or none, got 1 of 2",
    ),
    (
        lambda x, w, q: ops.few_linear(x, [bad_scales(q, rows=1)]),
        r"few_linear: a weight of \(32, 64\) must have scales of \(1, 1\), got \(2, 1\)",
    ),
    (lambda x, w, q: ops.few_linear(x, [bad_scales(q, dtype=BF16)]), "few_linear: expected scales of float32"),
    (
        lambda x, w, q: ops.few_linear(x, [ops.Quantized(w, q.sf)]),
        "few_linear: expected Quantized weights of float8_e4m3fn",
    ),
    (lambda x, w, q: ops.few_linear(x[:, :32], [q]), "few_linear: expected x"),
    (
        lambda x, w, q: torch.ops.dsv3.few_linear(x, [q.data] * 2, [q.sf], BF16, False),
        "few_linear: expected scales of every weight or of none, got 1 of 2",
    ),
    (
        lambda x, w, q: torch.ops.dsv3.few_linear(x, [q.data], [q.sf.repeat(3, 3)], BF16, False),
        r"few_linear: expected weights of e4m3 with scales of their blocks, got \(32, 64\) with \(3, 3\)",
    ),
    (lambda x, w, q: torch.ops.dsv3.few_linear(x, [w], [q.sf], BF16, False), "few_linear: expected weights of e4m3"),
    (
        lambda x, w, q: torch.ops.dsv3.few_experts(x, *[None] * 4, q.data, q.data.t(), *[None] * 3, q.sf, False),
        "few_experts: expected scales of every weight or of none, got 1 of 2",
    ),
    (
        lambda x, w, q: ops.few_experts(x, shared_gate_up=w.repeat(2, 1), shared_down=ops.Quantized(q.data.t(), q.sf)),
        "few_experts: expected weights that are all Quantized or none, got 1 of 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call, message):
    x, weight = draw(5, 64, device="cpu"), draw(32, 64, device="cpu")
    with pytest.raises(ValueError, match=message):
        call(x, weight, quantize(weight))
