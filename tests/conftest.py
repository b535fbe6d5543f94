from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from dsv3.ops import registry


def _hopper() -> bool:
    return torch.cuda.is_available() and registry.is_hopper(torch.device("cuda", 0))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """cpu, and cuda where a Hopper GPU is present: there the native ops run."""
    return torch.device(request.param)


def pytest_configure(config: pytest.Config) -> None:
    """Under pytest-xdist the workers share the cores: a pool of threads as large as the machine in each would thrash."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
    config.addinivalue_line("markers", "cuda: needs a Hopper GPU")
    config.addinivalue_line("markers", "two_gpus: needs two GPUs")
    config.addinivalue_line(
        "markers", "alone: processes whose kernels wait for each other share the GPU, best with no others"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What the machine lacks the GPUs for is not part of the run at all: a skip would look like a gap."""
    lacking = set()
    if not _hopper():
        lacking.add("cuda")
    if torch.cuda.device_count() < 2:
        lacking.add("two_gpus")
    config.hook.pytest_deselected(items=[item for item in items if lacking & item.keywords.keys()])
    items[:] = [item for item in items if not lacking & item.keywords.keys()]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leave_memory_to_other_workers() -> Iterator[None]:
    """pytest-xdist's workers share one GPU, and torch keeps what its largest test needed."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**32:
        torch.cuda.empty_cache()
