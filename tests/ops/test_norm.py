from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dsv3 import ops
from dsv3.reference.quant import dequantize
from dsv3.testing import (
    check_compile,
    check_graph,
    check_op,
    check_registration,
    reference_ops,
    relative_error,
)
from tests.ops.casts import GRADIENT_FLOOR, bits, check_same, draw

SHAPES = [(0, 128), (1, 512), (127, 1536), (33, 7168), (5, 16384), (4001, 128), (300, 576)]


def plain(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def plain_residual(x, residual, weight, eps=1e-6):
    return plain(x + residual, weight, eps), x + residual


def make(tokens, hidden, dtype, device):
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    residual = torch.randn(tokens, hidden, device=device, dtype=dtype)
    return x, residual, torch.rand(hidden, device=device).add(0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm(shape, dtype, device):
    if dtype is torch.float32 and shape[1] > 8192:
        shape = (shape[0], 8192)
    x, residual, weight = make(*shape, dtype, device)
    check_op(lambda x, w: ops.rmsnorm(x, w), plain, x, weight)
    check_op(lambda x, r, w: ops.rmsnorm(x, w, residual=r), plain_residual, x, residual, weight)


def test_scale_and_non_contiguous(device):
    x, _, weight = make(64, 2048, torch.bfloat16, device)
    check_op(lambda x, w: ops.rmsnorm(x, w), plain, x * 1e-4, weight)
    check_op(lambda x, w: ops.rmsnorm(x[:, ::2], w[:1024]), lambda x, w: plain(x[:, ::2], w[:1024]), x, weight)


def test_no_hidden_values(device):
    x, weight = (torch.zeros(*shape, 0, device=device, requires_grad=True) for shape in ((3,), ()))
    y = ops.rmsnorm(x, weight)
    y.sum().backward()
    assert y.shape == x.grad.shape == (3, 0)


def test_only_the_residual_stream_has_a_gradient(device):
    x, residual, weight = make(16, 256, torch.float32, device)
    x.requires_grad_()
    _, summed = ops.rmsnorm(x, weight, residual=residual)
    summed.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=0, atol=0)


def test_nan_stays_in_its_row(device):
    x, _, weight = make(8, 1024, torch.bfloat16, device)
    x[3, 5] = float("nan")
    bad = ops.rmsnorm(x, weight).isnan().any(-1)
    assert bad.tolist() == [i == 3 for i in range(8)]


def test_main_grad(device):
    x, _, weight = make(64, 512, torch.bfloat16, device)
    weight.requires_grad_()
    (expected,) = torch.autograd.grad(ops.rmsnorm(x, weight).float().square().sum(), weight)
    weight.main_grad = torch.ones(512, device=device)
    ops.rmsnorm(x, weight).float().square().sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad - 1, expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cast", [False, True])
def test_main_grad_in_a_recomputed_region(cast, device):
    """A region's own tensors have no main_grad: the parameter's gets the gradient, as without recomputation."""
    x, _, weight = make(9, 512, torch.bfloat16, device)
    found = []
    for recompute in (False, True):
        weight = torch.nn.Parameter(weight.clone())
        weight.main_grad = torch.zeros(512, device=device)
        norm = functools.partial(ops.rmsnorm, weight=weight, cast=cast)
        leaf = x.clone().requires_grad_()
        y = checkpoint(norm, leaf, use_reentrant=False) if recompute else norm(leaf)
        y.square().sum().backward()
        assert weight.grad is None
        found.append(weight.main_grad)
    assert torch.equal(*found)
    assert found[0].any()


def unfused(x, weight, residual, keep_y, settings):
    """What rmsnorm_cast must be bit for bit, on the same device."""
    y, summed, rstd = torch.ops.dsv3.rmsnorm(x, residual, weight, 1e-6)
    cast = ops.per_token_cast(y, **settings)
    return *cast, y if keep_y else None, None if residual is None else summed, rstd


@pytest.mark.parametrize("settings", [{}, {"pow2_scale": True}, {"amax_floor": 0.0}, {"amax_floor": GRADIENT_FLOOR}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 16), (130, 144), (7, 1008), (6, 2032), (5, 4080), (5, 7184), (3, 8208)])
def test_rmsnorm_cast(shape, dtype, settings, device):
    if dtype is torch.float32 and shape[1] > 8192:
        shape = (shape[0], 8192)
    x, residual, weight = make(*shape, dtype, device)
    x[:, : shape[1] // 2] = draw((shape[0], shape[1] // 2), dtype, device, spread=2.0)
    for addend, keep_y in ((None, False), (None, True), (residual, True), (residual, False)):
        found = ops.rmsnorm_cast(x, weight, residual=addend, keep_y=keep_y, **settings)
        check_same(found, unfused(x, weight, addend, keep_y, settings))
        check_same(found, ops.rmsnorm_cast(x, weight, residual=addend, keep_y=keep_y, **settings))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rmsnorm_cast_of_a_row_that_is_not_finite(bad, device):
    """3e38: the sum of squares overflows, so that the row becomes zeros."""
    x, _, weight = make(8, 1040, torch.bfloat16, device)
    clean = ops.rmsnorm_cast(x, weight, keep_y=True)
    x[3, 5], x[6] = bad, 0.0
    found = ops.rmsnorm_cast(x, weight, keep_y=True)
    check_same(found, unfused(x, weight, None, True, {}))
    for a, b in zip(bits(found), bits(clean), strict=True):
        assert torch.equal(a[:3], b[:3])
        assert torch.equal(a[7], b[7])
    assert (dequantize(*found[:2])[6] == 0).all()
    # Without a floor and without eps, a row of zeros is 0 * infinity.
    args = x, None, weight, 0.0, True, False, 0.0
    y = torch.ops.dsv3.rmsnorm(*args[:4])[0]
    check_same(torch.ops.dsv3.rmsnorm_cast(*args)[:3], (*ops.per_token_cast(y, amax_floor=0.0), y))


def test_rmsnorm_cast_views_and_gradients(device):
    x, residual, weight = make(64, 2048, torch.bfloat16, device)
    found = ops.rmsnorm_cast(x[:, ::2].requires_grad_(), weight[:1024], residual=residual[:, 1024:])
    expected = unfused(x[:, ::2].contiguous(), weight[:1024], residual[:, 1024:].contiguous(), False, {})
    check_same(found, expected)
    assert not any(t.requires_grad for t in found if t is not None)


@pytest.mark.cuda
def test_rmsnorm_cast_at_v3_shapes():
    x, residual, weight = make(4096, 7168, torch.bfloat16, "cuda")
    for settings in ({}, {"pow2_scale": True}):
        found = ops.rmsnorm_cast(x, weight, residual=residual, keep_y=True, **settings)
        check_same(found, unfused(x, weight, residual, True, settings))
        with reference_ops():
            expected = ops.rmsnorm_cast(x, weight, residual=residual, keep_y=True, **settings)
        # Sums in another order: a few values of y fall to the other side, and fewer of their codes.
        assert relative_error(dequantize(*found[:2]), dequantize(*expected[:2])) < 2e-3


def test_registration_compile_graph(device):
    x, residual, weight = make(16, 512, torch.bfloat16, device)
    check_registration("rmsnorm_cast", x, residual, weight, 1e-6, True, False, 1e-4)
    check_registration("rmsnorm_cast", x, None, weight, 1e-6, False, True, 0.0)
    check_compile(lambda x, r, w: bits(ops.rmsnorm_cast(x, w, residual=r, keep_y=True)), x, residual, weight)
    if device.type == "cuda":
        check_graph(lambda x, r, w: bits(ops.rmsnorm_cast(x, w, residual=r)), x, residual, weight)
    check_registration("rmsnorm", x, residual, weight, 1e-6)
    y, summed, rstd = torch.ops.dsv3.rmsnorm(x, residual, weight, 1e-6)
    check_registration("rmsnorm_backward", y, x, summed, weight, rstd)
    check_compile(lambda x, r, w: ops.rmsnorm(x, w, residual=r), x, residual, weight)
    if device.type == "cuda":
        check_graph(lambda x, r, w: torch.ops.dsv3.rmsnorm(x, r, w, 1e-6), x, residual, weight)


def test_the_norm_of_fp8_layers_compiles_in_one_graph(device):
    x, residual, weight = make(16, 256, torch.bfloat16, device)

    def loss(x, weight):
        y, summed = ops.rmsnorm(x, weight, residual=residual, cast=True)
        return (y * summed).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = x.requires_grad_(), weight.requires_grad_()
    pairs = zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_bad_arguments():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"got \(4, 8\) and \(7,\)"):
        ops.rmsnorm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"residual must have x's shape \(4, 8\), got \(4, 4\)"):
        ops.rmsnorm(x, torch.ones(8), residual=x[:, :4])
    with pytest.raises(ValueError, match=r"rmsnorm_cast: x must be .* got \(4, 8\) and \(7,\)"):
        ops.rmsnorm_cast(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"rmsnorm_cast: residual must have x's shape \(4, 8\), got \(4, 4\)"):
        ops.rmsnorm_cast(x, torch.ones(8), residual=x[:, :4])
    with pytest.raises(ValueError, match=r"rmsnorm_cast: H must be a multiple of 16, got \(4, 8\)"):
        ops.rmsnorm_cast(x, torch.ones(8))
    with pytest.raises(ValueError, match="x must be of a float dtype, and residual of the same, got int32"):
        ops.rmsnorm(x.int(), torch.ones(8))
    with pytest.raises(ValueError, match="got float32 and bfloat16"):
        ops.rmsnorm(x, torch.ones(8), residual=x.bfloat16())
    x = torch.randn(4, 16)
    with pytest.raises(ValueError, match="rmsnorm_cast: expected bfloat16 or float32, got float64"):
        ops.rmsnorm_cast(x.double(), torch.ones(16))
    with pytest.raises(ValueError, match="rmsnorm_cast: amax_floor must be at least 0 and finite, got inf"):
        ops.rmsnorm_cast(x, torch.ones(16), amax_floor=float("inf"))
