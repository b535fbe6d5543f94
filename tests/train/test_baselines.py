"""The compressors and the order-2 byte model, the latter against a plain loop."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter

import numpy as np
import pytest

from dsv3.train.baselines import measure_baselines, order2_bits_per_byte


def slow_order2(train: bytes, valid: bytes) -> float:
    """The docstring's formula, one byte at a time."""
    counts = [Counter(), Counter(), Counter()]
    totals = [Counter(), Counter(), Counter()]
    padded = b"\0\0" + train
    for i in range(2, len(padded)):
        for order in range(3):
            context, byte = padded[i - order : i], padded[i]
            counts[order][context, byte] += 1
            totals[order][context] += 1
    bits, padded = 0.0, b"\0\0" + valid
    for i in range(2, len(padded)):
        p = 1 / 256
        for order in range(3):
            context = padded[i - order : i]
            p = (counts[order][context, padded[i]] + p) / (totals[order][context] + 1)
        bits -= math.log2(p)
    return bits / len(valid)


def test_order2_equals_the_plain_loop() -> None:
    rng = np.random.default_rng(0)
    train = bytes(rng.choice(list(b"abc\xff\0 \n"), 3000, p=[0.4, 0.2, 0.1, 0.05, 0.05, 0.1, 0.1]).astype(np.uint8))
    valid = bytes(rng.choice(list(b"abcd\xff\0 \n"), 500).astype(np.uint8))
    assert order2_bits_per_byte(train, valid) == pytest.approx(slow_order2(train, valid), rel=1e-12)


def test_order2_is_a_distribution() -> None:
    """Over all 256 next bytes the probabilities sum to 1, also after an unseen context."""
    train = b"abcabd"
    for context in (b"ab", b"zz"):
        bits = [3 * slow_order2(train, context + bytes([c])) - 2 * slow_order2(train, context) for c in range(256)]
        assert sum(2.0**-b for b in bits) == pytest.approx(1, rel=1e-9)


def test_all_three_on_known_text() -> None:
    train, valid = ["the cat sat on the mat. " * 50], ["the mat sat ", "on the cat. " * 30]
    text = "".join(valid).encode()
    found = measure_baselines(train, valid)
    assert found.gzip == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
    assert found.xz == 8 * len(lzma.compress(text, preset=9)) / len(text)
    assert 0 < found.order2 < 1.5
    assert list(found.named()) == ["order-2 byte model", "gzip -9", "xz -9"]
    with pytest.raises(ValueError, match="expected validation text, found none"):
        measure_baselines(train, [])
