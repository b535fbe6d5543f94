"""Flat buffers for parameters, gradients and moments: what the optimizer, data parallel and checkpoints work on.

Parameters fall in two groups, dense and expert, because gradients of the two are reduced over different ranks. A group
is one flat tensor a quantity; inside it the tensors that decay come first, then the ones that do not, so that the
optimizer sees a few long segments instead of hundreds of small tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from dsv3.model import is_expert_param

_ALIGN = 64  # elements: every parameter starts at a multiple of 128 bytes in bf16, as TMA and vector loads like it


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its group's flat tensors, in elements."""

    name: str
    param: nn.Parameter
    offset: int

    def view(self, flat: Tensor, start: int = 0) -> Tensor:
        """The parameter's part of `flat`, whose first element is the group's element `start`."""
        offset = self.offset - start
        return flat[offset : offset + self.param.numel()].view(self.param.shape)


@dataclass(frozen=True)
class Segment:
    """A run of a group's flat tensors with one weight decay and one parameter dtype. All 1-D, of the same length."""

    decay: bool
    master: Tensor  # fp32
    main_grad: Tensor  # fp32
    exp_avg: Tensor  # bf16
    exp_avg_sq: Tensor  # bf16
    weight: Tensor | None  # the parameters themselves, or None where they are fp32 and are the master


class BufferGroup:
    """The flat tensors of one group. `slots` lists its parameters in the order in which they lie in memory."""

    def __init__(self, params: list[tuple[str, nn.Parameter]]) -> None:
        def kind(item: tuple[str, nn.Parameter]) -> tuple[bool, str]:
            return item[1].dim() < 2, str(item[1].dtype)

        runs: list[tuple[int, list[Slot]]] = []  # a run's first element and its slots
        size = 0
        for _, items in groupby(sorted(params, key=kind), key=kind):
            runs.append((size, []))
            for name, param in items:
                runs[-1][1].append(Slot(name, param, size))
                size += -(-param.numel() // _ALIGN) * _ALIGN
        device = params[0][1].device if params else None
        self.slots = [slot for _, run in runs for slot in run]
        self.master = torch.zeros(size, dtype=torch.float32, device=device)
        self.main_grad = torch.zeros_like(self.master)
        self.exp_avg = torch.zeros(size, dtype=torch.bfloat16, device=device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        bounds = pairwise([start for start, _ in runs] + [size])
        self.segments = [self._adopt(*bound, run) for bound, (_, run) in zip(bounds, runs, strict=True)]

    def grad_norm(self) -> Tensor:
        """L2 norm of main_grad, fp32 [].

        On a CPU in two levels: one fp32 sum over millions of values is off by a per cent and more there. On a GPU that is
        a tree of sums anyway, and rows of 64 take four times as long.
        """
        grad = self.main_grad
        return torch.linalg.vector_norm(
            grad if grad.is_cuda else torch.linalg.vector_norm(grad.view(-1, _ALIGN), dim=-1)
        )

    def _adopt(self, start: int, end: int, slots: list[Slot]) -> Segment:
        """Copies a run's parameters in and makes them views: of `weight`, or of `master` where they are fp32."""
        part, dtype = slice(start, end), slots[0].param.dtype
        weight = None if dtype == torch.float32 else torch.zeros_like(self.master[part], dtype=dtype)
        for slot in slots:
            slot.view(self.master).copy_(slot.param.detach())
            home = slot.view(self.master) if weight is None else slot.view(weight, start)
            slot.param.data = home.copy_(slot.param.detach())
            slot.param.main_grad = slot.view(self.main_grad)
        flat = (self.master, self.main_grad, self.exp_avg, self.exp_avg_sq)
        return Segment(slots[0].param.dim() >= 2, *(tensor[part] for tensor in flat), weight)


class ParamBuffers:
    """Moves every trainable parameter of `model` into flat buffers and routes its gradient there.

    After this `param.data` is a view of a flat tensor, `param.main_grad` (fp32, the parameter's shape) is where
    backward accumulates, and `param.grad` stays None: ops that write main_grad themselves give autograd nothing, and
    a hook moves the gradient of all others. Call it once the parameters are on their device and in their dtype.
    Raises ValueError for a parameter on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
        for name, param in params:
            if param.is_meta:
                raise ValueError(f"parameter {name} is on the meta device: materialise the model before training it")
        self.dense = BufferGroup([item for item in params if not is_expert_param(item[0])])
        self.expert = BufferGroup([item for item in params if is_expert_param(item[0])])
        for _, param in params:
            param.register_post_accumulate_grad_hook(_move_to_main_grad)

    @property
    def groups(self) -> tuple[BufferGroup, ...]:
        return tuple(group for group in (self.dense, self.expert) if group.slots)

    def slots(self) -> Iterator[tuple[Slot, BufferGroup]]:
        """Every parameter's slot with the group that holds it."""
        for group in self.groups:
            for slot in group.slots:
                yield slot, group

    def segments(self) -> list[Segment]:
        return [segment for group in self.groups for segment in group.segments]

    def zero_grad(self) -> None:
        for group in self.groups:
            group.main_grad.zero_()

    def grad_norm(self) -> Tensor:
        """L2 norm of main_grad over both groups, fp32 []."""
        return torch.linalg.vector_norm(torch.stack([group.grad_norm() for group in self.groups]))

    def sync_weights(self) -> None:
        """Rounds the master weights into the parameters, after the master was written from outside."""
        for segment in self.segments():
            if segment.weight is not None:
                segment.weight.copy_(segment.master)


def _move_to_main_grad(param: Tensor) -> None:
    if param.grad is not None:
        param.main_grad.add_(param.grad)
        param.grad = None
