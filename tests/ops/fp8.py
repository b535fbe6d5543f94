"""Operands of the FP8 products, and the bounds that their results must keep."""

from __future__ import annotations

import itertools

import torch

from dsv3 import ops
from dsv3.reference.quant import empty_row_scales
from dsv3.testing import relative_error

BF16, FP32 = torch.bfloat16, torch.float32
GRADIENT_FLOOR = 1e-30
SENTINEL = 123.0  # what is not written keeps it
NAN = float("nan")
KINDS = {
    "normal": lambda x: x.normal_(),
    "uniform": lambda x: x.uniform_(-1, 1),
    "positive": lambda x: x.uniform_(0, 1),
    "outlier": lambda x: x.normal_().mul_(1e4 ** (torch.arange(x.shape[-1], device=x.device) == 5)),
    "tiny": lambda x: x.normal_().mul_(1e-6),
    "gradient": lambda x: x.normal_().mul_(1e-12),
}
FP32_LIMITS = {"outlier": 6e-4, "positive": 1e-3}  # of the others: 3e-4


def draw(*shape, device, kind="normal"):
    return KINDS[kind](torch.empty(shape, device=device)).bfloat16()


def cast_rows(x, **settings):
    """per_token_cast, with NaN wherever the scales have padding that no one may read."""
    data, sf = ops.per_token_cast(x, **settings)
    if sf.numel():
        storage = sf.as_strided((sf.untyped_storage().nbytes() // 4,), (1,))
        stride = (len(x) + 3) // 4 * 4
        storage[torch.arange(len(storage), device=x.device) % stride >= len(x)] = NAN
    return data, sf


def operands(m, n, k, device, rows=False):
    """a, and b with scales of 1x128 (rows) or 128x128 values."""
    weight = draw(n, k, device=device)
    return cast_rows(draw(m, k, device=device)), cast_rows(weight) if rows else ops.per_block_cast(weight)


def take(cast, rows):
    """Some rows of an operand, with scales in the strides of so many rows."""
    data, sf = cast[0][rows].contiguous(), cast[1][rows]
    return data, empty_row_scales(sf, *sf.shape).copy_(sf)


def values(data, sf):
    """fp64: what an operand stands for."""
    if sf.shape[-2] != data.shape[-2]:
        sf = sf.repeat_interleave(128, -2)[..., : data.shape[-2], :]
    return data.float().double() * sf.double().repeat_interleave(128, -1)[..., : data.shape[-1]]


def product(a, b):
    return values(*a) @ values(*b).t()


def offsets_of(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def spans(lengths):
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


def bits(x):
    return x.contiguous().view(torch.int16 if x.dtype == BF16 else torch.int32)


def same(x, y):
    return x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def check(out, exact, kind="normal"):
    """The bounds of the specification: about one rounding to bf16, or what the tensor core keeps inside 128 of K."""
    error = relative_error(out, exact)
    rounding = relative_error(exact.bfloat16(), exact)
    limit = 1.05 * rounding + 6e-4 if out.dtype == BF16 else FP32_LIMITS.get(kind, 3e-4)
    assert out.shape == exact.shape
    assert error <= limit, f"{kind}: error {error:.3e} against a limit of {limit:.3e}"


def expert_weights(groups, n, k, device):
    return ops.per_block_cast(draw(groups, n, k, device=device))


def masked_operands(room, counts, n, k, device):
    a, a_sf = (t.view(len(counts), room, -1) for t in cast_rows(draw(len(counts) * room, k, device=device)))
    for g, count in enumerate(counts):
        a.view(torch.uint8)[g, count:], a_sf[g, count:] = 0x7F, NAN
    return a, a_sf, *expert_weights(len(counts), n, k, device), torch.tensor(counts, dtype=torch.int32, device=device)
