"""The expert-parallel seam: tokens go to the ranks that hold their experts, and the results come back.

A dispatch is a chain of steps: exchanges between ranks, across nodes and within one, then the copies into expert order
within the rank. Combine, and the backward of dispatch, walk the chain from its end and add up what a token got at every
step. So the tree of sums is fixed: experts within a rank, ranks within a node, nodes.
"""

from __future__ import annotations

from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm import counts
from dsv3.comm.alive import Heartbeat
from dsv3.comm.steps import Copies, Exchange, Step, add_up, copies_to, distinct, spread

TRANSPORTS = ("auto", "local", "collective")


class Dispatched(tuple[Tensor, ...]):
    """What a dispatch gives the G local experts: a flat tuple of tensors, R rows sorted by local expert.

    Behind the first five, every exchange between ranks leaves its source, position and splits (see comm/steps.py). T is
    the number of tokens that reached this rank.
    """

    def __new__(cls, *tensors: Tensor) -> Dispatched:
        return super().__new__(cls, tensors)

    x = property(itemgetter(0), doc="[R, H]")
    topk_weights = property(itemgetter(1), doc="fp32 [R]: the routing weight of each row, applied by the expert")
    offsets = property(itemgetter(2), doc="int32 [G+1]: where each local expert's rows begin")
    source = property(itemgetter(3), doc="int64 [R]: the (token, slot) pair of a row")
    position = property(itemgetter(4), doc="int64 [T, k]: the rows of a token, ascending; R where a slot has none here")

    @property
    def num_recv(self) -> int:
        """R, known without asking the device."""
        return self.x.shape[0]

    def steps(self, group: dist.ProcessGroup | None) -> list[Step]:
        """The way that the rows came."""
        exchanges = [self[start : start + 3] for start in range(5, len(self), 3)]
        ways: list[Step] = [Exchange(group, Copies(*copies), splits) for *copies, splits in exchanges]
        return [*ways, Copies(self.source, self.position)]


class ExpertBuffer:
    """Moves tokens to their experts and back. Ranks hold equal runs of experts, the first rank the first ones.

    A token goes once to each rank that needs it. With several nodes it goes once to each node, to the rank that has there
    the index which its own rank has here, and that one forwards it. No token is dropped. For the same number of ranks and
    of ranks a node, results are the same bits run after run, whatever the transport.

    All ranks of the group make the buffer together, with the same transport, and use it equally often, forward and
    backward; one that has no tokens dispatches none. Where a call fails on one rank alone, the others wait for it, until that
    rank's process ends or the group's time-out is over; then they raise RankLost, which names it (dsv3/comm/alive.py).

    Args:
        group: the ranks that share the experts; None: the default process group, or with "local" this rank on its own.
        num_experts: E, over all ranks.
        transport: "local", one rank that holds all experts, no communication; "collective", torch.distributed's
            all_to_all_single (gloo or NCCL); "auto", local for one rank and collective for more.
        ranks_per_node: consecutive ranks that are a node; None: all of them.
        wire_dtype: of the rows between ranks and of the sums of a rank and of a node: None for x's, or torch.float32.

    Raises:
        ValueError: a transport that is unknown or does not fit the group, a group without this process, numbers that are
            no ints or do not divide, and, on every rank, numbers that differ between ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        num_experts: int,
        transport: str = "auto",
        ranks_per_node: int | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
        for name, number in (("num_experts", num_experts), ("ranks_per_node", ranks_per_node)):
            if type(number) is not int and (number is not None or name == "num_experts"):
                raise ValueError(f"{name} must be an int, got {number!r}")
        if wire_dtype not in (None, torch.float32):
            raise ValueError(f"wire_dtype must be None or torch.float32, got {wire_dtype}")
        if transport == "collective" and not dist.is_initialized():
            raise ValueError(
                "transport collective needs a process group: torch.distributed.init_process_group comes first"
            )
        alone = not dist.is_initialized() or (transport == "local" and group is None)
        ranks, rank = (1, 0) if alone else (dist.get_world_size(group), dist.get_rank(group))
        if rank < 0:
            raise ValueError("this process is not one of the group's ranks")
        if transport == "local" and ranks > 1:
            raise ValueError(f"transport local is for one rank, and the group has {ranks}")
        width = ranks if ranks_per_node is None else ranks_per_node
        self.group, self.num_experts, self.wire_dtype = group, num_experts, wire_dtype
        self.transport = transport if transport != "auto" else "local" if ranks == 1 else "collective"
        if self.transport == "collective":
            self._heartbeat = Heartbeat()
            self._agree((num_experts, ranks_per_node, wire_dtype))
        if num_experts < 1 or num_experts % ranks:
            raise ValueError(
                f"num_experts must be a multiple of the ranks, got {num_experts} experts for {ranks} ranks"
            )
        if width < 1 or ranks % width:
            raise ValueError(f"ranks_per_node must divide the ranks, got {ranks_per_node} for {ranks} ranks")
        self.layout = counts.Layout(num_experts, ranks, width, rank)

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Dispatched:
        """Sends every token to its experts; differentiable in x and topk_weights.

        "collective" reads all ranks' counts once on the host. "local" never waits for the device, so it does not look at
        the expert ids.

        Args:
            x: [T, H], bf16, fp16, fp32 or fp64; ranks may differ in T, and have T = 0.
            topk_idx: int64 [T, k], experts in 0..E-1.
            topk_weights: fp32 [T, k]; of another float dtype, so are the handle's.

        Raises:
            ValueError: shapes, dtypes or ("collective" only) expert ids that do not fit; raised on every rank if they do
                not on one, or if H, k or a dtype differ.
        """
        slots, weights, rows = topk_idx, topk_weights, x.to(self.wire_dtype or x.dtype)
        ways: list[Tensor] = []
        if self.transport == "local":
            trouble = counts.problem(x, topk_idx, topk_weights)
            if trouble is not None:
                raise ValueError(f"dispatch: {trouble}")
            num_rows = topk_idx.numel()
        else:
            traffic = counts.exchange(self.layout, self.group, x, topk_idx, topk_weights)
            num_rows = traffic.num_rows
            for level in self.layout.levels:
                sent, received = traffic.splits(level)
                peers = len(level.peers)
                copies, _ = copies_to(distinct(slots // level.span, peers), peers, sum(sent))
                way = Exchange(self.group, copies, torch.tensor([sent, received]))
                rows, weights, slots = spread(rows, way), spread(weights, way), way.spread(slots)
                slots = slots - level.index * level.span
                slots = slots.where((slots >= 0) & (slots < level.span), level.span)  # that is no expert of ours
                ways += [*copies, way.splits]
        copies, offsets = copies_to(slots, self.layout.num_local_experts, num_rows)
        weights = weights.reshape(-1).index_select(0, copies.source)
        return Dispatched(spread(rows, copies).to(x.dtype), weights, offsets, *copies, *ways)

    def combine(self, y: Tensor, handle: Dispatched) -> Tensor:
        """Brings the rows y [R, H] home and sums each token's, unweighted -> [T, H]; differentiable in y.

        In fp32: experts ascending within a rank, then ranks ascending within a node, then nodes ascending, with one
        rounding after each. Raises ValueError, on this rank alone, where y has not the shape and dtype of the rows that were
        dispatched.
        """
        if (y.shape, y.dtype) != (handle.x.shape, handle.x.dtype):
            expected, got = (f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in (handle.x, y))
            raise ValueError(f"combine: y must be {expected} like handle.x, got {got}")
        out = y.to(self.wire_dtype or y.dtype)
        for step in reversed(handle.steps(self.group)):
            out = add_up(out, step)
        return out.to(y.dtype)

    def _agree(self, settings: tuple[object, ...]) -> None:
        everyone: list[object] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, settings, group=self.group)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise ValueError(
                    "num_experts, ranks_per_node and wire_dtype must be the same on all ranks, got "
                    f"{everyone[0]} on rank 0 and {other} on rank {rank}"
                )
