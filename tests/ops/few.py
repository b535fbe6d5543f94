"""Inputs of the ops of a decoding step with few tokens."""

from __future__ import annotations

import torch

BF16 = torch.bfloat16


def draw(*shape, device, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(BF16)


def paged(lengths, width, steps, heads, device, spare=3):
    """q, a cache of NaNs but for the rows in use, whose pages lie in any order, the table (its unused entries are no pages)
    and the lengths."""
    pages = torch.randperm(len(lengths) * width + spare).int()[: len(lengths) * width].view(len(lengths), width)
    cache = torch.full(((len(lengths) * width + spare) * 64, 576), torch.nan, dtype=BF16)
    for row, length in enumerate(lengths):
        used = -(-length // 64)
        slots = (pages[row, :used, None].long() * 64 + torch.arange(64)).flatten()[:length]
        cache[slots] = torch.randn(length, 576).to(BF16)
        pages[row, used:] = -7
    q = draw(len(lengths), steps, heads, 576, device=device)
    return (
        q,
        cache.view(-1, 64, 1, 576).to(device),
        pages.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )
