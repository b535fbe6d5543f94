"""`dsv3 demo`: real text, a tokenizer, a trained model, its checkpoint, and what it generates, in one command."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv3 import plots
from dsv3.config import Config
from dsv3.files import leftover_of, write_whole
from dsv3.inference import Engine, SamplingParams
from dsv3.model import DeepSeekV3
from dsv3.ops import registry
from dsv3.terminal import ShowProgress, clock, command, printable
from dsv3.tokenizer import load_tokenizer
from dsv3.train import Callback, EvalReport, StepReport, TrainConfig, export, run
from dsv3.train.baselines import Baselines, measure_baselines
from dsv3.train.corpus import Corpus, open_corpus
from dsv3.train.data import read_index, tokenize_corpus
from dsv3.train.tokenizer import train_on_corpus

PRESETS = ("tiny", "mini")
OUTPUTS = frozenset({"train", "model", "loss.png", "experts.png", "demo.json"})
LOAD_MEMORY = 0.98  # of the expert load, from step to step: the picture shows about the last 50 steps
MIN_SECONDS = 0.1  # of training: enough for a step
SPEED_PROMPTS, SPEED_TOKENS, SAMPLE_TOKENS = 4, 128, 200


@dataclass(frozen=True)
class Prepared:
    """Text that is ready to train on: the token folder (tokenizer inside) and what the model is compared with."""

    folder: Path
    baselines: Baselines
    prompts: tuple[str, ...]  # beginnings of validation documents


def demo(
    *,
    data: Path | None = None,
    preset: str | None = None,
    seconds: float = 240.0,
    out: Path = Path("runs/demo"),
    console: Console | None = None,
) -> int:
    """Run the whole demo and return its exit code (0, or that of an interrupted or diverged training run).

    data: a .txt, .jsonl or .parquet file or a folder; None: the standard library's source. preset: "tiny" or "mini"; None:
    mini on a Hopper GPU, tiny elsewhere. An earlier demo in `out` is replaced. Raises ValueError for text that cannot be
    used and for an `out` that holds something else.
    """
    console = console or Console(highlight=False)
    preset = _choose(preset, seconds)
    _check_out(out)
    started = time.monotonic()
    corpus = open_corpus(data)
    console.print(_banner(preset, seconds, corpus, data, out), soft_wrap=True)
    ready = prepare(corpus, Config.preset(preset).vocab_size, out.parent / "cache", console)
    _clear(out)
    config = train_config(preset, seconds, ready.folder, out / "train")
    record = Recorder()
    code = run(config, callbacks=[record, ShowProgress(console)])
    if code:
        return code
    _print_result(console, record, ready.baselines)
    export(config.out, out / "model", tokenizer_dir=str(ready.folder))
    model = DeepSeekV3.from_pretrained(out / "model", device=_device())
    console.print(f"saved as a Hugging Face checkpoint and loaded back: {out / 'model'}", soft_wrap=True)
    _sample(console, model, ready)
    speeds = _speeds(console, model, ready)
    drawn = _draw(console, out, record, ready.baselines, preset)
    _write_summary(out / "demo.json", preset, record, ready.baselines, speeds)
    console.print(f"{', '.join(drawn)}; all of it took {clock(time.monotonic() - started)}", soft_wrap=True)
    console.print(f'next: {command()} generate {out / "model"} "def main(" --temperature 0.8', soft_wrap=True)
    return 0


# ---- before training ----
def train_config(preset: str, seconds: float, tokens: Path, out: Path) -> TrainConfig:
    """The demo's training run; bench/results/cpu/README.md has what was tried for it."""
    common = {
        "preset": preset,
        "data": str(tokens),
        "out": str(out),
        "max_seconds": seconds,
        "fim_rate": 0.0,
        "lr_schedule": "wsd",
        "decay_fraction": 1.0,
        "lr_final": 0.0,
        "save_every": 10**9,
        "tensorboard": False,
    }
    if preset == "mini":
        epochs = {"max_tokens": 2 * read_index(tokens).splits["train"].num_tokens}
        # Two epochs of the standard library are some 6 million tokens: small batches make more than a thousand steps of them.
        sizes = {"seq_len": 512, "batch": 8, "micro_batch": 8, "eval_every": 200}
        # At this width 0.006 starts slowly, and a thousand steps need a faster bias than 14 trillion tokens do.
        start = {"model": {"initializer_range": 0.02}, "gamma": 0.01, "balance_alpha": 1e-3}
        return TrainConfig(**common, **epochs, **sizes, **start, precision="bf16", lr=1e-3, warmup_steps=150)
    # MTP joins for the last 40%: its work is better spent on the main model until then, and it drafts as well.
    sizes = {"seq_len": 128, "batch": 8, "micro_batch": 8}
    recipe = {
        "lr": 1e-2,
        "warmup_steps": 200,
        "beta2": 0.98,
        "weight_decay": 0.02,
        "gamma": 0.01,
        "balance_alpha": 1e-3,
    }
    mtp = {"mtp_weight": 0.0, "mtp_weight_final": 0.3, "mtp_switch": 0.6}
    return TrainConfig(**common, **sizes, **recipe, **mtp, model={"initializer_range": 0.04}, precision="fp32")


def prepare(corpus: Corpus, vocab_size: int, cache: Path, console: Console) -> Prepared:
    """Tokenizer, token files and baselines of a corpus, made once and then found again in `cache`."""
    folder = cache / f"{corpus.fingerprint()[:16]}-{vocab_size}"
    if not (folder / "baselines.json").is_file():
        start = time.monotonic()
        tokenize_corpus(corpus, train_on_corpus(corpus, vocab_size), folder)
        texts, valid = ((document.text for document in corpus.documents(split)) for split in ("train", "valid"))
        baselines = dataclasses.asdict(measure_baselines(texts, valid))
        write_whole(folder / "baselines.json", json.dumps(baselines, indent=2) + "\n")
        console.print(f"tokenizer, tokens and baselines made in {clock(time.monotonic() - start)}", soft_wrap=True)
    index = read_index(folder)
    train, valid = index.splits["train"], index.splits["valid"]
    console.print(
        f"BPE of {index.vocab_size} tokens: {train.num_tokens / 1e6:.2f} million to train on, "
        f"{train.num_bytes / train.num_tokens:.2f} bytes each; validation {valid.num_documents} documents, "
        f"{valid.num_bytes:,} bytes  ({folder})",
        soft_wrap=True,
    )
    baselines = Baselines(**json.loads((folder / "baselines.json").read_text()))
    prompts = tuple(_beginning(d.text) for d in islice(corpus.documents("valid"), SPEED_PROMPTS))
    return Prepared(folder, baselines, prompts)


def _choose(preset: str | None, seconds: float) -> str:
    if preset is None:
        hopper = torch.cuda.is_available() and registry.is_hopper(torch.device("cuda", 0))
        preset = "mini" if hopper else "tiny"
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, found {preset!r}")
    if not MIN_SECONDS <= seconds < math.inf:
        raise ValueError(f"seconds must be at least {MIN_SECONDS}, found {seconds}")
    return preset


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder at {out}, found a file")
    foreign = sorted(p.name for p in out.iterdir() if not _is_output(p)) if out.is_dir() else []
    if foreign:
        raise ValueError(f"expected an earlier demo or nothing in {out}, found {', '.join(foreign[:3])}")


def _is_output(path: Path) -> bool:
    return (leftover_of(path.name) or path.name) in OUTPUTS


def _clear(out: Path) -> None:
    for path in filter(_is_output, out.iterdir() if out.is_dir() else ()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _banner(preset: str, seconds: float, corpus: Corpus, data: Path | None, out: Path) -> str:
    source = "the Python standard library" if data is None else str(data)
    skipped = f", {len(corpus.skipped)} empty or non-UTF-8 files skipped" if corpus.skipped else ""
    device, precision = _device(), "bf16" if preset == "mini" else "fp32"
    config = Config.preset(preset)
    return (
        f"dsv3 demo: trains a DeepSeek-V3 of {_parameters(config) / 1e6:.1f} million parameters (preset {preset}, "
        f"{precision}, {device}) for at most {clock(seconds)} on {source} ({corpus.num_documents} documents, "
        f"{corpus.num_bytes / 1e6:.1f} MB{skipped}), then generates with it; everything goes under {out}, "
        f"but for tokens, in {out.parent / 'cache'}, where the next demo finds them"
    )


def _parameters(config: Config) -> int:
    return sum(p.numel() for p in DeepSeekV3(config, device="meta").parameters())


def _beginning(text: str, size: int = 400) -> str:
    """The text's first lines, `size` characters and the rest of their last line, unless that is long."""
    end = text.find("\n", size) + 1
    return text[: end if end <= 2 * size and end else size]


# ---- while training ----
class Recorder(Callback):
    """Keeps what the table and the pictures need."""

    def __init__(self) -> None:
        self.train: list[tuple[float, float]] = []  # (tokens, bits per byte)
        self.valid: list[tuple[float, float]] = []
        self.validation: EvalReport | None = None
        self.last: StepReport | None = None
        self.load: Tensor | None = None  # [layers, experts]

    def on_step(self, report: StepReport) -> None:
        self.last = report
        self.train.append((report.tokens, report.bits_per_byte))
        load = report.expert_load.double()
        self.load = load if self.load is None else LOAD_MEMORY * self.load + load

    def on_eval(self, report: EvalReport) -> None:
        assert self.last is not None
        self.valid.append((self.last.tokens, report.bits_per_byte))
        if report.full:
            self.validation = report


# ---- after training ----
def _print_result(console: Console, record: Recorder, baselines: Baselines) -> None:
    assert record.validation is not None
    assert record.last is not None
    bits = record.validation.bits_per_byte
    table = Table(title="bits per byte of the validation text (lower is better)", title_justify="left", box=None)
    table.add_column("")
    table.add_column("bits/byte", justify="right")
    table.add_column("")
    table.add_row(
        "this model", f"{bits:.3f}", f"{record.last.tokens / 1e6:.2f} million tokens, {record.last.step} steps"
    )
    for name, value in baselines.named().items():
        table.add_row(name, f"{value:.3f}", "beaten" if bits < value else "not beaten")
    console.print(table)


def _sample(console: Console, model: DeepSeekV3, ready: Prepared) -> None:
    console.print(
        "\na validation document's beginning, and from the bar on what the model makes of it:", soft_wrap=True
    )
    tail = "\n".join(ready.prompts[0].splitlines()[-8:]) + "\n"
    console.print(printable(tail), end="|", style="dim", markup=False, soft_wrap=True)
    engine = Engine(model, tokenizer=load_tokenizer(ready.folder), max_batch=1)
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.95, seed=1, ignore_eos=True)

    def show(index: int, tokens: list[int], piece: str) -> None:
        console.print(printable(piece), end="", markup=False, soft_wrap=True)

    engine.generate([ready.prompts[0]], params, on_token=show)
    console.print("\n")


def _speeds(console: Console, model: DeepSeekV3, ready: Prepared) -> dict[str, float]:
    """Greedy tokens a second, one prompt at a time, without and with MTP drafts."""
    params = SamplingParams(max_tokens=SPEED_TOKENS, temperature=0.0, ignore_eos=True)
    found = {}
    for name, speculative in (("plain", False), ("speculative", True)):
        engine = Engine(model, tokenizer=load_tokenizer(ready.folder), max_batch=1, speculative=speculative)
        engine.generate(ready.prompts[:1], dataclasses.replace(params, max_tokens=8))  # warm-up
        before = dataclasses.replace(engine.stats)
        engine.generate(ready.prompts, params)
        seconds = engine.stats.decode_seconds - before.decode_seconds
        found[name] = (engine.stats.generated_tokens - before.generated_tokens) / seconds
        if speculative:
            found["acceptance"] = engine.stats.acceptance_rate
    console.print(
        f"generation, greedy, one sequence: {found['plain']:.0f} tokens/s, with MTP drafts {found['speculative']:.0f} "
        f"({found['speculative'] / found['plain']:.2f}x), {found['acceptance']:.0%} of the drafts accepted",
        soft_wrap=True,
    )
    return found


def _draw(console: Console, out: Path, record: Recorder, baselines: Baselines, preset: str) -> list[str]:
    """Writes the pictures; returns what to say about them."""
    config = Config.preset(preset)
    rows = [f"layer {n}" for n in range(config.num_hidden_layers) if config.is_moe(n)]
    rows += [f"MTP {k + 1}" for k in range(config.num_nextn_predict_layers)]
    assert record.load is not None
    try:
        title = f"DeepSeek-V3 ({preset}) against compressors and an order-2 byte model"
        plots.loss_curve(out / "loss.png", record.train, record.valid, baselines.named(), title=title)
        title = "tokens an expert gets, at the end of training"
        plots.expert_load(out / "experts.png", record.load.numpy(), rows, title=title)
    except ImportError:
        return ["no pictures: matplotlib is not installed"]
    return [f"loss curve {out / 'loss.png'}", f"expert load {out / 'experts.png'}"]


def _write_summary(
    path: Path, preset: str, record: Recorder, baselines: Baselines, speeds: Mapping[str, float]
) -> None:
    assert record.last is not None
    assert record.validation is not None
    last = record.last
    values = {
        "preset": preset,
        "bits_per_byte": record.validation.bits_per_byte,
        "baselines": baselines.named(),
        "steps": last.step,
        "tokens": last.tokens,
        "training_seconds": last.seconds,
        "training_tokens_per_s": last.tokens / last.seconds,
        "tokens_per_s": dict(speeds),
    }
    write_whole(path, json.dumps(values, indent=2) + "\n")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
