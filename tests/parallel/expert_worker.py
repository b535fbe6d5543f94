"""What the expert-parallel test starts under torchrun: runs of four processes, the first step of eight, and of four that share
a GPU. Arguments: tokens, out, and on a GPU the transport."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3 import train
from dsv3.model import DeepSeekV3
from dsv3.parallel.data import DataParallel
from dsv3.train import launch
from dsv3.train.config import TrainConfig
from dsv3.train.trainer import Trainer
from tests.train.common import MODEL, micro, same_losses


def trainer_of(config: TrainConfig, parallel: DataParallel) -> Trainer:
    return launch._trainer(config, parallel, [])


def first_step(trainer: Trainer) -> dict[str, dict[str, Tensor] | float]:
    """Master weights at the start, the reduced gradients of the first step and their norm."""
    buffers = trainer.buffers
    start = {slot.name: slot.view(group.master).to("cpu", copy=True) for slot, group in buffers.slots()}
    trainer._accumulate_gradients(trainer.config.batch, 0.3)
    trainer.parallel.reduce_gradients(buffers)
    grads = {slot.name: slot.view(group.main_grad).to("cpu", copy=True) for slot, group in buffers.slots()}
    return {"start": start, "grads": grads, "norm": float(trainer.parallel.grad_norm(buffers))}


def assert_whole_models_are_cut(trainer: Trainer) -> None:
    """A model that has all its weights becomes, once split, the one that was never whole."""
    model = DeepSeekV3(trainer.model.config, dtype=torch.float32).init_weights(trainer.config.seed)
    trainer.parallel.apply(model)
    expected = trainer.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def run_config(tokens: Path, out: Path, ep: int) -> TrainConfig:
    return same_losses(tokens, out, ep=ep, micro_batch=2, max_steps=10, eval_every=5, eval_sequences=6)


def eight_config(tokens: Path, out: Path, ep: int) -> TrainConfig:
    model = {**MODEL, "initializer_range": 0.1, "n_routed_experts": 8}
    return same_losses(tokens, out, ep=ep, micro_batch=1, max_steps=1, model=model)


def gpu_config(tokens: Path, out: Path, ep: int, transport: str = "auto") -> TrainConfig:
    return same_losses(tokens, out, ep=ep, ep_transport=transport, device="cuda", micro_batch=2, max_steps=1)


def resumed_config(tokens: Path, out: Path) -> TrainConfig:
    return micro(tokens, out, ep=2, micro_batch=2, max_steps=6, save_every=3, ema_decay=0.9, fim_rate=0.5, gamma=0.01)


def fp8_config(tokens: Path, out: Path, ep: int) -> TrainConfig:
    return same_losses(tokens, out, ep=ep, batch=4, micro_batch=1, max_steps=3, precision="fp8")


def main() -> None:
    torch.set_num_threads(1)
    tokens, out = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3:]:
        parallel = DataParallel.start("cuda")
        trainer = trainer_of(gpu_config(tokens, out, 4, sys.argv[3]), parallel)
        assert trainer.parallel.buffer.transport == sys.argv[3]
        torch.save(first_step(trainer), out / f"first-4-{parallel.rank}.pt")
        parallel.stop()
        return
    parallel = DataParallel.start("cpu")
    if dist.get_world_size() == 8:
        torch.save(first_step(trainer_of(eight_config(tokens, out, 8), parallel)), out / f"first-8-{parallel.rank}.pt")
        parallel.stop()
        return
    for ep in (2, 4):
        config = run_config(tokens, out / f"ep{ep}", ep)
        trainer = trainer_of(config, parallel)
        assert_whole_models_are_cut(trainer)
        torch.save(first_step(trainer), out / f"first-{ep}-{parallel.rank}.pt")
        assert train.run(config) == 0

    fp8 = fp8_config(tokens, out / "fp8", 4)
    assert trainer_of(fp8, parallel).parallel.buffer.wire_dtype == torch.float8_e4m3fn
    assert train.run(fp8) == 0

    whole, parts = (resumed_config(tokens, out / name) for name in ("whole", "parts"))
    assert train.run(whole) == 0
    if parallel.is_first:
        shutil.copytree(whole.out, parts.out, ignore=shutil.ignore_patterns("step-00000006"))
    dist.barrier()
    assert train.run(parts, resume=True) == 0
    parallel.stop()


if __name__ == "__main__":
    main()
