from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.testing import check_graph, check_op, check_registration


def tables(positions, dim, device):
    angles = torch.outer(
        torch.arange(positions, dtype=torch.float64), 10000.0 ** -(torch.arange(0, dim, 2).double() / dim)
    )
    return angles.cos().float().to(device), angles.sin().float().to(device)


def plain(x, cos, sin, positions, head_dim):
    """Multiplication by cos + i sin of the pairs read as complex numbers."""
    heads = x.view(x.shape[0], x.shape[1] // head_dim, head_dim)
    still, turned = heads.split([head_dim - 2 * cos.shape[1], 2 * cos.shape[1]], -1)
    c, s = (t[positions][:, None].to(x.dtype) for t in (cos, sin))
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    return torch.cat((still, turned), -1).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "dim"), [(0, 2, 16, 16), (1, 1, 64, 64), (127, 128, 192, 64), (4001, 3, 48, 16)]
)
def test_rope(tokens, heads, head_dim, dim, dtype, device):
    x = torch.randn(tokens, heads * head_dim, device=device).to(dtype)
    cos, sin = tables(512, dim, device)
    positions = torch.randint(512, (tokens,), device=device)
    for p in (positions, positions.int()):
        check_op(
            lambda x, p=p: ops.rope_(x * 1, cos, sin, p, head_dim=head_dim),
            lambda x, p=p: plain(x, cos, sin, p.long(), head_dim),
            x,
        )


def test_in_place_and_inverse(device):
    x = torch.randn(8, 192, device=device)
    cos, sin = tables(8, 64, device)
    y = x.clone()
    assert ops.rope_(y, cos, sin, torch.arange(8, device=device), head_dim=96).data_ptr() == y.data_ptr()
    assert not torch.equal(x, y)
    torch.ops.dsv3.rope_(y, cos, sin, torch.arange(8, device=device), 96, True)
    torch.testing.assert_close(x, y)


def test_interleaved_pairs(device):
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]], device=device)
    quarter = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    assert ops.rope_(x, *quarter, torch.zeros(1, dtype=torch.int64, device=device), head_dim=4).tolist() == [
        [0, 1, -1, 0]
    ]


def test_a_position_outside_the_table_is_nan(device):
    cos, sin = tables(4, 16, device)
    y = ops.rope_(torch.ones(3, 32, device=device), cos, sin, torch.tensor([0, 4, -1], device=device), head_dim=32)
    assert y[:, 16:].isnan().all(-1).tolist() == [False, True, True]
    assert not y[:, :16].isnan().any()


def test_registration_and_graph(device):
    x = torch.randn(8, 192, device=device, dtype=torch.bfloat16)
    cos, sin = tables(8, 64, device)
    positions = torch.arange(8, device=device)
    check_registration("rope_", x, cos, sin, positions, 96, False)
    if device.type == "cuda":

        def f(x):
            y = x.clone()
            torch.ops.dsv3.rope_(y, cos, sin, positions, 96, False)
            return y

        check_graph(f, x)


def test_bad_arguments():
    cos, sin = tables(4, 16, "cpu")
    with pytest.raises(ValueError, match=r"R <= 8, got float32 \(2, 16\), \(4, 8\) and \(4, 8\)"):
        ops.rope_(torch.zeros(2, 16), cos, sin, torch.zeros(2).long(), head_dim=8)
    with pytest.raises(ValueError, match=r"positions must be \(2,\), got \(3,\)"):
        ops.rope_(torch.zeros(2, 16), cos, sin, torch.zeros(3).long(), head_dim=16)
    for x, (c, s), head_dim in (
        (torch.zeros(2, 16).long(), (cos, sin), 16),
        (torch.zeros(2, 16), (cos[:0], sin[:0]), 16),
        (torch.zeros(2, 16), (cos, sin), 0),
    ):
        with pytest.raises(ValueError, match=r"rope_: x must be floats .* with P >= 1"):
            ops.rope_(x, c, s, torch.zeros(2).long(), head_dim=head_dim)
