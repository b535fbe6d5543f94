"""The expert-parallel seam. One rank (transport "local") is a permutation to expert order and back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsv3.ops.moe import Permutation, moe_permute, moe_unpermute

TRANSPORTS = ("local",)


class Dispatched(NamedTuple):
    """What a dispatch gives the local experts, a flat tuple of tensors; R rows were received, sorted by local expert."""

    x: Tensor  # [R, H]
    topk_weights: Tensor  # fp32 [R]: the routing weight of each row, applied by the expert
    offsets: Tensor  # int32 [G+1]: where each local expert's rows begin
    source: Tensor  # int64 [R]: the (token, slot) pair of a row
    position: Tensor  # int64 [T, k]: the row of a pair

    @property
    def num_recv(self) -> int:
        """R, an upper bound known without asking the device."""
        return self.x.shape[0]


class ExpertBuffer:
    """Moves tokens to their experts and back.

    Args:
        num_experts: E, over all ranks.
        transport: "local", one rank that holds all experts.
    """

    def __init__(self, num_experts: int, *, transport: str = "local") -> None:
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
        self.num_experts = num_experts
        self.transport = transport

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Dispatched:
        """Sends every token of x [T, H] once to each of its experts, topk_idx int64 [T, k]; differentiable in x and weights."""
        rows, order = moe_permute(x, topk_idx, self.num_experts)
        weights = topk_weights.reshape(-1).index_select(0, order.source)
        return Dispatched(rows, weights, *order)

    def combine(self, y: Tensor, handle: Dispatched) -> Tensor:
        """Brings the rows y [R, H] home and sums each token's, unweighted, in fp32 and in the order of its slots -> [T, H]."""
        return moe_unpermute(y, Permutation(handle.offsets, handle.source, handle.position))
