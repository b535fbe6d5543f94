"""NVSHMEM, through which ranks of several nodes reach each other: the module dsv3._nvshmem, loaded when it is asked for, and
the symmetric memory of this process, of which every buffer has a part.

A process starts NVSHMEM once, among the ranks of its first buffer over it; later buffers are among these.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from dsv3.comm.reach import Unreachable, raise_first

ARENA_BYTES = 256 << 20  # of symmetric memory, or what the first buffer takes and as much for each of ROOM - 1 more
ROOM = 4  # buffers, of which later ones get no more than ARENA_BYTES
ALIGNMENT = 128  # of a part
DIRECT = True  # memory of others that is mapped here is written to without NVSHMEM; tests have it both ways
LIBRARY = "libnvshmem_host.so.3"

log = logging.getLogger("dsv3")


class Part(NamedTuple):
    """A buffer's part of the symmetric memory, the same on all its ranks."""

    offset: int
    pes: list[int]  # what NVSHMEM calls the buffer's ranks


@cache
def native() -> ModuleType:
    """dsv3._nvshmem. Raises ImportError with the reason where it cannot be loaded."""
    if importlib.util.find_spec("dsv3._nvshmem") is None:
        needs = "which is compiled where nvcc and the wheel nvidia-nvshmem-cu13 are found"
        raise ImportError(f"dsv3 was installed without the transport nvshmem, {needs}")
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) / "nvshmem" / "lib" for folder in (spec and spec.submodule_search_locations) or ()]
    library = next((folder / LIBRARY for folder in folders if (folder / LIBRARY).exists()), Path(LIBRARY))
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ImportError(f"NVSHMEM is not installed (pip install 'nvidia-nvshmem-cu13>=3.4,<3.5'): {error}") from error
    from dsv3 import _nvshmem

    return _nvshmem


def objection() -> str | None:
    """Why this process cannot use NVSHMEM."""
    try:
        native()
    except ImportError as error:
        return str(error)
    return None


class Memory:
    """The symmetric memory of a process."""

    def __init__(self) -> None:
        self.ranks: list[int] = []  # those among which NVSHMEM runs, as the default process group numbers them
        self.size, self.device = 0, 0
        self.taken: dict[int, int] = {}  # parts of buffers: {offset: bytes}
        self.refused: str | None = None  # why it did not start, which cannot be tried again

    def take(
        self, ranks: list[int], rank: int, size: int, ask: Callable[[Any], list[Any]], device: int, *, alone: bool
    ) -> Part:
        """A part for a buffer of these ranks, which call together; the first such call starts NVSHMEM.

        Args:
            ranks: of the buffer, as the default process group numbers them; rank: this one's place among them.
            size: bytes.
            ask: tells the ranks of the buffer something and returns what all said.
            alone: all ranks are on one machine.

        Raises Unreachable on all of them.
        """
        states = ask(self._state(device))
        raise_first([problem for problem, *_ in states])
        if not any(running for _, running, *_ in states):
            self._start(ranks, rank, size, ask, device, alone=alone)
            states = ask(self._state(device))
        running = states[0][1]
        if any(other != running for _, other, *_ in states) or not set(ranks) <= set(running):
            among = " and among ".join(str(list(r)) for r in dict.fromkeys(tuple(s[1]) for s in states) if r)
            raise Unreachable(f"NVSHMEM runs among ranks {among}, a buffer was asked for by {ranks}")
        offset = _first_gap([part for *_, taken in states for part in taken.items()], size)
        room = min(room for *_, room, _ in states)
        if offset + size > room:
            raise Unreachable(
                f"of {room / 1e6:.0f} MB of symmetric memory no {size / 1e6:.0f} MB are left in one piece: "
                "make the largest buffer first"
            )
        self.taken[offset] = size
        return Part(offset, [running.index(r) for r in ranks])

    def give_back(self, part: Part) -> None:
        """Of a buffer that has been closed on all its ranks."""
        self.taken.pop(part.offset, None)

    def _state(self, device: int) -> tuple[str | None, list[int], int, dict[int, int]]:
        problem = self.refused
        if self.ranks and device != self.device:
            problem = f"NVSHMEM's memory is on GPU {self.device} of this process, not {device}"
        return problem, self.ranks, self.size, self.taken

    def _start(
        self, ranks: list[int], rank: int, size: int, ask: Callable[[Any], list[Any]], device: int, *, alone: bool
    ) -> None:
        room = -(-max(ARENA_BYTES, size + (ROOM - 1) * min(size, ARENA_BYTES)) // ALIGNMENT) * ALIGNMENT
        reason, made = None, b""
        try:
            made = native().nvshmem_id() if rank == 0 else b""
        except RuntimeError as error:
            reason = str(error)
        said = ask((reason, made))
        raise_first([reason for reason, _ in said])
        try:
            native().nvshmem_start(device, rank, len(ranks), said[0][1], room, alone)
        except (RuntimeError, ValueError) as error:
            reason = str(error)
        reasons = ask(reason)
        self.refused = next(filter(None, reasons), None)
        raise_first(reasons)
        self.ranks, self.size, self.device = list(ranks), room, device
        log.info("nvshmem: %.3g MB of symmetric device memory for the buffers of %d ranks", room / 1e6, len(ranks))


def _first_gap(parts: list[tuple[int, int]], size: int) -> int:
    """The lowest offset from which `size` bytes overlap no part (offset, bytes)."""
    offset = 0
    for begin, length in sorted(parts):
        if offset + size <= begin:
            break
        offset = max(offset, -(-(begin + length) // ALIGNMENT) * ALIGNMENT)
    return offset


memory = Memory()  # a process has one
