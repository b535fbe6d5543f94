"""Auxiliary-loss-free load balance (report 2.1.2): the routing bias of every expert follows its load."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ExpertBias:
    """The routing biases of all MoE layers (MTP's last), gathered into one fp32 tensor [layers, experts].

    The layers' buffers become its rows, in the order of Loss.expert_load, so that one operation updates them all.
    `bias` has no rows where the gate has none (softmax gates, all-dense models).
    """

    def __init__(self, model: nn.Module) -> None:
        owners = [m for name, m in model.named_modules() if name.endswith("moe.gate") and m.bias is not None]
        self.bias = torch.stack([m.bias for m in owners]) if owners else torch.zeros(0, 0)
        for module, row in zip(owners, self.bias, strict=True):
            module.bias = row

    def update(self, load: Tensor, gamma: float, skip: Tensor) -> None:
        """b += gamma * sign(mean load - load) in every layer, and nothing where `skip` (bool []) is true.

        load: int [layers, experts], tokens that each expert got in the whole batch (all micro-batches, all ranks).
        """
        if self.bias.numel() == 0:
            return
        load = load.double()  # exact for any count
        sign = torch.sign(load.mean(dim=-1, keepdim=True) - load).to(self.bias.dtype)
        self.bias += sign * torch.where(skip, 0.0, gamma)
