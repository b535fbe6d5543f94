"""A block is four stages; what a pipeline schedule does with them gives the same numbers as its forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv3 import ops
from dsv3.model import AttentionContext, Batch, Block
from tests.model.cases import BASE, random_model, tokens_for


class Stage:
    """Runs a stage on detached inputs and its backward on its own, as a schedule does."""

    def __init__(self, function, *inputs, **options):
        self.inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
        out = function(*self.inputs, **options)
        self.outputs = [out] if isinstance(out, torch.Tensor) else list(out)
        assert all(isinstance(x, torch.Tensor) for x in self.outputs), "stages hand over flat tuples of tensors"

    def backward(self, *grads):
        """The gradients of the inputs, from those of the outputs (None where there is none)."""
        pairs = [(x, g) for x, g in zip(self.outputs, grads, strict=True) if x.requires_grad and g is not None]
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        return [getattr(x, "grad", None) for x in self.inputs]


@pytest.mark.parametrize("queued", [False, True])
def test_stages_run_apart(queued):
    block: Block = random_model(BASE).layers[1]
    ctx = replace(AttentionContext.batch(2, 15), balanced=True)
    x = torch.randn(30, BASE.hidden_size, requires_grad=True)
    dout, daffinity = torch.randn(30, BASE.hidden_size), torch.randn(2, 12, dtype=torch.float64)
    expected, stats = block(x, ctx)
    torch.autograd.backward([expected, stats.affinity], [dout, daffinity])
    grads = {name: param.grad for name, param in block.named_parameters()}
    block.zero_grad(set_to_none=True)

    queue = ops.WgradQueue() if queued else None
    attention = Stage(block.attention_stage, x, ctx, wgrad=queue)
    residual, u, topk_idx, topk_weights, counts, chosen, affinity = attention.outputs
    dispatch = Stage(block.dispatch_stage, u, topk_idx, topk_weights)
    rows, weights, offsets, source, position = dispatch.outputs
    experts = Stage(block.experts_stage, u, rows, weights, offsets, wgrad=queue)
    handle = type(block.dispatch_stage(u, topk_idx, topk_weights))(rows, weights, offsets, source, position)
    combine = Stage(
        lambda residual, y, shared: block.combine_stage(residual, handle, y, shared), residual, *experts.outputs
    )
    assert torch.equal(combine.outputs[0], expected)
    assert torch.equal(counts, stats.counts)
    assert torch.equal(chosen, stats.chosen)
    assert torch.equal(affinity, stats.affinity)

    dresidual, dy, dshared = combine.backward(dout)
    du, drows, dweights, _ = experts.backward(dy, dshared)
    du_dispatch, _, dtopk_weights = dispatch.backward(drows, dweights, None, None, None)
    dx = attention.backward(dresidual, du + du_dispatch, None, dtopk_weights, None, None, daffinity)[0]
    if queue is not None:
        linear = [name for name, param in block.named_parameters() if param.dim() > 1]
        assert all(param.grad is None for param in block.parameters() if param.dim() > 1)
        assert len(queue.pending) == len(linear)
        queue.flush()
    torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-6)
    for name, param in block.named_parameters():
        torch.testing.assert_close(param.grad, grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gates_sum_up_only_where_the_context_is_balanced():
    block, x, ctx = random_model(BASE).layers[1], torch.randn(30, BASE.hidden_size), AttentionContext.batch(2, 15)
    out, stats = block(x, ctx)
    assert (stats.chosen, stats.affinity) == (None, None)
    assert len(block.attention_stage(x, ctx)) == 5
    again, balanced = block(x, replace(ctx, balanced=True))
    assert torch.equal(out, again)
    assert balanced.chosen.sum(-1).tolist() == [15 * 3] * 2
    torch.testing.assert_close(balanced.affinity.sum(-1), torch.full((2,), 15.0).double())


def test_dense_block():
    block = random_model(BASE).layers[0]
    x, ctx = torch.randn(10, BASE.hidden_size), AttentionContext.batch(1, 10)
    residual, u = block.attention_stage(x, ctx)
    out, stats = block(x, ctx)
    assert stats is None
    assert torch.equal(out, residual + block.mlp(u))


@pytest.mark.parametrize("buffered", [False, True])
def test_queue_through_the_whole_model(buffered):
    model = random_model(BASE)
    batch = Batch(tokens_for(BASE, 2, 20))

    def gradients(queue):
        for param in model.parameters():
            param.grad = None
            if buffered:
                param.main_grad = torch.zeros_like(param)
        model.loss(batch, wgrad=queue).total.backward()
        if queue is not None:
            queue.flush()
        return [(p.main_grad + (0 if p.grad is None else p.grad)) if buffered else p.grad for p in model.parameters()]

    for early, late in zip(gradients(None), gradients(ops.WgradQueue()), strict=True):
        assert early.any()
        assert torch.equal(early, late)
