"""Where the gradient of a weight goes."""

from __future__ import annotations

from torch import Tensor


def accumulate(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Adds a gradient to `weight.main_grad` (fp32, same shape) and returns None, or returns it for autograd where the
    parameter has no such buffer."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad.to(weight.dtype)
    main_grad.add_(grad)
    return None
