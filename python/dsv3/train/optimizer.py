"""AdamW over ParamBuffers: clipping, the skip of a non-finite step and the update, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.train.buffers import ParamBuffers, Segment


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. 0-dim tensors on the device."""

    grad_norm: Tensor  # fp32, the global L2 norm before clipping
    skip: Tensor  # bool, whether the step changed nothing because its gradient or its loss was not finite


class AdamW:
    """AdamW with fp32 master weights and bf16 moments (report 4.2: betas 0.9 and 0.95, decay 0.1, clip 1.0).

    Norms and other 1-D parameters do not decay. `step_count` (fp32 []), `skipped` and `skipped_in_row` (int64 []) live
    on the device and belong to the state that a checkpoint saves.
    """

    def __init__(
        self,
        buffers: ParamBuffers,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
    ) -> None:
        self.buffers, self.betas, self.eps, self.weight_decay, self.clip = buffers, betas, eps, weight_decay, clip
        device = buffers.groups[0].master.device
        self.step_count = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_row = torch.zeros((), dtype=torch.int64, device=device)
        self._lr = torch.zeros((), device=device)

    def step(self, lr: float, loss: Tensor, grad_norm: Tensor | None = None) -> StepResult:
        """Clips main_grad to the global norm, updates master and weights, and clears main_grad.

        loss: [], the step's loss; if it or the gradient norm is not finite, weights, moments and step_count stay.
        grad_norm: fp32 [], the global norm where these buffers hold a part of the model; None: the buffers' own.
        """
        buffers = self.buffers
        norm = buffers.grad_norm() if grad_norm is None else grad_norm
        skip = ~(torch.isfinite(norm) & torch.isfinite(loss))
        scale = (self.clip / norm).clamp(max=1.0)
        self._lr.fill_(lr)
        segments = buffers.segments()
        for has_weight in (False, True):
            self._update([s for s in segments if (s.weight is not None) == has_weight], scale, skip)
        self.step_count += ~skip
        self.skipped += skip
        self.skipped_in_row.add_(1).mul_(skip)
        buffers.zero_grad()
        return StepResult(norm, skip)

    def _update(self, segments: list[Segment], scale: Tensor, skip: Tensor) -> None:
        if not segments:
            return
        ops.adamw(
            [s.master for s in segments],
            [s.main_grad for s in segments],
            [s.exp_avg for s in segments],
            [s.exp_avg_sq for s in segments],
            [s.weight for s in segments if s.weight is not None],
            self._lr,
            scale,
            skip,
            self.step_count,
            [self.weight_decay if s.decay else 0.0 for s in segments],
            *self.betas,
            self.eps,
        )
