"""Writing a checkpoint folder: tensors a shard at a time, config and tokenizer; all appears at once or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv3 import ops
from dsv3.config import Config
from dsv3.files import put_back, replace_folder
from dsv3.ops.linear import Quantized
from dsv3.weights.reader import BLOCK, INDEX, SINGLE, scale_at
from dsv3.weights.table import GATE_BIAS, SCALE_SUFFIX, Piece, Source, mtp_copies, plan

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@dataclass(frozen=True)
class Record:
    """Tensors of the files that go together (a weight, with its scales if it is FP8), and how to make them."""

    keys: tuple[str, ...]
    nbytes: int
    make: Callable[[], tuple[Tensor, ...]]


def records(
    config: Config, tensors: dict[str, Tensor | Quantized], dtype: torch.dtype | str | None
) -> Iterator[Record]:
    """What the files hold of `tensors` (ours), unfused, in the order of the model; copies for MTP come last.

    dtype: of the weights; None as they are, "fp8" quantises those that the official checkpoint has in FP8.
    Raises ValueError for a tensor that has not the shape that the config gives it.
    """
    by_key = {}
    for name, source in plan(config).items():
        found = tensors[name]
        if tuple(found.shape) != source.shape:
            raise ValueError(
                f"expected the whole {name} {list(source.shape)} to save, found a part {list(found.shape)}"
            )
        for piece in source.pieces:
            record = by_key[piece.key] = _record(piece, source, found, dtype)
            yield record
    for copy, key in mtp_copies(config).items():
        # safetensors refuses tensors that share memory.
        record = by_key[key]
        yield Record((copy,), record.nbytes, lambda record=record: (record.make()[0].clone(),))


def _record(piece: Piece, source: Source, found: Tensor | Quantized, dtype: torch.dtype | str | None) -> Record:
    keys = (piece.key, piece.key + SCALE_SUFFIX)
    if isinstance(found, Quantized):
        return _quantized_record(keys, piece, found, dtype)
    dense = found[piece.at]
    if dtype == "fp8" and source.quantizable:
        return _cast_record(keys, piece, lambda: dense)
    # The gate's bias is fp32 whatever the weights are: its steps of 0.001 would drown in bf16.
    wanted = {None: dense.dtype, "fp8": torch.bfloat16}.get(dtype, dtype)
    wanted = torch.float32 if piece.key.endswith(GATE_BIAS) else wanted
    return Record(keys[:1], dense.numel() * wanted.itemsize, lambda: (_host(dense.to(wanted)),))


def _quantized_record(keys: tuple[str, ...], piece: Piece, found: Quantized, dtype: torch.dtype | str | None) -> Record:
    *matrix, rows = piece.at
    assert isinstance(rows, slice)
    if rows.start % BLOCK or (rows.stop % BLOCK and rows.stop != found.shape[-2]):
        # They begin or end within a block, of which files have whole ones: dequantised with their neighbours, and cast again.
        held, cut = Quantized(found.data[(*matrix,)], found.sf[(*matrix,)]), rows
        if dtype in (None, "fp8"):
            return _cast_record(keys, piece, lambda: held.dequantize(torch.float32)[cut])
    else:
        held, cut = Quantized(found.data[piece.at], found.sf[scale_at(piece)]), slice(None)
        if dtype in (None, "fp8"):
            return Record(keys, held.data.nbytes + held.sf.nbytes, lambda: (_host(held.data), _host(held.sf)))
    assert isinstance(dtype, torch.dtype)
    size = math.prod(piece.shape) * dtype.itemsize
    return Record(keys[:1], size, lambda: (_host(held.dequantize(dtype)[cut]),))


def _cast_record(keys: tuple[str, ...], piece: Piece, make: Callable[[], Tensor]) -> Record:
    """What `make` gives in FP8 and its scales."""
    blocks = math.prod(-(-n // BLOCK) for n in piece.shape)
    return Record(keys, math.prod(piece.shape) + 4 * blocks, lambda: tuple(map(_host, ops.per_block_cast(make()))))


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def shards(found: list[Record], max_bytes: int) -> list[list[Record]]:
    """The records in order, cut where a shard would exceed `max_bytes`; a larger record is alone in its shard."""
    if max_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_bytes}")
    out: list[list[Record]] = []
    size = 0
    for record in found:
        if not out or size + record.nbytes > max_bytes:
            out.append([])
            size = 0
        out[-1].append(record)
        size += record.nbytes
    return out


def write_tensors(folder: Path, cut: list[list[Record]]) -> None:
    """model.safetensors, or numbered shards and their index; a shard at a time in memory."""
    files = {}
    for number, shard in enumerate(cut, start=1):
        name = SINGLE if len(cut) == 1 else f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        tensors = {}
        for record in shard:
            tensors.update(zip(record.keys, record.make(), strict=True))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o666 & ~_umask())  # as of the other files: safetensors makes them for the owner alone
        files.update(dict.fromkeys(tensors, name))
    if len(cut) > 1:
        total = sum(record.nbytes for shard in cut for record in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _umask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config(folder: Path, config: Config, generation: dict[str, Any] | None) -> None:
    """config.json and generation_config.json; generation: what the latter is to hold, None for what follows from config."""
    write_json(folder / "config.json", config.to_dict())
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", generation or {"_from_model_config": True, **tokens})


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The files that AutoTokenizer opens; a tokenizer_config.json is made where `source` has none."""
    if not (source / TOKENIZER_FILES[0]).is_file():
        raise ValueError(f"expected a {TOKENIZER_FILES[0]} in {source}, found none")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its place when the block ends well and is removed otherwise.

    Files of an earlier `target` that are not weights and were not written anew are kept. A process killed while
    writing leaves `target` as it was and a folder `.<name>.saving`, which the next save removes.

    Raises ValueError where `target` is not a folder of plain files, and OSError, naming it, where writing fails.
    """
    fresh = target.with_name(f".{target.name}.saving")
    _check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        put_back(target)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        yield fresh
        if target.exists():
            _keep_others(target, fresh)
        _sync(fresh)
        replace_folder(fresh, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save to {target}, which is as it was before: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"expected a folder to save to, found the file {target}")
    if target == Path.cwd() or target.parent == target:
        raise ValueError(f"expected a folder other than the current one to save to, got {target}")
    for entry in target.iterdir() if target.exists() else ():
        if entry.is_dir():
            raise ValueError(f"expected {target} to be new or hold a checkpoint's files only, found the folder {entry}")


def _keep_others(target: Path, fresh: Path) -> None:
    for entry in target.iterdir():
        is_weights = entry.suffix == ".safetensors" or entry.name == INDEX
        if not is_weights and not (fresh / entry.name).exists():
            shutil.copy2(entry, fresh / entry.name, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """To the disk, so that the rename cannot become durable before the contents."""
    for path in (*folder.iterdir(), folder):
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
