"""Dispatch and combine for the few tokens of a decoding step: rows in the masked layout, as masked_grouped_fp8_gemm wants them,
and each way in two halves, so that other work may run in between. Nothing here differentiates.

Over ipc and nvshmem every token of every rank has its slot (csrc/comm/low_latency.cuh): nobody is asked for counts and the host
waits for nothing. The other transports do the same with what a dispatch gives them, at a dispatch's speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dsv3.reference.quant import TILE, empty_row_scales

if TYPE_CHECKING:
    from dsv3.comm.buffer import Dispatched, ExpertBuffer

Result = TypeVar("Result")


class Masked(NamedTuple):
    """Rows of G local experts, R = ranks x low_latency places each, a rank's tokens in their order. Rows behind counts hold
    anything."""

    x: Tensor  # [G, R, H]: e4m3 over FP8, otherwise of the dispatched dtype
    x_sf: Tensor | None  # fp32 [G, R, ceil(H/128)], strides (R, 1, G*R rounded up to 4): scales of e4m3
    topk_weights: Tensor  # fp32 [G, R]: the routing weight of each row
    counts: Tensor  # int32 [G]
    dtype: torch.dtype  # of what was sent, and of the rows that go back
    way: tuple[Tensor, ...]  # how they came: for send_sums


class Pending(Generic[Result]):
    """What has been sent. It is received in the order of the sends, with at most one other sent in between."""

    def __init__(self, receive: Callable[[], Result]) -> None:
        self._receive: Callable[[], Result] | None = receive

    def receive(self) -> Result:
        """What came. Raises RuntimeError the second time."""
        if self._receive is None:
            raise RuntimeError("receive: this has been received already")
        receive, self._receive = self._receive, None
        return receive()


def empty_masked(like: Tensor, experts: int, room: int, *, cast: bool) -> tuple[Tensor, Tensor | None]:
    """Rows [G, R, H] for tokens like [T, H], and their scales."""
    hidden = like.shape[1]
    if not cast:
        return like.new_empty(experts, room, hidden), None
    sf = empty_row_scales(like, experts * room, -(-hidden // TILE))
    return like.new_empty(experts, room, hidden, dtype=torch.float8_e4m3fn), sf.unflatten(0, (experts, room))


def from_sorted(handle: Dispatched, room: int) -> Masked:
    """The rows of a dispatch, which are sorted by expert, in the masked layout."""
    counts, places = handle.offsets.diff(), _places(handle, room)
    experts = len(counts)
    if counts.is_cpu and (most := int(counts.max())) > room:
        raise ValueError(f"receive: an expert got {most} rows of at most {room} tokens: its tokens have it twice")
    x, sf = empty_masked(handle.rows, experts, room, cast=bool(handle.cast))
    weights = handle.topk_weights.new_empty(experts, room)

    def fill(target: Tensor, rows: Tensor) -> None:
        padded = rows.new_empty(experts * room + 1, *rows.shape[1:])  # what is nobody's ends in the last one
        target.copy_(padded.index_copy_(0, places, rows)[:-1].view(target.shape))

    fill(x.view(torch.uint8), handle.x.detach().contiguous().view(torch.uint8))
    fill(weights, handle.topk_weights.detach())
    if sf is not None:
        fill(sf, handle.x_sf)
    return Masked(x, sf, weights, counts, handle.rows.dtype, handle)


def to_sorted(y: Tensor, handle: Dispatched) -> Tensor:
    """[R', H] as combine wants it, of y [G, R, H]."""
    rows = y.flatten(0, 1)
    return rows.index_select(0, _places(handle, y.shape[1]).clamp(max=len(rows) - 1))


def _places(handle: Dispatched, room: int) -> Tensor:
    """int64 [R']: where each sorted row stands in [G * room]; G * room for what is nobody's."""
    row = torch.arange(handle.num_recv, device=handle.offsets.device)
    expert = torch.searchsorted(handle.offsets[1:].long(), row, right=True)
    return torch.where(
        row < handle.offsets[-1], expert * room + row - handle.offsets[expert], room * (len(handle.offsets) - 1)
    )


@torch.no_grad()
def send(buffer: ExpertBuffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, room: int) -> Pending[Masked]:
    """By a dispatch: all of it happens here."""
    handle = buffer.dispatch(x, topk_idx, topk_weights)
    return Pending(lambda: from_sorted(handle, room))


@torch.no_grad()
def send_sums(buffer: ExpertBuffer, y: Tensor, masked: Masked) -> Pending[Tensor]:
    """By a combine."""
    out = buffer.combine(to_sorted(y, masked.way), masked.way)
    return Pending(lambda: out)
