"""AdamW over lists of tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.ops.registry import define, native
from dsv3.reference import optim as reference


def _supports(
    master: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], *rest
) -> str | None:
    weight = rest[0]
    if any(t.dtype != torch.bfloat16 for t in (*exp_avg[:1], *exp_avg_sq[:1], *weight[:1])):
        return "moments and weights are not bfloat16"
    if any(t.dtype != torch.float32 for t in (*master[:1], *grad[:1])):
        return "master weights and gradients are not float32"
    return None


define(
    "adamw(Tensor(a!)[] master, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] weight, "
    "Tensor lr, Tensor grad_scale, Tensor skip, Tensor step, float[] weight_decay, float beta1, float beta2, float eps)"
    " -> ()",
    shapes="lists of tensors of equal sizes: master, grad fp32, moments bf16, weight bf16 or none; lr, grad_scale, step [] "
    "fp32, skip [] bool",
    reference=reference.adamw,
    allocate=lambda *args: None,
    launch=lambda _, *args: native().adamw(*args),
    supports=_supports,
)


def adamw(
    master: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    weight: Sequence[Tensor],
    lr: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    step: Tensor,
    weight_decay: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW step (Loshchilov and Hutter, 2019, decoupled decay) on lists of tensors, in place, in one launch.

    With g = grad * grad_scale and t = step + 1:
    m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    master = (1 - lr wd) master - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps); weight = master, rounded.

    Args:
        master: fp32 tensors.
        grad: fp32, the sizes of master.
        exp_avg: first moments m, bf16.
        exp_avg_sq: second moments v, bf16.
        weight: the model's weights, bf16 natively, or an empty sequence.
        lr: learning rate, fp32 [] on the device of master, like the next three: nothing waits for the host.
        grad_scale: factor on the gradients (clipping), fp32 [].
        skip: bool []; true leaves everything as it is.
        step: fp32 [], updates done before this one; the caller increments it.
        weight_decay: one number a tensor.
        beta1: decay of m.
        beta2: decay of v.
        eps: added to the root.

    Raises:
        ValueError: lists of different lengths, or tensors of different sizes.
    """
    lists = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "weight_decay": weight_decay}
    for name, values in lists.items() if not weight else [*lists.items(), ("weight", weight)]:
        if len(values) != len(master):
            raise ValueError(f"adamw: {name} must have {len(master)} entries as master has, got {len(values)}")
    for i, m in enumerate(master):
        sizes = [t[i].numel() for t in (grad, exp_avg, exp_avg_sq, *([weight] if weight else []))]
        if any(size != m.numel() for size in sizes):
            raise ValueError(f"adamw: tensor {i} has {m.numel()} master weights but sizes {sizes} elsewhere")
    torch.ops.dsv3.adamw(
        list(master), list(grad), list(exp_avg), list(exp_avg_sq), list(weight),
        lr, grad_scale, skip, step, list(weight_decay), beta1, beta2, eps,
    )  # fmt: skip
