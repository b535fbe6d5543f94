"""The demo with a budget of seconds: what it prints, what it leaves, what it finds again."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dsv3 import demo as demo_module
from dsv3 import plots, terminal
from dsv3.demo import demo, train_config
from dsv3.inference import Engine, SamplingParams
from dsv3.model import DeepSeekV3
from dsv3.terminal import clock, command, printable
from dsv3.tokenizer import load_tokenizer

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """Fewer tokens to generate: the speeds are not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "SPEED_TOKENS", 16)
        patch.setattr(demo_module, "SAMPLE_TOKENS", 24)
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(text, out, what was printed) of a demo of a few steps."""
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text"
    text.mkdir()
    for i in range(60):
        (text / f"f{i}.py").write_text(f"def function_{i}(x):\n    return [x + {i}]\n" * 40)
    (text / "empty.py").write_text("")
    console = Console(file=io.StringIO(), width=100, highlight=False)
    assert demo(data=text, preset="tiny", seconds=1.0, out=folder / "runs" / "demo", console=console) == 0
    return text, folder / "runs" / "demo", console.file.getvalue()


def test_what_it_prints(ran: tuple[Path, Path, str]) -> None:
    _, out, printed = ran
    lines = printed.splitlines()
    assert lines[0].startswith("dsv3 demo: trains a DeepSeek-V3 of ")
    assert "(60 documents, " in lines[0]
    assert "1 empty or non-UTF-8 files skipped" in lines[0]
    for name in ("this model", "order-2 byte model", "gzip -9", "xz -9"):
        assert re.search(rf"^ ?{name} +\d+\.\d{{3}}", printed, re.M), name
    assert re.search(r"\d+ tokens/s, with MTP drafts \d+ \(\d+\.\d\dx\), \d+% of the drafts accepted", printed)
    assert lines[-1].startswith(f"next: {command()} generate {out / 'model'} ")
    assert "\x1b" not in printed
    assert "\r" not in printed


def test_what_it_leaves(ran: tuple[Path, Path, str]) -> None:
    _, out, printed = ran
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "experts.png", "loss.png", "model", "train"]
    assert (out / "loss.png").read_bytes().startswith(PNG)
    assert (out / "experts.png").read_bytes().startswith(PNG)
    summary = json.loads((out / "demo.json").read_text())
    assert f"{summary['bits_per_byte']:.3f}" in printed
    validation = json.loads((out / "train" / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
    assert validation["full"]
    assert validation["bits_per_byte"] == summary["bits_per_byte"]
    model = DeepSeekV3.from_pretrained(out / "model")
    engine = Engine(model, tokenizer=load_tokenizer(out / "model"))
    assert len(engine.generate(["def f"], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


def test_second_run_finds_the_data_and_replaces_the_first(ran: tuple[Path, Path, str]) -> None:
    text, out, printed = ran
    assert "tokenizer, tokens and baselines made in" in printed
    cached = sorted(out.parent.joinpath("cache").iterdir())
    console = Console(file=io.StringIO(), width=100, highlight=False)
    (out / "demo.json").write_text("old")
    assert demo(data=text, preset="tiny", seconds=0.5, out=out, console=console) == 0
    assert "tokenizer, tokens and baselines made in" not in console.file.getvalue()
    assert sorted(out.parent.joinpath("cache").iterdir()) == cached
    assert json.loads((out / "demo.json").read_text())["preset"] == "tiny"


def test_a_terminal_gets_a_bar(ran: tuple[Path, Path, str]) -> None:
    text, out, _ = ran
    console = Console(file=io.StringIO(), width=120, force_terminal=True, highlight=False)
    assert demo(data=text, preset="tiny", seconds=1.0, out=out, console=console) == 0
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    # MTP joins at 60% of the time, when a slow machine may have no step left.
    text = r"loss \d\.\d{3}  bits/byte \d\.\d{3}  (MTP \d\.\d{3}  )?[\d,]+ tok/s  (\d+:\d\d|-:--) left"
    assert re.search(rf"━ 100%  {text}", printed)


def test_presets_fit_their_limits(ran: tuple[Path, Path, str]) -> None:
    tokens = next(ran[1].parent.joinpath("cache").iterdir())
    index = json.loads((tokens / "index.json").read_text())
    tiny, mini = (train_config(p, 240.0, tokens, Path("out")) for p in ("tiny", "mini"))
    assert (tiny.precision, tiny.max_seconds, tiny.preset) == ("fp32", 240.0, "tiny")
    assert (mini.precision, mini.max_seconds, mini.preset) == ("bf16", 240.0, "mini")
    assert mini.max_tokens == 2 * index["splits"]["train"]["num_tokens"]


def test_pictures_without_experts_or_validation(tmp_path: Path) -> None:
    plots.loss_curve(tmp_path / "a.png", [(10.0, 3.0), (20.0, 2.0)], [], {"xz": 1.5}, title="t")
    plots.expert_load(tmp_path / "b.png", np.arange(128.0).reshape(2, 64), ["a", "b"], title="t")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert (tmp_path / "b.png").read_bytes().startswith(PNG)


def test_what_to_type_next_works_where_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """dsv3 on the PATH, in an environment that is not activated, and not installed at all but for PYTHONPATH."""
    monkeypatch.chdir(tmp_path)
    scripts = tmp_path / ".venv" / "bin"
    monkeypatch.setattr(terminal.sysconfig, "get_path", lambda name: str(scripts))
    root = Path(terminal.__file__).resolve().parents[1]
    monkeypatch.setattr(terminal.shutil, "which", lambda name: sys.executable)
    assert command() == f"PYTHONPATH={root} python3 -m dsv3"
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None)
    assert command() == f"PYTHONPATH={root} {sys.executable} -m dsv3"
    done = subprocess.run(f"{command()} --help", shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        command("torchrun", "torch.distributed.run") == f"PYTHONPATH={root} {sys.executable} -m torch.distributed.run"
    )
    scripts.mkdir(parents=True)
    (scripts / "dsv3").touch()
    assert command() == ".venv/bin/dsv3"
    assert command("torchrun", "torch.distributed.run").endswith(" -m torch.distributed.run")  # torch lies elsewhere
    (scripts / "torchrun").touch()
    assert command("torchrun", "torch.distributed.run") == ".venv/bin/torchrun"
    monkeypatch.setattr(terminal.shutil, "which", lambda name: str(scripts / name))
    assert command() == "dsv3"


def test_small_things() -> None:
    assert [clock(s) for s in (0, 59.6, 65, 3605)] == ["0:00", "1:00", "1:05", "60:05"]
    assert printable("a\n\tb\x1b[31m\r é 漢🙂") == "a\n\tb\ufffd[31m\ufffd é 漢🙂"
