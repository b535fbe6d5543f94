"""A micro model, a small token folder and short runs, shared by the training tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsv3.train.config import TrainConfig
from dsv3.train.corpus import Corpus, open_corpus
from dsv3.train.data import tokenize_corpus
from dsv3.train.metrics import Callback, EvalReport, StepReport
from dsv3.train.tokenizer import train_tokenizer

WORDS = [f"word{i % 37}" for i in range(300)]
MODEL = {
    "vocab_size": 280,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 128,
}


def write_folder(folder: Path, count: int = 120) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        sub = folder / f"sub{i % 3}"
        sub.mkdir(exist_ok=True)
        (sub / f"file{i}.py").write_text(f"# file {i}\n" + " ".join(WORDS[i : i + 60]) + "\n<|eos|> é\n")
    return folder


def texts(corpus: Corpus, split: str) -> dict[str, str]:
    return {d.name: d.text for d in corpus.documents(split)}


def make_tokens(folder: Path) -> Path:
    """A token folder of about 20,000 tokens of arithmetic, which a micro model learns a little of in 50 steps."""
    text = folder / "text"
    text.mkdir(parents=True)
    for n in range(40):
        lines = [f"{a} times {n} is {a * n}, plus one is {a * n + 1}\n" for a in range(60)]
        (text / f"{n}.txt").write_text("".join(lines))
    corpus = open_corpus(text)
    tokenizer = train_tokenizer((d.text for d in corpus.documents("train")), MODEL["vocab_size"])
    tokenize_corpus(corpus, tokenizer, folder / "tokens")
    return folder / "tokens"


def micro(tokens: Path, out: Path, **changes: Any) -> TrainConfig:
    """A run of 12 short steps in fp32 on the CPU, unless changed."""
    base = TrainConfig(
        model=MODEL,
        data=str(tokens),
        out=str(out),
        device="cpu",
        precision="fp32",
        seq_len=32,
        batch=8,
        micro_batch=4,
        max_steps=12,
        lr=1e-2,
        lr_schedule="cosine",
        warmup_steps=4,
        save_every=1000,
        tensorboard=False,
    )
    return dataclasses.replace(base, **changes)


class Recorder(Callback):
    """Keeps what a run reports, and can act at a step."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.evals: list[EvalReport] = []
        self.saved: list[str] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_eval(self, report: EvalReport) -> None:
        self.evals.append(report)

    def on_save(self, checkpoint: Path) -> None:
        self.saved.append(checkpoint.name)

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.steps]

    @property
    def curve(self) -> list[tuple[float | list[int], ...]]:
        return [(r.loss, r.ce, r.mtp, r.grad_norm, r.expert_load.tolist()) for r in self.steps]


def same_losses(tokens: Path, out: Path, **changes: Any) -> TrainConfig:
    """50 steps whose losses can be compared to 1e-5 between orders of summation.

    A rounding error that flips a choice of experts jumps by orders of magnitude, so the choices must be clear: large
    initial weights, which spread the affinities, and small steps.
    """
    model = {**MODEL, "initializer_range": 0.1}
    return micro(tokens, out, **{"max_steps": 50, "lr": 1e-3, "model": model, **changes})


def with_and_without_graphs(tokens: Path, out: Path, **changes: Any) -> list[TrainConfig]:
    """A run on a GPU whose steps are not to be captured, and the same one where that is left open.

    A small model with the head dims of a large one: for others there is no kernel, and nothing is captured.
    """
    model = {
        "vocab_size": MODEL["vocab_size"], "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "q_lora_rank": 128, "moe_intermediate_size": 128, "n_routed_experts": 16, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": 4,
    }  # fmt: skip
    settings = {
        "device": "cuda", "deterministic": True, "preset": "mini", "model": model, "lr": 1e-3, "max_steps": 16,
        "micro_batch": 2, "batch_start": 2, "batch_ramp_tokens": 500, "mtp_weight": 0.0, "mtp_weight_final": 0.3,
        "mtp_switch": 0.5, **changes,
    }  # fmt: skip
    return [micro(tokens, out / str(graphs), cuda_graphs=graphs, **settings) for graphs in (False, None)]
