"""The steps of a dispatch: each copies tokens to their destinations, and the way back adds a token's copies up."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

import dsv3.ops.moe  # noqa: F401, registers torch.ops.dsv3.moe_*
from dsv3.comm.alive import naming_lost_ranks


class Step(Protocol):
    """A stretch of the way from tokens to rows."""

    def spread(self, x: Tensor) -> Tensor:
        """Tokens [T, H] -> a row for each of their copies [R, H]."""

    def sum(self, y: Tensor) -> Tensor:
        """Rows [R, H] -> [T, H]: each token's rows summed by ascending destination, in fp32, rounded once."""


class Copies(NamedTuple):
    """A row for every (token, slot) pair that has a destination, sorted by destination, within one by token."""

    source: Tensor  # int64 [R]: the pair of a row
    position: Tensor  # int64 [T, S]: the rows of a token, ascending; R stands for a slot without a destination

    def spread(self, x: Tensor) -> Tensor:
        return torch.ops.dsv3.moe_permute(x, self.source, self.position)

    def sum(self, y: Tensor) -> Tensor:
        if y.shape[0] < self.position.numel():  # row R, for the slots without one: x + -0.0 is x
            y = torch.cat([y, y.new_full((1, y.shape[1]), -0.0)])
        return torch.ops.dsv3.moe_unpermute(y, self.position, None)


def copies_to(destination: Tensor, num_destinations: int, num_rows: int) -> tuple[Copies, Tensor]:
    """The copies that `destination` asks for, and where each destination's rows begin: int32 [num_destinations + 1].

    destination: int64 [T, S], num_destinations where a slot has none. num_rows: how many have one, counted before.
    """
    partial = num_rows < destination.numel()
    offsets, source, position = torch.ops.dsv3.moe_permutation(destination, num_destinations + partial)
    position = position.sort(-1).values  # slots in the order of their destinations
    if partial:
        source, position = source[:num_rows], position.clamp(max=num_rows)
    return Copies(source, position), offsets[: num_destinations + 1]


def distinct(destination: Tensor, num_destinations: int) -> Tensor:
    """Each token's destinations once: int64 [T, k], num_destinations for none -> [T, min(k, num_destinations)]."""
    ordered = destination.sort(-1).values
    again = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:].masked_fill_(again, num_destinations)
    return ordered.sort(-1).values[:, :num_destinations].contiguous()


class Exchange(NamedTuple):
    """Copies for other ranks of `group`, and their way there."""

    group: dist.ProcessGroup | None
    copies: Copies
    splits: Tensor  # int64 [2, ranks] on the host: rows sent to every rank, and received from every rank

    def spread(self, x: Tensor) -> Tensor:
        sent, received = self.splits.tolist()
        return self._swap(self.copies.spread(x), sent, received)

    def sum(self, y: Tensor) -> Tensor:
        sent, received = self.splits.tolist()
        return self.copies.sum(self._swap(y, received, sent))

    def _swap(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), rows.shape[1])
        with naming_lost_ranks(self.group):
            dist.all_to_all_single(out, rows, received, sent, group=self.group)
        return out


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Step) -> Tensor:
        ctx.step = step
        return step.spread(x.contiguous())

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        return ctx.step.sum(drows.contiguous()), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, step: Step) -> Tensor:
        ctx.step = step
        return step.sum(y.contiguous())

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return ctx.step.spread(dout.contiguous()), None


def spread(x: Tensor, step: Step) -> Tensor:
    """step.spread, differentiable: its backward is step.sum."""
    return _Spread.apply(x, step)


def add_up(y: Tensor, step: Step) -> Tensor:
    """step.sum, differentiable: its backward is step.spread."""
    return _Sum.apply(y, step)
