"""Offsets without sense: every op that takes rows in groups says so on a CPU. (On a GPU the products and attention do, through
the device error word: test_grouped_fp8_gemm.py, test_mla_attention.py; casts stay inside their rows.)"""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops

ROWS, GROUPS, WIDTH = 40, 2, 32


def rows(width: int = WIDTH) -> torch.Tensor:
    return torch.randn(ROWS, width)


def cast() -> tuple[torch.Tensor, torch.Tensor]:
    return ops.per_token_cast(rows())


def expert_weights() -> tuple[torch.Tensor, torch.Tensor]:
    return ops.per_block_cast(torch.randn(GROUPS, 48, WIDTH))


def wgrad(offsets: torch.Tensor) -> None:
    transposed = ops.cast_transpose(rows(), torch.tensor([0, 10, ROWS], dtype=torch.int32))
    ops.grouped_fp8_wgrad(*transposed, *transposed, offsets, out=torch.zeros(GROUPS, WIDTH, WIDTH))


CALLS = {
    "grouped_linear": lambda offsets: ops.grouped_linear(rows(), torch.randn(GROUPS, 48, WIDTH), offsets),
    "grouped_fp8_gemm": lambda offsets: ops.grouped_fp8_gemm(*cast(), *expert_weights(), offsets),
    "grouped_fp8_wgrad": wgrad,
    "cast_transpose": lambda offsets: ops.cast_transpose(rows(), offsets),
    "cast_transpose of FP8": lambda offsets: ops.cast_transpose(cast(), offsets),
    "per_token_cast_and_transpose": lambda offsets: ops.per_token_cast_and_transpose(rows(), offsets),
    "swiglu_cast": lambda offsets: ops.swiglu_cast(rows(), torch.ones(ROWS), offsets=offsets),
    "swiglu_cast_backward": lambda offsets: ops.swiglu_cast_backward(rows(WIDTH // 2), rows(), offsets=offsets),
    "swiglu_backward_both_casts": lambda offsets: ops.swiglu_backward_both_casts(
        rows(WIDTH // 2), rows(), offsets=offsets
    ),
}


@pytest.mark.parametrize("bad", [[0, 30, 20], [5, 20, ROWS], [0, -1, ROWS], [0, 20, 1000]], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_offsets_without_sense(call, bad):
    call(torch.tensor([0, 30, ROWS], dtype=torch.int32))
    with pytest.raises(
        RuntimeError, match=r"offsets must start at 0, not decrease and stay within the [0-9]+ rows, got"
    ):
        call(torch.tensor(bad, dtype=torch.int32))
