"""The native module: it imports without a GPU, and says clearly what it can not take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dsv3.ops import registry

_C = pytest.importorskip("dsv3._C", reason="built without nvcc") if registry._C is None else registry._C
ROOT = Path(__file__).parents[1]


def test_every_native_function_is_bound_and_declared():
    bound = set(re.findall(r'define\(m, "(\w+)"', (ROOT / "csrc/bindings.cpp").read_text()))
    declared = set(re.findall(r"^void (\w+)\(", (ROOT / "csrc/ops.h").read_text(), re.M))
    assert bound == declared
    assert bound <= set(dir(_C))


@pytest.mark.cuda
def test_torch_calls_kernels_without_python():
    names = re.findall(r'op<"(\w+)"', (ROOT / "csrc/torch_ops.cpp").read_text())
    assert names
    for name in names:
        assert re.search(r"^CUDA: registered at csrc/torch_ops.cpp", torch._C._dispatch_dump(f"dsv3::{name}"), re.M), (
            name
        )


def test_cpu_tensors_are_refused():
    x, rstd = torch.randn(2, 8), torch.empty(2)
    with pytest.raises(ValueError, match=r"native ops take CUDA tensors, got a CPU tensor of shape \(2, 8\) float32"):
        _C.rmsnorm(x, None, rstd, x, None, torch.ones(8), 1e-6)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError):
        _C.rmsnorm("x", None, None, None, None, None, 1e-6)


@pytest.mark.cuda
def test_checks_name_what_they_saw():
    x, weight = torch.randn(4, 64, device="cuda"), torch.ones(64, device="cuda")
    rstd = torch.empty(4, device="cuda")
    with pytest.raises(ValueError, match=r"weight must have shape \(64\), got \(32\) float32"):
        _C.rmsnorm(x, None, rstd, x, None, weight[:32], 1e-6)
    with pytest.raises(ValueError, match=r"weight must be float32, got .* bfloat16"):
        _C.rmsnorm(x, None, rstd, x, None, weight.bfloat16(), 1e-6)
    with pytest.raises(ValueError, match="x must be contiguous"):
        _C.rmsnorm(x, None, rstd, x.t()[:4, :4].t(), None, weight[:4], 1e-6)
