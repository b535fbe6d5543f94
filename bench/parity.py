"""`python -m bench.parity [RUN...] [join]`: does a model learn in FP8 what it learns in bf16? Three runs on the same data in
the same order: bf16, fp8, and as the control bf16 once more, from weights that differ by a millionth; each from several starts,
whose mean is compared, since what one start makes of a small difference is chance. See README.md.

Every start of a run leaves its losses in a file, so that the runs can be made by one process after the other or on three GPUs
at once; `join` compares them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench import __main__ as bench
from bench.cases import Case, Timing
from bench.cases.model import RECIPE, Setup, Training, step_bytes, step_flops, window_means
from bench.check import require_native
from bench.plot import plot_parity
from bench.results import RESULTS, ROOT, Environment, csrc_sha, gpu_folder, make_row, write_apart
from bench.table import print_table
from bench.timing import FULL, Ceilings, measure_ceilings, release
from dsv3.terminal import clock
from dsv3.train.buffers import ParamBuffers
from dsv3.train.config import TrainConfig
from dsv3.train.tokenizer import MAX_BYTES, train_tokenizer

RUNS = {"bf16": ("bf16", 0.0), "fp8": ("fp8", 0.0), "control": ("bf16", 1e-6)}  # precision, perturbation of the weights
TOLERANCE, CONTROL_FACTOR = 0.0025, 1.5  # the bound is the larger of one, and the other times the control's difference
REPORT_EVERY = 200  # steps
SOURCE = Path(torch.__file__).parents[1]
FP8_OPS = ("fp8_gemm", "fp8_gemm_out", "grouped_fp8_gemm", "grouped_fp8_wgrad")


@dataclass(frozen=True)
class Plan:
    """What the runs share: a model, `steps` batches, the steps of the learning rate's warm-up and those of a mean, and how many
    initial weights a run starts from, one after the other."""

    setup: Setup
    warmup_steps: int
    window: int
    starts: int

    @property
    def recipe(self) -> TrainConfig:
        """The published recipe, its schedules over this run: 2.2e-4 constant for two thirds, then down to 7.3e-6."""
        size = {"batch": self.setup.rows, "micro_batch": self.setup.rows}
        return dataclasses.replace(
            RECIPE, max_tokens=0, max_steps=self.setup.steps, warmup_steps=self.warmup_steps, **size
        )


PLAN = Plan(Setup("mini", 8, 512, 2000), warmup_steps=500, window=100, starts=6)
TINY = Plan(Setup("tiny", 2, 32, 12), warmup_steps=4, window=2, starts=2)


@dataclass(frozen=True)
class Run:
    """What a run leaves behind of one of its starts."""

    name: str
    start: int
    plan: Plan
    data: str  # sha256 of the sequences in their order
    sha: str  # csrc_sha
    env: Environment
    ceilings: Ceilings
    step_us: float
    losses: list[float]  # nats a token, every step

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}-{self.start}.json").write_text(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def load(folder: Path, name: str, start: int) -> Run:
        """ValueError where there is none, or something else."""
        path = folder / f"{name}-{start}.json"
        if not path.is_file():
            raise ValueError(f"no {path}: run {name} first")
        try:
            values = json.loads(path.read_text())
            plan = values["plan"]
            values["plan"] = Plan(**{**plan, "setup": Setup(**plan["setup"])})
            run = Run(**{**values, "env": Environment(**values["env"]), "ceilings": Ceilings(**values["ceilings"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no run that this version wrote: {error}") from error
        if (run.name, run.start, len(run.losses)) != (name, start, run.plan.setup.steps):
            raise ValueError(
                f"{path} has start {run.start} of {run.name} and {len(run.losses)} steps: run {name} again"
            )
        return run

    @property
    def conditions(self) -> dict[str, Any]:
        """What must be the same in all."""
        return {"plan": self.plan, "data": self.data, "csrc_sha": self.sha, **asdict(self.env), "date": None}


# ---- a run ----
def _source() -> Iterator[str]:
    """All Python files beside torch's, shuffled."""
    files = sorted(SOURCE.rglob("*.py"))
    for i in torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist():
        yield files[i].read_text(encoding="utf-8", errors="replace")


@functools.cache
def sequences(setup: Setup) -> Tensor:
    """int32 [steps * rows, length + 1]: source of the packages that are installed, in tokens of a BPE of its own, cut up and
    shuffled. No part of it is read twice: how fast a model learns by heart what it has seen differs by 10% between two bf16
    runs (README.md). Raises ValueError where there is not enough."""
    width, needed = setup.length + 1, setup.steps * setup.rows
    source, sample, left = _source(), [], min(MAX_BYTES, 64 * needed * width)
    while left > 0 and (text := next(source, None)) is not None:
        sample.append(text)
        left -= len(text)
    tokenizer = train_tokenizer(sample, setup.config(False).vocab_size)
    source, parts, found = itertools.chain(sample, source), [], 0
    while found < needed * width and (texts := list(itertools.islice(source, 100))):
        parts += [torch.tensor(encoding.ids, dtype=torch.int32) for encoding in tokenizer.encode_batch(texts)]
        found += sum(map(len, parts[-len(texts) :]))
    if found < needed * width:
        raise ValueError(f"{SOURCE} makes {found // width} sequences, and the runs need {needed}")
    cut = torch.cat(parts)[: found // width * width].view(-1, width)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:needed]]


@torch.no_grad()
def perturb(buffers: ParamBuffers, size: float, seed: int) -> None:
    """Every weight times 1 + size * normal noise, in fp32: bf16 has no room for a millionth, the master weights do. The noise
    is the same on every rank."""
    generator = torch.Generator(buffers.dense.master.device).manual_seed(seed)
    for group in buffers.groups:
        noise = torch.empty_like(group.master).normal_(generator=generator)
        group.master *= noise.mul_(size).add_(1)
    buffers.sync_weights()


def train(name: str, start: int, plan: Plan, device: torch.device, say: Callable[[str], None]) -> tuple[Tensor, float]:
    """The loss of every step, fp64 [steps] on the CPU, and microseconds a step after the first two; `start` is the seed of the
    initial weights.

    Losses stay on the device: it is waited for only where progress is reported.
    """
    setup, (precision, perturbation) = plan.setup, RUNS[name]
    data, losses = sequences(setup).to(device), torch.zeros(setup.steps, dtype=torch.float64, device=device)
    training = Training(
        setup.config(False), device, setup.dtype(device), precision=precision, recipe=plan.recipe, seed=start
    )
    if perturbation:
        perturb(training.buffers, perturbation, start + 1)
    begin, warm = 0.0, 2  # the first steps are slow: kernels load, a graph is captured
    for step in range(setup.steps):
        if step == warm:
            losses[step - 1].item()
            begin = time.perf_counter()
        losses[step] = training.step(data[step * setup.rows : (step + 1) * setup.rows].long())
        done = step + 1
        if done % REPORT_EVERY == 0 or done == setup.steps:
            loss = float(losses[max(done - plan.window, 0) : done].mean())
            left = (time.perf_counter() - begin) / max(done - warm, 1) * (setup.steps - done)
            place = f"{name}, start {start + 1} of {plan.starts}"
            say(f"{place}: step {done} of {setup.steps}, loss {loss:.4f}, {clock(left)} left")
    return losses.cpu(), (time.perf_counter() - begin) / (setup.steps - warm) * 1e6


def measure(name: str, start: int, plan: Plan, env: Environment, say: Callable[[str], None]) -> Run:
    """A start of a run on this GPU; ValueError if an FP8 product ran on its reference."""
    sha = csrc_sha("model", copied=env.copied)
    release()  # the run before
    ceilings, _ = measure_ceilings(FULL)
    losses, step_us = train(name, start, plan, torch.device("cuda", torch.cuda.current_device()), say)
    for op in FP8_OPS:
        try:
            require_native(op)
        except RuntimeError as error:
            raise ValueError(f"{op} of {name}: {error}") from error
    data = hashlib.sha256(sequences(plan.setup).numpy().tobytes()).hexdigest()
    return Run(name, start, plan, data, sha, env, ceilings, step_us, losses.tolist())


# ---- the three together ----
def compare(losses: dict[str, Tensor], plan: Plan) -> dict[str, Any]:
    """How far the means are from those of bf16 after the warm-up, relative; the bound, and whether FP8 keeps it.

    Args:
        losses: fp64 [starts, steps] by the run's name. Compared is their mean over the starts.

    Returns:
        The means of signed differences say whether a run is on one side of bf16 throughout; windows_within, in how many of the
        `windows` FP8 keeps the bound that the control's difference in the same one makes; `*_of_starts`, the largest difference
        of each start from bf16's same start, in either direction, with its sign: how much of a single pair is chance.
    """
    first = -(-plan.warmup_steps // plan.window)
    means = {name: window_means(loss, plan.window)[:, first:] for name, loss in losses.items()}
    apart = {name: means[name].mean(0) / means["bf16"].mean(0) - 1 for name in ("fp8", "control")}
    worst = {name: float(difference.abs().max()) for name, difference in apart.items()}
    bound = bound_of(worst["control"])
    of_window = apart["control"].abs().mul(CONTROL_FACTOR).clamp(min=TOLERANCE)
    found = {
        "max_difference": worst["fp8"],
        "control_difference": worst["control"],
        "bound": bound,
        "mean_difference": float(apart["fp8"].mean()),
        "control_mean_difference": float(apart["control"].mean()),
    }
    return {
        "starts": len(losses["bf16"]),
        **{name: round(value, 6) for name, value in found.items()},
        "windows": len(of_window),
        "windows_within": int((apart["fp8"].abs() <= of_window).sum()),
        "fp8_of_starts": _worst_of_starts(means["fp8"], means["bf16"]),
        "control_of_starts": _worst_of_starts(means["control"], means["bf16"]),
        "last_loss": round(float(means["fp8"][:, -1].mean()), 4),
        "held": worst["fp8"] <= bound,
    }


def bound_of(control: float) -> float:
    """How far a run may be from another where nearly equal ones are `control` apart; NaN, which nothing keeps, where that is no
    number: a control that diverged."""
    return max(TOLERANCE, CONTROL_FACTOR * control) if math.isfinite(control) else math.nan


def _worst_of_starts(means: Tensor, bf16: Tensor) -> list[float]:
    """Of each row, the difference that is largest without its sign."""
    apart = means / bf16 - 1
    return [round(x, 6) for x in apart.gather(1, apart.abs().argmax(1, keepdim=True)).flatten().tolist()]


def join(folder: Path, out: Path | None, console: Console) -> bool:
    """Compares the three runs of a folder and writes the row, the means and the picture; whether FP8 keeps the bound.

    Raises ValueError where a run is missing or was made under other conditions than the others.
    """
    starts = range(PLAN.starts)
    runs = {name: [Run.load(folder, name, start) for start in starts] for name in RUNS}
    fp8 = runs["fp8"][0]
    if fp8.plan != PLAN:
        raise ValueError(f"{folder}: runs were made by another plan than this version's: run all again")
    for run in itertools.chain(*runs.values()):
        differing = [key for key, value in run.conditions.items() if value != fp8.conditions[key]]
        if differing:
            raise ValueError(f"{folder}: runs fp8-0 and {run.name}-{run.start} differ in {', '.join(differing)}")
    losses = {name: torch.tensor([run.losses for run in of], dtype=torch.float64) for name, of in runs.items()}
    facts = compare(losses, fp8.plan)
    row = parity_row(fp8, facts)
    print_table(console, "train_parity", [row])
    out = out or RESULTS / gpu_folder(fp8.env.gpu)
    write_apart(out / "model.jsonl", row)
    console.print(str(write_means(out / "train_parity.json", losses, row, fp8.data)), soft_wrap=True)
    return bool(facts["held"])


def parity_row(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """The row: times are those of the FP8 run's first start; the runs may have had a GPU each, so bf16's are no baselines."""
    setup, config = run.plan.setup, run.plan.setup.config(False)
    case = Case(
        op="train_parity",
        case={
            "model": setup.preset, "rows": setup.rows, "length": setup.length, "mtp": False, "precision": "fp8",
            "steps": setup.steps, "warmup_steps": run.plan.warmup_steps, "window": run.plan.window,
        },
        flops=step_flops(setup, config),
        bytes=step_bytes(config),
        fp8=True,
    )  # fmt: skip
    return make_row(case, Timing(run.step_us, {}, facts), ceilings=run.ceilings, env=run.env, sha=run.sha)


def write_means(path: Path, losses: dict[str, Tensor], row: dict[str, Any], data: str) -> Path:
    """What the picture is drawn from, [starts][windows] of each run, with the name of the data, and the picture."""
    case = row["case"]
    means = {
        name: [[round(x, 5) for x in start] for start in window_means(loss, case["window"]).tolist()]
        for name, loss in losses.items()
    }
    title = f"{case['model']}, {case['rows']} x {case['length']} tokens a step, {case['starts']} starts"
    record = {"title": title, **{key: case[key] for key in ("window", "warmup_steps", "bound")}}
    record |= {key: row[key] for key in ("gpu", "commit", "csrc_sha", "date")} | {"data": data}
    path.write_text(json.dumps({**record, "means": means}) + "\n")
    return plot_parity(path)


# ---- the command line ----
def dry_run(names: list[str], console: Console) -> None:
    """Runs at a tiny size, where this runs; compared where all three are asked for. Writes nothing."""
    device = torch.device("cuda" if bench.has_hopper() else "cpu")
    starts = range(TINY.starts)
    losses = {
        name: torch.stack([train(name, start, TINY, device, console.print)[0] for start in starts]) for name in names
    }
    if len(losses) == len(RUNS):
        console.print(f"on {device.type}: {compare(losses, TINY)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; no words mean all of them."""
    words = [*RUNS, "join"]
    parser = argparse.ArgumentParser(
        prog="python -m bench.parity", description="Trains in FP8 and in bf16, and compares."
    )
    parser.add_argument("what", nargs="*", help=f"{', '.join(words)}; default: all of them, one after the other")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "parity", help="folder of the runs' losses")
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results/<gpu>")
    parser.add_argument("--commit", help="commit to record where the tree is no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="any device: tiny runs, writes nothing")
    args = parser.parse_args(argv)
    unknown = [word for word in args.what if word not in words]
    if unknown:
        parser.error(f"expected {', '.join(words)}, got {', '.join(unknown)}")
    args.what = [word for word in words if word in args.what or not args.what]
    return args


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if FP8 does not keep the bound, 2 without a Hopper GPU or with runs that do not go together."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if args.dry_run:
        dry_run([name for name in args.what if name in RUNS], console)
        return 0
    try:
        env = bench.measuring(args.commit) if args.what != ["join"] else None
        names = [name for name in args.what if name in RUNS]
        for start, name in itertools.product(range(PLAN.starts), names):
            measure(name, start, PLAN, env, functools.partial(console.print, soft_wrap=True)).save(args.runs)
        held = "join" not in args.what or join(args.runs, args.out, console)
    except ValueError as error:
        print(f"bench.parity: {error}", file=sys.stderr)
        return 2
    if not held:
        console.print(
            "FAILED train_parity: FP8 is further from bf16 than the bound, or the control diverged", style="red"
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
