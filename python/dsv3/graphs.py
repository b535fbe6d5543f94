"""CUDA graphs of decode rounds and of micro-batches: one for every shape that is met again, all in one pool of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from dsv3.ops import Quantized

log = logging.getLogger("dsv3")


class Graphs:
    """Runs work that always does the same to tensors at the same addresses.

    The first run of a key launches every kernel (which also warms up what a capture must not: libraries, copies of
    weights), the second captures a graph, and that and all later ones replay it. Where there is no memory for what a graph
    keeps to itself, its kernels go on being launched.
    """

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        self._captured: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._too_large: set[Hashable] = set()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Does what `work()` does. It must not read anything on the host, nor return anything."""
        if key in self._captured and key not in self._too_large:
            graph = self._captured[key] = self._captured[key] or self._capture(key, work)
            if graph is not None:
                return graph.replay()
        self._captured.setdefault(key, None)
        work()

    def clear(self) -> None:
        """Forgets everything: what was captured no longer holds."""
        self._captured.clear()
        self._too_large.clear()
        self._pool = None

    def _capture(self, key: Hashable, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        # A stream of the current device: torch keeps one for the process. Other threads may use the device meanwhile.
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except torch.OutOfMemoryError:  # nothing has been done yet
            log.warning("no memory for another CUDA graph: kernels are launched one by one")
            self._too_large.add(key)
            torch.cuda.empty_cache()
            return None
        # NOTE: one pool serves all graphs because they run one after the other and nothing in it outlives a replay.
        self._pool = graph.pool()
        return graph


def addresses(model: nn.Module) -> tuple[object, ...]:
    """Where the weights of a model lie and how they are multiplied: what a captured graph takes for granted.

    Values that change in place change no address; a load that puts other tensors in their places, a quantisation, another
    precision or another device does.
    """
    found: list[object] = []
    for module in model.modules():
        values = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for value in values:
            if isinstance(value, Quantized):
                found += [value.data.data_ptr(), value.sf.data_ptr()]
            elif isinstance(value, Tensor):
                found.append(value.data_ptr())
        found.append(getattr(module, "fp8", False))
    return tuple(found)
