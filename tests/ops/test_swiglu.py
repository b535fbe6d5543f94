from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsv3 import ops
from dsv3.testing import check_compile, check_graph, check_op, check_registration

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


def test_registration_compile_graph(device):
    gate_up, weights = make(16, 256, torch.bfloat16, device)
    out = torch.ops.dsv3.swiglu(gate_up, weights)
    check_registration("swiglu", gate_up, weights)
    check_registration("swiglu_backward", out, gate_up, weights)
    check_registration("swiglu_backward", out, gate_up, None)
    check_compile(ops.swiglu, gate_up, weights)
    if device.type == "cuda":
        check_graph(torch.ops.dsv3.swiglu, gate_up, weights)
        check_graph(torch.ops.dsv3.swiglu_backward, out, gate_up, weights)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"got \(4, 7\) and None"):
        ops.swiglu(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"got \(4, 8\) and \(5,\)"):
        ops.swiglu(torch.zeros(4, 8), torch.zeros(5))
