"""What the differentiable ops share: whether there is anything to differentiate, and where the gradient of a weight goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Function(torch.autograd.Function):
    """Of an op whose backward is made of primitives, which nothing differentiates: gradients of second order raise
    RuntimeError instead of being zeros, but where torch.autograd.grad is told to let them (allow_unused, materialize_grads)."""

    def __init_subclass__(cls) -> None:
        cls.backward = staticmethod(_once(cls.backward))


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """backward, whose results raise when they are differentiated. (torch's once_differentiable lets them be constants where
    the gradient that came in is one.)"""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        kind = _autocast(grads)
        with torch.no_grad():
            if kind is None:
                found = backward(ctx, *grads)
            else:
                with torch.autocast(kind, enabled=False):
                    found = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # without create_graph=True
            return found
        outputs = found if isinstance(found, tuple) else (found,)
        leaves = [x if x is None else x.detach().requires_grad_() for x in outputs]
        raising = torch._C._functions.DelayedError("dsv3's ops have no gradients of second order", len(leaves))(*leaves)
        return raising if isinstance(found, tuple) else raising[0]

    return run


class _Forgetful:
    """Stands for the context of a forward that nothing will follow."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_dirty(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def apply(function: type[Function], *args: Any) -> Any:
    """function.apply(*args), in the dtypes of the arguments, whatever autocast says; without autograd's part, which takes
    longer than many a kernel, where no argument needs a gradient. Forward-mode differentiation raises, as apply does."""
    kind = _autocast(args)
    if kind is None:
        return _apply(function, args)
    with torch.autocast(kind, enabled=False):
        return _apply(function, args)


def _apply(function: type[Function], args: tuple[Any, ...]) -> Any:
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return function.apply(*args)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return function.apply(*args)
    return function.forward(_Forgetful(), *args)


def _autocast(args: tuple[Any, ...]) -> str | None:
    """The kind of device of the arguments, where autocast is on for it, or may be when a compiled graph runs."""
    compiling = torch.compiler.is_compiling()
    if not compiling and not torch._C._is_any_autocast_enabled():  # the usual case, soon known
        return None
    kind = next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")
    return kind if kind in ("cpu", "cuda") and (compiling or torch.is_autocast_enabled(kind)) else None


def accumulate(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Adds a gradient to `weight.main_grad` (fp32, same shape) and returns None, or returns it for autograd where the
    parameter has no such buffer."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.to(weight.dtype)
    main_grad.add_(grad)
    return None
