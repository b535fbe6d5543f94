"""The rows of a static buffer: how many there could be, and what happens when they do not suffice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm.alive import naming_lost_ranks
from dsv3.comm.counts import Layout


@torch.inference_mode(False)  # what an engine's dispatch makes must serve training too
def _words(device: torch.device) -> tuple[Tensor, Tensor]:
    """The most rows that a call on a device has needed, there, and where the host sees it."""
    most, seen = (torch.zeros((), dtype=torch.int32, device=where) for where in (device, "cpu"))
    return most, seen.pin_memory() if device.type == "cuda" else seen


@dataclass(frozen=True)
class Room:
    """`max_recv` rows for what the experts of a rank get from all ranks' `max_tokens` tokens."""

    layout: Layout
    max_tokens: int
    max_recv: int
    words: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    def most_rows(self, topk: int) -> int:
        """What could arrive: ranks x max_tokens x min(topk, local experts) rows."""
        return self.layout.ranks * self.max_tokens * min(topk, self.layout.num_local_experts)

    def line(self, hidden: int, topk: int, dtype: torch.dtype, *, exchanged: bool = True) -> str:
        """A sentence about the memory that a dispatch takes on a rank; exchanged: tokens arrive in memory of their own."""
        ranks, experts = self.layout.ranks, min(topk, self.layout.num_local_experts)
        scales = 4 * -(-hidden // 128) if dtype == torch.float8_e4m3fn else 0
        row = hidden * dtype.itemsize + scales
        held, most, tokens = (f"{n * row / 1e9:.3g} GB" for n in (self.max_recv, self.most_rows(topk), self._arrivals))
        passing = f"; {tokens} for {self._arrivals} tokens that arrive" if exchanged and ranks > 1 else ""
        return (
            f"dispatch takes {held} for {self.max_recv} rows of {hidden} {str(dtype).removeprefix('torch.')}{passing}. "
            f"Never too small: {self.most_rows(topk)} rows = {ranks} ranks x {self.max_tokens} tokens x {experts} experts, "
            f"{most}"
        )

    @property
    def _arrivals(self) -> int:
        return self.layout.ranks * self.max_tokens

    def raise_on_every_rank(self, needed: Tensor, group: dist.ProcessGroup | None) -> None:
        """needed: int32 [], on the CPU. Raises RuntimeError, on all ranks, where any has not enough rows."""
        everyone = [needed]
        if self.layout.ranks > 1:
            everyone = [torch.empty_like(needed) for _ in range(self.layout.ranks)]
            with naming_lost_ranks(group):
                dist.all_gather(everyone, needed, group=group)
        for rank, rows in enumerate(everyone):
            if rows > self.max_recv:
                raise RuntimeError(f"dispatch: rank {rank} gets {int(rows)} rows, and max_recv is {self.max_recv}")

    def note(self, needed: Tensor) -> Tensor:
        """Leaves needed, int32 [] on a device, where `raise_noted` sees it -> bool []: whether it is too much."""
        if needed.device not in self.words:
            self.words[needed.device] = _words(needed.device)
        most, seen = self.words[needed.device]
        seen.copy_(torch.maximum(most, needed, out=most), non_blocking=True)
        return needed > self.max_recv

    def raise_noted(self) -> None:
        """Raises RuntimeError, without waiting for a device, where a call on one has had too few rows."""
        for _, seen in self.words.values():
            if seen > self.max_recv:
                raise RuntimeError(
                    f"an earlier dispatch got {int(seen)} rows, and max_recv is {self.max_recv}: what it gave is NaN"
                )
