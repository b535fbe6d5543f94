from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsv3 import ops
from dsv3.testing import check_compile, check_graph, check_op, check_registration

SHAPES = [(0, 128), (1, 8), (127, 4096), (5, 129280), (4001, 256), (3, 32000), (9, 102400), (2, 262144), (4, 1000)]


def make(tokens, vocab, dtype, device):
    logits = (3 * torch.randn(tokens, vocab, device=device)).to(dtype)
    targets = torch.randint(vocab, (tokens,), device=device)
    targets[1::3] = -100
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape, dtype, device):
    logits, targets = make(*shape, dtype, device)
    check_op(ops.cross_entropy, lambda x, t: F.cross_entropy(x, t, reduction="none"), logits, targets)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_gradient(shape, device):
    logits, targets = make(*shape, torch.float32, device)
    leaf = logits.double().requires_grad_()
    F.cross_entropy(leaf, targets, reduction="sum").backward()
    untouched = logits.clone()
    torch.ops.dsv3.cross_entropy_(untouched, targets, False)
    assert torch.equal(untouched, logits)
    torch.ops.dsv3.cross_entropy_(logits, targets, True)
    torch.testing.assert_close(logits.double(), leaf.grad, rtol=1e-5, atol=1e-7)


def test_large_logits_and_infinite_ones(device):
    logits = torch.full((3, 4096), -1e4, device=device)
    logits[:, 7] = 3e4
    logits[1, 9] = float("-inf")
    loss = ops.cross_entropy(logits, torch.tensor([7, 9, 8], device=device))
    assert loss.tolist() == [0.0, float("inf"), 4e4]


def test_a_target_outside_the_vocabulary_is_nan_in_its_row_alone(device):
    logits, targets = make(4, 512, torch.bfloat16, device)
    targets[:] = torch.tensor([1, 512, -3, 2], device=device)
    loss = torch.ops.dsv3.cross_entropy_(logits, targets, True)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert logits.isnan().all(-1).tolist() == [False, True, True, False]
    assert not logits[::3].isnan().any()


def test_registration_compile_graph(device):
    logits, targets = make(6, 4096, torch.bfloat16, device)
    check_registration("cross_entropy_", logits, targets, True)
    check_compile(ops.cross_entropy, logits, targets)
    if device.type == "cuda":
        check_graph(lambda x, t: torch.ops.dsv3.cross_entropy_(x.clone(), t, True), logits, targets)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"got \(2, 8\) and \(3,\) torch.int64"):
        ops.cross_entropy(torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"int64, got \(2, 8\) and \(2,\) torch.int32"):
        ops.cross_entropy(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int32))
