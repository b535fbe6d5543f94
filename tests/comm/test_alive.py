"""A rank that dies: the others say which one, in time, and leave."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from dsv3.comm import RankLost
from dsv3.comm.alive import BEAT_SECONDS, SILENT_SECONDS, Heartbeat, _beat, lost_ranks, naming_lost_ranks

ROOT = Path(__file__).parents[2]
RANKS = 4


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(*arguments: str) -> list[subprocess.Popen[str]]:
    """Four processes without a torchrun that would end the others itself; rank 0 holds the store."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    command = [sys.executable, "-m", "tests.comm.dying_worker", *arguments]
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **address, "RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]


DEATHS = [
    (1, "combine", "no sign of life for 5 seconds"),
    (3, "backward", "no sign of life for 5 seconds"),
    (0, "combine", "the store of the process group, which rank 0 holds, does not answer"),
]
ON_A_GPU = [("ipc", death) for death in DEATHS] + [("nvshmem", DEATHS[0])]  # whose kernels are told in the same way
CASES = [(*death, "collective") for death in DEATHS] + [
    pytest.param(*death, transport, marks=[pytest.mark.cuda, pytest.mark.alone]) for transport, death in ON_A_GPU
]


@pytest.mark.parametrize(("dead", "moment", "why", "transport"), CASES)
def test_the_others_name_the_rank_that_died_and_leave(dead: int, moment: str, why: str, transport: str) -> None:
    """On a GPU without MPS, whose processes must not be killed."""
    processes = start(str(dead), moment, transport)
    assert processes[dead].wait(60) == -9
    died = time.monotonic()
    said = [process.communicate(timeout=60) for process in processes]
    seconds = time.monotonic() - died
    for rank, (process, (out, err)) in enumerate(zip(processes, said, strict=True)):
        if rank != dead:
            assert out == f"rank {rank}: lost rank {dead}: {why}\n", err[-3000:]
            assert process.returncode == 0, err[-3000:]
    assert seconds < SILENT_SECONDS + 15, "far below the group's own 30 seconds"


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, is_master=True), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_an_error_stays_what_it_is_while_all_are_alive() -> None:
    with naming_lost_ranks():
        pass
    heartbeat = Heartbeat()
    for error in (RuntimeError("mine"), ValueError("mine"), RankLost([3])):
        with pytest.raises(type(error)) as found, naming_lost_ranks():
            raise error
        assert found.value is error
    heartbeat.stop()


def test_ranks_of_other_groups_are_nobodys_loss() -> None:
    """What was found out of rank 3 is no news for those that do not wait for it."""
    store = dist.HashStore()
    for rank in range(4):
        store.add(f"dsv3/alive/{rank}", 7)
    stop, started = threading.Event(), []
    for rank in range(3):
        started.append(threading.Thread(target=_beat, args=(store, f"dsv3/alive/{rank}", stop)))
        started[-1].start()
    try:
        assert lost_ranks([2, 3], store) == [3]
        assert lost_ranks([0, 3], store) == [3]
        assert lost_ranks([0, 1], store) == []
    finally:
        stop.set()
        for thread in started:
            thread.join()


@pytest.mark.usefixtures("group")
def test_a_beat_ends_with_its_owner() -> None:
    before = threading.active_count()
    heartbeat = Heartbeat()
    assert threading.active_count() == before + 1
    del heartbeat
    gc.collect()
    time.sleep(2 * BEAT_SECONDS)
    assert threading.active_count() == before


@pytest.mark.usefixtures("group")
def test_what_one_rank_found_out_the_others_repeat() -> None:
    """Whoever finds out leaves, and is not to be named for it."""
    heartbeat = Heartbeat()
    time.sleep(BEAT_SECONDS / 2)
    heartbeat.stop()
    for _ in range(2):
        with (
            pytest.raises(RankLost, match="lost rank 0: no sign of life for 5 s") as found,
            naming_lost_ranks(),
        ):
            raise RuntimeError("Connection closed by peer")
        assert str(found.value.__cause__) == "Connection closed by peer"
    assert str(RankLost([1, 2])) == "lost ranks 1, 2: no sign of life for 5 seconds"
