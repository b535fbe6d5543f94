from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.testing import check_graph, check_registration, reference_ops

SIZES = [0, 1, 7, 127, 2048, 4001, 65536 * 2 + 24]


def state(sizes, device, weights=True):
    make = [
        [torch.randn(n, device=device) for n in sizes],
        [torch.randn(n, device=device) for n in sizes],
        [torch.randn(n, device=device).mul(0.1).bfloat16() for n in sizes],
        [torch.rand(n, device=device).mul(0.1).bfloat16() for n in sizes],
    ]
    make.append([m.bfloat16() for m in make[0]] if weights else [])
    lr, scale, step = (torch.tensor(v, device=device) for v in (1e-3, 0.5, 3.0))
    return [
        *make,
        lr,
        scale,
        torch.tensor(False, device=device),
        step,
        [0.1 * (i % 2) for i in range(len(sizes))],
        0.9,
        0.95,
        1e-8,
    ]


def copy(args):
    return [[t.clone() for t in a] if isinstance(a, list) and a and isinstance(a[0], torch.Tensor) else a for a in args]


@pytest.mark.parametrize("weights", [True, False])
def test_adamw_against_fp64(device, weights):
    args = state(SIZES, device, weights)
    master, grad, m, v, *_ = copy(args)
    ops.adamw(*args)
    for i in range(len(SIZES)):
        g = grad[i].double() * 0.5
        em, ev = 0.9 * m[i].double() + 0.1 * g, 0.95 * v[i].double() + 0.05 * g * g
        step = 1e-3 * (em / (1 - 0.9**4)) / ((ev / (1 - 0.95**4)).sqrt() + 1e-8)
        expected = master[i].double() * (1 - 1e-3 * args[9][i]) - step
        torch.testing.assert_close(args[0][i].double(), expected, rtol=2e-6, atol=2e-7)
        # One rounding to bf16: half a unit in the last place, 2^-9 relative; the moments of cancelling sums a little more.
        torch.testing.assert_close(args[2][i].double(), em, rtol=2**-8, atol=1e-7)
        torch.testing.assert_close(args[3][i].double(), ev, rtol=2**-8, atol=1e-7)
        if weights:
            assert torch.equal(args[4][i], args[0][i].bfloat16())


def test_a_thousand_small_tensors(device):
    args = state([5] * 1000, device)
    expected = copy(args)
    ops.adamw(*args)
    with reference_ops():
        ops.adamw(*expected)
    for ours, theirs in zip(args[0], expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_skip_touches_nothing(device):
    args = state(SIZES, device)
    args[7] = torch.tensor(True, device=device)
    args[1][3][0] = float("nan")
    before = copy(args)
    ops.adamw(*args)
    for i in range(5):
        assert all(torch.equal(a, b) for a, b in zip(args[i], before[i], strict=True) if i != 1)


def test_registration(device):
    check_registration("adamw", *state([16, 8], device))


def test_a_tensor_without_dimensions():
    flat = state([1, 4], "cpu")
    args = copy(flat)
    for group in args[:5]:
        group[0] = group[0].view(())
    ops.adamw(*flat)
    ops.adamw(*args)
    for ours, theirs in zip(args[0], flat[0], strict=True):
        assert torch.equal(ours.view(-1), theirs)


def test_bad_arguments():
    args = state([4, 4], "cpu")
    with pytest.raises(ValueError, match="grad must have 2 entries as master has, got 1"):
        ops.adamw(args[0], args[1][:1], *args[2:])
    args[2][1] = args[2][1][:3]
    with pytest.raises(ValueError, match=r"tensor 1 has 4 master weights but sizes \[4, 3, 4, 4\]"):
        ops.adamw(*args)


@pytest.mark.cuda
def test_a_captured_step_reads_its_scalars_on_replay():
    args = state([65536, 24], torch.device("cuda"))
    tensors = [t for group in args[:5] for t in group] + list(args[5:9])

    def step(*tensors):
        lists = [[t.clone() for t in tensors[2 * i : 2 * i + 2]] for i in range(5)]
        torch.ops.dsv3.adamw(*lists, *tensors[10:], *args[9:])
        return [t for i in (0, 2, 3, 4) for t in lists[i]]

    check_graph(step, *tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*tensors)
    for lr, skip in ((0.5, False), (0.25, True)):
        args[5].fill_(lr)
        args[7].fill_(skip)
        graph.replay()
        captured = [t.clone() for t in outputs]
        for ours, theirs in zip(captured, step(*tensors), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.cuda
def test_two_hundred_tensors_are_one_launch():
    args = state([1000] * 200, torch.device("cuda"))
    ops.adamw(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.adamw(*args)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "kernel" in event.name]
    assert len(kernels) == 1, kernels
