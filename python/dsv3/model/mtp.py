"""Multi-token prediction: one more block a depth, which predicts one token further (V3 report, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsv3 import ops
from dsv3.config import Config
from dsv3.model import few
from dsv3.model.attention import AttentionContext
from dsv3.model.block import Block, BlockStats
from dsv3.model.layers import Linear, RMSNorm


class MTP(nn.Module):
    """h'_i = eh_proj [enorm(Emb(t_{i+k})) ; hnorm(h_i)], then a block and a norm.

    The embedding first, as released weights want it (the paper writes the reverse), and h after the norm of the previous
    depth. `embed` is the main model's, held by reference: it is no submodule here and not in the state dict twice.
    """

    def __init__(self, config: Config, depth: int, embed: nn.Embedding, **at: Any) -> None:
        super().__init__()
        object.__setattr__(self, "embed", embed)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.cache_index = config.num_hidden_layers + depth
        self.enorm = RMSNorm(hidden, eps, **at)
        self.hnorm = RMSNorm(hidden, eps, **at)
        self.eh_proj = Linear(2 * hidden, hidden, **at)
        self.layer = Block(config, self.cache_index, **at)
        self.norm = RMSNorm(hidden, eps, **at)

    def forward(
        self,
        h: Tensor,
        next_tokens: Tensor,
        ctx: AttentionContext,
        cache: list[Tensor] | None = None,
        wgrad: ops.WgradQueue | None = None,
    ) -> tuple[Tensor, BlockStats | None]:
        """h [T, H] of the previous depth after its norm, next_tokens int64 [T] the token after the one h has seen last.

        Returns h [T, H] after this depth's norm (the head's input, and the next depth's), and the block's statistics, None
        where it has no experts and in decoding. `cache` is the whole model's list, main layers first.
        """
        x = torch.cat([self.enorm(self.embed(next_tokens)), self.hnorm(h)], -1)
        layer_cache = None if cache is None else cache[self.cache_index]
        blocks = None if layer_cache is None else few.prepare([self.layer], ctx, len(x))
        if blocks is not None:
            return few.run(blocks, self.norm, few.linear(self.eh_proj, x), ctx, [layer_cache]), None
        x, stats = self.layer(self.eh_proj(x, wgrad), ctx, layer_cache, wgrad)
        return self.norm(x), stats
