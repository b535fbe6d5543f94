"""Whole runs of a micro model: learning, accumulation, skipped steps, reports a step late, time limits, second stages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv3 import train
from dsv3.config import Config
from dsv3.graphs import Graphs
from dsv3.model import Batch, DeepSeekV3, Loss
from dsv3.ops import registry
from dsv3.parallel.data import DataParallel
from dsv3.train import checkpoint
from dsv3.train.buffers import ParamBuffers
from dsv3.train.data import BatchReader, TokenDataset
from dsv3.train.gradients import Gradients
from dsv3.train.trainer import Diverged, Trainer
from tests.train.common import MODEL, Recorder, micro, same_losses, with_and_without_graphs


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def make_trainer(tokens: Path, out: Path, **changes: object) -> Trainer:
    config = micro(tokens, out, **changes)
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    model_config = dataclasses.replace(Config.preset("tiny"), **MODEL)
    model = DeepSeekV3(model_config, device=config.device, dtype=dtype).init_weights(seed=0)
    model.set_precision("fp8" if config.precision == "fp8" else "bf16")
    reader = BatchReader(TokenDataset(config.data, config.seq_len, seed=config.seed, fim_rate=config.fim_rate))
    return Trainer(model, config, reader, callbacks=[Recorder()])


def break_loss(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool]) -> None:
    """Turns the total loss of the calls (one a micro-batch, counted from 0) for which `broken` holds into NaN."""
    real, calls = DeepSeekV3.loss, iter(range(10**6))

    def loss(self: DeepSeekV3, batch: Batch, **kwargs: float) -> Loss:
        result = real(self, batch, **kwargs)
        if torch.is_grad_enabled() and broken(next(calls)):
            result.total.data.mul_(float("nan"))
        return result

    monkeypatch.setattr(DeepSeekV3, "loss", loss)


def test_run_learns_and_records(token_folder: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    config = micro(
        token_folder, tmp_path, max_steps=40, save_every=15, keep=2, eval_every=15, eval_sequences=8, log_load_every=10
    )
    assert train.run(config, callbacks=[recorder]) == 0
    steps = recorder.steps
    assert [r.step for r in steps] == list(range(1, 41))
    assert steps[0].ce == pytest.approx(math.log(MODEL["vocab_size"]), rel=0.02)
    assert steps[-1].ce < 0.45 * steps[0].ce
    assert steps[-1].mtp < 0.45 * steps[0].mtp
    for r in steps:
        assert r.loss == pytest.approx(r.ce + r.mtp_weight * r.mtp + r.balance, rel=1e-6)
        assert r.expert_load.sum(-1).tolist() == [8 * 32 * 2] * 2  # one MoE layer and MTP's, two experts a token
        assert r.tokens == r.step * 8 * 32
        assert r.tokens_per_s > 0
        assert not r.skipped
    switch = math.ceil(40 * 10 / 14.8)  # the first step that begins after the fraction 10 / 14.8
    assert [r.mtp_weight for r in steps] == [0.3] * switch + [0.1] * (40 - switch)
    tokens_per_byte = 1 / TokenDataset(token_folder, 32).bytes_per_token
    assert steps[5].bits_per_byte == pytest.approx(steps[5].ce / math.log(2) * tokens_per_byte)
    assert [(e.step, e.full) for e in recorder.evals] == [(15, False), (30, False), (40, True)]
    assert recorder.evals[-1].bits_per_byte == pytest.approx(steps[-1].bits_per_byte, rel=0.3)
    assert recorder.saved == ["step-00000015", "step-00000030", "step-00000040"]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == recorder.saved[1:]
    rows = [row for row in lines(tmp_path) if "validation" not in row]
    assert [row["loss"] for row in rows] == recorder.losses
    assert [row["step"] for row in rows if "expert_load" in row] == [1, 10, 20, 30, 40]
    assert json.loads((tmp_path / "train_config.json").read_text()) == config.to_dict()


def test_reports_come_a_step_late(token_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(token_folder, tmp_path, max_steps=5)
    issued: list[tuple[int, int]] = []
    trainer.callbacks[0].on_step = lambda report: issued.append((report.step, trainer.step))
    trainer.train()
    assert issued == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]


def test_run_in_fp8_learns(token_folder: Path, tmp_path: Path) -> None:
    """Beside the same run in bf16, whose weights, data and settings it has."""
    curves = {}
    for precision in ("bf16", "fp8"):
        recorder = Recorder()
        out = tmp_path / precision
        assert train.run(micro(token_folder, out, max_steps=40, precision=precision), callbacks=[recorder]) == 0
        assert recorder.steps[-1].ce < 0.45 * recorder.steps[0].ce
        assert not any(r.skipped for r in recorder.steps)
        curves[precision] = [r.ce for r in recorder.steps]
    assert curves["bf16"] != curves["fp8"]
    assert curves["fp8"] == pytest.approx(curves["bf16"], rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_step_waits_for_nothing(token_folder: Path, tmp_path: Path, precision: str) -> None:
    """torch raises at every call that makes the host wait for the GPU; EMA and expert bias are on.

    In bf16 and FP8: the fp32 product of experts has no implementation on a GPU but one that reads the offsets on the host.
    """
    trainer = make_trainer(token_folder, tmp_path, device="cuda", precision=precision, ema_decay=0.9)
    for _ in range(3):  # tables, workspaces and the like are made once
        trainer._issue_step(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer._issue_step(False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer._drain()
    assert [r.step for r in trainer.callbacks[0].steps] == list(range(1, 9))


@pytest.mark.cuda
@pytest.mark.parametrize(("precision", "recompute"), [("bf16", False), ("fp8", False), ("fp8", True)])
def test_steps_in_graphs_are_the_steps_without(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, recompute: bool
) -> None:
    """Bit for bit, with micro-batches, batches that grow, and MTP that comes in, after which they are captured again."""
    captured, capture = [], Graphs._capture
    monkeypatch.setattr(Graphs, "_capture", lambda *args: captured.append(args) or capture(*args))
    curves = []
    try:
        for config in with_and_without_graphs(token_folder, tmp_path, precision=precision, recompute=recompute):
            recorder = Recorder()
            assert train.run(config, callbacks=[recorder]) == 0
            curves.append(recorder.curve)
            assert bool(captured) == (config.cuda_graphs is None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert curves[0] == curves[1]
    assert curves[0][0][2] == 0 < curves[0][-1][2]


def test_graphs_of_steps_need_a_gpu(token_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cuda_graphs needs a Hopper GPU, precision bf16 or fp8, and ep 1: references run"
    ):
        train.run(micro(token_folder, tmp_path / "run", cuda_graphs=True))
    assert not (tmp_path / "run").exists()


def test_where_a_reference_runs_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may ask the device."""
    model = DeepSeekV3(dataclasses.replace(Config.preset("tiny"), **MODEL)).init_weights(seed=0)
    ParamBuffers(model)
    gradients = Gradients(model, balance_alpha=0.0, cuda_graphs=True)
    real = model.loss
    monkeypatch.setattr(registry, "FALLBACKS", {("rope", "odd"): 1})
    monkeypatch.setattr(model, "loss", lambda *args, **more: registry.note("rope", "odd") or real(*args, **more))
    for _ in range(3):
        losses, _ = gradients.add(torch.randint(9, (2, 9)), 1, size=2, mtp_weight=0.0)
    assert losses.isfinite().all()


def test_micro_batches_change_nothing(token_folder: Path, tmp_path: Path) -> None:
    losses = []
    for size in (8, 2):
        recorder = Recorder()
        # Half the learning rate: with the whole one, on one kind of CPU, rounding flips a token's choice of experts at step 39.
        train.run(same_losses(token_folder, tmp_path / str(size), micro_batch=size, lr=5e-4), callbacks=[recorder])
        losses.append(recorder.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_recomputation_changes_nothing(token_folder: Path, tmp_path: Path) -> None:
    plain, again = Recorder(), Recorder()
    train.run(micro(token_folder, tmp_path / "plain"), callbacks=[plain])
    train.run(micro(token_folder, tmp_path / "again", recompute=True), callbacks=[again])
    assert again.losses == plain.losses


def test_recompute_reaches_the_model(token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[frozenset[str]] = []
    monkeypatch.setattr(DeepSeekV3, "set_recompute", lambda self, what: asked.append(what))
    train.run(micro(token_folder, tmp_path, recompute=True, max_steps=1))
    assert asked == [frozenset({"norm", "mla_up"})]


def test_batch_ramp_and_bf16(token_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(token_folder, tmp_path, precision="bf16", batch_start=4, batch_ramp_tokens=1024)
    trainer.train()
    reports = trainer.callbacks[0].steps
    assert [r.batch for r in reports] == [4] * 8 + [8] * 4
    assert trainer.reader.position == sum(r.batch for r in reports)
    assert reports[-1].loss < 0.8 * reports[0].loss
    assert all(p.dtype == torch.bfloat16 for p in trainer.model.parameters())
    assert all(b.dtype == torch.float32 for b in trainer.model.buffers())


def test_skipped_steps_are_counted_and_harmless(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4, 5 and 9 have one broken micro-batch of two; weights are those of the same run without these steps."""
    bad_steps = {4, 5, 9}
    break_loss(monkeypatch, lambda call: call // 2 + 1 in bad_steps and call % 2 == 1)
    trainer = make_trainer(token_folder, tmp_path, ema_decay=0.9, lr_schedule="constant", warmup_steps=0)
    snapshots: dict[int, torch.Tensor] = {}
    update = trainer.bias.update

    def spy(*args: object) -> None:
        update(*args)
        snapshots[trainer.step + 1] = torch.cat([g.master.clone() for g in trainer.buffers.groups])

    trainer.bias.update = spy
    trainer.train()
    reports = trainer.callbacks[0].steps
    assert [r.step for r in reports if r.skipped] == sorted(bad_steps)
    assert [r.skipped_total for r in reports] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert max(r.skipped_in_row for r in reports) == 2
    assert math.isnan(reports[3].loss)
    assert float(trainer.optimizer.step_count) == 12 - 3
    for step in range(2, 13):
        assert torch.equal(snapshots[step], snapshots[step - 1]) == (step in bad_steps)
    assert trainer.reader.position == 12 * 8, "a skipped step has used its data"


def test_too_many_skips_stop_the_run_with_the_checkpoint_intact(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_loss(monkeypatch, lambda call: call // 2 + 1 > 5)
    config = micro(token_folder, tmp_path, max_steps=100, save_every=4)
    assert train.run(config) == 1
    said = capsys.readouterr().out
    assert "loss or gradient not finite in steps 6 to 15: stopped; last checkpoint: " in said
    saved = checkpoint.find(tmp_path)
    assert f"last checkpoint: {saved}" in said
    assert checkpoint.problem(saved) is None
    rows = lines(tmp_path)
    assert rows[-1]["skipped_in_row"] == 10
    assert rows[-1]["loss"] is None, "NaN is no JSON"
    trainer = make_trainer(token_folder, tmp_path, max_steps=100)
    assert trainer.resume()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert float(trainer.optimizer.step_count) == 5
    with pytest.raises(Diverged):
        make_trainer(token_folder, tmp_path / "other", max_steps=100).train()


def test_time_limit_anneals_to_the_end(token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every look at it takes 25 ms, so that the machine's speed does not matter."""
    looks = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: 1000 + 0.025 * next(looks), perf_counter=time.perf_counter)
    monkeypatch.setattr("dsv3.train.trainer.time", clock)
    recorder = Recorder()
    config = micro(token_folder, tmp_path, max_steps=10**6, max_seconds=2.0, lr_final=0.0, warmup_steps=1)
    assert train.run(config, callbacks=[recorder]) == 0
    rates, progress = [r.lr for r in recorder.steps], [r.progress for r in recorder.steps]
    assert len(rates) > 5
    assert rates == sorted(rates, reverse=True)
    assert progress == sorted(progress)
    assert rates[-1] < 0.25 * config.lr
    assert 2.0 <= recorder.steps[-1].seconds < 2.5


def test_second_stage_extends_the_context(token_folder: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert train.run(micro(token_folder, first, ema_decay=0.9)) == 0
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
    for kept in ("keep", "fresh"):
        out = tmp_path / kept
        recorder = Recorder()
        config = micro(
            token_folder,
            out,
            init_from=str(first),
            init_optimizer=kept,
            model={"rope_scaling": yarn},
            seq_len=96,
            max_steps=3,
            lr=1e-3,
            lr_schedule="constant",
            warmup_steps=0,
        )
        assert train.run(config, callbacks=[recorder]) == 0
        assert [r.step for r in recorder.steps] == [1, 2, 3]
        assert recorder.steps[0].ce < 4.5, "starts from what the first stage has learnt"
        info = checkpoint.read_info(checkpoint.find(out))
        assert info["config"]["rope_scaling"]["factor"] == 4
        assert info["config"]["hidden_size"] == MODEL["hidden_size"]
        state = {"optimizer": {"step_count": torch.zeros(())}}
        checkpoint.load(checkpoint.find(out), state, parallel=DataParallel())
        assert float(state["optimizer"]["step_count"]) == (15 if kept == "keep" else 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "found no nowhere"),
        ({"model": {"hidden_sze": 3}}, "training config key 'model.hidden_sze', did you mean 'model.hidden_size'?"),
        ({"model": {**MODEL, "extra": 3}}, "extra must be an object, got 3"),
        ({"model": {**MODEL, "vocab_size": 100}}, "vocab_size 100, found token"),
        ({"seq_len": 256}, "seq_len 256 is longer than the model's max_position_embeddings 128"),
        ({"preset": "enormous"}, "enormous"),
        ({"device": "cuda:99"}, "device 'cuda:99' was asked for, and torch finds "),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"init_from": "nowhere"}, "expected a training checkpoint"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    token_folder: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is compared below
        train.run(micro(token_folder, tmp_path / "out", **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_existing_run_is_not_overwritten(token_folder: Path, tmp_path: Path) -> None:
    config = micro(token_folder, tmp_path, max_steps=2)
    train.run(config)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds checkpoints: pass --resume"):
        train.run(config)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_tensorboard_is_optional(
    token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = micro(token_folder, tmp_path / "without", max_steps=2, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.run(config) == 0
    assert capsys.readouterr().out.count("no TensorBoard events") == 1
    scalars: list[tuple[str, float, int]] = []
    writer = types.SimpleNamespace(add_scalar=lambda *args: scalars.append(args), close=lambda: None)
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, purge_step: writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    assert train.run(micro(token_folder, tmp_path / "with", max_steps=2, tensorboard=True)) == 0
    assert {step for _, _, step in scalars} == {1, 2}
    assert {"train/loss", "train/lr", "train/load_imbalance", "validation/bits_per_byte"} <= {s[0] for s in scalars}


def test_tensorboard_events_are_written(token_folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train.run(micro(token_folder, tmp_path, max_steps=2, tensorboard=True)) == 0
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload()
    assert [event.step for event in written.Scalars("train/loss")] == [1, 2]
