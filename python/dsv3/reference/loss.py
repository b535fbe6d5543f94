"""Cross-entropy in plain PyTorch: the specification of csrc/loss and the implementation on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100


def cross_entropy_(logits: Tensor, targets: Tensor, write_gradient: bool) -> Tensor:
    """loss_t = logsumexp(logits_t) - logits_t[target_t] in nats; logits [T, V] become exp(logits - logsumexp) - onehot where
    asked. A target of -100 gives 0 and a zero gradient, any other outside the vocabulary NaN."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = torch.logsumexp(wide, -1)
    ignored = targets == IGNORED
    valid = (targets >= 0) & (targets < logits.shape[1])
    column = targets.clamp(0, logits.shape[1] - 1)[:, None]
    loss = lse - wide.gather(1, column)[:, 0]
    loss = torch.where(valid, loss, torch.where(ignored, 0.0, torch.nan))
    if write_gradient:
        gradient = torch.exp_(wide - lse[:, None])
        gradient.scatter_add_(1, column, torch.full_like(column, -1, dtype=wide.dtype))
        gradient.mul_(torch.where(valid, 1.0, torch.nan)[:, None]).masked_fill_(ignored[:, None], 0.0)
        logits.copy_(gradient)
    return loss
