"""A transformer block as four stages whose composition is its forward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from dsv3 import ops
from dsv3.comm import Dispatched
from dsv3.config import Config
from dsv3.model.attention import MLA, AttentionContext
from dsv3.model.layers import MLP, RMSNorm
from dsv3.model.moe import MoE


class BlockStats(NamedTuple):
    """What an MoE block says about its routing."""

    counts: Tensor  # int32 [E], tokens of each expert
    chosen: Tensor | None = None  # int32 [n, E] and
    affinity: Tensor | None = None  # fp64 [n, E], of ops.moe_gate_loads, where the context is balanced


class Block(nn.Module):
    """norm -> MLA -> norm -> gate | dispatch | experts | combine; in a dense block the middle stages hold its MLP.

    Stages take and return flat tuples of tensors, so that a schedule can detach them, interleave two micro-batches and run
    each stage's backward itself.
    """

    def __init__(self, config: Config, index: int, **at: Any) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **at)
        self.attention = MLA(config, **at)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **at)
        self.is_moe = config.is_moe(index)
        if self.is_moe:
            self.moe = MoE(config, **at)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, **at)

    def attention_stage(
        self, x: Tensor, ctx: AttentionContext, cache: Tensor | None = None, wgrad: ops.WgradQueue | None = None
    ) -> tuple[Tensor, ...]:
        """x [T, H] -> (residual [T, H], input of the MLP [T, H]) and, with experts, what the gate returns."""
        out = self.attention(self.attn_norm(x), ctx, cache, wgrad)
        u, residual = self.mlp_norm.add(out, x)
        cu_seqlens = ctx.cu_seqlens_q if ctx.balanced else None
        return (residual, u, *self.moe.gate(u, wgrad, cu_seqlens=cu_seqlens)) if self.is_moe else (residual, u)

    def dispatch_stage(self, u: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Dispatched:
        """Sends the tokens to their experts' ranks."""
        return self.moe.dispatch(u, topk_idx, topk_weights)

    def experts_stage(
        self,
        u: Tensor,
        rows: Tensor,
        weights: Tensor,
        offsets: Tensor,
        *cast: Tensor,
        wgrad: ops.WgradQueue | None = None,
    ) -> tuple[Tensor, ...]:
        """(the received rows after their experts [R, H], the shared experts' output [T, H] where there are any); `cast` is
        the handle's."""
        y = self.moe.experts(rows, weights, offsets, *cast, wgrad=wgrad)
        return (y,) if self.moe.shared is None else (y, self.moe.shared(u, wgrad))

    def combine_stage(self, residual: Tensor, handle: Dispatched, y: Tensor, shared: Tensor | None = None) -> Tensor:
        """Brings the rows home: residual + shared + the sum of each token's rows -> [T, H]."""
        out = residual + self.moe.buffer.combine(y, handle)
        return out if shared is None else out + shared

    def forward(
        self, x: Tensor, ctx: AttentionContext, cache: Tensor | None = None, wgrad: ops.WgradQueue | None = None
    ) -> tuple[Tensor, BlockStats | None]:
        """x [T, H] -> [T, H]; `cache` is this layer's."""
        residual, u, *routed = self.attention_stage(x, ctx, cache, wgrad)
        if not self.is_moe:
            return residual + self.mlp(u, wgrad), None
        topk_idx, topk_weights, *stats = routed
        handle = self.dispatch_stage(u, topk_idx, topk_weights)
        y = self.experts_stage(u, handle.rows, handle.topk_weights, handle.offsets, *handle.cast, wgrad=wgrad)
        return self.combine_stage(residual, handle, *y), BlockStats(*stats)
