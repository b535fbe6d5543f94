"""csrc/gemm: FP8 products at the shapes of V3's layers. Few rows (decoding), 4096 rows (prefill, training), weight
gradients, experts whose rows are sorted or have room.

Peers compute from the same operands, prepared outside the timed part: dequantised to bf16, the codes alone (tensor-wise
FP8), the scales in the layout that cuBLASLt or DeepGEMM wants. Rows a group are drawn once a case, the same for all.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Baseline, Case, Timing
from dsv3 import ops
from dsv3.ops import registry
from dsv3.reference import linear
from dsv3.reference.quant import TILE, dequantize

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]  # N, K
ROWS = (1, 8, 16, 32, 64, 128, 4096)
WGRADS = [(4096, 7168, 4096), (7168, 2048, 4096), (2112, 7168, 4096)]  # M, N, K
GROUPED_WGRADS = [
    (groups, rows, n, k) for groups, rows in ((4, 8192), (8, 4096)) for n, k in ((4096, 7168), (7168, 2048))
]
GROUPED = [
    *((4, 8192, n, k) for n, k in ((6144, 7168), (4096, 7168), (7168, 2048), (7168, 3072))),
    *((8, 4096, n, k) for n, k in ((4096, 7168), (7168, 2048))),
]  # groups, mean rows, N, K
MASKED = [
    (groups, rows, n, k)
    for groups, rows in ((32, 192), (6, 1024), (32, 20), (6, 20))
    for n, k in ((4096, 7168), (7168, 2048))
]
ROOM = 4096  # rows that the masked layout has for a group
SPREAD = 0.3  # rows of a group: the mean times U(1 - SPREAD, 1 + SPREAD)
GRADIENT_FLOOR = 1e-30


def tiles(n: int) -> int:
    """Tiles of 128 that n values make."""
    return -(-n // TILE)


def draw_rows(groups: int, mean: int) -> list[int]:
    """Rows of every group, always the same ones."""
    generator = random.Random(groups * mean)
    return [max(1, int(mean * generator.uniform(1 - SPREAD, 1 + SPREAD))) for _ in range(groups)]


def _randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=BF16)


def _offsets(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32, device=device)


# ---- peers ----
def _on_hopper() -> bool:
    return torch.cuda.is_available() and registry.is_hopper(torch.device("cuda", torch.cuda.current_device()))


def _has_deep_gemm() -> bool:
    return _on_hopper() and importlib.util.find_spec("deep_gemm") is not None


def _deep_gemm(name: str) -> Callable[..., None]:
    import deep_gemm

    deep_gemm.set_pdl(True)  # as our kernels are launched
    return getattr(deep_gemm, name)


def _grouped_peers(plain: Callable[..., Any], deep: Callable[..., Any]) -> dict[str, Baseline]:
    found = {"torch bf16": Baseline(plain, binds=True, tolerance=1e-2)}
    if _has_deep_gemm():
        found["deep_gemm"] = Baseline(deep, binds=True)
    return found


def _bf16(data: Tensor, sf: Tensor) -> Tensor:
    return dequantize(data, sf).bfloat16()


def _scaled_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Callable[[], Tensor]:
    """FP8 with one scale a tensor: other values, but the rate of a product that promotes and scales nothing."""
    one, b_t = torch.ones((), device=a.device), b.t()
    return lambda: torch._scaled_mm(a, b_t, scale_a=one, scale_b=one, out_dtype=out_dtype, use_fast_accum=True)


def _block_scaled_mm(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, out_dtype: torch.dtype) -> Callable[[], Tensor]:
    """cuBLASLt's own 1x128 by 128x128 (or 1x128) product; scales of blocks are K-major there, padded to 4."""
    a_recipe, b_recipe, b_t = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise1x128, b.t()
    if b_sf.shape[0] != b.shape[0]:
        b_recipe = F.ScalingType.BlockWise128x128
        b_sf = F.pad(b_sf, (0, -b_sf.shape[1] % 4)).t()
    return lambda: F.scaled_mm(a, b_t, a_sf, a_recipe, b_sf, b_recipe, output_dtype=out_dtype)


# ---- dense ----
def _dense_deep_gemm(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[0], dtype=BF16)
    _deep_gemm("fp8_gemm_nt")((a, a_sf), (b, b_sf), out)
    return out


def _dense_peers(m: int, n: int, k: int) -> dict[str, Baseline]:
    def plain(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor) -> Callable[[], Tensor]:
        x, w = _bf16(a, a_sf), _bf16(b, b_sf)
        return lambda: torch.mm(x, w.t())

    found = {"torch bf16": Baseline(plain, binds=True, tolerance=1e-2)}
    if _on_hopper():
        tensor_wise = Baseline(lambda a, a_sf, b, b_sf: _scaled_mm(a, b, BF16), binds=True, tolerance=None)
        found["cuBLASLt tensor-wise"] = tensor_wise
    if _on_hopper() and m % 4 == 0 and n % TILE == 0 and k % TILE == 0:
        found["cuBLASLt block-scaled"] = Baseline(lambda *inputs: _block_scaled_mm(*inputs, BF16), binds=True)
    if _has_deep_gemm():
        found["deep_gemm"] = Baseline(_dense_deep_gemm)
    return found


def _dense_bytes(m: int, n: int, k: int) -> int:
    return (m + n) * k + 4 * (m + tiles(n)) * tiles(k) + 2 * m * n


def _dense_inputs(m: int, n: int, k: int, device: torch.device) -> tuple[Tensor, ...]:
    a, b = ops.per_token_cast(_randn(m, k, device=device)), ops.per_block_cast(_randn(n, k, device=device))
    return *a, *b


def _dense(m: int, n: int, k: int) -> Case:
    return Case(
        op="fp8_gemm",
        case={"m": m, "n": n, "k": k},
        flops=2 * m * n * k,
        bytes=_dense_bytes(m, n, k),
        fp8=True,
        inputs=functools.partial(_dense_inputs, m, n, k),
        run=lambda *inputs: torch.ops.dsv3.fp8_gemm(*inputs, BF16, False, False),
        baselines=_dense_peers(m, n, k),
    )


# ---- weight gradients ----
def _wgrad_peers(m: int, n: int) -> dict[str, Baseline]:
    def plain(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, out: Tensor) -> Callable[[], Tensor]:
        dy, x = _bf16(a, a_sf).t(), _bf16(b, b_sf).t()

        def call() -> Tensor:
            linear.add_product_(out, dy, x)
            return out

        return call

    def added(product: Callable[[], Tensor], out: Tensor) -> Callable[[], Tensor]:
        return lambda: out.add_(product())

    def deep(a: Tensor, a_sf: Tensor, b: Tensor, b_sf: Tensor, out: Tensor) -> Tensor:
        _deep_gemm("fp8_gemm_nt")((a, a_sf), (b, b_sf), out, c=out, recipe=(1, 1, 128))
        return out

    found = {"torch bf16": Baseline(plain, binds=True, tolerance=1e-2)}
    if _on_hopper():
        tensor_wise = Baseline(lambda a, _, b, __, out: added(_scaled_mm(a, b, FP32), out), binds=True, tolerance=None)
        found["cuBLASLt tensor-wise"] = tensor_wise
    if _on_hopper() and m % TILE == 0 and n % TILE == 0:
        block = Baseline(lambda *inputs: added(_block_scaled_mm(*inputs[:4], FP32), inputs[4]), binds=True)
        found["cuBLASLt block-scaled"] = block
    if _has_deep_gemm():
        found["deep_gemm"] = Baseline(deep)
    return found


def _wgrad(m: int, n: int, k: int) -> Case:
    """out [M, N] of K tokens."""

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        a = ops.cast_transpose(_randn(k, m, device=device), amax_floor=GRADIENT_FLOOR)
        return *a, *ops.cast_transpose(_randn(k, n, device=device)), torch.zeros(m, n, device=device)

    def run(*inputs: Tensor) -> Tensor:
        torch.ops.dsv3.fp8_gemm_out(*inputs, True, False, False)
        return inputs[4]

    return Case(
        op="fp8_gemm_out",
        case={"m": m, "n": n, "k": k, "accumulate": True},
        flops=2 * m * n * k,
        bytes=(m + n) * k + 4 * (m + n) * tiles(k) + 8 * m * n,
        fp8=True,
        inputs=inputs,
        run=run,
        baselines=_wgrad_peers(m, n),
    )


def _grouped_wgrad(groups: int, mean: int, n: int, k: int) -> Case:
    """out [G, N, K] of the rows of G experts."""
    rows = draw_rows(groups, mean)
    sizes = [tiles(count) * TILE for count in rows]  # with the slots that fill up the last tile
    starts = itertools.accumulate(sizes, initial=0)
    spans = [(start, start + count) for start, count in zip(starts, rows, strict=False)]

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        offsets = _offsets(rows, device)
        a = ops.cast_transpose(_randn(sum(rows), n, device=device), offsets, amax_floor=GRADIENT_FLOOR)
        b = ops.cast_transpose(_randn(sum(rows), k, device=device), offsets)
        return *a, *b, offsets, torch.zeros(groups, n, k, device=device)

    def run(*inputs: Tensor) -> Tensor:
        torch.ops.dsv3.grouped_fp8_wgrad(*inputs)
        return inputs[5]

    def plain(*inputs: Tensor) -> Callable[[], Tensor]:
        a_t, a_sf, b_t, b_sf, offsets, out = inputs
        dense = (_bf16(a_t, a_sf), _bf16(b_t, b_sf))
        dy, x = (torch.cat([t[:, start:end].t() for start, end in spans]) for t in dense)

        def call() -> Tensor:
            linear.grouped_linear_wgrad_(dy, x, offsets, out)
            return out

        return call

    def deep(*inputs: Tensor) -> Callable[[], Tensor]:
        a_t, a_sf, b_t, b_sf, offsets, out = inputs
        total = sum(sizes)
        a, b = (torch.cat([part.flatten() for part in t[:, :total].split(sizes, 1)]) for t in (a_t, b_t))
        scales = [sf[:, : total // TILE] for sf in (a_sf, b_sf)]
        on_device = torch.tensor(sizes, dtype=torch.int32, device=offsets.device)
        call = _deep_gemm("k_grouped_fp8_gemm_nt_contiguous")

        def run() -> Tensor:
            call((a, scales[0]), (b, scales[1]), out, sizes, on_device, out)
            return out

        return run

    return Case(
        op="grouped_fp8_wgrad",
        case={"groups": groups, "rows": mean, "n": n, "k": k, "spread": SPREAD},
        flops=2 * sum(rows) * n * k,
        bytes=(n + k) * (sum(rows) + 4 * sum(sizes) // TILE) + 4 * (groups + 1) + 8 * groups * n * k,
        fp8=True,
        inputs=inputs,
        run=run,
        baselines=_grouped_peers(plain, deep),
    )


# ---- experts ----
def _expert_weights(groups: int, n: int, k: int, device: torch.device) -> tuple[Tensor, ...]:
    made = [ops.per_block_cast(_randn(n, k, device=device)) for _ in range(groups)]
    return tuple(torch.stack(parts) for parts in zip(*made, strict=True))


def _grouped(groups: int, mean: int, n: int, k: int) -> Case:
    """Results are compared a group at a time, since a peer pads groups."""
    rows = draw_rows(groups, mean)
    total = sum(rows)

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        a = ops.per_token_cast(_randn(total, k, device=device))
        return *a, *_expert_weights(groups, n, k, device), _offsets(rows, device)

    def plain(*inputs: Tensor) -> Callable[[], Any]:
        x, w, offsets = _bf16(*inputs[:2]), _bf16(*inputs[2:4]), inputs[4]
        return lambda: linear.grouped_linear(x, w, offsets).split(rows)

    def deep(*inputs: Tensor) -> Callable[[], Any]:
        """Groups padded to 128 rows, the padding marked with -1."""
        a, a_sf, b, b_sf, _ = inputs
        sizes = [tiles(count) * TILE for count in rows]
        padded = [F.pad(part.view(torch.uint8), (0, 0, 0, -len(part) % TILE)) for part in a.split(rows)]
        scales = [F.pad(part, (0, 0, 0, -len(part) % TILE)) for part in a_sf.split(rows)]
        owners = [torch.full((size,), -1, dtype=torch.int32) for size in sizes]
        for g, count in enumerate(rows):
            owners[g][:count] = g
        owner = torch.cat(owners).to(a.device)
        x, x_sf = torch.cat(padded).view(a.dtype), torch.cat(scales).t().contiguous().t()
        call = _deep_gemm("m_grouped_fp8_gemm_nt_contiguous")

        def run() -> list[Tensor]:
            out = a.new_empty(len(x), n, dtype=BF16)
            call((x, x_sf), (b, b_sf), out, owner)
            return [part[:count] for part, count in zip(out.split(sizes), rows, strict=True)]

        return run

    return Case(
        op="grouped_fp8_gemm",
        case={"groups": groups, "rows": mean, "n": n, "k": k, "spread": SPREAD},
        flops=2 * total * n * k,
        bytes=total * (k + 4 * tiles(k) + 2 * n) + groups * (n * k + 4 * tiles(n) * tiles(k)) + 4 * (groups + 1),
        fp8=True,
        inputs=inputs,
        run=lambda *inputs: torch.ops.dsv3.grouped_fp8_gemm(*inputs, BF16, False).split(rows),
        baselines=_grouped_peers(plain, deep),
    )


def _masked(groups: int, mean: int, n: int, k: int, room: int) -> Case:
    rows = draw_rows(groups, mean)
    total = sum(rows)

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        a = (t.view(groups, room, -1) for t in ops.per_token_cast(_randn(groups * room, k, device=device)))
        return *a, *_expert_weights(groups, n, k, device), torch.tensor(rows, dtype=torch.int32, device=device)

    def valid(x: Tensor) -> list[Tensor]:
        return [x[g, :count] for g, count in enumerate(rows)]

    def plain(*inputs: Tensor) -> Callable[[], Any]:
        a, a_sf, b, b_sf, counts = inputs
        x = torch.cat([_bf16(*part) for part in zip(valid(a), valid(a_sf), strict=True)])
        w, offsets = _bf16(b, b_sf), _offsets(rows, counts.device)
        return lambda: linear.grouped_linear(x, w, offsets).split(rows)

    def deep(*inputs: Tensor) -> Callable[[], Any]:
        a, a_sf, b, b_sf, counts = inputs
        x_sf = a_sf.transpose(1, 2).contiguous().transpose(1, 2)
        call = _deep_gemm("m_grouped_fp8_gemm_nt_masked")

        def run() -> list[Tensor]:
            out = a.new_empty(groups, room, n, dtype=BF16)
            call((a, x_sf), (b, b_sf), out, counts, mean)
            return valid(out)

        return run

    return Case(
        op="masked_grouped_fp8_gemm",
        case={"groups": groups, "rows": mean, "n": n, "k": k, "room": room, "spread": SPREAD},
        flops=2 * total * n * k,
        bytes=total * (k + 4 * tiles(k) + 2 * n) + groups * (n * k + 4 * tiles(n) * tiles(k)) + 4 * groups,
        fp8=True,
        inputs=inputs,
        run=lambda *inputs: valid(torch.ops.dsv3.masked_grouped_fp8_gemm(*inputs, BF16, False)),
        baselines=_grouped_peers(plain, deep),
    )


# ---- host time ----
def host_us(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Microseconds that a call keeps the host: the median of spans of calls that never wait for the device."""
    times = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) * 1e6 / calls)
    return statistics.median(times[1:])


def measure_host(m: int, n: int, k: int, device: torch.device, quick: bool) -> Timing:
    """time_us: torch.ops.dsv3.fp8_gemm, which allocates its output. Facts: `public_us` is dsv3.ops.fp8_gemm with its
    checks, `native_us` the native function alone. `empty_us` and `empty_native_us` are per_token_cast of one tile on the
    same two paths: a launch that does next to nothing. `deep_gemm_us` is DeepGEMM's call, its output allocated."""
    calls = 5 if quick else 200  # fewer than a stream queues, so that a launch never waits
    inputs = _dense_inputs(m, n, k, device)
    tile = _randn(1, TILE, device=device)
    paths = {
        "public_us": lambda: ops.fp8_gemm(*inputs),
        "empty_us": lambda: torch.ops.dsv3.per_token_cast(tile, False, 1e-4),
    }
    if device.type == "cuda":
        native, out, cast = registry.native(), inputs[0].new_empty(m, n, dtype=BF16), ops.per_token_cast(tile)
        paths["native_us"] = lambda: native.fp8_gemm(out, None, *inputs, False, False, False)
        paths["empty_native_us"] = lambda: native.per_token_cast(*cast, tile, False, 1e-4)
    if _has_deep_gemm():
        paths["deep_gemm_us"] = lambda: _dense_deep_gemm(*inputs)
    facts = {name: round(host_us(path, device, calls), 3) for name, path in paths.items()}
    ours = host_us(lambda: torch.ops.dsv3.fp8_gemm(*inputs, BF16, False, False), device, calls)
    return Timing(ours, {}, facts)


def _host(m: int, n: int, k: int) -> Case:
    """flops, bytes and the floor are those of the device."""
    return Case(
        op="fp8_gemm",
        case={"m": m, "n": n, "k": k, "mode": "host"},
        flops=2 * m * n * k,
        bytes=_dense_bytes(m, n, k),
        fp8=True,
        measure=functools.partial(measure_host, m, n, k),
    )


def cases(tiny: bool) -> list[Case]:
    """`rows` is the mean of a group's; with `spread` they are drawn around it."""
    if tiny:
        dense = [_dense(min(m, 96), 144 if n % TILE else 256, 256) for m in ROWS for n, _ in SHAPES]
        wgrads = [_wgrad(144 if m % TILE else 128, 256, 256) for m, _, _ in WGRADS]
        grouped_wgrads = [_grouped_wgrad(groups, 40, 64, 128) for groups, _, _, _ in GROUPED_WGRADS]
        grouped = [_grouped(groups, 40, 128, 256) for groups, _, _, _ in GROUPED]
        masked = [_masked(groups, min(rows, 50), 128, 256, 72) for groups, rows, _, _ in MASKED]
        return [*dense, *wgrads, *grouped_wgrads, *grouped, *masked, _host(8, 144, 256)]
    return [
        *(_dense(m, n, k) for m in ROWS for n, k in SHAPES),
        *(_wgrad(*shape) for shape in WGRADS),
        *(_grouped_wgrad(*shape) for shape in GROUPED_WGRADS),
        *(_grouped(*shape) for shape in GROUPED),
        *(_masked(*shape, ROOM) for shape in MASKED),
        _host(64, 2112, 7168),
    ]
