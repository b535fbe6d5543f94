"""The steps of a dispatch: each copies tokens to their destinations, and the way back adds a token's copies up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import dsv3.ops.moe  # noqa: F401, registers torch.ops.dsv3.moe_*
from dsv3.comm.alive import naming_lost_ranks
from dsv3.ops.grad import Function


class Step(Protocol):
    """A stretch of the way from tokens to rows."""

    def spread(self, x: Tensor, blank: int | None = None) -> Tensor:
        """Tokens [T, H] -> a row for each of their copies [R, H]; rows that are nobody's copy get `blank`, or are left as
        they come."""

    def sum(self, y: Tensor) -> Tensor:
        """Rows [R, H] -> [T, H]: each token's rows summed by ascending destination, in fp32, rounded once."""


class Copies(NamedTuple):
    """A row for every (token, slot) pair that has a destination, sorted by destination, within one by token."""

    source: Tensor  # int64 [R]: the pair of a row
    position: Tensor  # int64 [T, S]: the rows of a token, ascending; R stands for a slot without a destination

    def spread(self, x: Tensor, blank: int | None = None) -> Tensor:
        return torch.ops.dsv3.moe_permute(x, self.source, self.position)

    def spread_cast(self, data: Tensor, sf: Tensor) -> tuple[Tensor, Tensor]:
        """The same of what per_token_cast returns."""
        return torch.ops.dsv3.moe_permute_cast(data, sf, self.source, self.position)

    def sum(self, y: Tensor) -> Tensor:
        return _sum_rows(y, self.position, partial=y.shape[0] < self.position.numel())

    def of_pairs(self, weights: Tensor) -> Tensor:
        """What each row's pair has in weights [T, S] -> [R]; differentiable."""
        return weights.reshape(-1).index_select(0, self.source)


class FixedCopies(NamedTuple):
    """Copies in R rows whatever their number, which the host does not know: rows that are nobody's are not touched, and a sum
    over a copy for which there was no row is NaN."""

    source: Tensor  # int64 [R]: the pair of a row; T * S stands for none
    position: Tensor  # as in Copies; R + 1 for a copy without a row

    def spread(self, x: Tensor, blank: int | None = None) -> Tensor:
        rows, shape = self.source.shape[0], (self.source.shape[0] + 2, *x.shape[1:])
        out = x.new_empty(shape) if blank is None else x.new_full(shape, blank)
        for slot in self.position.unbind(1):
            out.index_copy_(0, slot, x)  # what has no destination, or no row, meets behind the others
        return out.resize_(rows, *x.shape[1:])  # a slice would be a view, which autograd does not let be written

    def sum(self, y: Tensor) -> Tensor:
        return _sum_rows(y, self.position, partial=True)

    def of_pairs(self, weights: Tensor) -> Tensor:
        """As in Copies; NaN for rows that are nobody's, whose gradients are dropped."""
        return F.pad(weights.reshape(-1), (0, 1), value=float("nan")).index_select(0, self.source)


def _sum_rows(y: Tensor, position: Tensor, *, partial: bool) -> Tensor:
    if partial:  # row R, for the slots without one: x + -0.0 is x; and R + 1, for copies that had no room
        y = torch.cat([y, y.new_full((1, y.shape[1]), -0.0), y.new_full((1, y.shape[1]), float("nan"))])
    return torch.ops.dsv3.moe_unpermute(y, position, None)


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


def fixed_copies_to(destination: Tensor, num_destinations: int, num_rows: int) -> tuple[FixedCopies, Tensor]:
    """The same in `num_rows` rows, of which any number may be used; destinations beyond get none, and offsets say so."""
    offsets, _, position = torch.ops.dsv3.moe_permutation(destination, num_destinations + 1)
    offsets = offsets[: num_destinations + 1]
    row_of_pair = position.where(position < num_rows, num_rows + 1)
    return _fixed(row_of_pair.where(position < offsets[-1], num_rows), num_rows), offsets


def blocks_to(destination: Tensor, num_destinations: int, block: int) -> FixedCopies:
    """Copies where every destination has `block` rows of its own, enough for its tokens; destination as in copies_to."""
    offsets, _, position = torch.ops.dsv3.moe_permutation(destination, num_destinations + 1)
    within = position - offsets.index_select(0, destination.reshape(-1)).view_as(position)
    num_rows = num_destinations * block
    return _fixed((destination * block + within).clamp(max=num_rows), num_rows)


def _fixed(row_of_pair: Tensor, num_rows: int) -> FixedCopies:
    """row_of_pair: int64 [T, S], as a position."""
    pairs = row_of_pair.numel()
    source = row_of_pair.new_full((num_rows + 2,), pairs)
    source.index_copy_(0, row_of_pair.view(-1), torch.arange(pairs, device=source.device))
    return FixedCopies(source[:num_rows], row_of_pair.sort(-1).values)


def distinct(destination: Tensor, num_destinations: int) -> Tensor:
    """Each token's destinations once: int64 [T, k], num_destinations for none -> [T, min(k, num_destinations)]."""
    ordered = destination.sort(-1).values
    again = ordered[:, 1:] == ordered[:, :-1]
    ordered[:, 1:].masked_fill_(again, num_destinations)
    return ordered.sort(-1).values[:, :num_destinations].contiguous()


class Exchange(NamedTuple):
    """Copies for other ranks of `group`, and their way there."""

    group: dist.ProcessGroup | None
    copies: Copies | FixedCopies
    splits: Tensor  # int64 [2, ranks] on the host: rows sent to every rank, and received from every rank

    def spread(self, x: Tensor, blank: int | None = None) -> Tensor:
        sent, received = self.splits.tolist()
        return self._swap(self.copies.spread(x, blank), sent, received)

    def sum(self, y: Tensor) -> Tensor:
        sent, received = self.splits.tolist()
        return self.copies.sum(self._swap(y, received, sent))

    def _swap(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty(sum(received), rows.shape[1])
        with naming_lost_ranks(self.group):
            dist.all_to_all_single(out, rows, received, sent, group=self.group)
        return out


def there(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """All the way: [T, H] -> [R, H]."""
    for step in steps:
        x = step.spread(x)
    return x


def back(y: Tensor, steps: Sequence[Step]) -> Tensor:
    """And back: [R, H] -> [T, H]."""
    for step in reversed(steps):
        y = step.sum(y)
    return y


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Sequence[Step]) -> Tensor:
        ctx.steps = steps
        return there(x.contiguous(), steps)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        return back(drows.contiguous(), ctx.steps), None


class Sum(Function):
    """`back`; its gradient goes `there`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, steps: Sequence[Step]) -> Tensor:
        ctx.steps = steps
        return back(y.contiguous(), steps)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return there(dout.contiguous(), ctx.steps), None


def spread(x: Tensor, steps: Sequence[Step]) -> Tensor:
    """`there`, differentiable: its backward is `back`."""
    return _Spread.apply(x, steps)


def add_up(y: Tensor, steps: Sequence[Step]) -> Tensor:
    """`back`, differentiable: its backward is `there`."""
    return Sum.apply(y, steps)
