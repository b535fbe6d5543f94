"""few_attention against the reference; each sequence's bits are its own. Its registration is tested with the other ops of few
tokens, in test_decode.py."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.reference import decode as reference
from dsv3.testing import relative_error
from tests.ops.few import paged

LENGTHS = [[0], [1], [64], [65, 0, 7], [1000, 1024, 1025, 3, 513], [2049, 2], [4200, 7000, 2112]]
LENGTHS.append([37 * i % 800 for i in range(120)])  # more pieces than blocks run at a time


@pytest.mark.parametrize("rows", [(1, 1), (1, 16), (2, 16), (5, 3), (1, 32)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_few_attention(lengths, rows, device):
    """Chunks of two, four and eight pages, in one piece or, where all tables together are short, in pieces of a page."""
    width = next(width for width in (13, 34, 120) if max(lengths) <= 64 * width)
    q, *keys = paged(lengths, width, *rows, device)
    found = ops.few_attention(q, *keys, softmax_scale=0.07)
    settings = 0.07, 512, False
    exact = reference.few_attention(q.double(), keys[0].double(), *keys[1:], *settings)
    plain = reference.few_attention(q, *keys, *settings)
    # Beside the output's own rounding, that of the probabilities to bf16: half a unit in the last place of each.
    assert relative_error(found, exact) <= 2 * relative_error(plain, exact) + 2.0**-9
    assert torch.equal(found, ops.few_attention(q, *keys, softmax_scale=0.07, static_cache=True))
    for row, length in enumerate(lengths):
        if length == 0:
            assert not found[row].any()


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("lengths", "used"),
    [([700, 65, 1500], 26), ([1025, 2049, 6209], 98), ([64, 129, 6100], 96), ([2048, 2305, 4100], 70)],
)
def test_a_sequence_is_the_same_alone(lengths, used):
    """Whatever the width of the table, so also in pieces of a page instead of chunks; and the first token of two what it is
    without the second, also where that one is the first of a page and of a chunk."""
    device = torch.device("cuda")
    q, cache, table, lengths = paged(lengths, 100, 2, 16, device)
    whole = ops.few_attention(q, cache, table, lengths, softmax_scale=0.07)
    for row in range(3):
        part = slice(row, row + 1)
        alone = ops.few_attention(q[part], cache, table[part, :used], lengths[part], softmax_scale=0.07)
        assert torch.equal(alone, whole[part])
    first = ops.few_attention(q[:, :1], cache, table, lengths - 1, softmax_scale=0.07)
    assert torch.equal(first, whole[:, :1])


@pytest.mark.cuda
def test_a_sequence_of_many_is_the_same_alone():
    """Whose blocks go through several pieces each."""
    device = torch.device("cuda")
    q, cache, table, lengths = paged(LENGTHS[-1], 13, 1, 16, device)
    whole = ops.few_attention(q, cache, table, lengths, softmax_scale=0.07)
    for row in (1, 20, 31, 32, 47, 69, 119):
        part = slice(row, row + 1)
        alone = ops.few_attention(q[part], cache, table[part], lengths[part], softmax_scale=0.07)
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("static_cache", [False, True])
def test_few_attention_reports_pages_that_there_are_not(static_cache, device):
    q, cache, table, lengths = paged([100, 70], 2, 1, 16, device)
    table[1, 1] = len(cache)
    settings = {"softmax_scale": 0.07, "static_cache": static_cache}
    wrong = rf"block_table\[1, 1\] = {len(cache)}"
    if device.type == "cuda":  # at the next call
        found = ops.few_attention(q, cache, table, lengths, **settings)
        assert found[1].isnan().all()
        assert not found[0].isnan().any()
    with pytest.raises(RuntimeError, match=wrong):
        ops.few_attention(q, cache, table, lengths, **settings)


@pytest.mark.cuda
@pytest.mark.parametrize(("width", "length"), [(0, 5), (2, 129), (2, 2**31 - 1)])
def test_few_attention_reports_lengths_beyond_the_table(width, length):
    q, cache, table, lengths = paged([100, 70], 2, 1, 16, torch.device("cuda"))
    lengths[1] = length
    assert ops.few_attention(q, cache, table[:, :width], lengths, softmax_scale=0.07)[1].isnan().all()
    with pytest.raises(RuntimeError, match=r"block_table\[\d, \d\] = -1"):
        ops.few_attention(q, cache, table, lengths, softmax_scale=0.07)
