"""The acceptance rule of speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.inference.sampling import draw


def accept_sampled(p: Tensor, q: Tensor, drafts: Tensor, u_accept: Tensor, u_draw: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps a prefix of the drafts and adds one token, so that every token is distributed as if drawn from p.

    Draft i stays with probability min(1, p_i(x) / q_i(x)) if all before it stayed. In place of the first that does not, a
    token is drawn from max(p - q, 0), normalised; after the last draft, one from p.

    Args:
        p: fp32 [B, D+1, V], the model's distributions (after temperature and filters) at the drafts' places and behind them.
        q: fp32 [B, D, V], those that the drafts were drawn from.
        drafts: int64 [B, D], D >= 1.
        u_accept: fp64 [B, D], uniform noise.
        u_draw: fp64 [B, D+1], uniform noise for the added token, by its place.

    Returns:
        tokens int64 [B, D+1], whose first accepted + 1 are the result, and accepted int64 [B], 0 to D.
    """
    depth = drafts.shape[1]
    p_draft = p[:, :depth].gather(2, drafts[..., None]).squeeze(2)
    q_draft = q.gather(2, drafts[..., None]).squeeze(2)
    accepted = _prefix(u_accept * q_draft < p_draft)
    row = torch.arange(p.shape[0], device=p.device)
    p_next = p[row, accepted]
    q_next = q[row, accepted.clamp(max=depth - 1)] * (accepted < depth)[:, None]
    residual = (p_next - q_next).clamp(min=0)
    # No residual means p = q up to rounding, where a rejection has a chance of about one ulp.
    weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    added = draw(weights, u_draw[row, accepted])
    tokens = torch.cat([drafts, added[:, None]], 1).scatter(1, accepted[:, None], added[:, None])
    return tokens, accepted


def _prefix(ok: Tensor) -> Tensor:
    """int64 [B]: how many leading entries of bool [B, D] are true."""
    return ok.long().cumprod(1).sum(1)
