"""CUDA graphs of work of any kind; of decode rounds: inference/test_graphs.py, of micro-batches: train/test_trainer.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from dsv3.graphs import Graphs


class Recorded:
    """Stands for torch.cuda.CUDAGraph: a replay does what was done while it was captured."""

    current: Recorded | None = None

    def __init__(self) -> None:
        self.replays = 0
        self.stream: object = None

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """All graphs that are begun, where there is no GPU."""
    found: list[Recorded] = []

    @contextmanager
    def capture(graph: Recorded, *, stream: object, **options: Any) -> Iterator[None]:
        graph.stream, Recorded.current = stream, graph
        found.append(graph)
        try:
            yield
        finally:
            Recorded.current = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return found


def test_the_second_run_is_captured(captured: list[Recorded]) -> None:
    graphs, done = Graphs(), []
    for _ in range(4):
        for key in ("a", "b"):
            graphs.run(key, lambda key=key: done.append((key, Recorded.current is not None)))
    assert done == [("a", False), ("b", False), ("a", True), ("b", True)]
    assert [graph.replays for graph in captured] == [3, 3]
    assert captured[0].stream is captured[1].stream, "or they could not share memory"
    graphs.clear()
    graphs.run("a", lambda: done.append(("a", Recorded.current is not None)))
    assert done[-1] == ("a", False)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_without_memory_for_graphs_kernels_are_launched(
    captured: list[Recorded], caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    """All of them, from then on: what other graphs keep is wanted. It is said once."""
    graphs, done = Graphs(), []

    def large() -> None:
        if Recorded.current is not None:
            raise kind("CUDA error: out of memory")
        done.append("large")

    for _ in range(3):
        graphs.run("small", lambda: done.append("small"))
        graphs.run("large", large)
    assert done == ["small", "large", "small", "large", "small", "large"]
    assert [graph.replays for graph in captured] == [1, 0]
    assert [record.getMessage() for record in caplog.records] == [
        "no memory for CUDA graphs: kernels are launched one by one"
    ]


def test_other_errors_of_a_capture_are_raised(captured: list[Recorded]) -> None:
    def asks() -> None:
        if Recorded.current is not None:
            raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    graphs = Graphs()
    graphs.run("a", asks)
    with pytest.raises(torch.AcceleratorError, match="not permitted"):
        graphs.run("a", asks)


@pytest.mark.cuda
def test_a_graph_that_has_no_room_on_a_gpu() -> None:
    """Its memory, and that of the graphs before it, comes back, and so does the stream."""
    graphs, total, before = Graphs(), torch.zeros((), device="cuda"), torch.cuda.current_stream()

    def work(size: int, again: int) -> None:
        parts = [torch.ones(size, dtype=torch.uint8, device="cuda")]
        if torch.cuda.is_current_stream_capturing():
            parts += [torch.ones(size, dtype=torch.uint8, device="cuda") for _ in range(again)]
        total.add_(torch.stack([part[0] for part in parts]).sum())

    for _ in range(3):
        graphs.run("small", lambda: work(2**28, 0))
    for _ in range(3):
        graphs.run("large", lambda: work(2**32, 100))
    graphs.run("small", lambda: work(2**28, 0))
    assert total.item() == 7
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < 2**32
