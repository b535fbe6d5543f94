from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.testing import check_compile, check_graph, check_op, check_registration

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


def test_registration_compile_graph(device):
    x, residual, weight = make(16, 512, torch.bfloat16, device)
    check_registration("rmsnorm", x, residual, weight, 1e-6)
    y, summed, rstd = torch.ops.dsv3.rmsnorm(x, residual, weight, 1e-6)
    check_registration("rmsnorm_backward", y, x, summed, weight, rstd)
    check_compile(lambda x, r, w: ops.rmsnorm(x, w, residual=r), x, residual, weight)
    if device.type == "cuda":
        check_graph(lambda x, r, w: torch.ops.dsv3.rmsnorm(x, r, w, 1e-6), x, residual, weight)


def test_bad_arguments():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"got \(4, 8\) and \(7,\)"):
        ops.rmsnorm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"residual must have x's shape \(4, 8\), got \(4, 4\)"):
        ops.rmsnorm(x, torch.ones(8), residual=x[:, :4])
