"""Reading a checkpoint folder: where each tensor is, whether it is what was expected, and any rectangle of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.ops.linear import Quantized
from dsv3.weights.table import SCALE_SUFFIX, Piece, Source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 128  # rows and columns that share one scale in an FP8 checkpoint
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
E4M3 = "F8_E4M3"


def scale_range(values: range) -> range:
    """The scales that cover rows (or columns) `values`."""
    return range(values.start // BLOCK, -(-values.stop // BLOCK))


class Reader:
    """The tensors of one folder, through memory-mapped files that are opened when first needed: a rank that holds a
    part of the model opens the shards of that part and reads its bytes, as they are copied.

    Raises ValueError where something is missing, is not what was expected, or is not a whole safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self.indexed = not (folder / SINGLE).is_file()
        self.files = _read_index(folder) if self.indexed else dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def check(self, sources: Iterable[Source]) -> None:
        """Check that every tensor needed is there with the expected shape and dtype, from the headers alone."""
        for source in sources:
            for piece in source.pieces:
                self._check(piece.key, piece.shape, (*FLOATS, E4M3) if source.quantizable else tuple(FLOATS))
                if self._is_e4m3(piece.key):
                    scales = tuple(-(-n // BLOCK) for n in piece.shape)
                    self._check(
                        piece.key + SCALE_SUFFIX,
                        scales,
                        ("F32",),
                        f" (the block scales of the {E4M3} tensor {piece.key})",
                    )
                elif piece.key + SCALE_SUFFIX in self:
                    path, found = self.folder / self.files[piece.key], self._slice(piece.key).get_dtype()
                    raise ValueError(
                        f"{path}: expected {piece.key} of dtype {E4M3}, since it has block scales, found {found}"
                    )

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor that is not quantised."""
        return FLOATS[self._slice(key).get_dtype()]

    def is_quantized(self, source: Source) -> bool:
        """Whether a tensor of ours is FP8 in the files. Raises ValueError where its parts differ in that."""
        found = {self._is_e4m3(piece.key): piece.key for piece in source.pieces}
        if len(found) > 1:
            raise ValueError(
                f"{self.folder}: expected {found[False]} to be {E4M3} as {found[True]} is, found it is not"
            )
        return True in found

    def _is_e4m3(self, key: str) -> bool:
        return self._slice(key).get_dtype() == E4M3

    def read(self, key: str, rows: range, cols: range | None) -> Tensor:
        """A view of the mapped file: no memory of its own, the bytes are read when it is copied."""
        part = self._slice(key)
        return part[rows.start : rows.stop] if cols is None else part[rows.start : rows.stop, cols.start : cols.stop]

    def load(self, source: Source, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Our tensor in `dtype`, assembled piece by piece; FP8 pieces are dequantised."""
        out = torch.empty(source.shape, dtype=dtype, device=device)
        for piece in source.pieces:
            data = self.read(piece.key, piece.rows, piece.cols)
            if self._is_e4m3(piece.key):
                _dequantize(data.to(device), self._scales(piece).to(device), piece, out[piece.at])
            else:
                out[piece.at].copy_(data)
        return out

    def load_quantized(self, source: Source, *, device: torch.device | str) -> Quantized:
        """Our tensor as the bytes and scales of the files. Raises ValueError where a block of 128 x 128 would lie
        across two pieces or the edge of a local part."""
        for piece in source.pieces:
            _check_blocks(piece)
        *experts, rows, cols = source.shape
        data = torch.empty(source.shape, dtype=torch.float8_e4m3fn, device=device)
        sf = torch.empty((*experts, -(-rows // BLOCK), -(-cols // BLOCK)), dtype=torch.float32, device=device)
        for piece in source.pieces:
            data[piece.at].copy_(self.read(piece.key, piece.rows, piece.cols))
            sf[scale_at(piece)].copy_(self._scales(piece))
        return Quantized(data, sf)

    def _scales(self, piece: Piece) -> Tensor:
        assert piece.cols is not None
        return self.read(piece.key + SCALE_SUFFIX, scale_range(piece.rows), scale_range(piece.cols))

    def _check(self, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...], why: str = "") -> None:
        if key not in self.files:
            raise ValueError(
                f"expected tensor {key}{why} in {self.folder / (INDEX if self.indexed else SINGLE)}, found none"
            )
        path, part = self.folder / self.files[key], self._slice(key)
        if tuple(part.get_shape()) != shape:
            raise ValueError(f"{path}: expected {key} of shape {list(shape)}, found {part.get_shape()}")
        if part.get_dtype() not in dtypes:
            raise ValueError(f"{path}: expected {key} of dtype {' or '.join(dtypes)}, found {part.get_dtype()}")

    def _slice(self, key: str) -> Any:
        name = self.files[key]
        try:
            return self._file(name).get_slice(key)
        except SafetensorError:
            raise ValueError(f"expected tensor {key} in {self.folder / name}, as {INDEX} says, found none") from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"expected the shard {name}, named in {INDEX}, in {self.folder}, found none")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: {_what_is_wrong(path) or error}") from None
        return self._open[name]


def scale_at(piece: Piece) -> tuple[int | slice, ...]:
    """Where the scales of a piece belong among those of our tensor."""
    *prefix, rows = piece.at
    assert isinstance(rows, slice)
    covered = scale_range(range(rows.start, rows.stop))
    return (*prefix, slice(covered.start, covered.stop))


def _check_blocks(piece: Piece) -> None:
    *_, at = piece.at
    assert piece.cols is not None
    assert isinstance(at, slice)
    for part, size in zip((piece.rows, piece.cols), piece.shape, strict=True):
        if part.start % BLOCK or (part.stop % BLOCK and part.stop != size) or at.start % BLOCK:
            raise ValueError(
                f'dtype "fp8" needs parts of whole {BLOCK} x {BLOCK} blocks, found {part.start}:{part.stop} of'
                f" {piece.key} {list(piece.shape)} at row {at.start} of ours; load with dtype torch.bfloat16"
            )


def _dequantize(data: Tensor, scales: Tensor, piece: Piece, out: Tensor) -> None:
    """out = data * scale of the block, in fp32, 128 rows at a time so that no whole tensor exists in fp32."""
    assert piece.cols is not None
    skip = piece.cols.start % BLOCK
    wide = scales.repeat_interleave(BLOCK, dim=1)[:, skip : skip + len(piece.cols)]
    for number, block in enumerate(scale_range(piece.rows)):
        start = max(block * BLOCK, piece.rows.start) - piece.rows.start
        stop = min((block + 1) * BLOCK, piece.rows.stop) - piece.rows.start
        out[start:stop] = data[start:stop].float() * wide[number]


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"expected {SINGLE} or {INDEX} in {folder}, found neither")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(files, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f'{path}: expected JSON with a "weight_map" of tensor names to files, found {error!r}'
        ) from None
    for key, name in files.items():
        # A downloaded index must not make us open files elsewhere.
        if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
            raise ValueError(f"{path}: expected a plain file name for {key}, found {name!r}")
    return files


def _what_is_wrong(path: Path) -> str | None:
    """Expected and found sizes of a file that safetensors refuses (8 bytes of length, JSON, data), as far as it can be
    read."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or size < 8 + length:
            return f"expected a safetensors header of {length} bytes, found {size} bytes in all (truncated?)"
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    expected = 8 + length + end
    return None if expected == size else f"expected {expected} bytes, found {size} (truncated or overwritten)"
