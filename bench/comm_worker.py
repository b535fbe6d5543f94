"""What bench/cases/comm.py starts once a rank: times dispatch and combine between processes. Argument: a JSON list of cases,
in whose order results are printed."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm import Dispatched, ExpertBuffer
from dsv3.comm.low_latency import Masked
from dsv3.reference.quant import TILE

EXPERTS, GROUPS, KEPT = 256, 8, 4
WIRES = {"fp8": torch.float8_e4m3fn, "bf16": None}


def draw(case: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, and group-limited choices of experts as the gate makes them."""
    torch.manual_seed(dist.get_rank())
    tokens, topk = case["tokens"], case["topk"]
    scores = torch.rand(tokens, EXPERTS, device=device)
    best = scores.view(tokens, GROUPS, -1).topk(2, -1).values.sum(-1).topk(KEPT, -1).indices
    allowed = torch.zeros(tokens, GROUPS, device=device).scatter_(1, best, 1.0).repeat_interleave(EXPERTS // GROUPS, 1)
    idx = (scores * allowed).topk(topk, -1).indices
    x = torch.randn(tokens, case["hidden"], device=device, dtype=torch.bfloat16)
    return x, idx, torch.rand(tokens, topk, device=device)


def link_bytes(case: dict[str, Any], idx: Tensor) -> dict[str, int]:
    """What leaves this rank for others: a token once for each that it needs."""
    needs = torch.zeros(idx.shape[0], case["ranks"], dtype=torch.bool, device=idx.device)
    needs.scatter_(1, idx // (EXPERTS // case["ranks"]), True)[:, dist.get_rank()] = False
    sent, hidden = int(needs.sum()), case["hidden"]
    wire = hidden + 4 * -(-hidden // TILE) if case["wire"] == "fp8" else 2 * hidden
    return {"dispatch_bytes": sent * wire, "combine_bytes": sent * 2 * hidden}


def host_us(call: Callable[[], Any]) -> float:
    """One call between processes on CPUs, for a dry run."""
    dist.barrier()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def device_us(call: Callable[[], Any], calls: int, repeats: int, graph: bool) -> float:
    """A call on the slowest rank; median of repeats. Calls that are not timed run just before: their kernels wait for those of
    the other ranks, so that all begin together, however late one's host is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()

        def run() -> None:
            for _ in range(calls):
                call()

        replay = run
        if graph:
            captured = torch.cuda.CUDAGraph()
            dist.barrier()
            with torch.cuda.graph(captured, stream=stream):
                run()
            replay = captured.replay
        times = []
        for _ in range(repeats + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dist.barrier()
            replay()
            start.record()
            replay()
            end.record()
            end.synchronize()
            mine = torch.tensor(start.elapsed_time(end) * 1e3 / calls)
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
            times.append(float(mine))
    return statistics.median(times[1:])


def measure(case: dict[str, Any], device: torch.device) -> dict[str, float]:
    calls, repeats = (1, 1) if case["quick"] else (5, 7)
    x, idx, weights = draw(case, device)
    static, few = case["mode"] == "static", case["mode"] == "low_latency"
    room = {"max_recv": case["tokens"] * case["topk"] * 9 // 8, "max_tokens": case["tokens"]} if static else {}
    if few:
        room = {"low_latency": case["tokens"], "hidden": case["hidden"]}
    buffer = ExpertBuffer(
        num_experts=EXPERTS,
        transport=case["transport"],
        ranks_per_node=case["ranks"] // case.get("nodes", 1),
        wire_dtype=WIRES[case["wire"]],
        device=device,
        timeout=20,
        num_sms=case.get("num_sms"),
        **room,
    )
    assert buffer.transport == case["transport"]
    with torch.no_grad():

        def dispatch() -> Dispatched | Masked:
            return buffer.send(x, idx, weights).receive() if few else buffer.dispatch(x, idx, weights)

        handle = dispatch()
        y = torch.randn((handle.x if few else handle.rows).shape, device=device, dtype=torch.bfloat16)

        def combine() -> Tensor:
            return buffer.send_sums(y, handle).receive() if few else buffer.combine(y, handle)

        def microseconds(call: Callable[[], Any]) -> float:
            graph = (static or few) and case["transport"] != "collective"
            return device_us(call, calls, repeats, graph) if device.type == "cuda" else host_us(call)

        found = {"dispatch": microseconds(dispatch), "combine": microseconds(combine)}
    buffer.check()
    buffer.close()
    return found | link_bytes(case, idx)


def main() -> None:
    cases, device = json.loads(sys.argv[1]), torch.device("cpu")
    own_gpu = 1 < cases[0]["ranks"] <= torch.cuda.device_count()
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    for case in cases:
        found = measure(case, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # eight ranks on a GPU that each keep what their largest case had are too many
        if dist.get_rank() == 0:
            print(json.dumps({**case, **found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
