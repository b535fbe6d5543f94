"""Data parallel over torch.distributed: one sum of the flat gradient buffers a step, and the agreements around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm.alive import Heartbeat

if TYPE_CHECKING:
    from dsv3.train.buffers import ParamBuffers

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # how long a rank waits for another; groups of a mesh keep torch's default


def find_device(name: str) -> torch.device:
    """The device called "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".

    Raises ValueError for any other name, and for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"device {name!r} was asked for, and torch finds {count} CUDA devices")
    return device


def ranks_here() -> int:
    """How many ranks torchrun has started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def ranks_share_gpus() -> bool:
    """Whether torchrun has started more ranks on this machine than GPUs are visible; True of ranks of which it says nothing."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return dist.is_initialized() and dist.get_world_size() > 1
    return ranks_here() > torch.cuda.device_count()


@dataclass(frozen=True)
class DataParallel:
    """This process among those that train the same weights. The default is a process on its own."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    joined: bool = False  # whether `start` made the process group
    heartbeat: Heartbeat | None = None  # None for a process on its own

    @classmethod
    def start(cls, device: str = "auto") -> DataParallel:
        """Joins the process group that torchrun announced (NCCL on CUDA devices, gloo otherwise), or stays alone.

        A process group that exists already is used as it is.
        device: "auto", "cpu", "cuda" or "cuda:N"; under torchrun "cuda" is the device of the local rank. Where a machine has
        more ranks than GPUs they share them, over gloo: NCCL refuses two ranks on a device.
        """
        kind = find_device(device)
        if not (dist.is_initialized() or dist.is_torchelastic_launched()):
            return cls(device=kind)
        joins, backend = not dist.is_initialized(), "gloo"
        if kind.type == "cuda":
            kind = torch.device("cuda", dist.get_node_local_rank() % torch.cuda.device_count())
            torch.cuda.set_device(kind)
            if not ranks_share_gpus():
                backend = "nccl"
        if joins:
            dist.init_process_group(backend, timeout=TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), kind, joins, Heartbeat())

    def stop(self) -> None:
        """Leaves the process group, if `start` joined it."""
        if self.heartbeat is not None:
            self.heartbeat.stop()
        if self.joined:
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast_parameters(self, buffers: ParamBuffers) -> None:
        """Gives every rank the first one's master weights and parameters."""
        if self.world > 1:
            for group in buffers.groups:
                dist.broadcast(group.master, src=0)
            buffers.sync_weights()

    def reduce_gradients(self, buffers: ParamBuffers) -> None:
        """Sums main_grad over the ranks: after the last micro-batch of a step."""
        for group in buffers.groups:
            self.sum(group.main_grad)

    def grad_norm(self, buffers: ParamBuffers) -> Tensor:
        """L2 norm of the whole model's reduced gradient, fp32 []; the same bits on every rank."""
        return buffers.grad_norm()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The tensor of parameter `name` (weight, moment, average) as checkpoints have it; it shares the memory of `part`."""
        return part

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any picklable object), on every rank. Waits for all of them."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank (any picklable object), on every rank. An OSError or ValueError of it is raised
        on every rank, so that none waits for one that gave up."""
        outcome: Any = None
        if self.is_first:
            try:
                outcome = work()
            except (OSError, ValueError) as error:
                outcome = error
        outcome = self.gather(outcome)[0]
        if isinstance(outcome, OSError | ValueError):
            raise outcome
        return outcome

    def close(self) -> None:
        """Frees what ranks have opened for each other to train; all call it together, after a run that none left early."""
