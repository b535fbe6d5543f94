"""A stream of its own for what moves rows, so that other kernels compute meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv3.comm.low_latency import Pending, Result


class Aside:
    """Runs calls on one stream, in their order; on a CPU at once. Their backward runs there too: autograd takes the stream of
    the forward, and waits where streams meet."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def run(self, call: Callable[[], Result], inputs: Sequence[Tensor]) -> Pending[Result]:
        """Starts call(), of tensors on one device, behind all that the current stream has been given; who receives the result,
        a tensor or a tuple of them, has the stream that is current then wait for it."""
        device = inputs[0].device
        if device.type != "cuda":
            result = call()
            return Pending(lambda: result)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)  # few blocks that others may be waiting for
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            result = call()
            done = stream.record_event()
        _keep(inputs, stream)

        def receive() -> Result:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            tensors = result if isinstance(result, tuple) else (result,)
            gathered = [made for t in tensors if (made := getattr(t, "gathered", None)) is not None]
            _keep([*tensors, *(t for made in gathered for t in made.tensors)], current)
            return result

        return Pending(receive)


def _keep(tensors: Sequence[Tensor], stream: torch.cuda.Stream) -> None:
    """Their memory is not given to others before what `stream` has been given has run."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(stream)
