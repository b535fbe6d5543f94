"""AdamW in plain PyTorch: fp32 master weights and gradients, bf16 moments, varying scalars as tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 65536  # elements: the seven operands of a chunk stay in the L2 cache, 5x faster on a CPU than whole tensors


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
    """One AdamW step (Loshchilov & Hutter 2019, decoupled decay) on lists of tensors, in place.

    master, grad fp32 [n]; exp_avg, exp_avg_sq bf16 [n]; weight the same lengths in any float dtype, or an empty list;
    weight_decay one number a tensor. lr, grad_scale, step are fp32 [], skip bool []: all on the device of master, so
    nothing waits for the host. With g = grad * grad_scale, t = step + 1 (step counts the updates done before this one;
    the caller increments it):

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2        both in fp32 from the stored bf16
        master = (1 - lr wd) master - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    m and v take part in fp32 and are stored rounded to nearest; weight = master rounded to nearest. With skip true,
    nothing changes, whatever grad holds (NaN included).
    """
    keep = torch.where(skip, 0.0, 1.0)  # a factor instead of a branch: no copy of the flag to the host
    correction1, correction2 = 1 - beta1 ** (step + 1), (1 - beta2 ** (step + 1)).sqrt()
    weight1, weight2 = (1 - beta1) * keep, (1 - beta2) * keep
    scaled_eps, neg_lr = eps * correction2, -lr * keep * correction2 / correction1
    for i, wd in enumerate(weight_decay):
        decay = 1 - lr * keep * wd
        lists = (master, grad, exp_avg, exp_avg_sq, *([weight] if weight else []))
        whole = [x[i] if x[i].dim() else x[i].view(1) for x in lists]
        chunk = _CHUNK if whole[0].is_cpu else max(len(whole[0]), 1)
        for start in range(0, len(whole[0]), chunk):
            master_, grad_, m_, v_, *weight_ = (x[start : start + chunk] for x in whole)
            g = (grad_ * grad_scale).masked_fill_(skip, 0.0)
            m = m_.float().lerp_(g, weight1)
            v = v_.float().lerp_(g.mul_(g), weight2)
            m_.copy_(m)
            v_.copy_(v)
            updated = master_.mul_(decay).add_(m.div_(v.sqrt_().add_(scaled_eps)).mul_(neg_lr))
            for x in weight_:
                x.copy_(updated)
