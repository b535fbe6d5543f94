"""The gradient of a batch, a micro-batch at a time; on a GPU, where that can be, as CUDA graphs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dsv3.graphs import Graphs
from dsv3.model import Batch, DeepSeekV3
from dsv3.ops import registry

log = logging.getLogger("dsv3")


def why_no_graphs(device: torch.device, dtype: torch.dtype, ep: int = 1) -> str | None:
    """What keeps micro-batches of a model with weights of `dtype` from becoming CUDA graphs: whatever asks the device, as
    references, fp32 experts and experts of other ranks do."""
    reason = registry.why_no_kernels(device)
    if dtype == torch.float32 or ep > 1:
        reason = reason or f"got weights in {dtype} and ep {ep}".replace("torch.", "")
    return reason


class Gradients:
    """Adds to main_grad what backward gives; see ParamBuffers.

    Args:
        model: whose parameters have main_grad.
        balance_alpha: weight of the balance loss.
        cuda_graphs: forward and backward of a micro-batch become a CUDA graph the second time that one of a size comes with an
            mtp_weight, and are replayed from then on: the host launches one graph instead of some thousand kernels. Needs a
            model whose forward asks the device for nothing, and weights that stay where they are. Where an op has run on its
            reference, which may ask, nothing is captured. Graphs keep their activations: see `release`.
    """

    def __init__(self, model: DeepSeekV3, *, balance_alpha: float, cuda_graphs: bool = False) -> None:
        self.model, self.balance_alpha = model, balance_alpha
        device = model.embed.weight.device
        self._graphs = Graphs() if cuda_graphs else None
        self._rows: dict[int, Tensor] = {}  # what a graph reads, by the number of sequences
        self._mtp_weight: float | None = None  # of the graphs
        self._share = torch.ones((), dtype=torch.float64, device=device)
        self._losses = torch.zeros(4, dtype=torch.float64, device=device)
        self._load: Tensor | None = None

    def add(self, rows: Tensor, micro_batch: int, *, size: int, mtp_weight: float) -> tuple[Tensor, Tensor]:
        """Adds this rank's part of the mean gradient of a batch.

        Args:
            rows: int64 [n, S+1] on the model's device, this rank's sequences.
            micro_batch: how many of them at a time.
            size: sequences of the whole batch.

        Returns:
            This rank's part of the means of (total, ce, mtp, balance), fp64 [4], and its expert load, int64 [L, E].
        """
        self._losses.zero_()
        if self._load is not None:
            self._load.zero_()
        if mtp_weight != self._mtp_weight:  # the one before does not come back
            self.release()
            self._mtp_weight = mtp_weight
        for micro in rows.split(micro_batch):
            self._share.fill_(len(micro) / size)
            if self._graphs is None:
                self._micro_batch(micro, mtp_weight)
                continue
            if len(micro) not in self._rows:
                self._rows[len(micro)] = torch.empty_like(micro)
            held = self._rows[len(micro)].copy_(micro)
            known = sum(registry.FALLBACKS.values())
            self._graphs.run(len(micro), lambda held=held: self._micro_batch(held, mtp_weight))
            if sum(registry.FALLBACKS.values()) > known:
                log.info("no CUDA graphs: an op has run on its reference")
                self._graphs = None
        return self._losses.clone(), self._load.clone()  # the next batch writes them while these are still read

    def release(self) -> None:
        """Frees the memory of the graphs, for other work between batches; they are captured again."""
        if self._graphs is not None:
            self._graphs.clear()

    def _micro_batch(self, rows: Tensor, mtp_weight: float) -> None:
        loss = self.model.loss(Batch(rows), mtp_weight=mtp_weight, balance_alpha=self.balance_alpha)
        (loss.total * self._share).backward()
        parts = torch.stack([loss.total, loss.ce, loss.mtp, loss.balance]).detach()
        self._losses += parts.double() * self._share
        if self._load is None:
            self._load = torch.zeros_like(loss.expert_load, dtype=torch.int64)
        self._load += loss.expert_load
