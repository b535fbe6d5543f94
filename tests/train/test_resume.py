"""Resuming: bit for bit, after Ctrl-C, after damage, on a full disk; and the way out to a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3 import train
from dsv3.cli import _run
from dsv3.model import DeepSeekV3
from dsv3.parallel.data import DataParallel
from dsv3.terminal import command
from dsv3.train import checkpoint, launch
from dsv3.train.config import TrainConfig
from dsv3.train.data import ValidationSet
from dsv3.train.metrics import EvalReport, MetricsFile, StepReport
from tests.train.common import Recorder, micro


class Interrupt(Recorder):
    """Presses Ctrl-C when the report of a step arrives (that is, during the step after it)."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_step(self, report: StepReport) -> None:
        super().on_step(report)
        if report.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint: weights, moments, counts, bias, EMA, RNG."""
    found = checkpoint.find(folder)
    assert checkpoint.problem(found) is None
    metadata = checkpoint.dcp.FileSystemReader(found).read_metadata().state_dict_metadata
    state = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    checkpoint.load(found, state, parallel=checkpoint.DataParallel())
    return state


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def full(tokens: Path, out: Path, **changes: object) -> TrainConfig:
    """A run with everything on whose state a resume could lose: EMA, FIM, gamma, accumulation, a ramp, a changing lr."""
    return micro(
        tokens,
        out,
        ema_decay=0.9,
        fim_rate=0.5,
        gamma=0.01,
        batch_start=4,
        batch_ramp_tokens=800,
        save_every=3,
        **changes,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_interrupted_and_resumed_run_is_bit_identical(
    token_folder: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = (full(token_folder, tmp_path / name, precision=precision) for name in ("whole", "parts"))
    assert train.run(whole) == 0
    for at in (4, 7):
        assert train.run(parts, resume=True, callbacks=[Interrupt(at)]) == 130
        said = capsys.readouterr().out
        config_file = Path(parts.out) / "train_config.json"
        saved = Path(parts.out) / f"step-{at + 1:08d}"
        assert f"saved {saved}; resume with: {command()} train {config_file} --resume" in said
        assert TrainConfig.load(config_file) == parts
    assert train.run(parts, resume=True) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "parts")] == list(range(1, 13))
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} == {
        "master", "exp_avg", "exp_avg_sq", "optimizer", "expert_bias", "ema", "rng_0",
    }  # fmt: skip
    assert all(torch.equal(first[name], second[name]) for name in first)
    infos = [checkpoint.read_info(checkpoint.find(tmp_path / name)) for name in ("whole", "parts")]
    for key in ("step", "tokens", "data", "config"):
        assert infos[0][key] == infos[1][key]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_resume_is_bit_identical_on_a_gpu(token_folder: Path, tmp_path: Path, precision: str) -> None:
    gpu = {"device": "cuda", "precision": precision, "deterministic": True, "seq_len": 64}
    whole, parts = (full(token_folder, tmp_path / name, **gpu) for name in ("whole", "parts"))
    try:
        assert train.run(whole) == 0
        assert train.run(parts, callbacks=[Interrupt(4)]) == 130
        assert train.run(parts, resume=True) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resume_without_a_checkpoint_starts_anew(
    token_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.run(micro(token_folder, tmp_path, max_steps=2), resume=True) == 0
    assert f"no checkpoint in {tmp_path} yet: starting from the beginning" in capsys.readouterr().out


def test_a_run_without_data_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be a folder made by `dsv3 tokenize`, set data=FOLDER"):
        train.run(TrainConfig(max_steps=1, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_last_checkpoint_is_written_before_the_last_validation(token_folder: Path, tmp_path: Path) -> None:
    """Which may take long, fail, or be interrupted: then the run is to be validated once more."""

    happened: list[str] = []

    class Order(Recorder):
        def on_save(self, path: Path) -> None:
            happened.append(path.name)

        def on_eval(self, report: EvalReport) -> None:
            happened.append("validation")

    assert train.run(micro(token_folder, tmp_path, max_steps=2), callbacks=[Order()]) == 0
    assert happened == ["step-00000002", "validation"]


def test_ctrl_c_ends_a_validation(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches, scored = ValidationSet.batches, []

    def interrupted(self: ValidationSet, size: int) -> Iterator[Any]:
        for batch in batches(self, 1):
            scored.append(batch)
            if len(scored) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    config = micro(token_folder, tmp_path, max_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(ValidationSet, "batches", interrupted)
        assert train.run(config) == 130
    assert len(scored) == 2
    assert f"saved {tmp_path / 'step-00000002'}; resume with: " in capsys.readouterr().out
    recorder = Recorder()
    assert train.run(config, resume=True, callbacks=[recorder]) == 0
    assert "it has ended, and is validated once more" in capsys.readouterr().out
    assert [report.full for report in recorder.evals] == [True]
    assert recorder.steps == []


def test_a_trainer_that_was_interrupted_can_validate(token_folder: Path, tmp_path: Path) -> None:
    config = micro(token_folder, tmp_path, max_steps=4)
    trainer = launch._trainer(config, DataParallel(), [Interrupt(1)])
    trainer.train()
    assert trainer.interrupted
    assert trainer.evaluate().full


def test_nothing_is_lost_where_all_checkpoints_are_damaged(token_folder: Path, tmp_path: Path) -> None:
    config = micro(token_folder, tmp_path, max_steps=4, save_every=2)
    train.run(config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for path in tmp_path.glob("step-*/__0_0.distcp"):
        path.write_bytes(b"")
    for _ in range(2):  # also once they have been put aside
        with pytest.raises(ValueError, match=r"holds no intact checkpoint any more: choose another out, or remove it"):
            train.run(config, resume=True)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train.run(config)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_restores_the_random_generator(token_folder: Path, tmp_path: Path) -> None:
    """Nothing in a step draws from it today, so the test does, in a callback."""

    class Draw(Recorder):
        def on_step(self, report: StepReport) -> None:
            super().on_step(report)
            self.draws = [*getattr(self, "draws", []), float(torch.rand(()))]

    config, later = micro(token_folder, tmp_path, max_steps=6, save_every=3), Draw()
    whole = Draw()
    train.run(config, callbacks=[whole])
    shutil.rmtree(tmp_path / "step-00000006")
    train.run(config, resume=True, callbacks=[later])
    assert later.draws == whole.draws[3:]


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_checkpoint_is_named_and_the_one_before_used(
    token_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    config = full(token_folder, tmp_path)
    train.run(config)
    before = losses(tmp_path), tensors(tmp_path)
    path = tmp_path / "step-00000012" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 3] ^= 16
    path.write_bytes(content if damage == "flip" else content[:-100])
    capsys.readouterr()
    assert train.run(config, resume=True) == 0
    said = capsys.readouterr().out
    assert f"damaged checkpoint: {path}" in said
    assert f"resuming {tmp_path / 'step-00000009'}" in said
    assert losses(tmp_path) == before[0]
    again = tensors(tmp_path)
    assert all(torch.equal(again[name], value) for name, value in before[1].items())


def test_full_disk_ends_the_run_with_one_line(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_empty = checkpoint._make_empty

    def make_full(folder: Path) -> None:
        make_empty(folder)
        if folder.name.endswith("06"):
            (folder / "__0_0.distcp").symlink_to("/dev/full")

    monkeypatch.setattr(checkpoint, "_make_empty", make_full)
    with pytest.raises(train.CheckpointError) as caught:
        train.run(full(token_folder, tmp_path))
    failed = tmp_path / "step-00000006"
    assert str(caught.value) == f"could not save {failed}: the disk is full; earlier checkpoints are intact"
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith("tokenizer")}
    assert left == {"metrics.jsonl", "step-00000003", "train_config.json"}
    assert checkpoint.problem(tmp_path / "step-00000003") is None


def test_settings_may_change_on_resume(token_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.run(micro(token_folder, tmp_path, max_steps=3))
    recorder = Recorder()
    longer = micro(token_folder, tmp_path, max_steps=5, ema_decay=0.5, lr=1e-3)
    capsys.readouterr()
    assert train.run(longer, resume=True, callbacks=[recorder]) == 0
    changes = "max_steps 3 -> 5, lr 0.01 -> 0.001, ema_decay 0.0 -> 0.5"
    assert f"settings changed since the checkpoint: {changes}\n" in capsys.readouterr().out
    assert [r.step for r in recorder.steps] == [4, 5]
    assert any(name.startswith("ema.") for name in tensors(tmp_path))
    for changes, message in (({"seed": 1}, "other data"), ({"model": {"hidden_size": 48}}, "another model: expected")):
        with pytest.raises(ValueError, match=message):
            train.run(micro(token_folder, tmp_path, **changes), resume=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_export_writes_weights_and_average(token_folder: Path, tmp_path: Path, precision: str) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    train.run(micro(token_folder, run, precision=precision, ema_decay=0.5, max_steps=5))
    state = tensors(run)
    for ema in (False, True):
        out = tmp_path / f"hf-{ema}"
        train.export(run, out, ema=ema)
        model = DeepSeekV3.from_pretrained(out)
        for name, parameter in model.named_parameters():
            expected = state[f"{'ema' if ema else 'master'}.{name}"]
            assert parameter.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
            assert torch.equal(parameter, expected.to(parameter.dtype)), name
        biases = torch.stack([b for name, b in model.named_buffers() if name.endswith("gate.bias")])
        assert torch.equal(biases, state["expert_bias"])
        assert biases.abs().sum() > 0
    train.run(micro(token_folder, plain, max_steps=2))
    with pytest.raises(ValueError, match="holds no average of the weights: train with ema_decay above 0"):
        train.export(plain, tmp_path / "none", ema=True)
    with pytest.raises(ValueError, match="expected a training checkpoint"):
        train.export(tmp_path / "nothing", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_export_takes_the_tokenizer_of_the_run(
    token_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy beside the checkpoints, wherever the data is now; a checkpoint on its own takes the data's if it is the same."""
    data, out = tmp_path / "tokens", tmp_path / "run"
    shutil.copytree(token_folder, data)
    train.run(micro(data, out, max_steps=1))
    expected = (data / "tokenizer.json").read_bytes()
    shutil.copytree(out / "step-00000001", tmp_path / "alone")
    train.export(tmp_path / "alone", tmp_path / "of-data")
    other = json.loads(expected)
    other["model"]["vocab"] |= {"another": len(other["model"]["vocab"])}
    for folder in (data, tmp_path):
        (folder / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(
        ValueError, match=r"was trained with another tokenizer than that of .* and .*tokens: name the folder"
    ):
        train.export(tmp_path / "alone", tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"was trained with another tokenizer than that of .*tokens"):
        train.export(tmp_path / "alone", tmp_path / "wrong", tokenizer_dir=str(data))
    assert not (tmp_path / "wrong").exists()
    shutil.rmtree(data)
    (tmp_path / "tokenizer.json").unlink()
    train.export(out, tmp_path / "of-run")
    for name in ("of-data", "of-run"):
        assert (tmp_path / name / "tokenizer.json").read_bytes() == expected
    capsys.readouterr()
    train.export(tmp_path / "alone", tmp_path / "without")
    assert capsys.readouterr().err.startswith("dsv3: no tokenizer is exported: there is none beside ")
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_a_second_stage_resumes_without_the_first(token_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train.run(micro(token_folder, first, max_steps=1))
    config = micro(token_folder, second, max_steps=4, init_from=str(first), model={}, save_every=1)
    assert train.run(config, callbacks=[Interrupt(2)]) == 130
    shutil.rmtree(first)
    for path in checkpoint.find(second).glob("*.distcp"):  # the newest
        path.write_bytes(b"")
    assert len(checkpoint.complete(second)) == 2
    assert train.run(config, resume=True) == 0


def test_a_resume_command_works_whatever_the_folder_is_called(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lr=1" / "a run"
    assert train.run(micro(token_folder, out, max_steps=3), callbacks=[Interrupt(1)]) == 130
    said = capsys.readouterr().out
    words = shlex.split(said[said.index("resume with: ") :])
    arguments = words[words.index("train") :]
    assert arguments == ["train", str(out / "train_config.json"), "--resume"]
    assert _run(arguments) == 0
    assert f"export '{out}' '{out}-hf'" in capsys.readouterr().out


def test_what_ranks_opened_is_closed_however_a_run_ends(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(DataParallel, "close", lambda self: closed.append("closed"))
    assert train.run(micro(token_folder, tmp_path / "a", max_steps=3), callbacks=[Interrupt(1)]) == 130
    assert train.run(micro(token_folder, tmp_path / "a", max_steps=3), resume=True) == 0
    assert train.run(micro(token_folder, tmp_path / "b", lr=1e30, warmup_steps=0, max_skips=2)) == 1
    assert closed == ["closed"] * 3


def test_a_checkpoint_is_read_once_to_check_it(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may hold terabytes."""
    checked: list[Path] = []
    problem = checkpoint.problem
    monkeypatch.setattr(checkpoint, "problem", lambda found: checked.append(found) or problem(found))
    assert train.run(micro(token_folder, tmp_path / "a", max_steps=2)) == 0
    assert train.run(micro(token_folder, tmp_path / "a", max_steps=3), resume=True) == 0
    assert train.run(micro(token_folder, tmp_path / "b", max_steps=1, init_from=str(tmp_path / "a"), model={})) == 0
    assert checked == [tmp_path / "a" / "step-00000002", tmp_path / "a" / "step-00000003"]


@pytest.mark.parametrize("cut", ['{"step": 2', '{"step": 2}'])
def test_a_line_cut_short_does_not_join_the_next(cut: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + cut)
    metrics = MetricsFile(path, resume_after=2)
    metrics.on_eval(EvalReport(2, 1.0, 1.0, 7, True))
    metrics.on_end(None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_metrics_are_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.on_eval(EvalReport(3, float("nan"), float("inf"), 7, True))
    metrics.on_end(None)
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["validation"]["nats"] is None
