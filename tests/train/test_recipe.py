"""The published recipe where no other test looks: defaults of a run, dtypes of the optimizer's state, where things live."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3 import DeepSeekV3, train
from dsv3.config import Config
from dsv3.inference.cache import PAGE, allocate_cache
from dsv3.parallel.data import DataParallel
from dsv3.train import checkpoint, optimizer
from dsv3.train.balance import ExpertBias
from dsv3.train.buffers import ParamBuffers
from dsv3.train.config import TrainConfig
from dsv3.train.data import TokenDataset
from dsv3.train.ema import Ema
from tests.train.common import Recorder, micro


def test_defaults_are_the_published_recipe() -> None:
    """Report 4.2: AdamW 0.9/0.95, decay 0.1, clip 1.0, 4K sequences, 2000 warm-up steps, FIM 0.1, alpha 1e-4, gamma 1e-3."""
    c = TrainConfig(max_steps=1)
    assert (c.beta1, c.beta2, c.weight_decay, c.clip) == (0.9, 0.95, 0.1, 1.0)
    assert (c.lr, c.lr_schedule, c.warmup_steps, c.seq_len) == (2.2e-4, "v3", 2000, 4096)
    assert (c.fim_rate, c.mtp_weight, c.mtp_weight_final) == (0.1, 0.3, 0.1)
    assert (c.balance_alpha, c.gamma, c.max_skips) == (1e-4, 1e-3, 10)
    assert c.precision == "bf16"


def test_settings_reach_the_optimizer(token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """betas, decay and the schedule's learning rate are those of the config, not of the code that is called."""
    seen = []
    real = optimizer.ops.adamw
    monkeypatch.setattr(optimizer.ops, "adamw", lambda *args: (seen.append(args), real(*args))[1])
    config = micro(
        token_folder, tmp_path, max_steps=2, beta1=0.8, beta2=0.7, eps=1e-6, weight_decay=0.3,
        lr_schedule="constant", warmup_steps=0,
    )  # fmt: skip
    assert train.run(config) == 0
    assert len(seen) == 2
    for args in seen:
        assert float(args[5]) == pytest.approx(1e-2)
        assert set(args[9]) == {0.3, 0.0}
        assert args[10:13] == (0.8, 0.7, 1e-6)


def test_state_has_the_dtypes_of_the_recipe(device: torch.device) -> None:
    """Weights bf16; master weights and gradients fp32; both moments bf16; average and routing bias fp32, on CPU and device."""
    config = Config.preset("tiny")
    model = DeepSeekV3(config, device=device, dtype=torch.bfloat16).init_weights()
    buffers = ParamBuffers(model)
    for segment in buffers.segments():
        assert segment.weight is not None
        assert segment.weight.dtype == torch.bfloat16
        assert segment.master.dtype == segment.main_grad.dtype == torch.float32
        assert segment.exp_avg.dtype == segment.exp_avg_sq.dtype == torch.bfloat16
    ema = Ema(buffers, 0.9)
    assert {(a.device.type, a.dtype) for a in ema.averages} == {("cpu", torch.float32)}
    bias = ExpertBias(model).bias
    assert (bias.dtype, bias.device.type) == (torch.float32, device.type)
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace + config.num_nextn_predict_layers
    assert tuple(bias.shape) == (moe_layers, config.n_routed_experts)


def test_documents_are_packed_without_a_mask(token_folder: Path) -> None:
    """Windows run across document borders: rows hold several beginnings, and no row is padded."""
    dataset = TokenDataset(token_folder, 1024)
    rows = dataset.batch(0, dataset.windows_per_epoch)
    special = json.loads((token_folder / "index.json").read_text())["special"]
    assert rows.shape[1] == 1025
    assert ((rows[:, 1:] == special["bos"]) & (rows[:, :-1] == special["eos"])).any()
    assert not (rows == 2).any(), "<|pad|> has id 2"


def test_token_files_are_memory_mapped(token_folder: Path) -> None:
    tokens = TokenDataset(token_folder, 32)._split.tokens
    assert isinstance(tokens, np.memmap)
    assert tokens.mode == "r"


def test_the_cache_holds_576_values_a_token_in_pages_of_64() -> None:
    config = Config.preset("671b")
    assert (PAGE, config.latent_dim) == (64, 576)
    cache = allocate_cache(config, 3, layers=config.num_blocks, device=torch.device("meta"), dtype=torch.bfloat16)
    assert [tuple(c.shape) for c in cache] == [(3, 64, 1, 576)] * 62  # 61 layers and MTP's
    assert sum(c[0, 0].nbytes for c in cache[:61]) == 70272  # bytes a token, as published
    cache = allocate_cache(config, 3, layers=config.num_blocks, device=torch.device("meta"), dtype="fp8")
    assert [(tuple(c.shape), c.dtype) for c in cache] == [((3, 64, 1, 656), torch.uint8)] * 62


def test_the_bias_follows_the_load_of_the_whole_batch(token_folder: Path, tmp_path: Path) -> None:
    """One update a step, by gamma, from the sum over the micro-batches: not one a micro-batch, nor from the last one."""
    recorder = Recorder()
    assert train.run(micro(token_folder, tmp_path, max_steps=1, gamma=0.25, micro_batch=2), callbacks=[recorder]) == 0
    load = recorder.steps[0].expert_load.double()
    assert load.sum(-1).tolist() == [8 * 32 * 2] * 2
    state = {"expert_bias": torch.empty(2, 4)}
    checkpoint.load(checkpoint.find(tmp_path), state, parallel=DataParallel())
    assert torch.equal(state["expert_bias"], 0.25 * torch.sign(load.mean(-1, keepdim=True) - load).float())


def test_dsv3_train_under_torchrun(token_folder: Path, tmp_path: Path) -> None:
    """The command itself: two processes, one run, one set of records."""
    config = micro(token_folder, tmp_path / "run", max_steps=2)
    (tmp_path / "run.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dsv3"]
    arguments = [*command, "train", str(tmp_path / "run.json"), "gamma=0.5"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert rows[0]["gamma"] == 0.5
    assert (checkpoint.find(tmp_path / "run") / "__1_0.distcp").is_file(), "both processes have written their part"
