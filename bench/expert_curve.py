"""`python -m bench.expert_curve`: does a model with split experts learn what a whole one does?

Data-parallel processes train in bf16, 200 steps: with all experts on every rank, with a part of them on each (rows and partial
sums between ranks are then bf16), and as the control four times more whole, from weights that differ by a millionth. On CPUs
four gloo processes with `tiny`; on a Hopper GPU four that share it, with `tiny`; on several one a GPU, with `mini`.

Runs from nearly the same start drift apart, so the bound takes the largest of the ten distances between five whole runs: of
twelve whole runs of `mini` on two GPUs, drawn at random with replacement, one in 40 would then be called another model. With
the two distances of two controls, as it was, one in 8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bench.cases.model import window_means
from bench.parity import bound_of, perturb
from bench.results import RESULTS, ROOT, csrc_sha, gpu_folder, head_commit
from bench.shared_gpu import shared_gpu, torchrun
from dsv3.parallel.data import DataParallel
from dsv3.train import launch
from dsv3.train.config import TrainConfig
from dsv3.train.corpus import open_corpus
from dsv3.train.data import tokenize_corpus
from dsv3.train.metrics import Callback, StepReport
from dsv3.train.tokenizer import train_on_corpus

CONTROLS = {f"control{seed}": seed for seed in (1, 2, 3, 4)}
RUNS = {"whole": 0, "split": 0, **CONTROLS}  # seed of the start's perturbation, 0 for none
PERTURBATION, WINDOW, WARMUP = 1e-6, 20, 20  # WARMUP in steps, a multiple of WINDOW
STEPS = 200


class Setup(NamedTuple):
    """Where a comparison runs."""

    device: str  # cpu or cuda
    ranks: int
    transport: str  # between the ranks that share experts
    preset: str

    @staticmethod
    def of_this_machine(transport: str | None) -> Setup:
        """One rank a GPU where there are several, otherwise four. Raises ValueError where the transport cannot be had."""
        gpus = torch.cuda.device_count()
        usual = "ipc" if gpus else "collective"
        setup = Setup("cuda" if gpus else "cpu", gpus if gpus > 1 else 4, transport or usual, "tiny")
        if gpus == 0 and setup.transport != "collective":
            raise ValueError(f"transport {setup.transport} needs a GPU")
        if gpus > 1 and setup.transport == "nvshmem":
            raise ValueError("transport nvshmem is for ranks that share a GPU, as two nodes, or for several machines")
        return setup._replace(preset="mini") if gpus > 1 else setup

    @property
    def nodes(self) -> int:
        return 2 if self.transport == "nvshmem" else 1

    @property
    def folder(self) -> Path:
        """Of the result."""
        if self.device == "cpu":
            return RESULTS / "cpu"
        return RESULTS / gpu_folder(torch.cuda.get_device_name(), torch.cuda.device_count())

    @property
    def file(self) -> str:
        return f"expert_curve_{self.transport}.json"


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)


def recipe(setup: Setup, tokens: Path, out: Path, steps: int, *, split: bool) -> TrainConfig:
    """`tiny`: the demo's initialisation on 8 x 32 tokens a step; its learning rate of 1e-2 is too high for so few: the loss
    jumps. `mini`: 8 sequences of 512 a rank, with the demo's learning rate."""
    tiny = setup.preset == "tiny"
    batch = 8 if tiny else 8 * setup.ranks
    return TrainConfig(
        preset=setup.preset,
        model={"initializer_range": 0.04} if tiny else {},
        data=str(tokens),
        out=str(out),
        device=setup.device,
        precision="bf16",
        ep=setup.ranks if split else 1,
        ep_transport=setup.transport,
        seq_len=32 if tiny else 512,
        batch=batch,
        micro_batch=batch // setup.ranks,
        max_steps=steps,
        lr=2e-3 if tiny else 1e-3,
        lr_schedule="cosine",
        warmup_steps=WARMUP,
        mtp_weight_final=0.3,  # a constant weight: no step in the curve
        fim_rate=0.0,
    )


def prepare(folder: Path, parallel: DataParallel) -> Path:
    """The demo's text, tokenized once, by the first rank; the others wait."""
    tokens = folder / "tokens"
    if parallel.is_first and not tokens.exists():
        corpus = open_corpus()
        tokenize_corpus(corpus, train_on_corpus(corpus, 4096), tokens)
    parallel.gather(None)
    return tokens


def train(config: TrainConfig, parallel: DataParallel, seed: int) -> list[float]:
    """The loss of every step, on the first rank; empty on the others."""
    losses = Losses()
    launch._seed(config, parallel)
    trainer = launch._trainer(config, parallel, [losses])
    used = getattr(getattr(trainer.parallel, "buffer", None), "transport", config.ep_transport)
    if used != config.ep_transport:
        raise RuntimeError(f"the ranks reach each other over {used} alone, not over {config.ep_transport}")
    if seed:
        perturb(trainer.buffers, PERTURBATION, seed)
    while trainer.progress < 1:
        trainer._issue_step(stop_requested=False)
    trainer._drain()
    trainer.parallel.close()
    return losses.losses


def compare(losses: dict[str, list[float]]) -> dict[str, Any]:
    """How far the means over WINDOW steps of the split model are from the whole one's after the warm-up, relative; how far
    whole ones are from each other; the bound, and whether the split one keeps it."""
    means = {name: window_means(torch.tensor(loss, dtype=torch.float64), WINDOW) for name, loss in losses.items()}

    def apart(one: str, other: str) -> torch.Tensor:
        return (means[one] / means[other] - 1)[WARMUP // WINDOW :]

    worst = float(apart("split", "whole").abs().max())
    between = [apart(*pair).abs().max() for pair in itertools.combinations([*CONTROLS, "whole"], 2)]
    control = float(torch.stack(between).max())  # torch's max of a NaN is one
    bound = bound_of(control)
    return {
        "max_difference": round(worst, 6),
        "control_difference": round(control, 6),
        "bound": round(bound, 6),
        "mean_difference": round(float(apart("split", "whole").mean()), 6),
        "held": worst <= bound,
        "means": {name: [round(x, 5) for x in mean.tolist()] for name, mean in means.items()},
    }


def record(
    setup: Setup, config: TrainConfig, losses: dict[str, list[float]], seconds: float, commit: str | None
) -> dict[str, Any]:
    """What is written: the comparison, and what identifies the run; commit: of a tree that came without its history."""
    cuda = setup.device == "cuda"
    return {
        "title": f"{setup.preset}, bf16, {config.batch} x {config.seq_len} tokens a step, {setup.ranks} ranks",
        "transport": setup.transport,
        "nodes": setup.nodes,
        "steps": len(losses["whole"]),
        "window": WINDOW,
        "warmup_steps": WARMUP,
        **compare(losses),
        "seconds": round(seconds),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "commit": commit or head_commit(),
        "csrc_sha": csrc_sha("model", copied=commit is not None),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def work(setup: Setup, args: argparse.Namespace) -> None:
    """What every rank does; the first one writes the result."""
    torch.set_num_threads(1)
    parallel = DataParallel.start(setup.device)
    try:
        tokens = prepare(args.runs, parallel)
        start, losses = time.monotonic(), {}
        for name, seed in RUNS.items():
            config = recipe(setup, tokens, args.runs, args.steps, split=name == "split")
            losses[name] = train(config, parallel, seed)
            if parallel.is_first:
                print(f"{name}: loss {losses[name][-1]:.4f} after {time.monotonic() - start:.0f} s", flush=True)
        if parallel.is_first:
            result = record(setup, config, losses, time.monotonic() - start, args.commit)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / setup.file).write_text(json.dumps(result) + "\n")
    finally:
        parallel.stop()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; folders as absolute paths, since ranks start elsewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.expert_curve",
        description="Trains a model with all experts on every rank and with a part of them on each, and compares the losses: "
        "on CPUs and on one GPU tiny with four ranks, on several GPUs mini with one each. Exit code 1: they differ by more "
        "than nearly equal starts do; 2: it cannot be tried here.",
    )
    parser.add_argument(
        "--transport", choices=("collective", "ipc", "nvshmem"), help="default: ipc on GPUs, otherwise collective"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"a multiple of {WINDOW}, default {STEPS}")
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "expert_curve",
        help="folder of the tokens, default runs/expert_curve",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the result, default bench/results/<gpu>; to be named unless for {STEPS} steps",
    )
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    args = parser.parse_args(argv)
    if args.steps < WARMUP + WINDOW or args.steps % WINDOW:
        parser.error(f"--steps must be a multiple of {WINDOW}, at least {WARMUP + WINDOW}, got {args.steps}")
    if args.out is None and args.steps != STEPS:
        parser.error(f"name a folder with --out: bench/results is for {STEPS} steps, got {args.steps}")
    args.runs, args.out = args.runs.resolve(), None if args.out is None else args.out.resolve()
    return args


def refusal(args: argparse.Namespace) -> str | None:
    """Why it cannot be tried, before anything is trained."""
    if not (args.commit or head_commit()):
        return "no git checkout with a commit: name the sources with --commit"
    try:
        for folder in (args.out, args.runs):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror}"
    return None


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if the split model does not keep the bound, 2 where it cannot be tried here, 130 where it was stopped."""
    args = parse(argv)
    try:
        setup = Setup.of_this_machine(args.transport)
    except ValueError as error:
        print(f"bench.expert_curve: {error}", file=sys.stderr)
        return 2
    args.out = args.out or setup.folder
    if dist.is_torchelastic_launched():
        work(setup, args)
        return 0
    why = refusal(args)
    if why is not None:
        print(f"bench.expert_curve: {why}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the ranks end too
    options = ["--runs", args.runs, "--out", args.out, "--steps", args.steps, "--transport", setup.transport]
    options += ["--commit", args.commit] if args.commit else []
    command = ["-m", "bench.expert_curve", *map(str, options)]
    shares = setup.device == "cuda" and torch.cuda.device_count() < setup.ranks
    try:
        with shared_gpu() if shares else nullcontext() as env:
            torchrun(setup.ranks // setup.nodes, *command, nodes=setup.nodes, env=env, shown=True, timeout=1800)
    except RuntimeError as error:  # with what the ranks said
        print(f"bench.expert_curve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.expert_curve: stopped, nothing is written", file=sys.stderr)
        return 130
    finally:
        with suppress(OSError):
            args.out.rmdir()  # if it is empty
    return 0 if json.loads((args.out / setup.file).read_text())["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
