"""Cross-entropy in plain PyTorch: the specification of csrc/loss and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def cross_entropy_(logits: Tensor, targets: Tensor, write_gradient: bool) -> Tensor:
    """loss_t = logsumexp(logits_t) - logits_t[target_t] in nats; logits [T, V] become exp(logits - logsumexp) - onehot where
    asked. A target of -100 gives 0 and a zero gradient, any other outside the vocabulary NaN."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = targets == IGNORED
    valid = (targets >= 0) & (targets < logits.shape[1])
    column = targets.clamp(0, logits.shape[1] - 1)[:, None]
    highest = wide.amax(-1, keepdim=True)
    picked = wide.gather(1, column) - highest
    shifted = wide.sub_(highest) if write_gradient else wide - highest  # in place: the logits are large
    exps = shifted.exp_()
    total = exps.sum(-1, keepdim=True)
    factor = torch.where(valid, 1.0, torch.where(ignored, 0.0, torch.nan)).to(wide.dtype)[:, None]
    if write_gradient:
        exps.mul_(factor / total).scatter_add_(1, column, -factor)
        if exps.dtype != logits.dtype:
            logits.copy_(exps)
    return torch.where(ignored, 0.0, (total.log() - picked)[:, 0] * factor[:, 0])
