"""Bad checkpoints and failing disks: one clear line with what was expected and what was found, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv3 import files
from dsv3.model import DeepSeekV3
from dsv3.weights import load_pretrained, save_pretrained, writer
from tests.checkpoints import FP8, assert_same, edit, random_model, small_config, state, write_fp8

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    return random_model(small_config())


@pytest.fixture
def folder(tmp_path: Path, model: DeepSeekV3) -> Path:
    """A checkpoint in one file."""
    model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def sharded(tmp_path: Path, model: DeepSeekV3) -> Path:
    """A checkpoint in several shards."""
    model.save_pretrained(tmp_path / "s", max_shard_bytes=30_000)
    return tmp_path / "s"


def shard(folder: Path, number: int) -> Path:
    (path,) = folder.glob(f"model-{number:05d}-of-*.safetensors")
    return path


def refused(folder: Path, *expected: str, dtype: torch.dtype | str | None = None) -> None:
    """Loading raises one line of ValueError with all of these in it."""
    with pytest.raises(ValueError, match=r"expected|must|needs") as error:
        load_pretrained(folder, dtype=dtype)
    message = str(error.value)
    assert "\n" not in message
    assert [part for part in expected if part not in message] == [], message


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# ---- what is not there ----
def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "expected a checkpoint folder", str(tmp_path / "nowhere"))


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json", str(folder), "found none")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "expected model.safetensors or model.safetensors.index.json", str(folder))


def test_missing_shard(sharded: Path) -> None:
    path = shard(sharded, 2)
    path.unlink()
    refused(sharded, path.name, "model.safetensors.index.json", str(sharded), "found none")


@pytest.mark.parametrize(
    "key", [GATE, "model.layers.2.mlp.gate.e_score_correction_bias", "model.layers.3.eh_proj.weight"]
)
def test_missing_tensor(folder: Path, key: str) -> None:
    edit(folder, {key: None})
    refused(folder, key, "model.safetensors", "found none")


def test_missing_from_the_index(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", lambda index: index["weight_map"].pop(GATE))
    refused(sharded, GATE, "model.safetensors.index.json")


def test_missing_from_the_shard_that_the_index_names(sharded: Path) -> None:
    def swap(index: dict) -> None:
        index["weight_map"][GATE] = index["weight_map"]["model.norm.weight"]

    edit_json(sharded / "model.safetensors.index.json", swap)
    refused(sharded, GATE, "as model.safetensors.index.json says", "found none")


# ---- what is there but wrong ----
def test_wrong_shape(folder: Path) -> None:
    edit(folder, {GATE: torch.zeros(15, 32)})
    refused(folder, GATE, "[16, 32]", "[15, 32]", "model.safetensors")


def test_config_and_files_of_different_models(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(vocab_size=97))
    refused(folder, "model.embed_tokens.weight", "[97, 32]", "[96, 32]")


def test_integer_weight(folder: Path) -> None:
    edit(folder, {GATE: torch.zeros(16, 32, dtype=torch.int8)})
    refused(folder, GATE, "F8_E4M3", "found I8")


def test_fp8_norm(folder: Path) -> None:
    edit(folder, {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)})
    refused(folder, "model.norm.weight", "BF16", "found F8_E4M3")


def test_fp8_without_scale(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    edit(tmp_path / "a", {GATE + "_scale_inv": None})
    refused(tmp_path / "a", GATE + "_scale_inv", "block scales", "found none")


def test_fp8_scales_of_the_wrong_shape_or_dtype(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    key = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    edit(tmp_path / "a", {key: torch.ones(4, 2)})
    refused(tmp_path / "a", key, "[5, 2]", "[4, 2]")
    edit(tmp_path / "a", {key: torch.ones(5, 2, dtype=torch.bfloat16)})
    refused(tmp_path / "a", key, "F32", "BF16")


def test_fp8_asked_of_a_checkpoint_without(folder: Path) -> None:
    refused(folder, "F8_E4M3", str(folder), dtype="fp8")


def test_fp8_of_one_half_of_a_fused_tensor(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    edit(tmp_path / "a", {GATE: torch.zeros(128, FP8.hidden_size, dtype=torch.bfloat16), GATE + "_scale_inv": None})
    refused(tmp_path / "a", GATE, dtype="fp8")
    assert load_pretrained(tmp_path / "a").layers[1].moe.experts.gate_up[3, :128].abs().max() == 0


def test_fp8_blocks_that_fusing_would_cut(tmp_path: Path) -> None:
    config = small_config(hidden_size=FP8.hidden_size)
    write_fp8(tmp_path / "a", config)
    refused(tmp_path / "a", "whole 128 x 128 blocks", "bfloat16", dtype="fp8")
    load_pretrained(tmp_path / "a")


def test_another_quantisation(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    found = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    edit_json(tmp_path / "a/config.json", lambda config: config.update(quantization_config=found))
    refused(tmp_path / "a", "weight_block_size", "[128, 128]", "[64, 64]")


def test_another_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(model_type="llama"))
    with pytest.raises(ValueError, match=r"model_type must be one of deepseek_v2, deepseek_v3, got 'llama'"):
        load_pretrained(folder)


def test_unknown_dtypes(folder: Path, model: DeepSeekV3) -> None:
    for dtype in ("int4", torch.int8, torch.float8_e4m3fn):
        refused(folder, "dtype must be", str(dtype), dtype=dtype)
        with pytest.raises(ValueError, match="dtype must be"):
            model.save_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("size", [0, 5, 60, 10_000, -1])
def test_truncated_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    refused(folder, str(path), "bytes, found", f"{len(whole[:size])}")


def test_truncated_shard(sharded: Path) -> None:
    path = shard(sharded, 3)
    os.truncate(path, path.stat().st_size - 1)
    refused(sharded, str(path), f"{path.stat().st_size + 1} bytes, found {path.stat().st_size}")


def test_a_file_of_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((12).to_bytes(8, "little") + b"not json at all")
    with pytest.raises(ValueError, match=re.escape(str(folder / "model.safetensors"))):
        load_pretrained(folder)


# ---- the index ----
@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\\b", "a\0b", 3]
)
def test_the_index_cannot_point_elsewhere(sharded: Path, name: object) -> None:
    os.link(shard(sharded, 1), sharded.parent / "evil.safetensors")
    path = sharded / "model.safetensors.index.json"
    edit_json(path, lambda index: index["weight_map"].update({"model.embed_tokens.weight": name}))
    refused(sharded, str(path), "plain file name", "model.embed_tokens.weight", repr(name))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "\xff"])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(text, encoding="latin-1")
    refused(sharded, str(path), "weight_map", "found")


# ---- saving ----
def untouched(folder: Path, model: DeepSeekV3) -> None:
    """`folder` is as it was and nothing lies beside it."""
    assert_same(state(load_pretrained(folder)), state(model))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_disk_fills_while_saving_over_a_checkpoint(folder: Path, model: DeepSeekV3) -> None:
    """With a real limit on the size of files, in a process of its own."""
    child = """
import resource, sys
from tests.checkpoints import random_model, small_config
model = random_model(small_config(), seed=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    model.save_pretrained(sys.argv[1])
except OSError as error:
    sys.exit(f"caught: {error}")
"""
    run = subprocess.run([sys.executable, "-c", child, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"caught: could not save to {folder}, which is as it was before: ")
    assert "File too large" in line
    untouched(folder, model)


@pytest.mark.parametrize("fail_at", [1, 3])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_fails_at_a_later_shard(
    folder: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException
) -> None:
    calls = []

    def failing(*args: object, **options: object) -> None:
        calls.append(args)
        if len(calls) == fail_at:
            raise error
        save_file(*args, **options)

    save_file = writer.save_file
    monkeypatch.setattr(writer, "save_file", failing)
    other = random_model(model.config, seed=1)
    for target in (folder, folder.parent / "new"):
        calls.clear()
        with pytest.raises(type(error)):
            other.save_pretrained(target, max_shard_bytes=20_000)
        assert len(calls) == fail_at
        untouched(folder, model)


def test_the_config_cannot_be_written(folder: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_config", failing)
    with pytest.raises(OSError, match=r"could not save to .*as it was before.*No space left"):
        random_model(model.config, seed=1).save_pretrained(folder)
    untouched(folder, model)


def test_the_new_folder_cannot_take_its_place(folder: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that cannot exchange names."""
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".a.saving":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(files, "_exchange", lambda *names: False)
    with pytest.raises(OSError, match="could not save to"):
        random_model(model.config, seed=1).save_pretrained(folder)
    untouched(folder, model)


@pytest.mark.parametrize("stop", ["write_config", "_sync"])
def test_killed_while_saving(folder: Path, model: DeepSeekV3, stop: str) -> None:
    child = f"""
import os, signal, sys
from dsv3.weights import writer
from tests.checkpoints import random_model, small_config
writer.{stop} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
random_model(small_config(), seed=1).save_pretrained(sys.argv[1])
"""
    run = subprocess.run([sys.executable, "-c", child, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert_same(state(load_pretrained(folder)), state(model))
    # What it left is no checkpoint's name, and the next save clears it away.
    assert sorted(path.name for path in folder.parent.iterdir()) == [".a.saving", "a"]
    other = random_model(model.config, seed=1)
    other.save_pretrained(folder)
    untouched(folder, other)


def test_killed_between_the_two_renames(folder: Path, model: DeepSeekV3) -> None:
    """The earlier checkpoint is put back before anything else happens, even if the next save fails."""
    folder.rename(folder.with_name(".a.replaced"))
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json in"):
        random_model(model.config, seed=1).save_pretrained(folder, tokenizer_dir=folder.parent)
    untouched(folder, model)


def test_places_that_are_no_checkpoint_folder(
    tmp_path: Path, model: DeepSeekV3, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expected a folder to save to, found the file"):
        model.save_pretrained(tmp_path / "file")
    (tmp_path / "home/documents").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"found the folder .*documents"):
        model.save_pretrained(tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home/documents")
    with pytest.raises(ValueError, match="other than the current one"):
        model.save_pretrained(".")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["documents", "file", "home"]


def test_saving_through_a_link_replaces_what_it_points_to(folder: Path, model: DeepSeekV3) -> None:
    link = folder.with_name("link")
    link.symlink_to(folder)
    other = random_model(model.config, seed=1)
    save_pretrained(other, link)
    assert link.is_symlink()
    assert_same(state(load_pretrained(folder)), state(other))


def test_bad_arguments_write_nothing(tmp_path: Path, model: DeepSeekV3) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, got 0"):
        model.save_pretrained(tmp_path / "a", max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json in .*nowhere, found none"):
        model.save_pretrained(tmp_path / "a", tokenizer_dir=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
