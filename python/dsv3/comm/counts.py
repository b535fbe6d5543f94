"""Who sends how much to whom: counted on every rank, told to all of them, read on the host once a dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm import fp8
from dsv3.comm.alive import naming_lost_ranks
from dsv3.comm.steps import distinct

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Level(NamedTuple):
    """An exchange of this rank with its peers: across nodes (those with its index in theirs) or within its node."""

    across: bool
    peers: range  # ranks of the group
    span: int  # experts for which a peer stands: its node's, or its own
    index: int  # this rank's place among the peers


@dataclass(frozen=True)
class Layout:
    """Where the experts are: equal runs of them on consecutive ranks, `ranks_per_node` consecutive ranks a node."""

    num_experts: int
    ranks: int
    ranks_per_node: int
    rank: int  # this one

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ranks

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    @cached_property
    def levels(self) -> list[Level]:
        """The exchanges on a token's way, in order; none among a single rank."""
        width, local = self.ranks_per_node, self.num_local_experts
        node, index = divmod(self.rank, width)
        across = Level(True, range(index, self.ranks, width), local * width, node)
        within = Level(False, range(node * width, (node + 1) * width), local, index)
        return [level for level in (across, within) if len(level.peers) > 1]


class Counts(NamedTuple):
    """What all ranks send, as lists [sender][receiver]."""

    layout: Layout
    pairs: list[list[int]]  # (token, slot) pairs for a rank's experts
    to_rank: list[list[int]]  # tokens with an expert there
    to_node: list[list[int]]

    @property
    def num_rows(self) -> int:
        """Rows that this rank's experts get."""
        return sum(row[self.layout.rank] for row in self.pairs)

    def splits(self, level: Level) -> tuple[list[int], list[int]]:
        """Rows that this rank sends to every rank, and receives from every rank, at a level."""
        me, ranks = self.layout.rank, range(self.layout.ranks)
        flow = self._across if level.across else self._within
        sent = [flow(me, rank) if rank in level.peers else 0 for rank in ranks]
        return sent, [flow(rank, me) if rank in level.peers else 0 for rank in ranks]

    def _across(self, sender: int, receiver: int) -> int:
        return self.to_node[sender][receiver // self.layout.ranks_per_node]

    def _within(self, sender: int, receiver: int) -> int:
        """What `sender` forwards: tokens of every rank that has its index in a node."""
        width = self.layout.ranks_per_node
        return sum(self.to_rank[origin][receiver] for origin in range(sender % width, self.layout.ranks, width))


def problem(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, cast: bool) -> str | None:
    """What is wrong with the arguments of a dispatch, the values of the expert ids aside; cast: x is to travel as FP8."""
    shapes = [tuple(t.shape) for t in (x, topk_idx, topk_weights)]
    if (
        x.dim() != 2
        or topk_idx.dim() != 2
        or shapes[1] != shapes[2]
        or shapes[0][0] != shapes[1][0]
        or not shapes[1][1]
    ):
        return f"x must be (T, H), topk_idx and topk_weights (T, k) with k >= 1, got {', '.join(map(str, shapes))}"
    if topk_idx.dtype != torch.int64 or not {x.dtype, topk_weights.dtype} <= set(DTYPES):
        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, topk_idx, topk_weights))
        return f"x and topk_weights must be floats and topk_idx int64, got {dtypes}"
    if cast and (x.shape[1] % 16 or x.dtype not in fp8.DTYPES):
        found = f"{x.shape[1]} {x.dtype}".replace("torch.", "")
        return f"over FP8 x must be bfloat16 or float32, H a multiple of 16, got {found}"
    return None


def exchange(
    layout: Layout,
    group: dist.ProcessGroup | None,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    found: str | None,
) -> Counts:
    """Counts this rank's tokens and learns the others' counts; the host waits for the device here. found: the `problem` here.

    Raises ValueError, on all ranks, where the arguments of any do not fit, or differ in what must be the same.
    """
    head, counts = torch.zeros(5, dtype=torch.int64), torch.zeros(2 * layout.ranks + layout.nodes, dtype=torch.int64)
    head[:] = torch.tensor(head_of(x, topk_idx, topk_weights, found))
    if found is None:
        outside = ((topk_idx < 0) | (topk_idx >= layout.num_experts)).any()
        head, counts = torch.cat([outside.view(1) * 2, head[1:].to(x.device)]), _count(topk_idx, layout)
    mine = torch.cat([head, counts]).to(x.device)
    everyone = [torch.empty_like(mine) for _ in range(layout.ranks)]
    with naming_lost_ranks(group):
        dist.all_gather(everyone, mine, group=group)
        rows = torch.stack(everyone).tolist()
    compare([row[:5] for row in rows], found, layout)
    ends = 5 + layout.ranks, 5 + 2 * layout.ranks
    pairs, to_rank = [row[5 : ends[0]] for row in rows], [row[ends[0] : ends[1]] for row in rows]
    return Counts(layout, pairs, to_rank, [row[ends[1] :] for row in rows])


def head_of(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, found: str | None) -> list[int]:
    """What `compare` compares, the values of the expert ids aside."""
    if found is not None:
        return [1, 0, 0, 0, 0]
    return [0, x.shape[1], topk_idx.shape[1], *(DTYPES.index(t.dtype) for t in (x, topk_weights))]


def _count(topk_idx: Tensor, layout: Layout) -> Tensor:
    """int64 [2 * ranks + nodes]: pairs for each rank, tokens for each rank, tokens for each node."""
    rank = topk_idx.clamp(0, layout.num_experts - 1) // layout.num_local_experts
    node = rank // layout.ranks_per_node
    parts = [
        (rank, layout.ranks),
        (distinct(rank, layout.ranks), layout.ranks),
        (distinct(node, layout.nodes), layout.nodes),
    ]
    return torch.cat([_histogram(values, bins) for values, bins in parts])


def _histogram(values: Tensor, bins: int) -> Tensor:
    """int64 [bins]: how often each value in 0..bins occurs, the last one aside; torch.bincount would ask the device."""
    flat = values.reshape(-1)
    return torch.zeros(bins + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))[
        :-1
    ]


def compare(heads: list[list[int]], found: str | None, layout: Layout) -> None:
    """heads: every rank's trouble, hidden size, topk and the places of its dtypes in DTYPES. Raises as `exchange` does."""
    if found is not None:
        raise ValueError(f"dispatch: {found}")
    for rank, (trouble, *_) in enumerate(heads):
        if trouble:
            what = f"expert ids must lie in 0..{layout.num_experts - 1}" if trouble == 2 else "arguments do not fit"
            raise ValueError(f"dispatch: {what} on rank {rank}")
    for rank, head in enumerate(heads):
        if head != heads[0]:
            texts = [f"{h}, {k}, {DTYPES[x]}, {DTYPES[w]}".replace("torch.", "") for _, h, k, x, w in (heads[0], head)]
            raise ValueError(
                f"dispatch: hidden size, topk and dtypes of x and of the weights must be the same on all ranks, got "
                f"({texts[0]}) on rank 0 and ({texts[1]}) on rank {rank}"
            )
