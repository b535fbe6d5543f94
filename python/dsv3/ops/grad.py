"""What the differentiable ops share: whether there is anything to differentiate, and where the gradient of a weight goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Function(torch.autograd.Function):
    """Of an op whose backward is made of primitives, which nothing differentiates: gradients of second order raise
    RuntimeError instead of being zeros."""

    def __init_subclass__(cls) -> None:
        cls.backward = staticmethod(once_differentiable(cls.backward))


class _Forgetful:
    """Stands for the context of a forward that nothing will follow."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_dirty(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def apply(function: type[Function], *args: Any) -> Any:
    """function.apply(*args); without autograd's part, which takes longer than many a kernel, where no argument needs a
    gradient."""
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return function.apply(*args)
    return function.forward(_Forgetful(), *args)


def accumulate(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Adds a gradient to `weight.main_grad` (fp32, same shape) and returns None, or returns it for autograd where the
    parameter has no such buffer."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.to(weight.dtype)
    main_grad.add_(grad)
    return None
