"""The paged latent cache: pages of 64 tokens from one pool a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.config import Config

PAGE = 64


def allocate_cache(
    config: Config, num_pages: int, *, layers: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """One tensor [num_pages, 64, 1, kv_lora_rank + qk_rope_head_dim] a layer, main layers first, then MTP, zeroed."""
    shape = num_pages, PAGE, 1, config.latent_dim
    return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]


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
