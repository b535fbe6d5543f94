"""CUDA graphs of decode rounds and of micro-batches: one for every shape that is met again, all in one pool of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from dsv3.ops import Fp8Weights, Quantized

log = logging.getLogger("dsv3")


class Graphs:
    """Runs work that always does the same to tensors at the same addresses.

    The first run of a key launches every kernel (which also warms up what a capture must not: libraries, copies of
    weights), the second captures a graph, and that and all later ones replay it. Graphs keep the memory of what they work
    with; where there is not enough for that, none is kept or captured any more, and all kernels are launched.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._no_room = False

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Does what `work()` does. It must not read anything on the host, nor return anything."""
        if key in self._captured and not self._no_room:
            graph = self._captured[key] or self._capture(work)
            if graph is not None:
                self._captured[key] = graph
                return graph.replay()
        self._captured.setdefault(key, None)
        work()

    def clear(self) -> None:
        """Forgets everything: what was captured no longer holds, or its memory is wanted."""
        self._captured.clear()
        self._pool = None

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None where memory does not suffice; then nothing has been done."""
        graph = torch.cuda.CUDAGraph()
        # NOTE: one pool and one stream serve all graphs, because they run one after the other and nothing in it outlives a
        # replay. Other threads may use the device meanwhile.
        self._stream = self._stream or torch.cuda.Stream()
        options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **options):
                work()
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if "out of memory" not in str(error):
                raise
        else:
            self._pool = graph.pool()
            return graph
        log.warning("no memory for CUDA graphs: kernels are launched one by one")
        self._no_room = True
        self.clear()
        del graph
        torch.cuda.empty_cache()
        return None


# What most attributes of a module are, which there are thousands of.
_NO_TENSORS = frozenset({bool, int, float, str, type(None), dict, set})


def addresses(model: nn.Module) -> tuple[object, ...]:
    """Where the weights of a model lie and how they are multiplied: what a captured graph takes for granted.

    Values that change in place change no address; a load that puts other tensors in their places, a quantisation, another
    precision or another device does.
    """
    found: list[object] = []
    for module in model.modules():
        others = [value for value in vars(module).values() if type(value) not in _NO_TENSORS]
        for value in (*module._parameters.values(), *module._buffers.values(), *others):
            if isinstance(value, Quantized):
                found += [value.data.data_ptr(), value.sf.data_ptr()]
            elif isinstance(value, Tensor):
                found.append(value.data_ptr())
            elif isinstance(value, Fp8Weights):
                found += [t.data_ptr() for made in value.made.values() for t in (made.data.data, made.data.sf)]
        found.append(getattr(module, "fp8", False))
    return tuple(found)
