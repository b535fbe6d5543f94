"""csrc/comm: dispatch and combine of expert parallelism between processes, one a GPU where there are several; on one GPU eight
share it, and all of them together are one row. Over nvshmem they are two nodes, on one GPU of two processes each.

`bytes` are those that count in a GPU's memory: dispatch reads x once and writes every row of an expert once, combine reads
these rows and writes the output once. That each token also passes a ring to each of its ranks costs time and counts nothing.
In mode low_latency, of few tokens, each way is its two halves one after the other.
Between GPUs `link_gbs` is what left a rank for others, a token once for each that it needs, over the time. No speed of a link
can be told from ranks that share a GPU: there the links are its own memory.
"""

from __future__ import annotations

import functools
import json
from contextlib import nullcontext
from typing import Any

import torch

from bench.cases import Case, Timing
from bench.shared_gpu import shared_gpu, torchrun
from dsv3.reference.quant import TILE

WIRES = ("fp8", "bf16")
SHARED_RANKS, SHARED_SMS = {"ipc": 8, "nvshmem": 4}, 32  # of a GPU; multiprocessors of each of four
NUM_SMS = (8, 16, 20, 24)  # between GPUs


def _several_gpus() -> bool:
    """Whether a rank has a GPU of its own."""
    return torch.cuda.device_count() > 1


def _sizes(kind: dict[str, Any], tiny: bool) -> dict[str, int]:
    names = "ranks", "tokens", "hidden", "topk"
    ranks = torch.cuda.device_count() if _several_gpus() else SHARED_RANKS[kind["transport"]]
    tokens = 128 if kind["mode"] == "low_latency" else 4096
    return dict(zip(names, (2, 32, 256, 8) if tiny else (ranks, tokens, 7168, 8), strict=True))


def _kinds() -> list[dict[str, Any]]:
    """What is asked of the ranks, apart from sizes."""
    static = [{"transport": "ipc", "mode": "static", "wire": wire} for wire in WIRES]
    kinds = [{**kind, "num_sms": sms} for kind in static for sms in NUM_SMS] if _several_gpus() else static
    kinds.append({"transport": "ipc", "mode": "exact", "wire": "fp8"})
    kinds += [{"transport": "ipc", "mode": "low_latency", "wire": wire} for wire in WIRES]
    if _several_gpus() and torch.cuda.device_count() % 2:
        return kinds
    nodes = {"transport": "nvshmem", "nodes": 2} | ({} if _several_gpus() else {"num_sms": SHARED_SMS})
    return [*kinds, *({**nodes, "mode": mode, "wire": wire} for mode in ("static", "low_latency") for wire in WIRES)]


def _peer(kind: dict[str, Any]) -> dict[str, Any]:
    """The kind of peer that moves the same tokens, whatever else differs."""
    mode = "low_latency" if kind["mode"] == "low_latency" else "exact"
    nodes = {key: kind[key] for key in ("transport", "nodes") if key in kind}
    return {**nodes, "mode": mode, "wire": kind["wire"], "peer": True}


def _name(kind: dict[str, Any]) -> str:
    return json.dumps(kind, sort_keys=True)


@functools.cache
def _measured(transport: str, device: str, tiny: bool, quick: bool) -> dict[str, dict[str, Any]]:
    """What the ranks found, a transport's cases in one start of them, by _name; also of the peers, which are collective."""
    shared = device == "cuda" and not _several_gpus()
    kinds = [kind for kind in _kinds() if kind["transport"] == transport]
    peers = list({_name(_peer(kind)): _peer(kind) for kind in kinds}.values())
    over = {} if device == "cuda" else {"transport": "collective"}
    asked = [{**_sizes(kind, tiny), "quick": quick, **kind, **over} for kind in kinds]
    # Where ranks share a GPU collective goes through the host, and lasts.
    collective = {"transport": "collective", "mode": "exact", "quick": quick or shared}
    asked += [{**_sizes(kind, tiny), **kind, **collective} for kind in peers]
    with shared_gpu() if shared else nullcontext() as env:
        done = torchrun(asked[0]["ranks"], "-m", "bench.comm_worker", json.dumps(asked), env=env, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(map(_name, [*kinds, *peers]), found, strict=True))


def _case(op: str, kind: dict[str, Any], tiny: bool) -> Case:
    sizes, several = _sizes(kind, tiny), _several_gpus()
    backend = "nccl" if several else "gloo"

    def measure(device: torch.device, quick: bool) -> Timing:
        measured = _measured(kind["transport"], device.type, tiny, quick)
        found = measured[_name(kind)]
        facts = {"link_gbs": round(found[f"{op}_bytes"] / found[op] / 1e3, 2)} if several else {}
        return Timing(found[op], {f"all_to_all_single over {backend}": measured[_name(_peer(kind))][op]}, facts)

    tokens, hidden = sizes["tokens"] * (1 if several else sizes["ranks"]), sizes["hidden"]
    row = hidden + 4 * -(-hidden // TILE) if kind["wire"] == "fp8" and op == "dispatch" else 2 * hidden
    return Case(
        op=f"comm_{op}",
        case={**sizes, **kind},
        flops=tokens * hidden * sizes["topk"] if op == "combine" else 0,
        bytes=tokens * (2 * hidden + sizes["topk"] * row),
        measure=measure,
    )


def cases(tiny: bool) -> list[Case]:
    """The way back does not depend on the wire's FP8."""
    kinds = _kinds()
    combines = [kind for kind in kinds if kind["mode"] != "exact" and kind["wire"] == "bf16"]
    return [*(_case("dispatch", kind, tiny) for kind in kinds), *(_case("combine", kind, tiny) for kind in combines)]
