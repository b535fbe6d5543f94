"""Device time of a call, with a cold L2 cache: CUDA graphs of many calls over rotating input sets, median of replays."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bench.cases import Baseline, Case, Timing

COLD_BYTES = 300e6  # six times the L2 cache: by the time a set comes round again nothing of it is left there
GRAPH_US = 2000  # length of a graph: its launch, a few us, disappears in it


@dataclass(frozen=True)
class Protocol:
    """calls: the fewest calls a graph; replays: timed replays, of which the median counts."""

    calls: int
    replays: int


FULL = Protocol(calls=10, replays=7)
QUICK = Protocol(calls=2, replays=2)


@dataclass(frozen=True)
class Ceilings:
    """What the card reached in this run: GB/s of a copy (read + written) and of a reduction, TFLOP/s of bf16 matmul and of
    FP8 matmul with one scale a tensor."""

    copy_gbs: float
    read_gbs: float
    matmul_tflops: float
    fp8_tflops: float

    def floor_us(self, case: Case) -> float:
        """The time below which no implementation gets: the larger of moving the bytes and doing the arithmetic."""
        tflops = self.fp8_tflops if case.fp8 else self.matmul_tflops
        return max(case.bytes / self.copy_gbs / 1e3, case.flops / tflops / 1e6)


def clone(inputs: Any) -> Any:
    """A copy of every tensor in nested lists and tuples, with the same strides."""

    def copy(x: Any) -> Any:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)

    return tree_map(lambda x: copy(x) if isinstance(x, Tensor) else x, inputs)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def set_count(case: Case, input_bytes: float, calls: int) -> int:
    """Number of input sets: together more than COLD_BYTES, and one a call where calls spoil their inputs."""
    touched = max(min(input_bytes, case.bytes / 2), 1.0)
    cold = int(COLD_BYTES // touched) + 1
    return calls if case.restore else min(cold, calls)


def call_count(floor_us: float, protocol: Protocol) -> int:
    """Calls a graph."""
    return max(protocol.calls, round(GRAPH_US / max(floor_us, 1.0))) if protocol is FULL else protocol.calls


def binder(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """Turns a function of an input set into one that returns the call to time."""
    return lambda *inputs: lambda: function(*inputs)


def baseline_binder(baseline: Baseline, backend: str = "inductor") -> Callable[..., Callable[[], Any]]:
    """The binder of a baseline, compiled where it asks for that."""
    function, split = baseline.function, baseline.split
    if baseline.compiled:
        torch._dynamo.reset()  # shapes of an earlier case must not make this one dynamic
        function = torch.compile(function, dynamic=False, backend=backend)
    if split is not None:
        return lambda *inputs: lambda: [function(*part) for part in split(*inputs)]
    return function if baseline.binds else binder(function)


class Captured:
    """A graph of calls. All its results stay alive as long as it does, so that every call writes memory of its own."""

    def __init__(
        self,
        bind: Callable[..., Callable[[], Any]],
        sets: Sequence[tuple[Any, ...]],
        *,
        calls: int,
        reset: Callable[[], None] = lambda: None,
    ) -> None:
        self.calls, self.reset = calls, reset
        # Autograd runs a backward on the stream of its forward: bind, calls and capture share one.
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.bound = [bind(*inputs) for inputs in sets]
            for call in self.bound:
                call()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.results = [self.bound[i % len(self.bound)]() for i in range(calls)]
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(self) -> float:
        """Microseconds a call."""
        with torch.cuda.stream(self.stream):
            self.reset()
            self.start.record()
            self.graph.replay()
            self.end.record()
            self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3 / self.calls


def in_turn_us(captured: Mapping[str, Captured], replays: int) -> tuple[dict[str, float], dict[str, Exception]]:
    """The median of each one's replays, and the error of each that failed. They take turns, forwards and backwards: what a
    card does as it warms up then happens to all of them. The first round, which uploads the graphs, does not count."""
    times: dict[str, list[float]] = {name: [] for name in captured}
    failed: dict[str, Exception] = {}
    for turn in range(replays + 1):
        for name in list(times) if turn % 2 else reversed(list(times)):
            try:
                times[name].append(captured[name].replay())
            except Exception as error:
                failed[name] = error
                del times[name]
    return {name: statistics.median(spans[1:]) for name, spans in times.items()}, failed


def graph_us(
    bind: Callable[..., Callable[[], Any]],
    sets: Sequence[tuple[Any, ...]],
    *,
    calls: int,
    replays: int,
    reset: Callable[[], None] = lambda: None,
) -> float:
    """Microseconds a call, of one thing alone."""
    times, failed = in_turn_us({"": Captured(bind, sets, calls=calls, reset=reset)}, replays)
    release()
    for error in failed.values():
        raise error
    return times[""]


def stream_us(call: Callable[[], Any], *, calls: int, replays: int) -> float:
    """Microseconds a call without a graph, for calls so long that the launch of the next one is hidden."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(replays + 1):
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[1:])


def release() -> None:
    """Returns all unused device memory."""
    gc.collect()
    torch.cuda.empty_cache()


def _fp8_matmul(a: Tensor, b: Tensor, one: Tensor) -> Tensor:
    """bf16 [M, N] of e4m3 a [M, K] and b [N, K] with one scale a tensor: no partial sum is scaled or promoted."""
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def measure_ceilings(protocol: Protocol) -> tuple[Ceilings, list[tuple[Case, Timing]]]:
    """The ceilings, and each as a case of its own: a copy and a sum of 1 GiB, bf16 products of 4096^3 and 8192^3, and FP8
    products of 8192^3 and 4096 x 7168 x 16384."""
    gib = 2**30
    options = {"calls": protocol.calls, "replays": protocol.replays}
    source = torch.randn(gib // 4, device="cuda")
    target = torch.empty_like(source)
    # NOTE: captured in a graph, a device-to-device copy is a memcpy node and reaches 2.7 TB/s on an H200; launched on a
    # stream it is a kernel and reaches 4.3.
    copy_us = stream_us(lambda: target.copy_(source), **options)
    measured = [(Case(op="copy", case={"mib": 1024}, flops=0, bytes=2 * gib), Timing(copy_us, {}))]

    def measure(case: Case, function: Callable[..., Any], *inputs: Tensor) -> None:
        measured.append((case, Timing(graph_us(binder(function), [inputs], **options), {})))

    measure(Case(op="read", case={"mib": 1024}, flops=0, bytes=gib), torch.sum, source)
    for size in (4096, 8192):
        case = {"m": size, "n": size, "k": size}
        operands = [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        measure(Case(op="matmul", case=case, flops=2.0 * size**3, bytes=6.0 * size**2), torch.matmul, *operands)
    for m, n, k in ((8192, 8192, 8192), (4096, 7168, 16384)):
        operands = [torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (m, n)]
        work = {"flops": 2.0 * m * n * k, "bytes": (m + n) * k + 2.0 * m * n, "fp8": True}
        fp8 = Case(op="matmul_fp8", case={"m": m, "n": n, "k": k}, **work)
        measure(fp8, _fp8_matmul, *operands, torch.ones((), device="cuda"))
    copy_gbs, read_gbs = (case.bytes / timing.time_us / 1e3 for case, timing in measured[:2])
    rates = [case.flops / timing.time_us / 1e6 for case, timing in measured]
    return Ceilings(copy_gbs, read_gbs, max(rates[2:4]), max(rates[4:])), measured


def measure_case(case: Case, ceilings: Ceilings, protocol: Protocol) -> Timing:
    """Times the op and its baselines in turn on the same input sets. A baseline whose graph does not fit in memory beside
    the others is timed alone, afterwards; one that fails is an error and hides no other."""
    device = torch.device("cuda", torch.cuda.current_device())
    if case.measure is not None:
        return case.measure(device, protocol is QUICK)
    calls = call_count(ceilings.floor_us(case), protocol)
    first = case.inputs(device)
    input_bytes = sum(x.numel() * x.element_size() for x in tensors(first))
    sets = [first] + [clone(first) for _ in range(set_count(case, input_bytes, calls) - 1)]
    spoiled = [[s[i] for i in case.restore] for s in sets]
    pristine = clone([first[i] for i in case.restore])

    def reset() -> None:
        for arguments in spoiled:
            for target, source in zip(tensors(arguments), tensors(pristine), strict=True):
                target.copy_(source)

    def capture(bind: Callable[..., Callable[[], Any]]) -> Captured:
        reset()
        return Captured(bind, sets, calls=calls, reset=reset)

    op = "the op itself"
    together, alone, lines = {op: capture(binder(case.run))}, [], []
    for name, baseline in case.baselines.items():
        try:
            together[name] = capture(baseline_binder(baseline))
        except torch.OutOfMemoryError:
            alone.append(name)
        except Exception as error:  # not kept: it would keep the memory of its peer
            lines.append(f"{name}: {one_line(error)}")
    times, failed = in_turn_us(together, protocol.replays)
    if op in failed:
        raise failed[op]
    lines += [f"{name}: {one_line(error)}" for name, error in failed.items()]
    del together, failed
    release()
    for name in alone:
        reset()
        bind = baseline_binder(case.baselines[name])
        try:
            times[name] = graph_us(bind, sets, calls=calls, replays=protocol.replays, reset=reset)
        except Exception as error:
            lines.append(f"{name}: {one_line(error)}")
        release()
    op_us = times.pop(op)
    return Timing(op_us, {**times, **case.published}, errors=lines)


def one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
