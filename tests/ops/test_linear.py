from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3 import ops
from dsv3.ops.linear import _chunk
from dsv3.testing import check_compile, check_op, check_registration

DTYPES = [torch.float32, torch.bfloat16]
# (T, K, N)
SHAPES = [(0, 64, 32), (1, 64, 48), (127, 96, 576), (4001, 64, 64)]
LENGTHS = [[3, 0, 17, 1, 0], [0, 0, 0], [127], [40, 1, 300]]


def make(device, dtype, *shapes):
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def offsets_of(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def plain_grouped(x, weight, offsets):
    bounds = offsets.tolist()
    parts = [x[a:b] @ w.t() for w, a, b in zip(weight, bounds[:-1], bounds[1:], strict=True)]
    return torch.cat(parts)


def with_main_grad(weight):
    weight = torch.nn.Parameter(weight.clone())
    weight.main_grad = torch.zeros(weight.shape, device=weight.device)
    return weight


# ---- linear ----
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "k", "n"), SHAPES)
def test_linear(t, k, n, dtype, device):
    check_op(ops.linear, lambda x, w: x @ w.t(), *make(device, dtype, (t, k), (n, k)))


def test_linear_with_wider_output(device):
    x, weight = make(device, torch.bfloat16, (65, 128), (16, 128))
    out = ops.linear(x, weight, out_dtype=torch.float32)
    exact = x.double() @ weight.double().t()
    assert out.dtype == torch.float32
    assert (out - exact).norm() < 1e-6 * exact.norm()
    x.requires_grad_()
    weight.requires_grad_()
    dy = torch.randn(65, 16, device=device)
    ops.linear(x, weight, out_dtype=torch.float32).backward(dy)
    for grad, expected in ((x.grad, dy.double() @ weight.double()), (weight.grad, dy.double().t() @ x.double())):
        assert grad.dtype == torch.bfloat16
        assert (grad - expected).norm() < 2.0**-8 * expected.norm()
    weight = with_main_grad(weight)
    ops.linear(x, weight, out_dtype=torch.float32).backward(dy)
    assert (weight.main_grad - expected).norm() < 2.0**-15 * expected.norm()  # bf16 gradients would be 2^-9 apart


def test_main_grad_takes_the_weight_gradient(device):
    for dtype in DTYPES:
        x, weight, dy = make(device, dtype, (300, 64), (32, 64), (300, 32))
        weight = with_main_grad(weight)
        for _ in range(2):
            ops.linear(x, weight).backward(dy)
        exact = 2 * dy.double().t() @ x.double()
        assert weight.grad is None
        assert (weight.main_grad - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("buffered", [False, True])
def test_queued_weight_gradients(buffered, grouped, device):
    offsets = offsets_of([30, 0, 70], device)
    shape = (3, 32, 64) if grouped else (32, 64)
    x, weight, dy = make(device, torch.float32, (100, 64), shape, (100, 32))

    def gradient(queue):
        w = with_main_grad(weight) if buffered else torch.nn.Parameter(weight.clone())
        inputs = x.clone().requires_grad_()
        for _ in range(2):
            y = ops.grouped_linear(inputs, w, offsets, wgrad=queue) if grouped else ops.linear(inputs, w, wgrad=queue)
            y.backward(dy)
        assert (w.grad is None) == (buffered or queue is not None)
        if queue is not None:
            assert len(queue.pending) == 2
            assert not (buffered and w.main_grad.any()), "the weight part must wait"
            queue.flush()
            assert not queue.pending
        return (w.main_grad if buffered else w.grad), inputs.grad

    for early, late in zip(gradient(None), gradient(ops.WgradQueue()), strict=True):
        assert early.any()
        assert torch.equal(early, late)


def test_recipe_replaces_the_kept_input(device):
    source, weight = make(device, torch.float32, (50, 64), (32, 64))
    weight = torch.nn.Parameter(weight)
    dy = torch.randn(50, 32, device=device)
    ops.linear(source.sin(), weight).backward(dy)
    expected, weight.grad = weight.grad, None

    x = source.sin()
    x.recipe = ops.Recipe(torch.sin, (source,))
    kept = weakref.ref(x)
    y = ops.linear(x, weight)
    del x
    assert kept() is None
    y.backward(dy)
    assert torch.equal(weight.grad, expected)


def test_quantized_weights(device):
    data = torch.randn(200, 130, device=device).to(torch.float8_e4m3fn)
    sf = torch.rand(2, 2, device=device) + 0.5
    weight = ops.Quantized(data, sf)
    dense = data.float()
    for i in range(2):
        for j in range(2):
            dense[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= sf[i, j]
    assert torch.equal(weight.dequantize(torch.float32), dense)
    x = torch.randn(5, 130, device=device)
    assert torch.equal(ops.linear(x, weight), x @ dense.t())
    stacked = ops.Quantized(torch.stack([data, data]), torch.stack([sf, 2 * sf]))
    y = ops.grouped_linear(x, stacked, offsets_of([2, 3], device))
    torch.testing.assert_close(y, torch.cat([x[:2] @ dense.t(), 2 * x[2:] @ dense.t()]), rtol=1e-5, atol=1e-4)


# ---- grouped ----
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_grouped_linear(lengths, dtype, device):
    x, weight = make(device, dtype, (sum(lengths), 64), (len(lengths), 48, 64))
    check_op(ops.grouped_linear, plain_grouped, x, weight, offsets_of(lengths, device))


def test_grouped_rows_past_the_end_do_not_count(device):
    x, weight = make(device, torch.float32, (20, 64), (2, 48, 64))
    x[12:] = float("nan")
    x.requires_grad_()
    weight.requires_grad_()
    offsets = offsets_of([5, 7], device)
    y = ops.grouped_linear(x, weight, offsets)
    torch.testing.assert_close(y[:12], plain_grouped(x[:12], weight, offsets))
    y[:12].sum().backward()
    assert weight.grad.isfinite().all()
    assert x.grad[:12].isfinite().all()


# ---- head and cross-entropy ----
def head_case(device, dtype, tokens=70, hidden=32, vocab=200):
    h, weight = make(device, dtype, (tokens, hidden), (vocab, hidden))
    targets = torch.randint(vocab, (tokens,), device=device)
    targets[::7] = -100
    return h, weight, targets


def plain_head(h, weight, targets):
    logits = (h @ weight.t()).to(torch.promote_types(h.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 16, 70, 1024])
def test_linear_cross_entropy(chunk, dtype, device):
    def ours(h, weight, targets):
        return ops.linear_cross_entropy(h, weight, targets, chunk=chunk)

    check_op(ours, plain_head, *head_case(device, dtype))


def test_linear_cross_entropy_of_nothing(device):
    h, weight, targets = head_case(device, torch.float32)
    for rows, ignored in ((0, False), (70, True)):
        inputs = h[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
        loss = ops.linear_cross_entropy(*inputs, targets[:rows].masked_fill(torch.tensor(ignored, device=device), -100))
        loss.backward()
        assert loss == 0
        assert not any(x.grad.any() for x in inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_scaled_in_fp32(dtype, device):
    """By a number that bf16 does not have; rounded to it first, every gradient would be 0.2% too large."""
    h, weight, targets = head_case(device, dtype)
    h, scale = h.detach().requires_grad_(), 0.3 / 4095 / 8
    (whole,) = torch.autograd.grad(ops.linear_cross_entropy(h, weight.detach(), targets), h)
    (found,) = torch.autograd.grad(ops.linear_cross_entropy(h, weight.detach(), targets) * scale, h)
    assert found.dtype == dtype
    assert torch.equal(found, (whole.float() * torch.tensor(scale, device=device)).to(dtype))


def test_linear_cross_entropy_into_main_grad(device):
    for dtype in DTYPES:
        h, weight, targets = head_case(device, dtype)
        weight = with_main_grad(weight)
        (ops.linear_cross_entropy(h, weight, targets, chunk=32) / 7).backward()
        exact = weight.detach().double().requires_grad_()
        (plain_head(h.double(), exact, targets) / 7).backward()
        assert weight.grad is None
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert (weight.main_grad - exact.grad).norm() < limit * exact.grad.norm()


def test_all_logits_never_exist():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() for t in (out,) if isinstance(t, torch.Tensor))
            return out

    h, weight, targets = (
        t.requires_grad_(t.is_floating_point()) for t in head_case("cpu", torch.float32, 512, 8, 1000)
    )
    with Sizes():
        ops.linear_cross_entropy(h, weight, targets, chunk=64).backward()
    assert 64 * 1000 * 4 <= max(sizes) < 512 * 1000 * 4 / 4


@pytest.mark.parametrize(
    ("device", "vocab", "dtype", "tokens"),
    [
        ("cuda", 32000, torch.bfloat16, 4096), ("cuda", 129280, torch.bfloat16, 1024), ("cuda", 129280, torch.float32, 512),
        ("cuda", 2**22, torch.float32, 128), ("cpu", 32000, torch.bfloat16, 1024),
    ],
)  # fmt: skip
def test_tokens_whose_logits_exist_at_a_time(device, vocab, dtype, tokens):
    weight = torch.empty(vocab, 1, device="meta", dtype=dtype)
    stub = SimpleNamespace(device=torch.device(device), shape=weight.shape, element_size=weight.element_size)
    assert _chunk(stub) == tokens


# ---- registration, compilation, errors ----
def test_registration_and_compile(device):
    x, weight, dy = make(device, torch.float32, (10, 16), (2, 8, 16), (10, 8))
    offsets = offsets_of([4, 6], device)
    check_registration("grouped_linear", x, weight, offsets)
    check_registration("grouped_linear_dgrad", dy, weight, offsets)
    check_registration("grouped_linear_wgrad_", dy, x, offsets, torch.zeros_like(weight))
    check_compile(torch.ops.dsv3.grouped_linear, x, weight, offsets)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"linear: .* got \(2, 3\) and \(4, 5\)"):
        ops.linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"grouped_linear: .* got \(2, 3\), \(1, 4, 3\) and \(3,\)"):
        ops.grouped_linear(torch.zeros(2, 3), torch.zeros(1, 4, 3), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"linear_cross_entropy: .* got \(2, 3\), \(9, 3\) and \(4,\)"):
        ops.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(9, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"grouped_linear: offsets must be int32 \(G\+1,\) with G >= 1, got float32 \(2,\)"
    ):
        ops.grouped_linear(torch.zeros(2, 3), torch.zeros(1, 4, 3), torch.zeros(2))
    h, weight, targets = torch.zeros(2, 3), torch.zeros(9, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="linear_cross_entropy: expected targets of int64"):
        ops.linear_cross_entropy(h, weight, targets.int())
    with pytest.raises(ValueError, match="linear_cross_entropy: chunk must be at least 1, got 0"):
        ops.linear_cross_entropy(h, weight, targets, chunk=0)
