"""Which ranks are alive. Each adds to a counter in the store of the default process group, from a thread that otherwise sleeps;
the counters are read only after a collective has failed, so a step pays nothing.

The store is torchrun's, or rank 0's where that started the process group. It serves gloo and NCCL alike, and its counters tell
a rank that is gone from one that waits for it, which the error of a collective does not.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

BEAT_SECONDS, SILENT_SECONDS = 1.0, 5.0  # between two beats; without any for that long, a rank is lost


class RankLost(RuntimeError):
    """Ranks of the default process group, `ranks`, are gone. Nothing but leaving is possible any more."""

    def __init__(self, ranks: list[int], why: str = f"no sign of life for {SILENT_SECONDS:g} seconds") -> None:
        noun = "rank" if len(ranks) == 1 else "ranks"
        super().__init__(f"lost {noun} {', '.join(map(str, ranks))}: {why}")
        self.ranks = ranks


class Heartbeat:
    """This rank's beat, until `stop`, or until nothing refers to this object."""

    def __init__(self) -> None:
        store = dist.group.WORLD.get_group_store().clone()  # a connection of its own: calls do not wait for each other
        stopped = threading.Event()
        threading.Thread(target=_beat, args=(store, _key(dist.get_rank()), stopped), daemon=True).start()
        self.stop = weakref.finalize(self, stopped.set)


@contextmanager
def naming_lost_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Around what waits for the ranks of `group` (None: all): its RuntimeError becomes RankLost where one of them is gone.

    That takes SILENT_SECONDS from the error on. The error itself comes at once where a process dies under gloo, and after
    the group's own time-out (init_process_group) where a rank is stuck. Only ranks with a Heartbeat can be missed.
    """
    try:
        yield
    except RuntimeError as error:
        # Not RankLost, nor a lack of memory.
        from_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if not (from_torch and dist.is_initialized()):
            raise
        try:
            lost = lost_ranks(dist.get_process_group_ranks(group), dist.group.WORLD.get_group_store())
        except dist.DistError:  # of the store
            holder = "torchrun" if dist.is_torchelastic_launched() else "rank 0"
            raise RankLost([0], f"the store of the process group, which {holder} holds, does not answer") from error
        if lost:
            raise RankLost(lost) from error
        raise


def lost_ranks(ranks: list[int], store: dist.Store) -> list[int]:
    """Those of `ranks` whose beat has stopped; or what another rank has found out of them before, as it may have left since."""
    silent = {rank: beats for rank, beats in _beats(store, ranks).items() if beats}
    end = time.monotonic() + SILENT_SECONDS
    while silent and time.monotonic() < end and not _known(store, ranks):
        time.sleep(BEAT_SECONDS / 4)
        silent = {rank: beats for rank, beats in _beats(store, list(silent)).items() if beats == silent[rank]}
    known = _known(store, ranks)
    for rank in () if known else silent:
        store.set(_lost(rank), "")
    return known or sorted(silent)


def _known(store: dist.Store, ranks: list[int]) -> list[int]:
    return [rank for rank in ranks if store.check([_lost(rank)])]


def _beats(store: dist.Store, ranks: list[int]) -> dict[int, int]:
    return {rank: store.add(_key(rank), 0) for rank in ranks}


def _key(rank: int) -> str:
    return f"dsv3/alive/{rank}"


def _lost(rank: int) -> str:
    return f"dsv3/lost/{rank}"


def _beat(store: dist.Store, key: str, stopped: threading.Event) -> None:
    with suppress(RuntimeError):  # the store is gone: the run ends
        while True:
            store.add(key, 1)
            if stopped.wait(BEAT_SECONDS):
                return
