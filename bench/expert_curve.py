"""`torchrun --nproc-per-node 4 -m bench.expert_curve`: does a model with split experts learn what a whole one does?

`tiny` in bf16 on CPUs, 200 steps of four data-parallel processes: with all experts on every rank, with a quarter of them on
each (rows and partial sums between ranks are then bf16), and as the control twice more whole, from weights that differ by a
millionth. See README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.cases.model import window_means
from bench.parity import CONTROL_FACTOR, TOLERANCE
from bench.results import RESULTS, ROOT, csrc_sha, head_commit
from dsv3.parallel.data import DataParallel
from dsv3.train import launch
from dsv3.train.config import TrainConfig
from dsv3.train.corpus import open_corpus
from dsv3.train.data import tokenize_corpus
from dsv3.train.metrics import Callback, StepReport
from dsv3.train.tokenizer import train_on_corpus

RUNS = {"ep1": (1, 0), "ep4": (4, 0), "control1": (1, 1), "control2": (1, 2)}  # ep, seed of the perturbation or 0
PERTURBATION, WINDOW, WARMUP = 1e-6, 20, 20  # WARMUP in steps, a multiple of WINDOW


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.losses.append(report.loss)


def recipe(tokens: Path, out: Path, ep: int, steps: int) -> TrainConfig:
    """The demo's initialisation on 8 x 32 tokens a step; its learning rate of 1e-2 is too high for so few: the loss jumps."""
    return TrainConfig(
        preset="tiny",
        model={"initializer_range": 0.04},
        data=str(tokens),
        out=str(out),
        device="cpu",
        precision="bf16",
        ep=ep,
        seq_len=32,
        batch=8,
        micro_batch=2,
        max_steps=steps,
        lr=2e-3,
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


@torch.no_grad()
def perturb(trainer: launch.Trainer, seed: int) -> None:
    """Master weights times 1 + 1e-6 x normal noise, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for group in trainer.buffers.groups:
        group.master *= 1 + PERTURBATION * torch.randn(group.master.shape, generator=generator)
    trainer.buffers.sync_weights()


def train(config: TrainConfig, parallel: DataParallel, seed: int) -> list[float]:
    """The loss of every step, on the first rank; empty on the others."""
    losses = Losses()
    launch._seed(config, parallel)
    trainer = launch._trainer(config, parallel, [losses])
    if seed:
        perturb(trainer, seed)
    while trainer.progress < 1:
        trainer._issue_step(stop_requested=False)
    trainer._drain()
    return losses.losses


def compare(losses: dict[str, list[float]]) -> dict[str, Any]:
    """How far the means over WINDOW steps are from those of EP=1 after the warm-up, relative; the bound, and whether EP=4
    keeps it."""
    means = {name: window_means(torch.tensor(loss, dtype=torch.float64), WINDOW) for name, loss in losses.items()}
    apart = {name: (mean / means["ep1"] - 1)[WARMUP // WINDOW :] for name, mean in means.items()}
    worst = {name: float(difference.abs().max()) for name, difference in apart.items()}
    control = max(worst["control1"], worst["control2"])
    bound = max(TOLERANCE, CONTROL_FACTOR * control)
    return {
        "max_difference": round(worst["ep4"], 6),
        "control_difference": round(control, 6),
        "bound": round(bound, 6),
        "mean_difference": round(float(apart["ep4"].mean()), 6),
        "held": worst["ep4"] <= bound,
        "means": {name: [round(x, 5) for x in mean.tolist()] for name, mean in means.items()},
    }


def record(losses: dict[str, list[float]], seconds: float) -> dict[str, Any]:
    """What is written: the comparison, and what identifies the run."""
    return {
        "title": "tiny, bf16, 4 gloo processes, 8 x 32 tokens a step, EP=4 against EP=1",
        "steps": len(losses["ep1"]),
        "window": WINDOW,
        "warmup_steps": WARMUP,
        **compare(losses),
        "seconds": round(seconds),
        "torch": torch.__version__,
        "commit": head_commit(),
        "csrc_sha": csrc_sha("model"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 if EP=4 does not keep the bound, 2 without four processes."""
    parser = argparse.ArgumentParser(prog="python -m bench.expert_curve", description="Trains with EP=4 and EP=1.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "expert_curve", help="folder of the tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="folder of the result")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    parallel = DataParallel.start("cpu")
    try:
        if parallel.world != 4:
            print("bench.expert_curve: start it with torchrun --nproc-per-node 4", file=sys.stderr)
            return 2
        tokens = prepare(args.runs, parallel)
        start, losses = time.monotonic(), {}
        for name, (ep, seed) in RUNS.items():
            losses[name] = train(recipe(tokens, args.runs, ep, args.steps), parallel, seed)
            if parallel.is_first:
                print(f"{name}: loss {losses[name][-1]:.4f} after {time.monotonic() - start:.0f} s", flush=True)
        held = [True]
        if parallel.is_first:
            result = record(losses, time.monotonic() - start)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "expert_curve.json").write_text(json.dumps(result) + "\n")
            held[0] = result["held"]
        dist.broadcast_object_list(held, src=0)
        return 0 if held[0] else 1
    finally:
        parallel.stop()


if __name__ == "__main__":
    sys.exit(main())
