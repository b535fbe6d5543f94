"""The paged latent cache: pages of 64 tokens from one pool a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.config import Config
from dsv3.ops.attention import LATENT, ROPE
from dsv3.reference.attention import FP8_ROW

PAGE = 64
FP8 = "fp8"


def check_kv_cache_dtype(kv_cache_dtype: str | None) -> None:
    """ValueError for what no cache can hold, whatever the model."""
    if kv_cache_dtype not in (None, FP8):
        raise ValueError(f'kv_cache_dtype must be "fp8", or left out for that of the weights, got {kv_cache_dtype!r}')


def allocate_cache(
    config: Config, num_pages: int, *, layers: int, device: torch.device, dtype: torch.dtype | str
) -> list[Tensor]:
    """One tensor a layer, main layers first, then MTP, zeroed.

    Args:
        dtype: of [num_pages, 64, 1, kv_lora_rank + qk_rope_head_dim]; or "fp8", for uint8 [num_pages, 64, 1, 656], whose rows
            are those of mla_append_kv: for latents of 512 values and 64 rotated ones, 656 bytes a token where bf16 has 1152.

    Raises:
        ValueError: "fp8" for a model whose latents are of another size.
    """
    columns = config.latent_dim
    if dtype == FP8:
        sizes = config.kv_lora_rank, config.qk_rope_head_dim
        if sizes != (LATENT, ROPE):
            raise ValueError(
                f'kv_cache_dtype="fp8" needs kv_lora_rank {LATENT} and qk_rope_head_dim {ROPE}, got {sizes[0]} and {sizes[1]}'
            )
        columns, dtype = FP8_ROW, torch.uint8
    return [torch.zeros(num_pages, PAGE, 1, columns, device=device, dtype=dtype) for _ in range(layers)]


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE)


class PagePool:
    """Hands out pages 1 to num_pages - 1. Page 0 belongs to nobody: unused rows of a batch and of block tables point to it."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a page pool needs at least 2 pages, got {num_pages}")
        self.capacity = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` distinct pages, or None where fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Takes back pages that `allocate` gave."""
        self._free.extend(reversed(pages))
        assert len(self._free) <= self.capacity, "pages were freed twice"
