"""Cross-entropy of logits, with the gradient written over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.grad import Function, apply
from dsv3.ops.registry import check_dtype, define, native
from dsv3.reference import loss as reference

_MAX_VOCAB_BYTES = 8 * 8 * 512 * 16  # a cluster of 8 blocks, 8 vectors of 16 bytes for each of 512 threads


def _allocate(logits: Tensor, targets: Tensor, write_gradient: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


def _supports(logits: Tensor, targets: Tensor, write_gradient: bool) -> str | None:
    row = logits.shape[1] * logits.element_size()
    if row % 16 or row > _MAX_VOCAB_BYTES:
        return f"a row of {row} bytes is not a multiple of 16 up to {_MAX_VOCAB_BYTES}"
    if not logits.is_contiguous():
        return "logits are not contiguous"
    return check_dtype("logits", logits, torch.bfloat16, torch.float32)


define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, bool write_gradient) -> Tensor",
    shapes="logits [T,V] bf16|fp32 (become the gradient), targets [T] int64, -100 ignored -> loss [T] fp32",
    reference=reference.cross_entropy_,
    allocate=_allocate,
    launch=lambda loss, logits, targets, write: native().cross_entropy_(loss, logits, targets, write),
    supports=_supports,
)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        differentiate = ctx.needs_input_grad[0]
        gradient = logits.clone() if differentiate else logits
        loss = torch.ops.dsv3.cross_entropy_(gradient, targets, differentiate)
        if differentiate:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * dloss[:, None]).to(gradient.dtype), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, a token: loss_t = logsumexp_v(logits_tv) - logits_t,target.

    Differentiable in the logits, which stay as they are; `torch.ops.dsv3.cross_entropy_` is the primitive that reads the
    logits once and writes the gradient of the summed loss over them. `linear_cross_entropy` includes the head.

    Args:
        logits: [T, V], contiguous; native on Hopper for bf16 and fp32 with rows of a multiple of 16 bytes up to 512 KiB.
        targets: int64 [T]; -100 is ignored (loss and gradient 0); any other outside [0, V) gives NaN.

    Returns:
        loss fp32 [T].

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        found = f"{tuple(logits.shape)} and {tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"cross_entropy: logits must be (T, V) and targets (T,) int64, got {found}")
    return apply(_CrossEntropy, logits.contiguous(), targets.contiguous())
