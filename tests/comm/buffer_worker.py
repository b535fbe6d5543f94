"""What the buffer tests start under torchrun: eight processes that leave their results. Arguments: a folder, and the transport:
collective between CPUs, or ipc or nvshmem between processes that share a GPU."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.comm import Dispatched, ExpertBuffer, nvshmem
from dsv3.reference.quant import dequantize
from tests.comm.cases import CASES, FP8, Case, arrived, experts, inputs


def run(buffer: ExpertBuffer, case: Case, rank: int, device: str, *, aside: bool = False) -> dict[str, Any]:
    """A forward and a backward of dispatch, experts and combine; aside: beside other work."""
    x, idx, weights, dout = (t.to(device) for t in inputs(case, rank))
    x.requires_grad_()
    weights.requires_grad_()
    if aside:
        pending = buffer.dispatch_aside(x, idx, weights)
        busy(device)
        handle = pending.receive()
    else:
        handle = buffer.dispatch(x, idx, weights)
    first, end = buffer.layout.num_local_experts * buffer.layout.rank, int(handle.offsets[-1])
    expert = torch.zeros(handle.num_recv, dtype=torch.int64, device=device)
    held = torch.arange(first, first + handle.offsets.numel() - 1, device=device)
    expert[:end] = held.repeat_interleave(handle.offsets.diff())
    y = experts(arrived(handle), handle.topk_weights, expert)
    y.register_hook(lambda dy: seen.append(dy[end:]))
    seen = [arrived(handle)[end:], handle.topk_weights[end:], y[end:]]
    if aside:
        pending = buffer.combine_aside(y, handle)
        busy(device)
        out = pending.receive()
    else:
        out = buffer.combine(y, handle)
    out.backward(dout)
    assert all(rows.isnan().all() for rows in seen), "new memory is NaN here, and what is nobody's is not touched"
    assert len(handle.x) == (case.settings["max_recv"] if case.static else end)
    apart = Dispatched(*(t.detach() for t in handle))
    again = buffer.combine(experts(arrived(apart), apart.topk_weights, expert), apart)
    assert torch.equal(again, out), "a handle is its tensors"
    cast = {} if handle.x_sf is None else {"x_sf": handle.x_sf[:end], "strides": torch.tensor(handle.x_sf.stride())}
    low_latency(buffer, x.detach(), idx, weights.detach(), rank, out.detach())
    results = {
        **cast,
        "x": handle.x.detach()[:end],
        "weights": handle.topk_weights.detach()[:end],
        "offsets": handle.offsets,
        "out": out.detach(),
        "dx": x.grad,
        "dweights": weights.grad,
    }
    return {name: result.cpu() for name, result in results.items()}


def busy(device: str) -> None:
    """Some work for the current stream, in memory that has just been let go."""
    for _ in range(3):
        x = torch.full((256, 256), 1e9, device=device)
        x @ x


def low_latency(buffer: ExpertBuffer, x: Tensor, idx: Tensor, weights: Tensor, rank: int, out: Tensor) -> None:
    """Masked rows in two halves give the sums of a dispatch, also with a second call under way."""
    pending = [buffer.send(x * factor, idx, weights) for factor in (1, 2)]
    sums = []
    for sent in pending:
        masked = sent.receive()
        y = torch.full(masked.x.shape, torch.nan, dtype=x.dtype, device=x.device)
        for g, count in enumerate(masked.counts.tolist()):
            rows = masked.x[g, :count]
            if masked.x_sf is not None:
                rows = dequantize(rows, masked.x_sf[g, :count]).to(x.dtype)
            expert = torch.full((count,), rank * len(masked.counts) + g, device=x.device)
            y[g, :count] = experts(rows, masked.topk_weights[g, :count], expert)
        sums.append(buffer.send_sums(y, masked))
    assert torch.equal(sums[0].receive(), out)
    assert torch.equal(sums[1].receive(), 2 * out), "of tokens twice as large, bit for bit"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_rank_alone(group: dist.ProcessGroup, transport: str, device: str) -> None:
    """The transports agree bit for bit, forward and backward."""
    bf16 = {"dtype": torch.bfloat16}
    plain = [Case(1, 1), Case(1, 1, **bf16), Case(1, 1, wire=torch.float32, **bf16), Case(1, 1, wire=FP8, **bf16)]
    for case in (*plain, *(dataclasses.replace(case, static=True) for case in plain)):
        made = [ExpertBuffer(group, transport=name, **case.settings) for name in ("local", transport)]
        local, other = (run(buffer, case, 0, device) for buffer in made)
        assert same(local, other)
        made[1].close()
    assert ExpertBuffer(group, num_experts=16).transport == "local"


def two_groups_at_once(groups: list[dist.ProcessGroup], rank: int, transport: str, device: str) -> None:
    """Buffers do not disturb each other: their calls may be nested."""
    buffers = [
        ExpertBuffer(group, num_experts=16, ranks_per_node=n, transport=transport)
        for group, n in zip(groups, (4, 2, 2), strict=True)
    ]
    x, idx, weights, _ = (t.to(device) for t in inputs(Case(4, 4), rank))
    handles = [buffer.dispatch(x, idx, weights) for buffer in buffers]
    nested = [b.combine(h.x, h) for b, h in reversed(list(zip(buffers, handles, strict=True)))]
    apart = [b.combine(h.x, h) for b, h in ((b, b.dispatch(x, idx, weights)) for b in reversed(buffers))]
    assert all(torch.equal(a, b) for a, b in zip(nested, apart, strict=True))
    for buffer in buffers:
        buffer.close()


def errors(group: dist.ProcessGroup, rank: int, transport: str, device: str) -> dict[str, str]:
    """What two ranks say to mistakes of the second; afterwards the buffer works as before."""
    said: dict[str, str] = {}
    buffer = ExpertBuffer(group, num_experts=8, transport=transport)
    x, idx, weights = torch.randn(3, 8), torch.tensor([[0, 7], [1, 2], [3, 4]]), torch.rand(3, 2)
    x, idx, weights = (t.to(device) for t in (x, idx, weights))
    bad = {
        "hidden": (x[:, :4], idx, weights),
        "dtype": (x.bfloat16(), idx, weights),
        "topk": (x, idx[:, :1], weights[:, :1]),
        "tokens": (x[:2], idx, weights),
        "weights": (x, idx, weights[:, :1]),
        "ids": (x, idx + 1, weights),
        "negative": (x, idx - 1, weights),
        "index": (x, idx.int(), weights),
    }
    for name, arguments in bad.items():
        try:
            buffer.dispatch(*(arguments if rank == 1 else (x, idx, weights)))
        except ValueError as error:
            said[name] = str(error)
    handle = buffer.dispatch(x, idx, weights)
    try:
        buffer.combine(handle.x[1:], handle)
    except ValueError as error:
        said["rows"] = str(error)
    torch.testing.assert_close(buffer.combine(handle.x, handle), 2 * x)
    settings: dict[str, dict[str, Any]] = {
        "differ": {"num_experts": 8 * (rank + 1)},
        "experts": {"num_experts": 7},
        "nodes": {"num_experts": 8, "ranks_per_node": 3},
        "local": {"num_experts": 8, "transport": "local"},
    }
    for name, setting in settings.items():
        try:
            ExpertBuffer(group, **{"transport": transport, **setting})
        except ValueError as error:
            said[name] = str(error)
    small = ExpertBuffer(group, num_experts=8, max_recv=4, max_tokens=3, transport=transport)
    tried = {"long": (x[[0] * 4], idx[[0] * 4], weights[[0] * 4])}
    if device == "cpu":  # a GPU says the first later (see ipc_worker.py) and does not look at ids
        tried |= {"full": (x, idx, weights), "static": (x[:1], idx[:1] + rank, weights[:1])}
    for name, arguments in tried.items():
        try:
            small.dispatch(*arguments)
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    handle = small.dispatch(x[:1], idx[:1], weights[:1])
    torch.testing.assert_close(small.combine(handle.rows, handle), 2 * x[:1])
    for made in (buffer, small):
        made.close()
    return said


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    dist.init_process_group("gloo")
    rank, out, transport = dist.get_rank(), Path(sys.argv[1]), sys.argv[2]
    device = "cpu" if transport == "collective" else "cuda"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, 4, 8)}
    results: dict[str, Any] = {}
    if transport == "nvshmem":  # the first buffer says among whom NVSHMEM runs
        nvshmem.DIRECT = False  # as between machines
        ExpertBuffer(num_experts=8, transport=transport, ranks_per_node=4, timeout=20).close()
    for case in CASES:
        if rank < case.ranks:
            buffer = ExpertBuffer(groups[case.ranks], transport=transport, timeout=20, **case.settings)
            assert buffer.transport == transport
            results[case.name] = run(buffer, case, rank, device)
            for aside in (False, True):
                again = run(buffer, case, rank, device, aside=aside)
                assert same(results[case.name], again), f"{case.name}: other bits again, aside: {aside}"
            buffer.close()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank < 1:
        one_rank_alone(groups[1], transport, device)
    if rank < 2:
        results["errors"] = errors(groups[2], rank, transport, device)
    if rank < 4:
        two_groups_at_once([groups[4], groups[4], pairs[rank // 2]], rank, transport, device)
    torch.save(results, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
