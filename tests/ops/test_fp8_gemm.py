"""fp8_gemm into an out: weight gradients, and what is added to what is there."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.testing import check_graph
from tests.ops.fp8 import FP32, GRADIENT_FLOOR, KINDS, NAN, check, draw, operands, product, same

F8 = torch.float8_e4m3fn


@pytest.mark.parametrize("kind", KINDS)
def test_weight_gradient(kind, device):
    """Two outputs of cast_transpose, summed over the tokens and added to what is there."""
    dy = draw(333, 272, device=device, kind=kind)
    x = draw(333, 192, device=device, kind="positive" if kind == "positive" else "normal")
    a, b = ops.cast_transpose(dy, amax_floor=GRADIENT_FLOOR), ops.cast_transpose(x)
    exact = product(a, b)
    start = torch.randn(272, 192, device=device) * exact.std()
    out = start.clone()
    ops.fp8_gemm(*a, *b, out=out, accumulate=True)
    check(out - start, exact, kind)
    again = start.clone()
    torch.ops.dsv3.fp8_gemm_out(*a, *b, again, True, False, False)
    assert same(out, again)
    ops.fp8_gemm(*a, *b, out=again)
    check(again, exact, kind)


@pytest.mark.parametrize(("m", "n"), [(272, 192), (144, 1008), (1408, 80), (768, 1024)])
def test_weight_gradient_of_many_tokens(m, n, device):
    """Where the output has few tiles the native kernel cuts K into parts: added in the order of K, so they are the same bits
    every time, and with batch_invariant in one part, as rows of any matrix have them."""
    dy, x = draw(3000, m, device=device), draw(3000, n, device=device)
    a, b = ops.cast_transpose(dy), ops.cast_transpose(x)
    exact = product(a, b)
    start = torch.randn(m, n, device=device) * exact.std()
    outs = [start.clone() for _ in range(8)]
    for out in outs:
        ops.fp8_gemm(*a, *b, out=out, accumulate=True)
    check(outs[0] - start, exact)
    assert all(same(out, outs[0]) for out in outs)
    written = torch.full_like(start, NAN)
    ops.fp8_gemm(*a, *b, out=written)
    check(written, exact)
    first = ops.cast_transpose(dy[:, :128].contiguous())
    whole, part = (ops.fp8_gemm(*rows, *b, out_dtype=FP32, batch_invariant=True) for rows in (a, first))
    assert same(whole[:128], part)
    if device.type == "cuda":
        args = a[0].view(torch.uint8), a[1], b[0].view(torch.uint8), b[1]
        check_graph(lambda a, a_sf, b, b_sf: ops.fp8_gemm(a.view(F8), a_sf, b.view(F8), b_sf, out_dtype=FP32), *args)


@pytest.mark.cuda
@pytest.mark.parametrize("m", [4000, 4352])
def test_weight_gradient_of_a_large_output(m):
    """In tiles of 256 rows, whose factors are multiplied in another order, so that few bits differ from those of 128 rows; the
    last tiles have none, few and half of their rows."""
    dy, x = draw(333, m, device="cuda"), draw(333, 9008, device="cuda")
    a, b = ops.cast_transpose(dy, amax_floor=GRADIENT_FLOOR), ops.cast_transpose(x)
    exact = product(a, b)
    start = torch.randn(m, 9008, device="cuda") * exact.std()
    out, again = start.clone(), start.clone()
    for target in (out, again):
        ops.fp8_gemm(*a, *b, out=target, accumulate=True)
    check(out - start, exact)
    assert same(out, again)
    written = torch.full_like(start, NAN)
    ops.fp8_gemm(*a, *b, out=written)
    check(written, exact)
    in_128 = ops.fp8_gemm(*a, *b, out_dtype=FP32, batch_invariant=True)
    assert not same(written, in_128)
    torch.testing.assert_close(written, in_128, rtol=1e-5, atol=1e-5 * exact.std().item())


@pytest.mark.parametrize("m", [5, 72, 128, 300])
@pytest.mark.parametrize(("n", "k"), [(328, 2048), (16384, 256)])
def test_adds_to_what_is_there(m, n, k, device):
    """With a scale for every 128x128 of b: split, whole, several tiles a block, many rows."""
    a, b = operands(m, n, k, device)
    exact = product(a, b)
    start = torch.randn(m, n, device=device) * exact.std()
    out = start.clone()
    ops.fp8_gemm(*a, *b, out=out, accumulate=True)
    check(out - start, exact)


def test_weight_gradient_of_no_tokens(device):
    a, b = (ops.cast_transpose(draw(0, n, device=device)) for n in (272, 192))
    out = torch.randn(272, 192, device=device)
    before = out.clone()
    ops.fp8_gemm(*a, *b, out=out, accumulate=True)
    assert same(out, before)
    assert not ops.fp8_gemm(*a, *b, out=out).any()
