"""What the model is measured against, in bits per byte of the validation text: order-2 bytes, gzip -9, xz -9."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MAX_TRAIN_BYTES = 1 << 28  # of training text that is counted: more does not move an order-2 model
MAX_VALID_BYTES = 1 << 26  # of validation text: xz takes about a second a MB


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the validation text; the order-2 counts come from the training text."""

    order2: float
    gzip: float
    xz: float

    def named(self) -> dict[str, float]:
        """The same under the names people read."""
        return {"order-2 byte model": self.order2, "gzip -9": self.gzip, "xz -9": self.xz}


def measure_baselines(train: Iterable[str], valid: Iterable[str]) -> Baselines:
    """Measure all three. `train` and `valid` are documents; those past MAX_*_BYTES are left out."""
    text = _join(valid, MAX_VALID_BYTES)
    if not text:
        raise ValueError("expected validation text, found none")
    return Baselines(
        order2=order2_bits_per_byte(_join(train, MAX_TRAIN_BYTES), text),
        gzip=8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        xz=8 * len(lzma.compress(text, preset=9)) / len(text),
    )


def order2_bits_per_byte(train: bytes, valid: bytes) -> float:
    """Bits per byte of `valid` where the two bytes before give the distribution of the next one, counted in `train`.

    Additive smoothing that backs off: p2(c|ab) = (n(abc) + p1(c|b)) / (n(ab) + 1), p1(c|b) likewise from p0, and p0
    from the uniform distribution.
    """
    counted, scored = _trigrams(train), _trigrams(valid)
    n2 = np.bincount(counted, minlength=1 << 24).reshape(1 << 16, 256)
    n1 = n2.reshape(256, 256, 256).sum(0)
    n0 = n1.sum(0)
    p0 = (n0 + 1 / 256) / (n0.sum() + 1)
    p1 = (n1 + p0) / (n1.sum(1, keepdims=True) + 1)
    context, byte = scored >> 8, scored & 255
    p2 = (n2[context, byte] + p1[context & 255, byte]) / (n2.sum(1)[context] + 1)
    return float(-np.log2(p2).mean())


def _trigrams(text: bytes) -> np.ndarray:
    """Each byte with the two before it (zeros before the first) as one number: int32 [len(text)]."""
    padded = np.frombuffer(b"\0\0" + text, np.uint8).astype(np.int32)
    return (padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]


def _join(documents: Iterable[str], limit: int) -> bytes:
    parts, size = [], 0
    for document in documents:
        raw = document.encode()
        size += len(raw)
        if size > limit and parts:
            break
        parts.append(raw)
    return b"".join(parts)
