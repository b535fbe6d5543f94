"""CUDA graphs of work of any kind; of decode rounds: inference/test_graphs.py, of micro-batches: train/test_trainer.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dsv3.graphs import Graphs


class Recorded:
    """Stands for torch.cuda.CUDAGraph: a replay does what was done while it was captured."""

    current: Recorded | None = None

    def __init__(self) -> None:
        self.work: list[str] = []
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """All graphs that are begun, where there is no GPU."""
    found: list[Recorded] = []

    @contextmanager
    def capture(graph: Recorded, **options: Any) -> Iterator[None]:
        Recorded.current = graph
        found.append(graph)
        try:
            yield
        finally:
            Recorded.current = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
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
    graphs.clear()
    graphs.run("a", lambda: done.append(("a", Recorded.current is not None)))
    assert done[-1] == ("a", False)


def test_without_memory_for_a_graph_kernels_are_launched(
    captured: list[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    """Of the one that is too large; said once."""
    graphs, done = Graphs(), []

    def large() -> None:
        if Recorded.current is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append("large")

    for _ in range(3):
        graphs.run("large", large)
        graphs.run("small", lambda: done.append("small"))
    assert done == ["large", "small", "large", "small", "large"]
    assert [graph.replays for graph in captured] == [0, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "no memory for another CUDA graph: kernels are launched one by one"
    ]
