"""`python -m bench sanitize [FAMILY...]`: runs every kernel at small sizes under compute-sanitizer and records what it
says, in sanitizer.json. `python -m bench.sanitize FAMILY` is what runs under it."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from bench.cases import load
from bench.cases.attention import decode_inputs
from bench.results import ROOT, Environment, csrc_sha
from bench.suite import FAMILIES
from dsv3 import ops

TOOLS = ("memcheck", "synccheck", "racecheck")
SECONDS = 600  # of one tool and family
CALLED = tuple(family for family in FAMILIES if family != "comm")  # comm needs a process a rank

# What racecheck reports although a barrier orders it: it follows neither mbarriers that count bytes nor named barriers of a
# part of a block. A family's pairs of functions, of which one writes and the other reads, and what orders them.
# NOTE: a race between the same two functions that nothing orders would be taken for one of these.
RING = "the stage's mbarriers: full when the copy has landed, empty when every consumer warp is done with it"
MBARRIER = "the mbarrier itself: one thread makes it and is the first to use it, the others wait behind a __syncthreads"
SLOT = "kReady of the slot's owner; who writes a slot again has received a later tile from every other warpgroup"
ORDERED = {
    "gemm": {
        "SM90_BULK_COPY_G2S::copy and load_shared_float": RING,
        "SM90_BULK_COPY_G2S::copy and load_shared_float2": RING,
        "copy_float_async and load_shared_float": RING,
    },
    "attention": {
        "load_codes and load_matrices": RING,
        "load_codes and load_transposed": RING,
        "load_codes and load_scales": RING,
        "Attender::run and Loader::give_queries": "queries_full and queries_empty of the warpgroup",
        "Consumer::give and Consumer::start_other_values": "kReady of who gives, and of the other before it gives again",
        "Consumer::write and Consumer::write": "kEnd; sums have a place for each of two pieces in a row",
        "Fp8Consumer::make_probabilities and Fp8Consumer::receive": SLOT,
        "Fp8Consumer::make_probabilities and __half2::operator=": SLOT,
        "Fp8Consumer::pair_at and Fp8Consumer::write": "the second kEnd of a piece",
        "Fp8Consumer::write and mla_decode_fp8_kernel": "the second kEnd of a piece",
    },
    "decode": {
        "Attention::row_of and expect_bytes": MBARRIER,  # of what is made there no line is left but one behind it
        "cutlass::arch::ClusterBarrier::init and expect_bytes": MBARRIER,
        "expect_bytes and few_attention_kernel": MBARRIER,
    },
}


# ---- what runs under the tool ----
def _gemm(device: torch.device) -> Iterator[Callable[[], Any]]:
    def rows(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.per_token_cast(torch.randn(m, k, device=device, dtype=torch.bfloat16))

    def blocks(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.per_block_cast(torch.randn(n, k, device=device, dtype=torch.bfloat16))

    for m in (1, 17, 33, 64, 72, 128):  # split, whole, several tiles a block
        for n, k in ((200, 1040), (576, 2048), (16384, 256)):
            yield functools.partial(ops.fp8_gemm, *rows(m, k), *blocks(n, k))
        a, b = rows(m, 2048), blocks(576, 2048)
        yield functools.partial(ops.fp8_gemm, *a, *b, batch_invariant=True)
        yield functools.partial(ops.fp8_gemm, *a, *b, static_weights=True)
        yield functools.partial(ops.fp8_gemm, *a, *b, out=torch.zeros(m, 576, device=device), accumulate=True)
    for m, n, k in ((300, 2112, 640), (700, 576, 1040), (300, 1024, 512), (300, 8, 128)):
        yield functools.partial(ops.fp8_gemm, *rows(m, k), *blocks(n, k))
    for m, n, k in ((200, 136, 640), (512, 512, 1024)):
        out = torch.zeros(m, n, device=device)
        yield functools.partial(ops.fp8_gemm, *rows(m, k), *rows(n, k), out=out, accumulate=True)
    for counts in ([40, 1, 300], [600, 130], [0, 129, 5, 64, 300]):  # few rows, many, both
        groups, n, k, room = len(counts), 328, 640, 320
        weights = [blocks(n, k) for _ in counts]
        b, b_sf = (torch.stack(part) for part in zip(*weights, strict=True))
        numbers = torch.tensor(counts, dtype=torch.int32, device=device)
        offsets = F.pad(numbers.cumsum(0, dtype=torch.int32), (1, 0))
        a, a_sf = rows(groups * room, k)
        masked_sf = a_sf.as_strided((groups, room, a_sf.size(1)), (room, 1, a_sf.stride(1)))
        for out_dtype in (torch.bfloat16, torch.float32):
            yield functools.partial(ops.grouped_fp8_gemm, *rows(sum(counts), k), b, b_sf, offsets, out_dtype=out_dtype)
            yield functools.partial(
                ops.masked_grouped_fp8_gemm, a.view(groups, room, k), masked_sf, b, b_sf, numbers.clamp(max=room),
                out_dtype=out_dtype,
            )  # fmt: skip


def _attention(device: torch.device) -> Iterator[Callable[[], Any]]:
    lengths = [1100, 700, 0, 64, 65, 1, 513]
    for heads, s_q, page in ((128, 1, 64), (128, 2, 16), (64, 1, 64), (16, 1, 64), (16, 2, 32), (9, 1, 128)):
        for kv in ("bf16", "fp8"):
            q, cache, table, seq_lens, *_ = decode_inputs(lengths, s_q, heads, kv, device, page=page)
            table[torch.arange(table.size(1), device=device) * page >= seq_lens[:, None]] = 2**30  # nobody's
            yield functools.partial(ops.mla_decode, q, cache, table, seq_lens, softmax_scale=192**-0.5)


def _decode(device: torch.device) -> Iterator[Callable[[], Any]]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * shape[-1] ** -0.5

    def same(weight: torch.Tensor) -> torch.Tensor:
        return weight

    def quantize(weight: torch.Tensor) -> ops.Quantized:
        return ops.Quantized(*ops.per_block_cast(weight))

    for tokens in (3, 12, 40):  # 8, 16 and 32 at a time, and a second pass
        for cast in (same, quantize):
            yield functools.partial(ops.few_linear, draw(tokens, 416), [cast(draw(7216, 416))])
            yield functools.partial(ops.few_linear, draw(tokens, 416), [cast(draw(144, 416))])
            index = torch.rand(tokens, 12, device=device).topk(4).indices
            weights = {"gate_up": draw(12, 192, 160), "down": draw(12, 160, 96)}
            weights |= {"shared_gate_up": draw(128, 160), "shared_down": draw(160, 64)}
            weights = {name: cast(weight) for name, weight in weights.items()}
            factors = torch.rand(tokens, 4, device=device)
            yield functools.partial(ops.few_experts, draw(tokens, 160), index, factors, **weights)
    for rows in (1, 2):
        q, cache, table, seq_lens, *_ = decode_inputs([37 * i % 500 for i in range(40)], rows, 16, "bf16", device)
        yield functools.partial(ops.few_attention, q, cache, table, seq_lens, softmax_scale=192**-0.5)


def _moe(device: torch.device) -> Iterator[Callable[[], Any]]:
    settings = (8, 4, 6, 2.5, "sigmoid", "top2_sum", True)
    for lengths in ([3, 0, 1, 60], [160, 160, 7, 0, 1, 300]):  # one cluster; more blocks, with ends inside them
        logits, bias = torch.randn(sum(lengths), 64, device=device), torch.rand(64, device=device)
        cu_seqlens = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).int()
        index, weights, _, _, affinity = torch.ops.dsv3.moe_gate_loads(logits, bias, cu_seqlens, *settings)
        inputs = weights, affinity, logits, index, cu_seqlens
        yield functools.partial(torch.ops.dsv3.moe_gate_loads_backward, *inputs, 2.5, "sigmoid", True)


EXTRA = {"gemm": _gemm, "attention": _attention, "decode": _decode, "moe": _moe}


def call(family: str) -> None:
    """Calls every op of a family at tiny sizes, once."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    for case in load(family, tiny=True):
        if case.measure is None:
            case.run(*case.inputs(device))
    if family in EXTRA:
        for function in EXTRA[family](device):
            function()
    torch.cuda.synchronize()


# ---- what runs the tool ----
def function_name(text: str) -> str:
    """A function without its namespace of ours, template arguments, parameters and return type."""
    before = None
    text = re.sub(r"(\(anonymous namespace\)|<unnamed>)::|\((int|bool|unsigned int)\)(?=\d)", "", text)
    while before != text:
        before, text = text, re.sub(r"<[^<>]*>", "", text)
    name = re.sub(r"operator ?", "operator", text.split("(")[0].strip()).split(" ")[-1]
    return name.replace("dsv3::", "").replace("cute::", "")


def reports_of(output: str) -> Iterator[list[str]]:
    """The lines of every report. What follows a first line is indented."""
    for block in re.split(r"^=========(?: (?! )|\s*$)", output, flags=re.MULTILINE):
        lines = [line.removeprefix("=========").strip() for line in block.splitlines()]
        if lines and re.match(r"(Error|Warning|Invalid|Barrier|Misaligned|Program hit)", lines[0]):
            yield lines


def count(reports: list[list[str]]) -> Counter[str]:
    """What a tool reported and how often: hazards by the two functions, all else by its first lines."""
    found: Counter[str] = Counter()
    for lines in reports:
        race = re.match(r"\w+: Race reported between (?:Write|Read) access at (.*)\+0x", lines[0])
        others = re.findall(r"and (?:Write|Read) access at (.*)\+0x.*\[(\d+) hazards?\]", "\n".join(lines))
        for other, hazards in others if race else []:
            found[" and ".join(sorted((function_name(race[1]), function_name(other))))] += int(hazards)
        if not (race and others):
            found[" | ".join(re.sub(r"0x[0-9a-f]+|\(\d+,\d+,\d+\)", "*", line) for line in lines[:2])] += 1
    return found


def summarize(output: str, family: str) -> dict[str, Any]:
    """`errors`: reports that no known barrier explains, None where the tool did not come to an end; `hazards`: the others,
    how often, and what orders them."""
    reports, ordered = list(reports_of(output)), ORDERED.get(family, {})
    found = count(reports)
    hazards = {report: f"{times}, ordered by {ordered[report]}" for report, times in found.items() if report in ordered}
    errors = {report: times for report, times in found.items() if report not in ordered}
    total = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    if total and int(total[1]) > len(reports):
        errors["reports that are not understood"] = int(total[1]) - len(reports)
    return {
        "errors": sum(errors.values()) if total else None,
        **({"reports": dict(sorted(errors.items()))} if errors else {}),
        **({"hazards": dict(sorted(hazards.items()))} if hazards else {}),
    }


def run(tool: str, family: str) -> dict[str, Any]:
    """A tool's summary of a family, and the end of its output where it or the process failed."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=dsv3", "--print-limit", "10000"]
    try:
        done = subprocess.run(
            [*command, sys.executable, "-m", "bench.sanitize", family],
            cwd=ROOT,
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that memcheck sees every tensor's end
            text=True,
            timeout=SECONDS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"errors": None, "output": f"not done after {SECONDS} s"}
    found = summarize(done.stdout, family)
    if found["errors"] is None or (done.returncode and not found["errors"]):
        return {**found, "errors": None, "output": done.stdout[-2000:]}
    return found


def run_sanitizer(families: list[str], out: Path, env: Environment, console: Console) -> int:
    """Every tool over every family, all of them if none is named; 1 if anything was reported that no barrier orders."""
    if unknown := [family for family in families if family not in CALLED]:
        raise ValueError(f"sanitize: expected families among {', '.join(CALLED)}, got {', '.join(unknown)}")
    if shutil.which("compute-sanitizer") is None:
        raise ValueError("sanitize: there is no compute-sanitizer; it comes with the CUDA toolkit")
    path, bad = out / "sanitizer.json", False
    for family in families or CALLED:
        sha = csrc_sha(family, copied=env.copied)
        found: dict[str, Any] = {}
        for tool in TOOLS:
            found[tool] = run(tool, family)
            errors, hazards = found[tool]["errors"], found[tool].get("hazards", {})
            said = "failed: " + found[tool].get("output", "") if errors is None else f"{errors} errors"
            console.print(
                f"{family} {tool}: {said}" + (f", {len(hazards)} hazards in order" if hazards else ""), markup=False
            )
            bad = bad or errors != 0
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[family] = {"commit": env.commit, "csrc_sha": sha, "gpu": env.gpu, "date": env.date, **found}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    return int(bad)


if __name__ == "__main__":
    call(sys.argv[1])
