"""Acceptance rules with the mistakes that are easy to make; tests of the distribution must notice each."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.inference.speculative import accept_sampled


def always_accept(p: Tensor, q: Tensor, drafts: Tensor, u_accept: Tensor, u_draw: Tensor) -> tuple[Tensor, Tensor]:
    return accept_sampled(p, q, drafts, torch.zeros_like(u_accept) - 1, u_draw)


def resample_from_p(p: Tensor, q: Tensor, drafts: Tensor, u_accept: Tensor, u_draw: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts rightly, but draws the replacement from p in place of max(p - q, 0)."""
    tokens, accepted = accept_sampled(p, q, drafts, u_accept, u_draw)
    plain, _ = accept_sampled(p, torch.zeros_like(q), drafts, torch.zeros_like(u_accept) + 2, u_draw)
    rejected = accepted < drafts.shape[1]
    row = torch.arange(len(p), device=p.device)
    replacement = torch.where(rejected & (accepted == 0), plain[:, 0], tokens[row, accepted])
    return tokens.scatter(1, accepted[:, None], replacement[:, None]), accepted


def accept_by_p_alone(p: Tensor, q: Tensor, drafts: Tensor, u_accept: Tensor, u_draw: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts with probability p(x) in place of p(x) / q(x)."""
    q_draft = q.gather(2, drafts[..., None]).squeeze(2)
    return accept_sampled(p, q, drafts, u_accept / q_draft, u_draw)


WRONG_RULES = {f.__name__: f for f in (always_accept, resample_from_p, accept_by_p_alone)}
