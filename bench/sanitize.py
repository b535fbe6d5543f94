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
from rich.console import Console

from bench.cases import load
from bench.results import ROOT, Environment, csrc_sha
from bench.suite import FAMILIES
from dsv3 import ops

TOOLS = ("memcheck", "synccheck", "racecheck")
SECONDS = 600  # of one tool and family
CALLED = tuple(family for family in FAMILIES if family != "comm")  # comm needs a process a rank

# What racecheck reports although a barrier orders it: it follows neither mbarriers that count bytes nor named barriers of a
# part of a block. Which functions, of which one writes and the other reads, and what orders them.
RING = "the stage's mbarriers: full when the copy has landed, empty when every consumer warp is done with it"
SLOT = "kReady of the slot's owner; who writes a slot again has received a later tile from every other warpgroup"
ORDERED = {
    ("SM90_BULK_COPY_G2S::copy", "load_shared_float"): RING,
    ("SM90_BULK_COPY_G2S::copy", "load_shared_float2"): RING,
    ("copy_float_async", "load_shared_float"): RING,
    ("load_codes", "load_matrices"): RING,
    ("load_codes", "load_transposed"): RING,
    ("load_codes", "load_scales"): RING,
    ("Attender::run", "Loader::give_queries"): "queries_full and queries_empty of the warpgroup",
    (
        "Consumer::give",
        "Consumer::start_other_values",
    ): "kReady of the warpgroup that gives, and of the other before it does again",
    ("Consumer::write", "Consumer::write"): "kEnd; sums have a place for each of two pieces in a row",
    ("Fp8Consumer::make_probabilities", "Fp8Consumer::receive"): SLOT,
    ("Fp8Consumer::make_probabilities", "__half2::operator="): SLOT,
    ("Fp8Consumer::pair_at", "Fp8Consumer::write"): "the second kEnd of a piece",
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
        yield functools.partial(ops.fp8_gemm, *rows(m, 2048), *blocks(576, 2048), batch_invariant=True)
        yield functools.partial(ops.fp8_gemm, *rows(m, 512), *blocks(576, 512), out_dtype=torch.float32)
    for m, n, k in ((300, 2112, 640), (700, 576, 1040), (300, 1024, 512), (300, 8, 128)):
        yield functools.partial(ops.fp8_gemm, *rows(m, k), *blocks(n, k))
    for m, n, k in ((200, 136, 640), (512, 512, 1024)):
        out = torch.zeros(m, n, device=device)
        yield functools.partial(ops.fp8_gemm, *rows(m, k), *rows(n, k), out=out, accumulate=True)


def _decode(device: torch.device, heads: int, s_q: int, page: int, fp8: bool) -> Callable[[], Any]:
    lengths = [1100, 700, 0, 64, 65, 1, 513]
    counts = [-(-length // page) for length in lengths]
    table = torch.full((len(lengths), max(counts)), 2**30, dtype=torch.int32)
    for i, (first, count) in enumerate(zip([0, *torch.tensor(counts).cumsum(0).tolist()], counts, strict=False)):
        table[i, :count] = torch.arange(first, first + count)
    cache = torch.randn(sum(counts), page, 1, 576, device=device).div(10).bfloat16()
    if fp8:
        cache = torch.zeros(sum(counts), page, 1, 656, device=device, dtype=torch.uint8)
    q = torch.randn(len(lengths), s_q, heads, 576, device=device).div(10).bfloat16()
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return functools.partial(ops.mla_decode, q, cache, table.to(device), lens, softmax_scale=192**-0.5)


def _attention(device: torch.device) -> Iterator[Callable[[], Any]]:
    for heads, s_q, page in ((128, 1, 64), (128, 2, 16), (64, 1, 64), (16, 1, 64), (16, 2, 32), (9, 1, 128)):
        for fp8 in (False, True):
            yield _decode(device, heads, s_q, page, fp8)


EXTRA = {"gemm": _gemm, "attention": _attention}


def call(family: str) -> None:
    """Calls every op of a family at tiny sizes, once."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    for case in load(family, tiny=True):
        if case.measure is None:
            case.run(*case.inputs(device))
    for function in EXTRA.get(family, lambda device: iter(()))(device):
        function()
    torch.cuda.synchronize()


# ---- what runs the tool ----
def function_name(text: str) -> str:
    """A function without its namespace of ours, template arguments, parameters and return type."""
    before = None
    text = re.sub(r"\(anonymous namespace\)::|\((int|bool|unsigned int)\)", "", text)
    while before != text:
        before, text = text, re.sub(r"<[^<>]*>", "", text)
    name = re.sub(r"operator ?", "operator", text.split("(")[0].strip()).split(" ")[-1]
    return name.replace("dsv3::", "").replace("cute::", "")


def reports(output: str) -> Counter[str]:
    """What a tool reported and how often: hazards by the two functions and what orders them, all else by its first lines."""
    found: Counter[str] = Counter()
    for block in re.split(
        r"^=========(?: (?! )|\s*$)", output, flags=re.MULTILINE
    ):  # what follows a first line is indented
        lines = [line.removeprefix("=========").strip() for line in block.splitlines()] or [""]
        if race := re.match(r"Error: Race reported between (?:Write|Read) access at (.*)\+0x", lines[0]):
            for other, count in re.findall(r"and (?:Write|Read) access at (.*)\+0x.*\[(\d+) hazards\]", block):
                found[" and ".join(sorted((function_name(race[1]), function_name(other))))] += int(count)
        elif re.match(r"(Error|Invalid|Barrier|Misaligned|Program hit)", lines[0]):
            found[" | ".join(re.sub(r"0x[0-9a-f]+|\(\d+,\d+,\d+\)", "*", line) for line in lines[:2])] += 1
    return found


def ordered_by(report: str) -> str | None:
    """The barrier that orders a hazard; None if none is known or it is no hazard."""
    return ORDERED.get(tuple(sorted(report.split(" and "))))  # type: ignore[call-overload,no-any-return]


def summarize(output: str) -> dict[str, Any]:
    """`errors`: reports that no known barrier explains, None where the tool did not come to an end; `hazards`: the others,
    how often, and what orders them."""
    found = reports(output)
    hazards = {
        report: f"{count}, ordered by {ordered_by(report)}" for report, count in found.items() if ordered_by(report)
    }
    errors = {report: count for report, count in found.items() if not ordered_by(report)}
    total = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    if total and int(total[1]) and not found:
        errors["reports that are not understood"] = int(total[1])
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
    found = summarize(done.stdout)
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
