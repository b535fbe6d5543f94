"""The checks that every op test uses, also for frameworks that wrap the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.registry import ReferenceOps as reference_ops

__all__ = ["check_compile", "check_graph", "check_op", "check_registration", "reference_ops", "relative_error"]

_FLOOR = {torch.bfloat16: 1e-4, torch.float32: 2e-6, torch.float64: 1e-12}


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||x - exact|| / ||exact|| in fp64 (the plain norm of x where exact is zero); inf where one has a NaN alone."""
    x, exact = x.detach().double(), exact.detach().double()
    if not torch.equal(x.isnan(), exact.isnan()):
        return float("inf")
    difference = (x - exact).nan_to_num().norm()
    scale = exact.nan_to_num().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for t in value if isinstance(t, Tensor)]


def _cast(args: Sequence[Any], dtype: torch.dtype | None, differentiate: bool) -> list[Any]:
    """Copies of the arguments, the floating ones as leaves and in another dtype where one is given."""
    copies = []
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype.itemsize > 1:
            arg = arg.detach().to(dtype or arg.dtype, copy=True).requires_grad_(differentiate)
        elif isinstance(arg, Tensor):
            arg = arg.clone()
        copies.append(arg)
    return copies


def _run(f: Callable[..., Any], args: list[Any], cotangents: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    outputs = _tensors(f(*args))
    if cotangents is None:
        return outputs, []
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], inputs, [c for _, c in pairs])
    return outputs, list(grads)


def check_op(
    op: Callable[..., Any], reference: Callable[..., Any], *args: Any, gradients: bool = True, factor: float = 2.0
) -> None:
    """Asserts that an op is about as exact as its reference: against the reference in fp64, the error of the op is at
    most `factor` times the error of the reference in the arguments' own dtype, plus the dtype's floor. The same for the
    gradients of all floating arguments, with random cotangents; and a second run gives the same bits.

    Args:
        op: function of the arguments; returns a tensor or a tuple of tensors.
        reference: the same function in plain, differentiable PyTorch, for any floating dtype.
        args: tensors and plain values; floating tensors of more than 8 bits are differentiated.
    """
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    exact_outputs = _tensors(reference(*_cast(args, torch.float64, False)))
    cotangents = [torch.randn_like(o).to(dtype) for o in exact_outputs] if gradients else None
    exact = _run(reference, _cast(args, torch.float64, gradients), cotangents)
    plain = _run(reference, _cast(args, None, gradients), cotangents)
    ours = _run(op, _cast(args, None, gradients), cotangents)
    again = _run(op, _cast(args, None, gradients), cotangents)
    for kind, e, p, o, a in zip(("output", "gradient"), exact, plain, ours, again, strict=True):
        for i, (x_exact, x_plain, x, x_again) in enumerate(zip(e, p, o, a, strict=True)):
            assert x.shape == x_exact.shape, f"{kind} {i}: shape {tuple(x.shape)}, expected {tuple(x_exact.shape)}"
            limit = factor * relative_error(x_plain, x_exact) + _FLOOR[x_plain.dtype]
            error = relative_error(x, x_exact)
            assert error <= limit, f"{kind} {i}: error {error:.3e} against a limit of {limit:.3e}"
            bits = torch.equal(x.nan_to_num(), x_again.nan_to_num())
            assert bits, f"{kind} {i}: two runs differ"


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)


def check_registration(name: str, *args: Any) -> None:
    """torch.library.opcheck on `torch.ops.dsv3.<name>`: schema, fake kernel, autograd registration, AOT dispatch.

    torch can not compare e4m3, as its test of the schema does; with such arguments the test made here is whether the op
    leaves alone what its schema does not call mutable."""
    op = getattr(torch.ops.dsv3, name).default
    if not any(x.dtype == torch.float8_e4m3fn for arg in args for x in _members(arg)):
        torch.library.opcheck(op, args)
        return
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, args, test_utils=tests)
    pairs = [(p, x) for p, arg in zip(op._schema.arguments, args, strict=True) for x in _members(arg)]
    fixed = [(x, _bits(x).clone()) for p, x in pairs if p.alias_info is None]
    op(*args)
    assert all(torch.equal(_bits(arg), before) for arg, before in fixed), f"{name} changes an input"


def _members(arg: Any) -> list[Tensor]:
    """The tensors of an argument that is one, or a list of them."""
    return [x for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]


def check_compile(f: Callable[..., Any], *args: Any) -> None:
    """Asserts that f compiles without a graph break and gives the eager results (aot_eager: no code generation)."""
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for x, expected in zip(_tensors(compiled(*args)), _tensors(f(*args)), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=0)


def check_graph(f: Callable[..., Any], *args: Tensor) -> None:
    """Captures f on CUDA tensors in a graph, replays it with changed contents, and compares with the eager call."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _tensors(f(*args))
    for arg in args:
        arg.copy_(arg.roll(1, 0) if arg.dim() else arg)
    before = [a.clone() for a in args]
    graph.replay()
    captured = [o.clone() for o in outputs]
    for arg, value in zip(args, before, strict=True):
        arg.copy_(value)
    for x, expected in zip(captured, _tensors(f(*args)), strict=True):
        torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
