"""The commands work together, say what they did, and let bugs keep their traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3 import cli
from dsv3.train.corpus import open_corpus
from dsv3.train.tokenizer import train_on_corpus


def run(*arguments: object) -> int:
    return cli._run([str(a) for a in arguments])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"f{i}.py").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 12)
    return folder


MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
}
RUN = {"seq_len": 32, "batch": 4, "micro_batch": 4, "lr": 0.01, "warmup_steps": 2, "lr_schedule": "constant"}
SIZES = [f"model.{key}={value}" for key, value in MODEL.items()] + [f"{key}={value}" for key, value in RUN.items()]
SIZES += ["precision=fp32", "device=cpu", "tensorboard=false"]


def test_from_text_to_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tokenize, train, resume, export, generate."""
    tokens, runs = tmp_path / "tokens", tmp_path / "run"
    assert run("tokenize", text, "--out", tokens, "--vocab-size", 300) == 0
    out = capsys.readouterr().out
    assert "train: " in out
    assert "vocabulary 300, 0 empty or non-UTF-8 files skipped" in out

    assert run("train", f"data={tokens}", f"out={runs}", "max_steps=6", *SIZES) == 0
    assert len((runs / "metrics.jsonl").read_text().splitlines()) == 7  # 6 steps and the validation
    last = json.loads((runs / "metrics.jsonl").read_text().splitlines()[5])
    line = f"step 6: loss {last['ce']:.3f}, {last['bits_per_byte']:.3f} bits/byte; next: "
    out = capsys.readouterr().out
    assert line in out
    assert out.endswith(f"export {runs} {runs}-hf\n")
    assert run("train", runs / "train_config.json", "max_steps=8", "--resume") == 0
    assert "resuming" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (runs / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 9))

    fp8 = tmp_path / "fp8"
    assert run("train", f"data={tokens}", f"out={fp8}", "max_steps=2", *SIZES, "--precision", "fp8") == 0
    assert json.loads((fp8 / "train_config.json").read_text())["precision"] == "fp8"
    assert len((fp8 / "metrics.jsonl").read_text().splitlines()) == 3
    capsys.readouterr()

    assert run("export", runs, tmp_path / "model") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert (tmp_path / "model" / "tokenizer.json").is_file()

    options = ["--max-tokens", 8, "--seed", 1, "--ignore-eos", "--device", "cpu"]
    assert run("generate", tmp_path / "model", "def function", *options) == 0
    first = capsys.readouterr()
    assert "[8 tokens, " in first.err
    assert "of the drafts accepted]" in first.err
    assert run("generate", tmp_path / "model", "def function", *options) == 0
    assert capsys.readouterr().out == first.out
    assert run("generate", tmp_path / "model", "def function", *options, "--no-speculative") == 0
    assert "drafts" not in capsys.readouterr().err


def test_another_tokenizer_ends_its_documents_itself(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is told which tokens begin and end a document: generation stops there, whatever their numbers."""
    own = train_on_corpus(open_corpus(text), 300).to_str()
    for ours, theirs in (("<|bos|>", "<s>"), ("<|eos|>", "<unk>"), ("<|pad|>", "</s>"), ("<|fim_hole|>", "<|x|>")):
        own = own.replace(ours, theirs)
    (tmp_path / "theirs.json").write_text(own)
    assert run("tokenize", text, "--out", tmp_path / "tokens", "--tokenizer", tmp_path / "theirs.json") == 0
    settings = [f"data={tmp_path / 'tokens'}", f"out={tmp_path / 'run'}", "max_steps=1", *SIZES]
    capsys.readouterr()
    assert run("train", *settings) == 2
    assert "found a tokenizer without them: set fim_rate=0\n" in capsys.readouterr().err
    assert run("train", *settings, "fim_rate=0") == 0
    assert run("export", tmp_path / "run", tmp_path / "model") == 0
    for file in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "model" / file).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (0, 2), file
    tokenizer = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert (tokenizer["bos_token"], tokenizer["eos_token"]) == ("<s>", "</s>")


def test_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Closed:
        def read(self) -> str:
            raise KeyError("stdin was read")

    monkeypatch.setattr(sys, "stdin", Closed())
    with pytest.raises(KeyError, match="stdin was read"):
        run("generate", "model")


def test_without_a_command_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    for command in ("demo", "train", "tokenize", "generate", "export", "doctor"):
        assert f"  {command} " in out


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dsv3", "generate"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.lower() == "dsv3: missing argument 'model'.\n"


@pytest.mark.parametrize("columns", [40, 200])
def test_doctor(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from dsv3.comm import nvshmem
    from dsv3.ops import registry

    monkeypatch.setenv("COLUMNS", str(columns))
    assert run("doctor") == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for name, op in registry.OPS.items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        if not torch.cuda.is_available():
            reason = registry.NATIVE_ERROR or "no GPU" if op.native else "no kernel yet"
            assert line.split(maxsplit=1)[1].strip() == f"reference: {reason}"
    assert (registry.NATIVE_ERROR or str(registry.native().__file__)) in out
    assert (nvshmem.objection() or str(nvshmem.native().__file__)) in out


@pytest.mark.parametrize(
    "error", [ValueError("from a library"), RuntimeError("a bug"), OSError(5, "Input/output error")]
)
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from dsv3.train import corpus

    def broken(path: object) -> None:
        raise error

    monkeypatch.setattr(corpus, "open_corpus", broken)
    with pytest.raises(type(error)):
        run("tokenize")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dsv3.train import corpus

    def broken(path: object) -> None:
        import no_such_package  # noqa: F401

    monkeypatch.setattr(corpus, "open_corpus", broken)
    assert run("tokenize") == 2
    assert capsys.readouterr().err == "dsv3: this needs a package that is not installed: no_such_package\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import dsv3

    assert run("--version") == 0
    assert capsys.readouterr().out == f"{dsv3.__version__}\n"


def test_a_run_is_no_model_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train_config.json").write_text("{}")
    assert run("generate", tmp_path, "x", "--device", "cpu") == 2
    assert f"found none: `dsv3 export {tmp_path} {tmp_path}-hf` makes a folder that has one" in capsys.readouterr().err
