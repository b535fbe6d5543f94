"""The module of NVSHMEM and the symmetric memory of a process, on the host; between processes: test_buffer.py, test_ipc.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.comm import nvshmem, reach
from dsv3.comm.nvshmem import ALIGNMENT, ARENA_BYTES, Memory, Part, _first_gap
from dsv3.comm.reach import Unreachable

BUILT = pytest.mark.skipif(importlib.util.find_spec("dsv3._nvshmem") is None, reason="built without NVSHMEM")


class Starts:
    """Stands for dsv3._nvshmem; `fails`: what this rank's start says."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def nvshmem_id(self) -> bytes:
        return b"id"

    def nvshmem_start(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        if self.fails:
            raise RuntimeError(self.fails)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Starts:
    found = Starts()
    monkeypatch.setattr(nvshmem, "native", lambda: found)
    return found


def beside(*others: Any) -> Any:
    """`ask` of a rank whose neighbours say `others`, in turn, as many as there are asks; then what it says itself."""
    said = list(others)
    return lambda mine: [mine, said.pop(0) if said else mine]


def test_a_process_starts_once(starts: Starts) -> None:
    memory = Memory()
    first = memory.take([4, 7], 0, 1000, beside(), 3, alone=True)
    assert first == Part(0, [0, 1])
    assert starts.calls == [(3, 0, 2, b"id", ARENA_BYTES, True)]
    second = memory.take([4, 7], 0, 50, beside(), 3, alone=True)
    assert second == Part(1024, [0, 1])
    assert memory.take([7], 0, 50, lambda mine: [mine], 3, alone=True) == Part(1152, [1]), (
        "a buffer of some of the ranks"
    )
    memory.give_back(first)
    assert memory.take([4, 7], 0, 1000, beside(), 3, alone=True) == first
    assert len(starts.calls) == 1


def test_a_large_buffer_has_room_for_more(starts: Starts) -> None:
    memory = Memory()
    memory.take([0, 1], 0, ARENA_BYTES, beside(), 0, alone=False)
    assert starts.calls[0][4:] == (4 * ARENA_BYTES, False)


def test_what_a_neighbour_holds_is_not_taken(starts: Starts) -> None:
    memory = Memory()
    memory.take([0, 1], 0, 256, beside(), 0, alone=True)
    other = None, [0, 1], ARENA_BYTES, {0: 256, 256: 300}
    assert memory.take([0, 1], 0, 100, beside(other), 0, alone=True).offset == 640
    full = None, [0, 1], ARENA_BYTES, {0: ARENA_BYTES}
    with pytest.raises(Unreachable, match=r"of 268 MB of symmetric memory no 1 MB are left in one piece"):
        memory.take([0, 1], 0, 1 << 20, beside(full), 0, alone=True)


def test_ranks_that_nvshmem_does_not_know(starts: Starts) -> None:
    memory = Memory()
    memory.take([0, 1], 0, 256, beside(), 0, alone=True)
    with pytest.raises(Unreachable, match=r"NVSHMEM runs among ranks \[0, 1\], a buffer was asked for by \[0, 2\]"):
        memory.take([0, 2], 0, 256, beside((None, [0, 1], ARENA_BYTES, {})), 0, alone=True)
    with pytest.raises(
        Unreachable, match=r"runs among ranks \[0, 1\] and among \[2, 3\], a buffer was asked for by \[0, 2\]"
    ):
        memory.take([0, 2], 0, 256, beside((None, [2, 3], ARENA_BYTES, {})), 0, alone=True)
    for neighbour in ([], [1, 2]):
        with pytest.raises(Unreachable, match="NVSHMEM runs among ranks"):
            memory.take([0, 1], 0, 256, beside((None, neighbour, ARENA_BYTES, {})), 0, alone=True)


def test_a_start_that_fails_is_told(starts: Starts) -> None:
    """And remembered on all ranks: NVSHMEM cannot be started a second time."""
    for neighbour, own in ((None, "no memory"), ("no memory", "")):
        starts.fails, memory = own, Memory()
        state = (None, [], 0, {})
        ask = beside(state, (None, b"id"), neighbour)
        with pytest.raises(Unreachable, match="no memory"):
            memory.take([0, 1], 0, 256, ask, 0, alone=True)
        assert memory.ranks == []
        calls = len(starts.calls)
        with pytest.raises(Unreachable, match="no memory"):
            memory.take([0, 1], 0, 256, beside(state), 0, alone=True)
        assert len(starts.calls) == calls


def test_another_gpu_of_the_process(starts: Starts) -> None:
    memory = Memory()
    memory.take([0, 1], 0, 256, beside(), 2, alone=True)
    with pytest.raises(Unreachable, match="NVSHMEM's memory is on GPU 2 of this process, not 3"):
        memory.take([0, 1], 0, 256, beside(), 3, alone=True)


@given(st.lists(st.integers(1, 2000), max_size=12), st.integers(1, 2000), st.data())
def test_parts_do_not_overlap(sizes: list[int], size: int, data: st.DataObject) -> None:
    """Nor is one further up than it must be."""
    parts: dict[int, int] = {}
    for wanted in sizes:
        parts[_first_gap(list(parts.items()), wanted)] = wanted
    for offset in data.draw(st.lists(st.sampled_from(sorted(parts)), unique=True)) if parts else ():
        del parts[offset]
    offset = _first_gap(list(parts.items()), size)
    assert offset % ALIGNMENT == 0
    assert all(offset + size <= begin or begin + length <= offset for begin, length in parts.items())
    for lower in range(0, offset, ALIGNMENT):
        assert any(lower < begin + length and begin < lower + size for begin, length in parts.items())


@BUILT
def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvshmem, "LIBRARY", "libnvshmem_nowhere.so.3")
    nvshmem.native.cache_clear()
    reason = nvshmem.objection()
    nvshmem.native.cache_clear()
    assert reason.startswith(
        "NVSHMEM is not installed (pip install 'nvidia-nvshmem-cu13>=3.4,<3.5'): libnvshmem_nowhere"
    )


def test_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nvshmem.native.cache_clear()
    reason = nvshmem.objection()
    nvshmem.native.cache_clear()
    needs = "which is compiled where nvcc and the wheel nvidia-nvshmem-cu13 are found"
    assert reason == f"dsv3 was installed without the transport nvshmem, {needs}"


@pytest.mark.parametrize(
    ("machines", "expected"),
    [("aaaa", 4), ("aabb", 2), ("abcd", 1), ("aaab", None), ("abab", None), ("aabbcc", 2), ("aabbaa", None)],
)
def test_ranks_per_machine(machines: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(everyone: list[Any], mine: Any, group: Any) -> None:
        everyone[:] = machines

    stand_in = SimpleNamespace(get_world_size=lambda group: len(machines), all_gather_object=gather)
    monkeypatch.setattr(reach, "dist", stand_in)
    assert reach.ranks_per_machine(None) == expected


@BUILT
def test_the_module_loads_without_a_gpu() -> None:
    assert nvshmem.objection() is None
    module = nvshmem.native()
    rings, windows = (module.Network.symmetric_bytes(4, 2, 20, 16, *window) for window in ((0, 0), (128, 3)))
    assert rings > 2 * 2 * 20 * 16 * 8192, "slots and what is staged"
    assert windows - rings > 2 * 4 * 8 * 128 * 3 * 8192, "two ways, twice, of all ranks' tokens, and what is staged"
    with pytest.raises(ValueError, match=r"an id must have \d+ bytes, got 3"):
        module.nvshmem_start(0, 0, 1, b"bad", 1 << 20, True)
    with pytest.raises(ValueError, match="ranks must be"):
        module.Network(0, 0, 17, 0, 2, 20, 16, 0, 0, 1.0, True, 0, [0, 1])
    with pytest.raises(ValueError, match=r"nodes must be 1\.\.8 and have at most 64 ranks, got 8 of 16"):
        module.Network(0, 0, 16, 0, 8, 20, 16, 0, 0, 1.0, True, 0, list(range(128)))
    with pytest.raises(RuntimeError, match="cuda"):
        module.nvshmem_start(1000, 0, 1, b"\0" * 128, 1 << 20, True)


def test_it_is_loaded_when_asked_for() -> None:
    code = "import sys, dsv3.comm; assert not any('_nvshmem' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
