"""Decoding through the paged latent cache gives what the whole sequence gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.model import AttentionContext
from tests.model.cases import BASE, CASES, random_model, tokens_for

PAGE, WIDTH = 16, 8
NAMES = ["groups and q_lora", "without q_lora", "yarn", "all dense", "v2 groups"]


class Paged:
    """A cache of NaNs, with pages handed out in a random order; row 0 of the batch is never used."""

    def __init__(self, config, batch, device):
        self.cache = [
            torch.full((batch * WIDTH, PAGE, 1, config.latent_dim), float("nan"), device=device)
            for _ in range(config.num_blocks)
        ]
        order = torch.randperm(batch * WIDTH, generator=torch.Generator().manual_seed(5))
        self.table = order.view(batch, WIDTH).int().to(device)

    def slots(self, row: int, positions: Tensor) -> Tensor:
        return self.table[row, positions // PAGE].long() * PAGE + positions % PAGE


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_decoding_equals_the_whole_forward(name, device):
    config = CASES[name]
    model = random_model(config, device=device)
    prompts = [tokens_for(config, n, seed=n).to(device) for n in (5, 1, 33)]
    paged = Paged(config, 4, device)

    lengths = [len(prompt) for prompt in prompts]
    where = [paged.slots(row, torch.arange(n, device=device)) for row, n in enumerate(lengths, 1)]
    ctx = AttentionContext.packed(lengths, device, slot_mapping=torch.cat(where))
    h, _ = model.hidden(torch.cat(prompts), ctx, paged.cache)
    logits = [model.logits(h[torch.tensor(lengths, device=device).cumsum(0) - 1])]
    texts = [torch.cat([prompt, best[None]]) for prompt, best in zip(prompts, logits[0].argmax(-1), strict=True)]
    for _ in range(40):
        seq_lens = torch.tensor([0, *map(len, texts)], dtype=torch.int32, device=device)
        slots = [paged.slots(row, seq_lens[row].long() - 1)[None] for row in (1, 2, 3)]
        slots = torch.cat([torch.tensor([-1], device=device), *slots])
        ctx = AttentionContext.decode(paged.table, seq_lens, slots)
        tokens = torch.stack([torch.tensor(0, device=device), *(text[-1] for text in texts)])
        h, _ = model.hidden(tokens, ctx, paged.cache)
        logits.append(model.logits(h)[1:])
        texts = [torch.cat([text, best[None]]) for text, best in zip(texts, logits[-1].argmax(-1), strict=True)]

    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        expected = model(text[None, :-1])[0, len(prompt) - 1 :]
        assert torch.equal(text[len(prompt) :], expected.argmax(-1))
        torch.testing.assert_close(torch.stack(logits)[:, row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3])
@torch.no_grad()
def test_mtp_through_the_cache(steps, device):
    """Both depths of MTP have layers of the cache of their own, after the main ones."""
    config = replace(BASE, num_nextn_predict_layers=2)
    model = random_model(config, device=device)
    tokens = tokens_for(config, 30).to(device)
    following = [tokens.roll(-1), tokens.roll(-2)]

    def depths(inputs, nexts, ctx, cache=None):
        outs = [model.hidden(inputs, ctx, cache)[0]]
        for mtp, next_tokens in zip(model.mtp, nexts, strict=True):
            outs.append(mtp(outs[-1], next_tokens, ctx, cache)[0])
        return torch.stack(outs)

    whole = depths(tokens, following, AttentionContext.batch(1, 30, device))
    paged = Paged(config, 1, device)
    mapping = paged.slots(0, torch.arange(18, device=device))
    ctx = AttentionContext.packed([18], device, slot_mapping=mapping)
    found = [depths(tokens[:18], [x[:18] for x in following], ctx, paged.cache)]
    for end in range(18 + steps, 31, steps):
        now = slice(end - steps, end)
        mapping = paged.slots(0, torch.arange(end - steps, end, device=device))
        ctx = AttentionContext.decode(
            paged.table, torch.tensor([end], dtype=torch.int32, device=device), mapping, steps
        )
        found.append(depths(tokens[now], [x[now] for x in following], ctx, paged.cache))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
