"""Rows of the paged latent cache, read back."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.reference.attention import pack_fp8_cache, unpack_fp8_cache
from dsv3.testing import check_compile

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


def make_cache(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """3 pages of 16 random rows."""
    rows = torch.randn(48, 576, device=device)
    rows = pack_fp8_cache(rows.bfloat16()) if dtype == torch.uint8 else rows.to(dtype)
    return rows.view(3, 16, 1, -1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_as_they_are(dtype, device):
    cache = make_cache(dtype, device)
    slots = torch.tensor([40, 0, 47, 15, 16, 16], device=device)
    found = ops.mla_cached_rows(cache, slots)
    rows = (unpack_fp8_cache(cache) if dtype == torch.uint8 else cache).view(48, 576)
    assert torch.equal(found, torch.stack([rows[slot] for slot in slots.tolist()]))
    assert found.dtype == rows.dtype
    assert ops.mla_cached_rows(cache, slots[:0]).shape == (0, 576)


@pytest.mark.parametrize("slot", [48, -1, 2**40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_that_there_are_not(slot, dtype, device):
    cache, slots = make_cache(dtype, device), torch.tensor([3, slot, 5], device=device)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match=rf"among the 48 rows of the cache, got slots\[1\] = {slot}"):
            ops.mla_cached_rows(cache, slots)
    else:
        found = ops.mla_cached_rows(cache, slots)
        assert found[1].isnan().all()
        assert torch.equal(found[::2], ops.mla_cached_rows(cache, slots[::2]))


def test_compile(device):
    check_compile(ops.mla_cached_rows, torch.randn(3, 16, 1, 576, device=device), torch.tensor([5, 0], device=device))


@pytest.mark.parametrize(
    ("cache", "slots", "match"),
    [
        (torch.zeros(3, 16, 576), torch.zeros(2).long(), r"\(pages,page,1,D\), .* got torch.float32 \(3, 16, 576\)"),
        (torch.zeros(3, 16, 2, 576), torch.zeros(2).long(), r"got torch.float32 \(3, 16, 2, 576\)"),
        (torch.zeros(3, 16, 1, 576).byte(), torch.zeros(2).long(), r"uint8 \(pages,page,1,656\), got torch.uint8"),
        (torch.zeros(3, 16, 1, 576), torch.zeros(2).int(), r"slots int64 \(T,\), got torch.int32 \(2,\)"),
        (torch.zeros(3, 16, 1, 576), torch.zeros(2, 1).long(), r"slots int64 \(T,\), got torch.int64 \(2, 1\)"),
        (torch.zeros(16, 3, 1, 576).transpose(0, 1), torch.zeros(2).long(), r"contiguous cache, got strides \(576, 17"),
    ],
)
def test_bad_arguments(cache, slots, match, device):
    with pytest.raises(ValueError, match=rf"mla_cached_rows: expected .*{match}"):
        ops.mla_cached_rows(cache.to(device), slots.to(device))
