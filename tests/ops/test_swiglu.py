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


def unfused_backward(dout, gate_up, weights, keep_dgate_up, **settings):
    dgate_up, dweights = torch.ops.dsv3.swiglu_backward(dout, gate_up, weights)
    cast = ops.per_token_cast(dgate_up, **{"amax_floor": GRADIENT_FLOOR, **settings})
    return *cast, dgate_up if keep_dgate_up else None, None if weights is None else dweights


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
    for factor, keep in ((None, False), (weights, True), (weights, False)):
        args = dout.to(dtype), gate_up, factor
        *found, out = ops.swiglu_cast_backward(*args, keep_dgate_up=keep, **settings)
        assert out is None
        check_same(found, unfused_backward(*args, keep, **settings))
        *again, out = ops.swiglu_cast_backward(*args, keep_dgate_up=keep, keep_out=True, **settings)
        check_same(found, again)
        check_same(out, ops.swiglu_cast(gate_up, factor))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("inner", [272, 384])
def test_casts_of_values_that_are_not_finite(bad, inner, device):
    """A bad value spoils its tiles, a bad weight its row; nothing else changes."""
    gate_up, weights = make(9, inner, torch.bfloat16, device)
    dout = torch.randn(9, inner, device=device).bfloat16()
    clean = ops.swiglu_cast(gate_up, weights), ops.swiglu_cast_backward(dout, gate_up, weights)
    gate_up[2, 3], gate_up[2, inner + 200], weights[5], dout[7, 140] = bad, bad, bad, bad
    found = ops.swiglu_cast(gate_up, weights), ops.swiglu_cast_backward(dout, gate_up, weights, keep_dgate_up=True)
    check_same(found[0], unfused(gate_up, weights))
    check_same(found[1][:4], unfused_backward(dout, gate_up, weights, True))
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
    *gradients, out = ops.swiglu_cast_backward(
        dout, gate_up, weights, offsets=offsets, keep_dgate_up=True, keep_out=True
    )
    check_same([t[:end] for t in out], [t[:end] for t in found])
    expected = unfused_backward(dout, gate_up, weights, True)
    check_same([t[:end] for t in gradients], [t[:end] for t in expected])


@pytest.mark.cuda
def test_rows_of_no_group_are_not_written():
    gate_up, weights = make(130, 256, torch.bfloat16, "cuda")
    dout = torch.randn(130, 256, device="cuda").bfloat16()
    offsets = torch.tensor([0, 30, 77], dtype=torch.int32, device="cuda")
    forward = unfused(gate_up, weights)
    backward = *unfused_backward(dout, gate_up, weights, True), *forward
    outputs, gradients = filled(forward), filled(backward)
    registry.native().swiglu_cast(*outputs, gate_up, weights, offsets, False, 1e-4)
    args = dout, gate_up, weights, offsets, False, GRADIENT_FLOOR
    registry.native().swiglu_cast_backward(*gradients, *args)
    for found, expected in ((outputs, forward), (gradients, backward)):
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
            lambda: ops.swiglu_cast_backward(dout, gate_up, weights, keep_dgate_up=True)[:4],
            lambda: unfused_backward(dout, gate_up, weights, True),
        ),
    ):
        found = run()
        check_same(found, composed())
        with reference_ops():
            expected = run()
        # Another sigmoid: a few values fall to the other side, and fewer of their codes.
        assert relative_error(dequantize(*found[:2]), dequantize(*expected[:2])) < 2e-3


def test_registration_compile_graph(device):
    gate_up, weights = make(16, 256, torch.bfloat16, device)
    offsets = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
    dout = torch.randn(16, 256, device=device).bfloat16()
    check_registration("swiglu_cast", gate_up, weights, offsets, True, 1e-4)
    check_registration("swiglu_cast", gate_up, None, None, False, 0.0)
    check_registration("swiglu_cast_backward", dout, gate_up, weights, offsets, True, True, True, GRADIENT_FLOOR)
    check_registration("swiglu_cast_backward", dout, gate_up, None, None, False, False, False, GRADIENT_FLOOR)
    narrow = dout[:, :144].contiguous(), gate_up[:, :288].contiguous(), weights
    check_registration("swiglu_cast_backward", *narrow, None, False, True, False, GRADIENT_FLOOR)
    check_compile(lambda g, w: bits(ops.swiglu_cast(g, w, offsets=offsets)), gate_up, weights)
    check_compile(lambda d, g, w: bits(ops.swiglu_cast_backward(d, g, w, offsets=offsets)[:4]), dout, gate_up, weights)
    if device.type == "cuda":
        check_graph(lambda g, w: bits(ops.swiglu_cast(g, w, offsets=offsets)), gate_up, weights)
        check_graph(lambda d, g, w: bits(ops.swiglu_cast_backward(d, g, w)[:4]), dout, gate_up, weights)
        check_graph(lambda d, g, w: bits(ops.swiglu_cast_backward(d, g, w, keep_dgate_up=True)[:4]), *narrow)
        check_graph(lambda d, g, w: bits(ops.swiglu_cast_backward(d, g, w, keep_out=True).out), dout, gate_up, weights)
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
