"""Bad input on the command line: exit code 2, one line that says what was expected and found, nothing written or lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3 import Config, DeepSeekV3, cli
from dsv3.tokenizer import load_tokenizer
from dsv3.train.corpus import open_corpus
from dsv3.train.data import ValidationSet, tokenize_corpus
from dsv3.train.tokenizer import train_on_corpus

VOCAB = 300
SMALL = Config(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
    dtype="float32",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"f{i}.txt").write_text(f"Text number {i}: " + "some words and more words. " * 20)
    return folder


@pytest.fixture
def tokens(text: Path, tmp_path: Path) -> Path:
    corpus = open_corpus(text)
    tokenize_corpus(corpus, train_on_corpus(corpus, VOCAB), tmp_path / "tokens")
    return tmp_path / "tokens"


@pytest.fixture
def model(tokens: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    DeepSeekV3(SMALL).init_weights().save_pretrained(path, max_shard_bytes=40_000, tokenizer_dir=tokens)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The one line on stderr of a command that must exit with 2 and leave `folder` as it is."""
    before = files(folder)
    assert cli._run([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"dsv3: [^\n]+\n", err), err
    assert files(folder) == before
    return err


# ---- training ----
def test_unknown_key_of_the_training_config(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: Path) -> None:
    (tmp_path / "run.toml").write_text(
        f'data = "{tokens}"\nout = "{tmp_path / "run"}"\nmax_steps = 1\nlearning_rat = 1.0\n'
    )
    assert "unknown training config key 'learning_rat', did you mean" in refused(
        capsys, tmp_path, "train", tmp_path / "run.toml"
    )
    assert "unknown training config key 'sed', did you mean 'seed'?" in refused(capsys, tmp_path, "train", "sed=1")


def train_arguments(tmp_path: Path, tokens: Path, **values: object) -> list[str]:
    sizes = {
        f"model.{k}": v for k, v in SMALL.to_dict().items() if isinstance(v, int) and k in SMALL.__dataclass_fields__
    }
    common = {"data": tokens, "out": tmp_path / "run", "max_steps": 2, "seq_len": 16, "batch": 2, "micro_batch": 2}
    settings = {**common, "precision": "fp32", "device": "cpu", "tensorboard": "false", **sizes, **values}
    return [f"{key}={json.dumps(v) if isinstance(v, bool) else v}" for key, v in settings.items()]


def test_training_tokens_outside_the_vocabulary(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: Path
) -> None:
    arguments = train_arguments(tmp_path, tokens, **{"model.vocab_size": 200})
    line = refused(capsys, tmp_path, "train", *arguments)
    assert re.search(r"expected tokens below the model's vocab_size 200, found token 29\d", line)


def test_training_tokens_that_the_index_does_not_know(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: Path
) -> None:
    """A token file that was overwritten: found where it is read, before any step is made of it."""
    shutil.copytree(tokens, tmp_path / "damaged")
    for name in ("train.bin", "valid.bin"):
        size = (tokens / name).stat().st_size
        (tmp_path / "damaged" / name).write_bytes(b"\xff" * size)
    arguments = train_arguments(tmp_path, tmp_path / "damaged")
    assert cli._run(["train", *arguments]) == 2
    line = capsys.readouterr().err
    assert re.search(r"train\.bin: expected tokens below 300, found 65535: the file is damaged\n$", line)
    with pytest.raises(ValueError, match=r"valid\.bin: expected tokens below 300, found 65535: the file is damaged"):
        list(ValidationSet(tmp_path / "damaged", 16).batches(2))


def test_a_preset_that_there_is_not(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: Path) -> None:
    line = refused(capsys, tmp_path, "train", "preset=tny", f"data={tokens}", f"out={tmp_path / 'run'}", "max_steps=1")
    assert "preset must be one of tiny, mini, 2b, 16b, 236b, 671b, or a folder with a config.json, got 'tny'" in line


def test_training_data_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: Path) -> None:
    line = refused(capsys, tmp_path, "train", *train_arguments(tmp_path, tmp_path / "gone"))
    assert "expected a folder made by `dsv3 tokenize`, found no" in line
    line = refused(capsys, tmp_path, "train", tmp_path / "gone.toml")
    assert "no training config at" in line
    line = refused(capsys, tmp_path, "train", "a.toml", "b.toml")
    assert "expected one config file and key=value overrides, found a.toml and b.toml" in line


def test_training_does_not_overwrite_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: Path) -> None:
    arguments = train_arguments(tmp_path, tokens)
    assert cli._run(["train", *arguments]) == 0
    capsys.readouterr()
    line = refused(capsys, tmp_path, "train", *arguments)
    assert "already holds checkpoints: pass --resume to continue them, or choose another out" in line


# ---- text ----
@pytest.mark.parametrize("command", ["tokenize", "demo"])
@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"", "expected text, found an empty file"), (b"caf\xe9", "expected UTF-8 text, found byte 0xe9 at 3")],
)
def test_unusable_file_given_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, raw: bytes, message: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(raw)
    arguments = [path] if command == "tokenize" else ["--data", path]
    line = refused(capsys, tmp_path, command, *arguments, "--out", tmp_path / "out")
    assert f"{path}: {message}" in line


@pytest.mark.parametrize("command", ["tokenize", "demo"])
def test_folder_without_usable_text(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes(b"\xe9")
    arguments = [tmp_path] if command == "tokenize" else ["--data", tmp_path]
    line = refused(capsys, tmp_path, command, *arguments, "--out", tmp_path / "out")
    assert f"expected text under {tmp_path}, found none (2 empty or non-UTF-8 files skipped)" in line


def test_unusable_files_in_a_folder_are_skipped_and_counted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    for file in text.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes(b"\xe9")
    assert cli._run(["tokenize", str(tmp_path), "--out", str(tmp_path / "out"), "--vocab-size", "300"]) == 0
    assert "vocabulary 300, 2 empty or non-UTF-8 files skipped" in capsys.readouterr().out


def test_unusable_files_of_the_standard_library_are_counted() -> None:
    """All of it, the `test` package too: 32 files with Python 3.11."""
    root = Path(sysconfig.get_path("stdlib"))
    unusable = set()
    for path in root.rglob("*.py"):
        if "site-packages" not in path.parts:
            try:
                empty = not path.read_bytes().decode()
            except UnicodeDecodeError:
                empty = True
            unusable |= {path} if empty else set()
    skipped = {p for p in open_corpus(root).skipped if p.suffix == ".py"}
    assert skipped == unusable
    assert skipped >= set(open_corpus().skipped)


def test_tokenize_keeps_what_is_no_token_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep")
    line = refused(capsys, tmp_path, "tokenize", text, "--out", tmp_path, "--vocab-size", 300)
    assert f"expected a token folder or nothing at {tmp_path}, found something else" in line


def test_demo_keeps_what_is_no_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep")
    line = refused(capsys, tmp_path, "demo", "--out", tmp_path)
    assert f"expected an earlier demo or nothing in {tmp_path}, found thesis.txt" in line
    assert "preset must be one of tiny, mini, found 'huge'" in refused(capsys, tmp_path, "demo", "--preset", "huge")
    for seconds in ("0", "0.00001", "nan", "inf"):
        assert "seconds must be at least 0.1, found " in refused(capsys, tmp_path, "demo", "--seconds", seconds)


# ---- checkpoints ----
def test_missing_shard(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(capsys, model, "generate", model, "Text", "--device", "cpu")


def rewrite(model: Path, change: dict[str, torch.Tensor]) -> None:
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.keys() & change.keys():
            save_file({**tensors, **{k: v for k, v in change.items() if k in tensors}}, shard, {"format": "pt"})


def test_tensor_of_the_wrong_shape(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    rewrite(model, {"model.norm.weight": torch.ones(33)})
    line = refused(capsys, model, "generate", model, "Text", "--device", "cpu")
    assert "model.norm.weight" in line
    assert "32" in line
    assert "33" in line


def test_tensor_of_the_wrong_dtype(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    rewrite(model, {"model.norm.weight": torch.ones(32, dtype=torch.int32)})
    line = refused(capsys, model, "generate", model, "Text", "--device", "cpu")
    assert "model.norm.weight" in line
    assert "I32" in line or "int32" in line


def test_another_architecture(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    line = refused(capsys, model, "generate", model, "Text", "--device", "cpu")
    assert "model_type must be one of deepseek_v2, deepseek_v3, got 'llama'" in line


def test_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "expected a checkpoint folder, found none" in refused(capsys, tmp_path, "generate", tmp_path / "gone", "a")
    assert "expected a config.json in" in refused(capsys, tmp_path, "generate", tmp_path, "a")
    line = refused(capsys, tmp_path, "export", tmp_path / "gone", tmp_path / "out")
    assert "expected a training checkpoint (step-...) at" in line


# ---- generation ----
def test_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    line = refused(capsys, model, "generate", model, "words and more " * 40, "--device", "cpu")
    assert re.search(r"expected at most 63 tokens \(context of 64\), got \d+", line)


def test_prompt_that_is_not_utf8(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    prompt = b"caf\xe9".decode(errors="surrogateescape")  # how Python hands on such an argument
    line = refused(capsys, model, "generate", model, prompt, "--device", "cpu")
    assert r"expected a prompt of UTF-8 text, found '\udce9' at character 3" in line


def test_prompt_outside_the_vocabulary(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    larger = load_tokenizer(model)
    larger.add_tokens(["zebra"])
    larger.save(str(tmp_path / "larger.json"))
    arguments = ("generate", model, "a zebra", "--tokenizer", tmp_path / "larger.json", "--device", "cpu")
    assert "expected tokens from 0 to 299, got 300" in refused(capsys, tmp_path, *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature must be a finite number of at least 0, got -1.0"),
        (["--min-p", "2"], "min_p must be a number in [0, 1], got 2.0"),
        (["--max-tokens", "0"], "max_tokens must be an integer of at least 1, got 0"),
        (["--max-tokens", "many"], "Invalid value for '--max-tokens'"),
        (["--dtype", "int4"], "dtype must be bfloat16, float32 or fp8, found 'int4'"),
        (
            ["--kv-cache-dtype", "int4"],
            "kv_cache_dtype must be \"fp8\", or left out for that of the weights, got 'int4'",
        ),
        (["--kv-cache-dtype", "fp8"], "needs kv_lora_rank 512 and qk_rope_head_dim 64, got 16 and 8"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "device 'cuda:99' was asked for, and torch finds "),
        (["--no-such-option"], "No such option: --no-such-option"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], model: Path, options: list[str], message: str) -> None:
    assert message in refused(capsys, model, "generate", model, "Text", "--device", "cpu", *options)


def test_min_p_reaches_the_model(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """With 1 only the likeliest token is left."""
    texts = []
    for options in (["--temperature", "0"], ["--temperature", "2", "--top-p", "1", "--min-p", "1"]):
        arguments = ["generate", str(model), "Text", "--device", "cpu", "--max-tokens", "12", "--ignore-eos"]
        assert cli._run([*arguments, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_speculation_without_mtp(capsys: pytest.CaptureFixture[str], tmp_path: Path, tokens: Path) -> None:
    config = Config.from_dict({**SMALL.to_dict(), "num_nextn_predict_layers": 0})
    DeepSeekV3(config).init_weights().save_pretrained(tmp_path / "plain", tokenizer_dir=tokens)
    line = refused(capsys, tmp_path, "generate", tmp_path / "plain", "Text", "--speculative", "--device", "cpu")
    assert "needs an MTP module" in line


# ---- disks ----
def on_a_small_disk(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a process that may write at most `limit` bytes into a file."""
    code = (
        f"import resource, sys; from dsv3 import cli; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(cli._run(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_full_disk_while_saving(tmp_path: Path, tokens: Path, text: Path, model: Path) -> None:
    before = files(tmp_path)
    commands = [
        (10_000, ["tokenize", text, "--out", tokens, "--vocab-size", 300]),  # replaces an intact folder
        (30_000, ["train", *train_arguments(tmp_path, tokens)]),
    ]
    for limit, command in commands:
        done = on_a_small_disk(limit, *command)
        assert done.returncode == 2, done.stderr
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("dsv3: "))
        assert re.match(r"dsv3: could not (write|save) [^ ]+(,|:) ", line), line
        assert "Traceback" not in done.stderr
        after = files(tmp_path)
        assert {name: after[name] for name in before} == before
        assert not [name for name in after if "distcp" in name]


def test_full_disk_while_recording(tmp_path: Path, tokens: Path) -> None:
    limit = (tokens / "tokenizer.json").stat().st_size  # which is copied first
    done = on_a_small_disk(limit, "train", *train_arguments(tmp_path, tokens, max_steps=1000, save_every=1000))
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("dsv3: "))
    assert line == f"dsv3: could not write {tmp_path}/run/metrics.jsonl: File too large; checkpoints are intact"
    assert "Traceback" not in done.stderr


def test_full_disk_before_the_first_step(tmp_path: Path, tokens: Path) -> None:
    done = on_a_small_disk(3000, "train", *train_arguments(tmp_path, tokens))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"dsv3: could not write {tmp_path}/run/tokenizer.json: File too large\n"


def test_full_disk_while_exporting(tmp_path: Path, tokens: Path) -> None:
    assert cli._run(["train", *train_arguments(tmp_path, tokens)]) == 0
    before = files(tmp_path)
    done = on_a_small_disk(30_000, "export", tmp_path / "run", tmp_path / "exported")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"dsv3: [^\n]+\n", done.stderr), done.stderr
    assert files(tmp_path) == before
