"""Exponential moving average of the parameters, kept in the memory of the host (report 3.2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.train.buffers import ParamBuffers


class Ema:
    """average += (1 - decay) * (master - average) after every step that was not skipped; fp32, on the CPU.

    With weights on a GPU the new master weights are copied to pinned memory without waiting, and blended a step later,
    when the step's flag has reached the host anyway: `snapshot` after the optimizer, `settle` with the flag.
    """

    def __init__(self, buffers: ParamBuffers, decay: float) -> None:
        self.decay = decay
        self.groups = buffers.groups
        on_gpu = self.groups[0].master.is_cuda
        self.averages = [torch.empty_like(g.master, device="cpu").copy_(g.master) for g in self.groups]
        self._pinned = [torch.empty_like(a, pin_memory=True) for a in self.averages] if on_gpu else []

    def snapshot(self, skip: Tensor) -> None:
        """Takes the master weights of the step that has just been issued; skip: bool [], on their device."""
        if self._pinned:
            for pinned, group in zip(self._pinned, self.groups, strict=True):
                pinned.copy_(group.master, non_blocking=True)
        elif not skip:
            self._blend([group.master for group in self.groups])

    def settle(self, skipped: bool) -> None:
        """Blends the last snapshot in, once its step has finished on the device."""
        if self._pinned and not skipped:
            self._blend(self._pinned)

    def _blend(self, weights: list[Tensor]) -> None:
        for average, weight in zip(self.averages, weights, strict=True):
            average.lerp_(weight, 1 - self.decay)

    def views(self) -> dict[str, Tensor]:
        """The average of every parameter, by name, as views."""
        pairs = zip(self.averages, self.groups, strict=True)
        return {slot.name: slot.view(average) for average, group in pairs for slot in group.slots}
