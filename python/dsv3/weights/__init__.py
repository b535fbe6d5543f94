"""DeepSeek-V3 checkpoints in the Hugging Face layout: `load_pretrained` and `save_pretrained`."""

from __future__ import annotations

import dataclasses
import logging
import operator
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsv3.config import Config, read_object
from dsv3.model import DeepSeekV3
from dsv3.model.transformer import check_precision
from dsv3.ops.linear import Quantized
from dsv3.ops.registry import why_no_kernels
from dsv3.weights import writer
from dsv3.weights.reader import FLOATS, Reader
from dsv3.weights.table import EMBED, SCALE_SUFFIX, Local, mtp_copies, plan

__all__ = ["Local", "load_pretrained", "plan", "save_pretrained"]

log = logging.getLogger("dsv3")
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")


def load_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    mtp: bool = True,
    precision: str | None = None,
) -> DeepSeekV3:
    """A model from a checkpoint folder, tensor by tensor: nothing but its parameters is ever in memory.

    Of generation_config.json, where there is one, the end-of-sequence tokens count in generation beside those of config.json;
    saving the model writes it as it was.

    Where config.json promises MTP modules that the files lack, the model has none, and one warning says so. The path of a
    tokenizer.json in the folder is left in `model.tokenizer_path`, where generation finds it.

    Args:
        path: a folder with config.json and model.safetensors, or shards and model.safetensors.index.json.
        dtype: of the weights. None: that of the embedding in the files. "fp8": FP8 weights stay the bytes and scales of the
            files (`ops.Quantized`), for inference: no parameters, and not in the state dict; the rest is as with None.
        device: where the model is to be; not "meta".
        mtp: False leaves the MTP modules out.
        precision: how linear layers multiply, see DeepSeekV3.set_precision. With dtype "fp8", "fp8" multiplies the bytes of the
            files with activations in FP8, as the released model is served, and in bf16 what the files have so; "bf16"
            dequantises weights whenever they are used. Decoding steps of few tokens multiply the bytes with activations as they
            are in both, which differs from the dequantised model's own results by the rounding of its weights to bf16. None:
            "fp8" for such weights on a Hopper GPU, else "bf16".

    Raises:
        ValueError: something is missing, has another shape or dtype than config.json asks for, or is no whole
            safetensors file; the message names the file, what was expected and what was found.
    """
    folder = Path(path)
    _check_dtype(dtype)
    if precision is not None:
        check_precision(precision)
    if torch.device(device).type == "meta":
        raise ValueError(
            "expected a device that holds weights, got meta: DeepSeekV3(config, device='meta') needs no files"
        )
    if not folder.is_dir():
        raise ValueError(f"expected a checkpoint folder, found none at {folder}")
    config = Config.from_pretrained(folder)
    _check_quantization(folder, config)
    reader = Reader(folder)
    _warn_of_unexpected(config, reader)
    model = _build(_without_absent_mtp(config, reader, mtp), reader, dtype, device)
    tokenizer = folder / "tokenizer.json"
    if precision is None:
        precision = "fp8" if dtype == "fp8" and why_no_kernels(model.embed.weight.device) is None else "bf16"
    model.set_precision(precision, parameters=dtype != "fp8")
    model.tokenizer_path = tokenizer if tokenizer.is_file() else None
    model.generation_config = _generation_config(folder)
    return model


def save_pretrained(
    model: DeepSeekV3,
    path: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_dir: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Write `model` as a folder that transformers, vLLM, SGLang and `load_pretrained` open.

    The folder appears, or replaces an earlier one, only when everything is written; other files in it are kept.

    Args:
        max_shard_bytes: tensors are split over files of at most this size (a larger tensor has a file of its own).
        tokenizer_dir: a folder with tokenizer.json, and perhaps tokenizer_config.json, to copy; None: that of the folder from
            which the model came, if it had one.
        dtype: of the weights. None: as they are. "fp8": what the official checkpoint has in FP8 is quantised in blocks
            of 128 x 128, the rest is bf16. The gate's bias is always fp32.

    Raises:
        ValueError: bad arguments; `path` is a file, or a folder that holds folders.
        OSError: writing failed, for instance because the disk is full; `path` is as it was before.
    """
    _check_dtype(dtype)
    tensors = {name: operator.attrgetter(name)(model) for name in plan(model.config)}
    fp8 = dtype == "fp8" or (dtype is None and any(isinstance(t, Quantized) for t in tensors.values()))
    embed = tensors["embed.weight"]
    saved = {None: embed.dtype, "fp8": torch.bfloat16}.get(dtype, dtype)
    config = dataclasses.replace(
        model.config,
        dtype=str(saved).removeprefix("torch."),
        quantization_config=(model.config.quantization_config or writer.QUANTIZATION) if fp8 else None,
        # It names Python files of the folder that the config came from.
        extra={key: value for key, value in model.config.extra.items() if key != "auto_map"},
    )
    if not config.is_known_elsewhere:
        gate = f"scoring_func {config.scoring_func}, topk_method {config.topk_method}, norm_topk_prob {config.norm_topk_prob}"
        log.warning("%s with %s: transformers computes this model otherwise, or refuses it", config.model_type, gate)
    cut = writer.shards(list(writer.records(config, tensors, dtype)), max_shard_bytes)
    with writer.replacing(Path(path).resolve()) as folder:
        writer.write_tensors(folder, cut)
        writer.write_config(folder, config, model.generation_config)
        known = getattr(model, "tokenizer_path", None)
        if tokenizer_dir is None and known is not None and Path(known).is_file():
            tokenizer_dir = Path(known).parent
        if tokenizer_dir is not None:
            writer.copy_tokenizer(Path(tokenizer_dir), folder)


def _generation_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    values = read_object(path)
    ids = values.get("eos_token_id")
    if any(type(token) is not int for token in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
        raise ValueError(f"{path}: expected eos_token_id to be a token or a list of them, got {ids!r}")
    return values


def _check_dtype(dtype: torch.dtype | str | None) -> None:
    if dtype is not None and dtype != "fp8" and dtype not in FLOATS.values():
        names = ", ".join(str(known) for known in FLOATS.values())
        raise ValueError(f'dtype must be None, "fp8" or one of {names}, got {dtype!r}')


def _check_quantization(folder: Path, config: Config) -> None:
    found = config.quantization_config or {}
    for key in ("quant_method", "fmt", "weight_block_size"):
        expected = writer.QUANTIZATION[key]
        if found.get(key, expected) != expected:
            path = folder / "config.json"
            raise ValueError(f"{path}: expected {key} {expected} in quantization_config, found {found[key]}")


def _without_absent_mtp(config: Config, reader: Reader, mtp: bool) -> Config:
    """`config` with the MTP modules that can and should be loaded: all of them or none."""
    without = dataclasses.replace(config, num_nextn_predict_layers=0)
    keys = {piece.key for name, source in plan(config).items() if name.startswith("mtp.") for piece in source.pieces}
    if mtp and keys and not any(key in reader for key in keys):
        log.warning(
            "%s has no MTP tensors though num_nextn_predict_layers is %d: loaded without MTP, so without speculation",
            reader.folder,
            config.num_nextn_predict_layers,
        )
        return without
    return config if mtp else without


def _warn_of_unexpected(config: Config, reader: Reader) -> None:
    known = {piece.key for source in plan(config).values() for piece in source.pieces} | mtp_copies(config).keys()
    unexpected = [key for key in reader.files if key not in known and key.removesuffix(SCALE_SUFFIX) not in known]
    unexpected = [key for key in unexpected if not HARMLESS.search(key)]
    if unexpected:
        shown = ", ".join(unexpected[:3]) + (", ..." if len(unexpected) > 3 else "")
        log.warning("%s: ignored %d tensors that the model has no place for: %s", reader.folder, len(unexpected), shown)


def _build(config: Config, reader: Reader, dtype: torch.dtype | str | None, device: torch.device | str) -> DeepSeekV3:
    sources = plan(config)
    reader.check(sources.values())
    quantized = {name for name, source in sources.items() if dtype == "fp8" and reader.is_quantized(source)}
    if dtype == "fp8" and not quantized:
        raise ValueError(f'dtype "fp8" needs an FP8 checkpoint, found no F8_E4M3 tensors in {reader.folder}')
    kept = dtype if isinstance(dtype, torch.dtype) else reader.dtype(EMBED)
    config = dataclasses.replace(
        config,
        dtype=str(kept).removeprefix("torch."),
        quantization_config=(config.quantization_config or writer.QUANTIZATION) if quantized else None,
    )
    model = DeepSeekV3(config, device="meta", dtype=kept)
    for name, source in sources.items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        meta = getattr(module, leaf)
        assert tuple(meta.shape) == source.shape, (name, meta.shape, source.shape)
        if name in quantized:
            # A module takes a Quantized only where no parameter of that name is registered.
            delattr(module, leaf)
            setattr(module, leaf, reader.load_quantized(source, device=device))
        else:
            value = reader.load(source, dtype=meta.dtype, device=device)
            setattr(module, leaf, nn.Parameter(value) if isinstance(meta, nn.Parameter) else value)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model
