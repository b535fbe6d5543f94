"""What all differentiable ops have in common: what autograd is told, and what it must not be given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dsv3 import ops
from dsv3.comm import ExpertBuffer

OFFSETS = torch.tensor([0, 2, 3], dtype=torch.int32)


def through_a_buffer(x: Tensor) -> Tensor:
    buffer = ExpertBuffer(num_experts=2)
    handle = buffer.dispatch(x, torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.ones(3, 2))
    return buffer.combine(torch.tanh(handle.rows), handle)


CALLS = {
    "swiglu": ops.swiglu,
    "rmsnorm": lambda x: ops.rmsnorm(x, torch.ones(16))[0],
    "linear": lambda x: ops.linear(x, torch.eye(16)),
    "grouped_linear": lambda x: ops.grouped_linear(x, torch.eye(16).expand(2, 16, 16).contiguous(), OFFSETS),
    "cross_entropy": lambda x: ops.cross_entropy(x, torch.tensor([1, 2, 3])),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, torch.eye(16), torch.tensor([1, 2, 3])),
    "fp8_linear": lambda x: ops.fp8_linear(x, ops.Fp8Weight.make(torch.eye(16))),
    "moe_permute": lambda x: ops.moe_permute(x, torch.tensor([[0], [1], [0]]), 2)[0],
    "ExpertBuffer": through_a_buffer,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_second_order_raises(call) -> None:
    """Also where the gradient that came in is a constant, and the first order is what it is without create_graph."""
    x = torch.randn(3, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(call(x).sum(), x)
    (grad,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="no gradients of second order"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", ["swiglu", "rmsnorm", "cross_entropy", "linear"])
def test_forward_mode_is_right_or_raises(name: str) -> None:
    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(CALLS[name], (x,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        CALLS[name](forward_ad.make_dual(x, tangent))


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    def run() -> tuple[Tensor, Tensor]:
        x = torch.linspace(-3, 3, 48).view(3, 16).requires_grad_()
        out = CALLS[name](x)
        out.sum().backward()
        return out.detach(), x.grad

    expected = run()
    for kind in ("cpu", "cuda"):  # the latter is on for devices that the tensors are not on
        with torch.autocast(kind, torch.bfloat16):
            found = run()
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_autocast_changes_nothing_in_a_compiled_graph() -> None:
    x, weight = torch.randn(5, 16), torch.randn(8, 16)

    def run(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            out = call(*leaves)
            out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled), run(ops.linear), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_autocast_and_tensors_without_data() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.swiglu(torch.empty(3, 16, device="meta")).shape == (3, 8)


def test_a_weight_changed_before_backward_is_noticed() -> None:
    """As torch's own layers do; also one that only the gradient of x needs."""
    x = torch.randn(3, 16, requires_grad=True)
    weight, stacked = torch.randn(16, 16), torch.randn(2, 16, 16)
    for wanted in (False, True):
        fp8 = ops.Fp8Weight.make(torch.randn(16, 16).requires_grad_(wanted))
        for param, call in (
            (weight, lambda: ops.linear(x, weight)),
            (stacked, lambda: ops.grouped_linear(x, stacked, OFFSETS)),
            (fp8.param, lambda fp8=fp8: ops.fp8_linear(x, fp8)),
        ):
            out = call()
            with torch.no_grad():
                param.mul_(2.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


def test_inputs_of_frozen_weights_are_not_kept() -> None:
    kept: list[Tensor] = []
    frozen, x = torch.randn(16, 16), torch.randn(3, 16, requires_grad=True)
    fp8 = ops.Fp8Weight.make(frozen)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs = ops.linear(x, frozen), ops.fp8_linear(x, fp8)
    assert kept
    assert all(t is frozen for t in kept)
    for out in outs:
        out.sum().backward()


def test_a_recipe_of_a_tensor_that_was_changed_is_not_used() -> None:
    base = torch.randn(4, 16)
    y = base * 3
    y.recipe = ops.Recipe(lambda x: x * 3, (base,))
    y.mul_(2)
    weight = torch.randn(8, 16, requires_grad=True)
    ops.linear(y, weight).sum().backward()
    torch.testing.assert_close(weight.grad, y.sum(0).expand(8, 16))


def test_a_queue_refuses_weights_that_were_computed() -> None:
    base, queue = torch.randn(8, 16, requires_grad=True), ops.WgradQueue()
    out = ops.linear(torch.randn(4, 16), base * 2, wgrad=queue)
    with pytest.raises(ValueError, match="computed from others needs its gradient at once"):
        out.sum().backward()


def test_gradients_of_linear_still_agree() -> None:
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    found = torch.autograd.grad(ops.linear(x, weight).square().sum(), (x, weight))
    expected = torch.autograd.grad(F.linear(x, weight).square().sum(), (x, weight))
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair)
