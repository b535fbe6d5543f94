"""From a TrainConfig to a finished run, alone or under torchrun; and from its checkpoint to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv3.comm.alive import RankLost, naming_lost_ranks
from dsv3.config import PRESETS, Config
from dsv3.files import write_whole
from dsv3.model import DeepSeekV3
from dsv3.model.transformer import RECOMPUTE
from dsv3.parallel.data import DataParallel, ranks_here
from dsv3.parallel.expert import ExpertParallel
from dsv3.terminal import command
from dsv3.tokenizer import load_tokenizer
from dsv3.train import checkpoint
from dsv3.train.config import TrainConfig, check_key
from dsv3.train.data import BatchReader, TokenDataset, ValidationSet, read_index
from dsv3.train.gradients import why_no_graphs
from dsv3.train.metrics import Callback, MetricsFile, TensorBoard
from dsv3.train.tokenizer import tokenizer_sha
from dsv3.train.trainer import Diverged, Trainer
from dsv3.weights.writer import TOKENIZER_FILES

CONFIG_FILE = "train_config.json"


def run(config: TrainConfig, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> int:
    """Trains, and returns the exit code: 0 at the end, 1 if the run diverged or lost a rank, 130 if interrupted (and saved).

    Under torchrun it joins the process group (NCCL on GPUs, gloo on CPUs). Raises ValueError, before anything is
    written, for a config that does not fit the data or the machine, and for a folder that already holds checkpoints
    unless `resume` is set; CheckpointError (a ValueError) for a disk that fills up.
    """
    parallel = DataParallel.start(config.device)
    try:
        with naming_lost_ranks():
            return _run(config, parallel, resume, callbacks)
    except RankLost as error:
        left = (rank for rank in range(parallel.world) if rank not in error.ranks)
        if parallel.rank == next(left):  # one line from all that are left
            saved = next(iter(checkpoint.complete(Path(config.out))), None)  # maybe just now, which no trainer heard of
            print(f"dsv3: {error}; last checkpoint: {saved}", file=sys.stderr)
        return 1
    finally:
        parallel.stop()


def _run(config: TrainConfig, parallel: DataParallel, resume: bool, callbacks: Sequence[Callback]) -> int:
    out = Path(config.out)
    held, begun = parallel.first(lambda: (checkpoint.holds_any(out), checkpoint.model_config(out)))
    if not resume and held:
        raise ValueError(f"{out} already holds checkpoints: pass --resume to continue them, or choose another out")
    _seed(config, parallel)
    trainer = _trainer(config, parallel, callbacks, begun=begun)
    resumed = resume and trainer.resume()
    if resumed:
        done = "; it has ended, and is validated once more" if trainer.progress >= 1 else ""
        trainer.say(f"resuming {trainer.last_checkpoint}{done}")
    elif held:
        raise ValueError(f"{out} holds no intact checkpoint any more: choose another out, or remove it to start anew")
    elif resume:
        trainer.say(f"no checkpoint in {out} yet: starting from the beginning")
    if config.init_from and not resumed:
        trainer.start_from(Path(config.init_from), keep_optimizer=config.init_optimizer == "keep")
    parallel.first(lambda: _begin_records(config, trainer))
    code = 0
    try:
        trainer.train()
    except Diverged as error:
        trainer.say(str(error))
        code = 1
    if trainer.interrupted:
        again = f"{_launcher(parallel)} train {shlex.quote(str(out / CONFIG_FILE))} --resume"
        trainer.say(f"saved {trainer.last_checkpoint}; resume with: {again}")
        code = 130
    trainer.parallel.close()
    return code


def _launcher(parallel: DataParallel) -> str:
    """What starts as many processes as these."""
    if parallel.world == 1:
        return command()
    run, nodes = command("torchrun", "torch.distributed.run"), parallel.world // ranks_here()
    return f"{run} {f'--nnodes {nodes} ' if nodes > 1 else ''}--nproc-per-node {ranks_here()} -m dsv3"


def export(checkpoint_dir: str | Path, out: str | Path, *, ema: bool = False, tokenizer_dir: str | None = None) -> None:
    """Writes a training checkpoint (or the newest one in a run's folder) in the Hugging Face layout.

    ema: the averaged weights instead of the last ones. tokenizer_dir: None takes the tokenizer that the run kept, or that of
    its data; where neither is there, one line says so. Weights get the dtype that the run trained in. Raises ValueError for a
    damaged checkpoint, a tokenizer that is not the run's, or if no average was kept.
    """
    found = checkpoint.find(Path(checkpoint_dir))
    checkpoint.check(found)
    info = checkpoint.read_info(found)
    config = Config.from_dict(info["config"])
    if tokenizer_dir and tokenizer_sha(load_tokenizer(tokenizer_dir)) != info["data"]["tokenizer_sha"]:
        raise ValueError(f"{found} was trained with another tokenizer than that of {tokenizer_dir}")
    tokenizer_dir = tokenizer_dir or _tokenizer_of(found, info)
    weights = "ema" if ema else "master"
    stored = checkpoint.stored_names(found)
    if ema and not any(name.startswith("ema.") for name in stored):
        raise ValueError(f"{found} holds no average of the weights: train with ema_decay above 0")
    model = DeepSeekV3(config, dtype=_dtype(info["train_config"]["precision"]))
    parameters = dict(model.named_parameters())
    values = {name: torch.empty(p.shape) for name, p in parameters.items()}
    biases = [m for name, m in model.named_modules() if name.endswith("moe.gate") and m.bias is not None]
    state: checkpoint.State = {weights: values}
    if biases:
        state["expert_bias"] = torch.empty(len(biases), config.n_routed_experts)
    checkpoint.load(found, state, parallel=DataParallel())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values.pop(name))
        for gate, row in zip(biases, state.get("expert_bias", ()), strict=True):
            gate.bias.copy_(row)
    model.save_pretrained(out, tokenizer_dir=tokenizer_dir)


def _keep_tokenizer(data: Path, out: Path) -> None:
    """Copies the data's tokenizer beside the checkpoints: the data may move, or be made anew with another."""
    for name in TOKENIZER_FILES:
        if (data / name).is_file():
            write_whole(out / name, (data / name).read_bytes())


def _tokenizer_of(found: Path, info: dict[str, Any]) -> str | None:
    """The folder with the tokenizer that a checkpoint's run was trained with: the copy beside it, or the data's."""
    there = [f for f in (found.parent, Path(info["train_config"]["data"])) if (f / "tokenizer.json").is_file()]
    if not there:
        data = info["train_config"]["data"]
        print(f"dsv3: no tokenizer is exported: there is none beside {found}, nor at {data}", file=sys.stderr)
        return None
    for folder in there:
        if tokenizer_sha(load_tokenizer(folder)) == info["data"]["tokenizer_sha"]:
            return str(folder)
    others = " and ".join(map(str, there))
    raise ValueError(
        f"{found} was trained with another tokenizer than that of {others}: name the folder of the right one"
    )


def _trainer(
    config: TrainConfig, parallel: DataParallel, callbacks: Sequence[Callback], *, begun: dict[str, Any] | None = None
) -> Trainer:
    """begun: the model's config, where the run has checkpoints already."""
    if not config.data:
        raise ValueError("data must be a folder made by `dsv3 tokenize`, set data=FOLDER")
    model_config = _model_config(config, begun)
    if config.seq_len > model_config.max_position_embeddings:
        limit = model_config.max_position_embeddings
        raise ValueError(
            f"seq_len {config.seq_len} is longer than the model's max_position_embeddings {limit}: set seq_len={limit}, or less"
        )
    sizes = {"seq_len": config.seq_len, "vocab_size": model_config.vocab_size}
    dataset = TokenDataset(config.data, seed=config.seed, fim_rate=config.fim_rate, **sizes)
    has_validation = dataset.index.splits["valid"].num_bytes > 0
    if config.cuda_graphs:
        reason = why_no_graphs(parallel.device, _dtype(config.precision), config.ep)
        if reason is not None:
            raise ValueError(f"cuda_graphs needs a Hopper GPU, precision bf16 or fp8, and ep 1: {reason}")
    if config.ep > 1:
        if not any(map(model_config.is_moe, range(model_config.num_blocks))):
            raise ValueError(f"ep {config.ep} splits routed experts, and no layer of this model has any")
        wire = _wire_dtype(config, model_config)
        parallel = ExpertParallel.split(
            parallel, config.ep, model_config.n_routed_experts, wire_dtype=wire, transport=config.ep_transport
        )
    return Trainer(
        _model(model_config, config, parallel),
        config,
        BatchReader(dataset, rank=parallel.rank, world_size=parallel.world),
        validation=ValidationSet(config.data, **sizes) if has_validation else None,
        parallel=parallel,
        callbacks=callbacks,
    )


def _model(model_config: Config, config: TrainConfig, parallel: DataParallel) -> DeepSeekV3:
    """This rank's part of a new model; experts of other ranks never take memory here."""
    split = isinstance(parallel, ExpertParallel)
    recompute = RECOMPUTE if config.recompute else frozenset()
    device = "meta" if split else parallel.device  # torch takes half a second for its first tensor on meta
    model = DeepSeekV3(model_config, device=device, dtype=_dtype(config.precision), recompute=recompute)
    if split:
        parallel.apply(model)
        model.to_empty(device=parallel.device)
    model.set_precision("fp8" if config.precision == "fp8" else "bf16")
    return model.init_weights(seed=config.seed, first_expert=parallel.experts.start if split else 0)


def _model_config(config: TrainConfig, begun: dict[str, Any] | None = None) -> Config:
    """The preset's, the folder's or the first stage's config, with the data's ids of the first and last token of a document,
    and the keys of config.model replaced. A run that has `begun` needs its first stage no more."""
    if config.init_from and begun is not None:
        base = Config.from_dict(begun)
    elif config.init_from:
        base = Config.from_dict(checkpoint.read_info(checkpoint.find(Path(config.init_from)))["config"])
    elif config.preset in PRESETS:
        base = Config.preset(config.preset)
    elif not Path(config.preset).is_dir():
        known = ", ".join(PRESETS)
        raise ValueError(f"preset must be one of {known}, or a folder with a config.json, got {config.preset!r}")
    else:
        base = Config.from_pretrained(config.preset)
    for key in config.model:
        check_key(key, Config, "model.")
    dtype = str(_dtype(config.precision)).removeprefix("torch.")
    special = read_index(config.data).special
    given = {"dtype": dtype, "bos_token_id": special.bos, "eos_token_id": special.eos}
    return dataclasses.replace(base, **{**given, **config.model})


def _begin_records(config: TrainConfig, trainer: Trainer) -> None:
    """The files that every run leaves beside its checkpoints."""
    out, step = Path(config.out), trainer.step
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_FILE, json.dumps(config.to_dict(), indent=1) + "\n")
    _keep_tokenizer(Path(config.data), out)
    records: list[Callback] = [MetricsFile(out / "metrics.jsonl", resume_after=step, load_every=config.log_load_every)]
    if config.tensorboard:
        try:
            records.append(TensorBoard(out / "tensorboard", resume_after=step))
        except ImportError:
            trainer.say("no TensorBoard events: the tensorboard package is not installed")
    trainer.callbacks[:0] = records


def _seed(config: TrainConfig, parallel: DataParallel) -> None:
    torch.manual_seed(config.seed)
    if config.deterministic and parallel.device.type == "cuda":
        # torch refuses deterministic cuBLAS calls without this, and reads it when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _wire_dtype(config: TrainConfig, model_config: Config) -> torch.dtype | None:
    """FP8 where the experts compute in it."""
    fits = model_config.hidden_size % 16 == 0 and model_config.moe_intermediate_size % 16 == 0
    return torch.float8_e4m3fn if config.precision == "fp8" and fits else None


def _dtype(precision: str) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16
