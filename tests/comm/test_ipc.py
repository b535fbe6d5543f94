"""Transports ipc and nvshmem: between four processes that share a GPU, and one a GPU (see ipc_worker.py); and on the host,
anywhere."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench.shared_gpu import shared_gpu, torchrun
from dsv3.comm import ExpertBuffer, counts, ipc
from dsv3.comm.alive import BEAT_SECONDS, SILENT_SECONDS, Heartbeat
from dsv3.ops import registry

LEAVING = "-m", "tests.comm.leaving_worker"


@pytest.mark.cuda
@pytest.mark.alone
@pytest.mark.parametrize("transport", ["ipc", "nvshmem"])
def test_four_processes_on_one_gpu(transport: str) -> None:
    """Or on those that there are, in turn."""
    with shared_gpu() as env:
        torchrun(4, "-m", "tests.comm.ipc_worker", transport, 6, env=env)


@pytest.mark.cuda
@pytest.mark.two_gpus
@pytest.mark.alone
@pytest.mark.parametrize("transport", ["collective", "ipc", "nvshmem"])
def test_one_process_a_gpu(transport: str) -> None:
    """collective goes over NCCL there."""
    ranks = max(n for n in (2, 4, 8) if n <= torch.cuda.device_count())
    torchrun(ranks, "-m", "tests.comm.ipc_worker", transport, 6)


@pytest.mark.cuda
@pytest.mark.alone
@pytest.mark.parametrize("num_sms", [3, 16])
def test_kernels_take_num_sms_multiprocessors(num_sms: int, tmp_path: Path) -> None:
    """As many blocks, or fewer, of every kernel that waits for other ranks."""
    path = tmp_path / "blocks.json"
    torchrun(1, *LEAVING, "ipc", num_sms, path, timeout=100)
    blocks = json.loads(path.read_text())
    kernels = ["exchange", "dispatch", "order_scales", "combine", "send", "receive", "send_sums", "receive_sums"]
    found = {k: [n for name, counts in blocks.items() if f"::{k}_kernel" in name for n in counts] for k in kernels}
    assert all(found.values()), found
    assert [max(found[k]) for k in ("exchange", "dispatch", "combine")] == [1, num_sms, num_sms]
    assert max(map(max, found.values())) <= num_sms


@pytest.mark.cuda
@pytest.mark.alone
@pytest.mark.parametrize("transport", ["ipc", "nvshmem"])
def test_memory_is_freed_at_exit(transport: str, tmp_path: Path) -> None:
    """Of processes that did not close their buffers: they end, say nothing, and leave the GPU, and what they shared it through,
    as they were."""
    with shared_gpu() as env:
        client = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
        subprocess.run(client, env=env, check=True, timeout=100)
        free, _ = torch.cuda.mem_get_info()
        done = torchrun(2, *LEAVING, transport, 8, tmp_path / "unused", env=env, timeout=100)
        assert "rror" not in done.stderr
        deadline = time.monotonic() + 10  # the driver takes back what a process had just behind its end
        while (lost := free - torch.cuda.mem_get_info()[0]) > 2**26 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert lost <= 2**26


@pytest.mark.parametrize(
    ("ranks", "experts", "most"), [(2, 64, 1024), (16, 512, 1024), (16, 1024, 717), (64, 256, 358), (64, 1024, 358)]
)
def test_tokens_of_low_latency_mode(ranks: int, experts: int, most: int) -> None:
    """As many as a block has memory for."""
    assert ipc.most_window_tokens(counts.Layout(experts, ranks, ranks, 0)) == most


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, is_master=True), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("transport", ["ipc", "nvshmem"])
def test_what_cannot_be_reached_is_said_once(
    transport: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "NATIVE_ERROR", "dsv3 was installed without native code")
    with caplog.at_level(logging.WARNING, logger="dsv3"):
        buffer = ExpertBuffer(num_experts=8, transport=transport)
    assert buffer.transport == "collective"
    buffer.check()
    buffer.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        f"experts are exchanged through torch.distributed instead of {transport}: "
        "dsv3 was installed without native code (rank 0)"
    )


def test_a_rank_that_has_no_memory_leaves_all_to_collective(tmp_path: Path) -> None:
    """Its rings cannot be made; the others have theirs, and all of them still meet to take them down."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        """
import torch, torch.distributed as dist
from dsv3.comm import ExpertBuffer, counts, ipc
from dsv3.ops import registry
dist.init_process_group("gloo")
class Peers:
    handle, bytes, lost = b"", 0, -1
    def __init__(self, *args):
        if dist.get_rank() == 1:
            raise RuntimeError("cudaMalloc of the rings: out of memory")
    def connect(self, handles): raise AssertionError("there is nothing to connect to")
    def disconnect(self): pass
    def release(self): pass
class Native:
    pass
Native.Peers = Peers
ipc._objection = lambda layout, device, across: None
registry.native = lambda: Native
registry.sm_count = lambda device: 132
buffer = ExpertBuffer(num_experts=4, transport="ipc", device=torch.device("cpu"))
assert buffer.transport == "collective"
x, idx = torch.randn(3, 8), torch.tensor([[0, 3], [1, 2], [3, 0]])
handle = buffer.dispatch(x, idx, torch.ones(3, 2))
torch.testing.assert_close(buffer.combine(handle.x, handle), 2 * x)
dist.destroy_process_group()
"""
    )
    done = torchrun(2, worker, timeout=100)
    assert done.stderr.count("cudaMalloc of the rings: out of memory (rank 1)") == 1


class Kernels:
    """Stands for the kernels of a rank that wait, and for what they are told."""

    def __init__(self) -> None:
        self.long_wait, self.told = False, []

    def take_long_wait(self) -> bool:
        return self.long_wait

    def give_up(self, rank: int) -> None:
        self.told.append(rank)


@pytest.mark.usefixtures("group")
def test_kernels_wait_for_the_living_alone() -> None:
    """While nothing waits long nobody's beat is looked at; a rank that beats is waited for, one that has stopped is not."""
    kernels, stopped, heartbeat = Kernels(), threading.Event(), Heartbeat()
    watch = threading.Thread(target=ipc._watch, args=(kernels, [0], stopped))
    watch.start()
    time.sleep(BEAT_SECONDS)
    kernels.long_wait = True
    time.sleep(2 * BEAT_SECONDS)
    assert watch.is_alive()
    assert kernels.told == []
    heartbeat.stop()
    watch.join(SILENT_SECONDS + 5)
    assert not watch.is_alive()
    assert kernels.told == [0]
