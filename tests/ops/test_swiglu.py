from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsv3 import ops
from dsv3.ops import registry
from dsv3.reference.quant import dequantize
from dsv3.testing import (
    check_compile,
    check_graph,
    check_op,
    check_registration,
    reference_ops,
    relative_error,
)
from tests.ops.casts import GRADIENT_FLOOR, SENTINEL, bits, check_same, draw, filled

SHAPES = [(0, 64), (1, 64), (127, 512), (33, 2048), (3, 18432), (4001, 128), (5, 10944)]


def plain(gate_up, weights=None):
    gate, up = gate_up.chunk(2, -1)
    out = F.silu(gate) * up
    return out if weights is None else out * weights[:, None].to(out.dtype)


def make(tokens, inner, dtype, device):
    return torch.randn(tokens, 2 * inner, device=device).to(dtype), torch.rand(tokens, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype, device):
    gate_up, weights = make(*shape, dtype, device)
    check_op(ops.swiglu, plain, gate_up)
    check_op(ops.swiglu, lambda g, w: plain(g.to(w.dtype), w).to(g.dtype), gate_up, weights)


def test_large_gates(device):
    gate_up = torch.tensor([[-200.0, 200.0, -80.0, 80.0, 1.0, 1.0, 1.0, 1.0]], device=device)
    assert torch.equal(ops.swiglu(gate_up)[0, [0, 1, 3]], torch.tensor([0.0, 200.0, 80.0], device=device))


# What the fused ops must be bit for bit, on the same device.
def unfused(gate_up, weights, **settings):
    return ops.per_token_cast(torch.ops.dsv3.swiglu(gate_up, weights), **settings)


def unfused_backward(dout, gate_up, weights, **settings):
    dgate_up, dweights = torch.ops.dsv3.swiglu_backward(dout, gate_up, weights)
    cast = ops.per_token_cast(dgate_up, **{"amax_floor": GRADIENT_FLOOR, **settings})
    return *cast, None if weights is None else dweights


def unfused_transposes(dout, gate_up, weights, offsets=None, **settings):
    dgate_up, _ = torch.ops.dsv3.swiglu_backward(dout, gate_up, weights)
    dgate_up_t = ops.cast_transpose(dgate_up, offsets, **{"amax_floor": GRADIENT_FLOOR, **settings})
    return *dgate_up_t, *ops.cast_transpose(torch.ops.dsv3.swiglu(gate_up, weights), offsets)


def check_both_casts(found, backward, transposes, rows=None):
    """Codes bit for bit; the weights' gradient, whose terms are added in another order, to fp32's rounding. Of its terms
    nothing is known here, so it is measured by the largest."""
    data, sf, dweights, *transposed = found
    *cast, expected = backward
    check_same([t[:rows] for t in (data, sf)], [t[:rows] for t in cast])
    check_same([t for pair in transposed for t in pair], transposes)
    assert (dweights is None) == (expected is None)
    if expected is not None and expected[:rows].numel():
        scale = expected[:rows].abs().nan_to_num(posinf=0.0).max()
        torch.testing.assert_close(
            dweights[:rows], expected[:rows], rtol=1e-4, atol=1e-5 * scale.item(), equal_nan=True
        )


SETTINGS = [{}, {"pow2_scale": True}, {"amax_floor": 0.0}, {"amax_floor": 1e-4}]
CAST_SHAPES = [
    *SHAPES,
    (9, 16),
    (130, 144),
    (7, 1040),
    (5, 2176),
    (127, 384),
    (9, 640),
    (131, 768),
    (65, 1024),
    (7, 1536),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CAST_SHAPES)
def test_swiglu_cast(shape, dtype, settings, device):
    gate_up, weights = make(*shape, dtype, device)
    gate_up[:, ::3] = draw(gate_up[:, ::3].shape, dtype, device, spread=2.0)
    for factor in (None, weights):
        found = ops.swiglu_cast(gate_up, factor, **settings)
        check_same(found, unfused(gate_up, factor, **settings))
        check_same(found, ops.swiglu_cast(gate_up, factor, **settings))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CAST_SHAPES)
def test_swiglu_cast_backward(shape, dtype, settings, device):
    gate_up, weights = make(*shape, dtype, device)
    gate_up[:, ::3] = draw(gate_up[:, ::3].shape, dtype, device, spread=2.0)
    dout = 1e-12 * torch.randn(shape, device=device)
    for factor in (None, weights):
        args = dout.to(dtype), gate_up, factor
        expected = unfused_backward(*args, **settings)
        check_same(ops.swiglu_cast_backward(*args, **settings), expected)
        found = ops.swiglu_backward_both_casts(*args, **settings)
        check_both_casts(found, expected, unfused_transposes(*args, **settings))
        again = ops.swiglu_backward_both_casts(*args, **settings)
        check_same([*found[:3], *found[3], *found[4]], [*again[:3], *again[3], *again[4]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("inner", [272, 384])
def test_casts_of_values_that_are_not_finite(bad, inner, device):
    """A bad value spoils its tiles, a bad weight its row; nothing else changes."""
    gate_up, weights = make(9, inner, torch.bfloat16, device)
    dout = torch.randn(9, inner, device=device).bfloat16()
    clean = ops.swiglu_cast(gate_up, weights), ops.swiglu_cast_backward(dout, gate_up, weights)
    gate_up[2, 3], gate_up[2, inner + 200], weights[5], dout[7, 140] = bad, bad, bad, bad
    found = ops.swiglu_cast(gate_up, weights), ops.swiglu_cast_backward(dout, gate_up, weights)
    check_same(found[0], unfused(gate_up, weights))
    expected = unfused_backward(dout, gate_up, weights)
    check_same(found[1], expected)
    both = ops.swiglu_backward_both_casts(dout, gate_up, weights)
    check_both_casts(both, expected, unfused_transposes(dout, gate_up, weights))
    for a, b in zip(found, clean, strict=True):
        good = [0, 1, 3, 4, 6, 8]
        assert torch.equal(dequantize(*a[:2])[good], dequantize(*b[:2])[good])


@pytest.mark.parametrize("end", [0, 1, 77, 130])
@pytest.mark.parametrize("inner", [256, 272])
def test_casts_of_the_rows_of_groups(inner, end, device):
    gate_up, weights = make(130, inner, torch.bfloat16, device)
    dout = torch.randn(130, inner, device=device).bfloat16()
    gate_up[end:], dout[end:], weights[end:] = float("nan"), float("nan"), float("nan")
    offsets = torch.tensor([0, 0, end // 2, end], dtype=torch.int32, device=device)
    found = ops.swiglu_cast(gate_up, weights, offsets=offsets)
    check_same([t[:end] for t in found], [t[:end] for t in unfused(gate_up, weights)])
    gradients = ops.swiglu_cast_backward(dout, gate_up, weights, offsets=offsets)
    expected = unfused_backward(dout, gate_up, weights)
    check_same([t[:end] for t in gradients], [t[:end] for t in expected])
    both = ops.swiglu_backward_both_casts(dout, gate_up, weights, offsets=offsets)
    check_both_casts(both, expected, unfused_transposes(dout, gate_up, weights, offsets), end)


@pytest.mark.parametrize("lengths", [[0, 129, 0, 3, 256, 61], [1] * 40, [513], [0, 0, 0]])
@pytest.mark.parametrize("inner", [128, 384, 768])
def test_both_casts_of_groups(inner, lengths, device):
    """Groups that begin between the rows that a thread holds, that are empty, and more than a tile."""
    tokens = sum(lengths) + 7
    gate_up, weights = make(tokens, inner, torch.bfloat16, device)
    dout = torch.randn(tokens, inner, device=device).bfloat16()
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    for factor in (None, weights):
        found = ops.swiglu_backward_both_casts(dout, gate_up, factor, offsets=offsets, pow2_scale=True)
        expected = unfused_backward(dout, gate_up, factor, pow2_scale=True)
        transposes = unfused_transposes(dout, gate_up, factor, offsets, pow2_scale=True)
        check_both_casts(found, expected, transposes, sum(lengths))


@pytest.mark.cuda
def test_rows_of_no_group_are_not_written():
    gate_up, weights = make(130, 256, torch.bfloat16, "cuda")
    dout = torch.randn(130, 256, device="cuda").bfloat16()
    offsets = torch.tensor([0, 30, 77], dtype=torch.int32, device="cuda")
    forward = unfused(gate_up, weights)
    backward = unfused_backward(dout, gate_up, weights)
    outputs, gradients, both = filled(forward), filled(backward), filled(backward[:2])
    registry.native().swiglu_cast(*outputs, gate_up, weights, offsets, False, 1e-4)
    args = dout, gate_up, weights, offsets, False, GRADIENT_FLOOR
    registry.native().swiglu_cast_backward(*gradients, *args)
    transposes = unfused_transposes(dout, gate_up, weights, offsets)
    transposed, parts = filled(transposes), torch.full((4, 130), SENTINEL, device="cuda")
    registry.native().swiglu_backward_both_casts(*both, *transposed, parts, *args)
    check_same(transposed, transposes)
    assert (parts[:, 77:] == SENTINEL).all()
    for found, expected in ((outputs, forward), (gradients, backward), (both, backward[:2])):
        check_same([t[:77] for t in found], [t[:77] for t in expected])
        assert all((t[77:].float() == torch.tensor(SENTINEL).to(t.dtype).float().item()).all() for t in found)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(32768, 2048), (4096, 18432)])
def test_casts_at_v3_shapes(shape):
    gate_up, weights = make(*shape, torch.bfloat16, "cuda")
    dout = torch.randn(shape, device="cuda").bfloat16()
    for run, composed in (
        (lambda: ops.swiglu_cast(gate_up, weights), lambda: unfused(gate_up, weights)),
        (
            lambda: ops.swiglu_cast_backward(dout, gate_up, weights),
            lambda: unfused_backward(dout, gate_up, weights),
        ),
    ):
        found = run()
        check_same(found, composed())
        with reference_ops():
            expected = run()
        # Another sigmoid: a few values fall to the other side, and fewer of their codes.
        assert relative_error(dequantize(*found[:2]), dequantize(*expected[:2])) < 2e-3


@pytest.mark.cuda
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shape", [(32768, 2048), (4096, 18432), (65536, 768)])
def test_both_casts_at_v3_shapes(shape, grouped):
    gate_up, weights = make(*shape, torch.bfloat16, "cuda")
    dout = torch.randn(shape, device="cuda").bfloat16()
    ends = torch.tensor([0, 1, 1, shape[0] // 3, shape[0] - 5], dtype=torch.int32, device="cuda")
    offsets, rows = (ends, shape[0] - 5) if grouped else (None, None)
    found = ops.swiglu_backward_both_casts(dout, gate_up, weights, offsets=offsets)
    transposes = unfused_transposes(dout, gate_up, weights, offsets)
    check_both_casts(found, unfused_backward(dout, gate_up, weights), transposes, rows)


def test_both_casts_of_no_tokens(device):
    """Groups without tokens have slots, which are 0."""
    gate_up, weights = make(0, 256, torch.bfloat16, device)
    dout = torch.randn(0, 256, device=device).bfloat16()
    offsets = torch.zeros(4, dtype=torch.int32, device=device)
    found = ops.swiglu_backward_both_casts(dout, gate_up, weights, offsets=offsets)
    transposes = unfused_transposes(dout, gate_up, weights, offsets)
    check_both_casts(found, unfused_backward(dout, gate_up, weights), transposes)
    assert found.out_t[0].shape == (256, 384)
    assert not found.out_t[0].float().any()


def test_registration_compile_graph(device):
    gate_up, weights = make(16, 256, torch.bfloat16, device)
    offsets = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
    dout = torch.randn(16, 256, device=device).bfloat16()
    check_registration("swiglu_cast", gate_up, weights, offsets, True, 1e-4)
    check_registration("swiglu_cast", gate_up, None, None, False, 0.0)
    narrow = dout[:, :144].contiguous(), gate_up[:, :288].contiguous(), weights
    cases = (dout, gate_up, weights, offsets, True), (dout, gate_up, None, None, False), (*narrow, None, False)
    for case in cases:
        check_registration("swiglu_cast_backward", *case, GRADIENT_FLOOR)
        check_registration("swiglu_backward_both_casts", *case, GRADIENT_FLOOR)

    def backward(d, g, w):
        return bits(ops.swiglu_cast_backward(d, g, w, offsets=offsets))

    def both(d, g, w):
        data, sf, dweights, dgate_up_t, out_t = ops.swiglu_backward_both_casts(d, g, w, offsets=offsets)
        return bits([data, sf, dweights, *dgate_up_t, *out_t])

    check_compile(lambda g, w: bits(ops.swiglu_cast(g, w, offsets=offsets)), gate_up, weights)
    check_compile(backward, dout, gate_up, weights)
    check_compile(both, dout, gate_up, weights)
    if device.type == "cuda":
        check_graph(lambda g, w: bits(ops.swiglu_cast(g, w, offsets=offsets)), gate_up, weights)
        for run in (backward, both):
            check_graph(run, dout, gate_up, weights)
            check_graph(run, *narrow)
    out = torch.ops.dsv3.swiglu(gate_up, weights)
    check_registration("swiglu", gate_up, weights)
    check_registration("swiglu_backward", out, gate_up, weights)
    check_registration("swiglu_backward", out, gate_up, None)
    check_compile(ops.swiglu, gate_up, weights)
    if device.type == "cuda":
        check_graph(torch.ops.dsv3.swiglu, gate_up, weights)
        check_graph(torch.ops.dsv3.swiglu_backward, out, gate_up, weights)


def test_bad_arguments():
    with pytest.raises(ValueError, match="gate_up must be of a float dtype, got int64"):
        ops.swiglu(torch.zeros(4, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(4, 7\) and None"):
        ops.swiglu(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"got \(4, 8\) and \(5,\)"):
        ops.swiglu(torch.zeros(4, 8), torch.zeros(5))
    with pytest.raises(ValueError, match=r"swiglu_cast: I must be a multiple of 16, got gate_up \(4, 16\)"):
        ops.swiglu_cast(torch.zeros(4, 16))
    with pytest.raises(ValueError, match=r"swiglu_cast: gate_up must be .* got \(4, 32\) and \(5,\)"):
        ops.swiglu_cast(torch.zeros(4, 32), torch.zeros(5))
    with pytest.raises(ValueError, match="swiglu_cast: expected bfloat16 or float32, got float16"):
        ops.swiglu_cast(torch.zeros(4, 32).half())
    with pytest.raises(ValueError, match="swiglu_cast: amax_floor must be at least 0 and finite, got -1"):
        ops.swiglu_cast(torch.zeros(4, 32), amax_floor=-1)
    with pytest.raises(ValueError, match=r"swiglu_cast: offsets must be int32 \(G\+1,\) with G >= 1, got int64 \(2,\)"):
        ops.swiglu_cast(torch.zeros(4, 32), offsets=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"swiglu_cast_backward: I must be a multiple of 16, got gate_up \(4, 16\)"):
        ops.swiglu_cast_backward(torch.zeros(4, 8), torch.zeros(4, 16))
    with pytest.raises(ValueError, match=r"got float32 \(4, 8\) and float32 \(4, 32\)"):
        ops.swiglu_cast_backward(torch.zeros(4, 8), torch.zeros(4, 32))
    with pytest.raises(ValueError, match=r"got float32 \(4, 16\) and bfloat16 \(4, 32\)"):
        ops.swiglu_cast_backward(torch.zeros(4, 16), torch.zeros(4, 32).bfloat16())
    with pytest.raises(
        ValueError, match=r"swiglu_backward_both_casts: dout must be .* got float32 \(4, 8\) and float32"
    ):
        ops.swiglu_backward_both_casts(torch.zeros(4, 8), torch.zeros(4, 32))
