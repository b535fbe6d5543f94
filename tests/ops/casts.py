"""What the tests of the FP8 casts share: tensors that are hard to cast, and comparison bit for bit."""

from __future__ import annotations

import torch

GRADIENT_FLOOR = 1e-30
SENTINEL = 123.0  # what is not written keeps it


def draw(shape, dtype, device, spread=6.0):
    """Normal values times lognormal ones, so that tiles have zeros, subnormal codes and scales of any size."""
    x = torch.randn(shape, device=device) * torch.exp(spread * torch.randn(shape, device=device))
    x.flatten()[: x.numel() // 3] *= torch.rand(x.numel() // 3, device=device) > 0.5
    return x.to(dtype)


def bits(outputs):
    """The tensors, with e4m3 as bytes."""
    tensors = [t for t in outputs if t is not None]
    return tuple(t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors)


def strides(t):
    """Of the dimensions that have one."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def check_same(found, expected):
    """Bit for bit and in the same strides; what is NaN need only be NaN in both."""
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
            continue
        assert (a.dtype, a.shape, strides(a)) == (b.dtype, b.shape, strides(b))
        for x, y in zip(bits([a]), bits([b]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def filled(outputs):
    """Tensors like these, in the same strides, with the sentinel in every place."""
    empty = [torch.empty_strided(t.shape, t.stride(), dtype=torch.float32, device=t.device) for t in outputs]
    return [e.fill_(SENTINEL).to(t.dtype) for e, t in zip(empty, outputs, strict=True)]
