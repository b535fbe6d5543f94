"""The FP8 recipe of linear layers in plain, differentiable fp32: values are rounded to what their codes stand for, and then
multiplied. Its functions take the arguments of those of `dsv3.ops`, so they can stand in for them in a model."""

from __future__ import annotations

import torch

from dsv3.reference import quant
from dsv3.reference.swiglu import swiglu, swiglu_backward

FLOOR, GRADIENT_FLOOR = 1e-4, 1e-30


def rows(x, pow2=False, floor=FLOOR):
    """x in tiles of 1x128."""
    return quant.dequantize(*quant.per_token_cast(x.float(), pow2, floor))


def columns(x, pow2=False, floor=FLOOR):
    """x in tiles of 128x1."""
    data, sf = quant.cast_transpose(x.float(), None, None, pow2, floor)
    return quant.dequantize(data, sf).t()[: len(x)]


def blocks(weight):
    """A weight [N, K] in blocks of 128x128."""
    data, sf, *_ = quant.per_block_cast(weight.detach().float()[None], False, False)
    return quant.dequantize(data, sf)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, shared_input):
        ctx.save_for_backward(x, weight)
        ctx.shared_input = shared_input
        return (rows(x, shared_input) @ blocks(weight).t()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = rows(dy, floor=GRADIENT_FLOOR) @ blocks(weight)
        kept = columns(x, True) if ctx.shared_input else columns(rows(x))
        return dx.to(x.dtype), columns(dy, floor=GRADIENT_FLOOR).t() @ kept, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, gate_up, down, pow2):
        hidden = (rows(x, pow2) @ blocks(gate_up).t()).to(x.dtype)
        ctx.save_for_backward(x, weights, gate_up, down, hidden)
        ctx.pow2 = pow2
        return (rows(swiglu(hidden, weights)) @ blocks(down).t()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, weights, gate_up, down, hidden), pow2 = ctx.saved_tensors, ctx.pow2
        d_inner = (rows(dy, pow2, GRADIENT_FLOOR) @ blocks(down)).to(x.dtype)
        d_down = columns(dy, pow2, GRADIENT_FLOOR).t() @ columns(swiglu(hidden, weights))
        d_hidden, d_weights = swiglu_backward(d_inner, hidden, weights)
        dx = rows(d_hidden, floor=GRADIENT_FLOOR) @ blocks(gate_up)
        d_gate_up = columns(d_hidden, floor=GRADIENT_FLOOR).t() @ columns(rows(x, pow2), pow2)
        return dx.to(x.dtype), None if weights is None else d_weights, d_gate_up, d_down, None


class _Arrived(torch.autograd.Function):
    """What came as FP8, for the tensor that stands for it."""

    @staticmethod
    def forward(ctx, x, data, sf):
        return quant.dequantize(data, sf).to(x.dtype)

    @staticmethod
    def backward(ctx, dx):
        return dx, None, None


def fp8_linear(x, weight, *, wgrad=None, shared_input=False, static_weights=False):
    return _Linear.apply(x, weight.param, shared_input)


def fp8_mlp(x, gate_up, down, *, wgrad=None, static_weights=False):
    return _MLP.apply(x, None, gate_up.param, down.param, False)


def fp8_experts(x, weights, offsets, gate_up, down, *, cast=None, wgrad=None):
    x = x if cast is None else _Arrived.apply(x, *cast)
    bounds = offsets.tolist()
    parts = zip(bounds[:-1], bounds[1:], gate_up.param, down.param, strict=True)
    return torch.cat([_MLP.apply(x[a:b], weights[a:b], first, second, True) for a, b, first, second in parts])
