"""Whether the layers of a model ask for products and attention whose bits do not depend on what is computed beside a token."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

_wanted = contextvars.ContextVar("batch_invariance", default=False)


@contextlib.contextmanager
def batch_invariance(wanted: bool = True) -> Iterator[None]:
    """In this context, of this thread, the FP8 layers of a model and its attention over a cache keep the order of their sums
    whatever the number of tokens is: they pass `batch_invariant` to fp8_gemm and mla_decode. Generation runs so, and then
    drafts that are verified together give the tokens of plain decoding. It costs the splits over K of few rows. Not to be held
    across the yields of a generator, whose caller would be in it too.
    """
    before = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(before)


def is_batch_invariant() -> bool:
    """Whether batch_invariance was asked for; never in a graph that is being compiled."""
    return not torch.compiler.is_compiling() and _wanted.get()
