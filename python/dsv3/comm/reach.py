"""Which ranks can reach which memory, and how all of them hear of it where one cannot."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist


class Unreachable(Exception):
    """Why the ranks of a group cannot use each other's memory; the same on all of them."""


def raise_first(reasons: list[str | None]) -> None:
    """Raises Unreachable with the first reason, and whose it is; reasons: what every rank of a group said, the same on all."""
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise Unreachable(f"{reason} (rank {rank})")


def machine() -> str:
    """What the processes of a machine have in common."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def ranks_per_machine(group: dist.ProcessGroup | None) -> int | None:
    """How many consecutive ranks every machine has; None where it is not the same number."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, machine(), group=group)
    runs = [len(list(run)) for _, run in itertools.groupby(everyone)]
    return runs[0] if len(set(runs)) == 1 and len(runs) == len(set(everyone)) else None
