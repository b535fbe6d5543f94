"""csrc/loss: cross-entropy over V3's vocabulary, the gradient written over the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Baseline, Case, peers
from dsv3.reference import loss as reference


def _run(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.dsv3.cross_entropy_(logits, targets, True), logits


def _plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return reference.cross_entropy_(logits, targets, True), logits


def _torch(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient as one function, so that the compiler sees both at once."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(x.float(), targets, reduction="none")
        return loss.sum(), loss

    gradient, loss = torch.func.grad(total, has_aux=True)(logits)
    return loss, gradient


def cases(tiny: bool) -> list[Case]:
    """4096 tokens x 129280 words in bf16."""
    tokens, vocab = (8, 1024) if tiny else (4096, 129280)

    def inputs(device: torch.device) -> tuple[Any, ...]:
        logits = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16).mul_(2)
        return logits, torch.randint(vocab, (tokens,), device=device)

    return [
        Case(
            op="cross_entropy_",
            case={"tokens": tokens, "hidden": vocab},
            flops=4 * tokens * vocab,
            bytes=4 * tokens * vocab + 12 * tokens,  # logits read once, the gradient written once
            inputs=inputs,
            run=_run,
            baselines=peers(_plain, **{"F.cross_entropy compiled": Baseline(_torch, compiled=True)}),
            restore=(0,),  # a gradient is no typical set of logits
        )
    ]
