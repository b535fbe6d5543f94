"""What the demo decides by itself: the preset, the vocabulary, the time, the place; and what it promises on a terminal."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dsv3 import cli, demo
from dsv3.config import Config
from dsv3.model import DeepSeekV3
from dsv3.ops import registry
from dsv3.terminal import ShowProgress
from dsv3.train import tokenizer
from dsv3.train.corpus import open_corpus
from dsv3.train.metrics import EvalReport, StepReport


def on_machine(monkeypatch: pytest.MonkeyPatch, gpu: bool, hopper: bool) -> str:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(registry, "is_hopper", lambda device: hopper)
    return demo._choose(None, 240.0)


def test_mini_on_a_hopper_gpu_and_tiny_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_machine(monkeypatch, gpu=False, hopper=False) == "tiny"
    assert on_machine(monkeypatch, gpu=True, hopper=False) == "tiny"
    assert on_machine(monkeypatch, gpu=True, hopper=True) == "mini"


def test_vocabularies_and_sizes() -> None:
    tiny, mini = Config.preset("tiny"), Config.preset("mini")
    assert (tiny.vocab_size, mini.vocab_size) == (4096, 32000)
    parameters = sum(p.numel() for p in DeepSeekV3(tiny, device="meta").parameters())
    assert 2e6 <= parameters <= 4e6


def test_four_minutes_under_runs() -> None:
    for function in (cli.demo, demo.demo):
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        assert defaults["seconds"] == 240.0
        assert defaults["out"] == Path("runs/demo")
        assert defaults["data"] is defaults["preset"] is None


def test_what_a_killed_demo_left_is_cleared(tmp_path: Path) -> None:
    """Hidden files and folders of the demo's own names, and no others."""
    for name in ("model", ".model.saving", ".model.replaced", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("demo.json", ".demo.json.4242"):
        (tmp_path / name).touch()
    demo._check_out(tmp_path)
    demo._clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    demo._clear(tmp_path / "none")
    for name in (".notes.4242", ".model.old"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"expected an earlier demo or nothing in .*, found {name}"):
            demo._check_out(tmp_path)
        (tmp_path / name).unlink()


def report(step: int, progress: float, seconds: float) -> StepReport:
    return StepReport(
        step=step, loss=3.0, ce=2.5, mtp=1.25, balance=0.0, bits_per_byte=2.125, tokens=100 * step, seconds=seconds,
        tokens_per_s=5000.0, progress=progress, lr=1e-3, mtp_weight=0.3, gamma=0.0, batch=1, grad_norm=1.0, skipped=False,
        skipped_total=0, skipped_in_row=0, expert_load=torch.ones(1, 4),
    )  # fmt: skip


def test_the_bar_shows_the_time_left() -> None:
    """A quarter of the run took a minute: three are left. The first steps, which warm up, do not count."""
    shown = ShowProgress(Console(file=io.StringIO(), highlight=False))
    shown.on_step(report(1, 0.05, 40.0))
    shown.on_step(report(2, 0.25 + 0.05 * 0.75, 100.0))
    text = shown._text(report(2, 0.25 + 0.05 * 0.75, 100.0))
    assert text == "loss 2.500  bits/byte 2.125  MTP 1.250  5,000 tok/s  3:00 left"


def test_a_terminal_gets_a_bar_that_names_mtp_once_it_has_joined() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, highlight=False)
    shown = ShowProgress(console)
    frames = []
    shown.on_start(SimpleNamespace(progress=0.0))
    for step in (dataclasses.replace(report(1, 0.01, 1.0), mtp=0.0), report(2, 0.51, 31.0)):
        shown.on_step(step)
        before = console.file.tell()
        shown._bar.refresh()
        frames.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()[before:]))
    shown.on_end(SimpleNamespace(progress=1.0))
    assert "   1%  loss 2.500  bits/byte 2.125  5,000 tok/s  -:-- left" in frames[0]
    assert "  51%  loss 2.500  bits/byte 2.125  MTP 1.250  5,000 tok/s  0:29 left" in frames[1]


def test_a_skipped_step_does_not_stay_in_what_is_shown() -> None:
    shown = ShowProgress(Console(file=io.StringIO(), highlight=False))
    nan = float("nan")
    bad = dataclasses.replace(report(1, 0.1, 1.0), ce=nan, bits_per_byte=nan, skipped=True, skipped_total=1)
    for first, second in ((bad, report(2, 0.2, 2.0)), (report(2, 0.2, 2.0), bad)):
        shown._smooth.clear()
        shown.on_step(first)
        shown.on_step(second)
        assert shown._text(second).startswith("loss 2.500  bits/byte 2.125  MTP 1.250")


def test_validations_are_shown() -> None:
    out = io.StringIO()
    for full in (False, True):
        ShowProgress(Console(file=out, highlight=False)).on_eval(EvalReport(7, 2.0, 1.5, 100, full))
    assert out.getvalue() == "step 7: validation 1.500 bits/byte\n" * 2


@pytest.mark.parametrize("line", ["x" * 5000, "short\n" + "y" * 5000 + "\nlast\n"])
def test_prompts_are_short_however_long_the_lines_are(line: str) -> None:
    assert 0 < len(demo._beginning(line)) <= 800
    assert line.startswith(demo._beginning(line))


def test_the_tokenizer_is_trained_on_the_training_files_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"f{i}.txt").write_text(f"document {i} " * 40)
    corpus = open_corpus(tmp_path)
    seen: list[str] = []
    monkeypatch.setattr(tokenizer, "train_tokenizer", lambda texts, size: seen.extend(texts))
    tokenizer.train_on_corpus(corpus, 300)
    valid = {document.text for document in corpus.documents("valid")}
    assert valid
    assert sorted(seen) == sorted(document.text for document in corpus.documents("train"))
    assert not valid & set(seen)
