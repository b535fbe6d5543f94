"""DeepSeekMoE: no dropping, fp32 gate, the balance loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsv3 import DeepSeekV3
from dsv3.model import AttentionContext
from dsv3.model.moe import balance_loss
from tests.model.cases import BASE, CASES, V2, random_model


def run(block, u):
    """The MoE part of a block on u [T, H]."""
    topk_idx, topk_weights, counts, _ = block.moe.gate(u)
    handle = block.dispatch_stage(u, topk_idx, topk_weights)
    y = block.experts_stage(u, handle.rows, handle.topk_weights, handle.offsets)
    return block.combine_stage(torch.zeros_like(u), handle, *y), topk_idx, topk_weights, counts


def mlp(x, gate_up, down):
    gate, up = (x @ gate_up.t()).chunk(2, -1)
    return (F.silu(gate) * up) @ down.t()


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("name", ["groups and q_lora", "two shared experts", "v2 greedy"])
@torch.no_grad()
def test_every_token_gets_its_experts(name, collapsed, device):
    block = random_model(CASES[name], device=device).layers[1]
    moe = block.moe
    u = torch.randn(300, BASE.hidden_size, device=device)
    if collapsed:  # every token wants the same experts
        u[:] = u[0]
    out, topk_idx, topk_weights, counts = run(block, u)
    assert counts.sum() == 300 * 3
    assert (counts.max() == 300) == collapsed
    for t in range(0, 300, 37):
        expected = mlp(u[t], moe.shared.gate_up.weight, moe.shared.down.weight)
        for e, w in zip(topk_idx[t], topk_weights[t], strict=True):
            expected = expected + w * mlp(u[t], moe.experts.gate_up[e], moe.experts.down[e])
        torch.testing.assert_close(out[t], expected, rtol=1e-4, atol=1e-4)


def test_gate_computes_in_fp32(device):
    """bf16 logits would choose other experts."""
    block = random_model(BASE, device=device).bfloat16().layers[1]
    u = torch.randn(500, BASE.hidden_size, device=device).bfloat16()
    _, weights, _, logits = block.moe.gate(u)
    exact = u.double() @ block.moe.gate.weight.double().t()
    assert logits.dtype == weights.dtype == torch.float32
    assert (logits - exact).norm() < 1e-6 * exact.norm()
    (logits.square().sum() + weights.sum()).backward()
    assert block.moe.gate.weight.grad.dtype == torch.bfloat16


def test_bias_stays_in_fp32():
    model = random_model(BASE)
    bias = model.layers[1].moe.gate.bias.clone()
    for cast in (model.bfloat16(), model.to(torch.float16), model.float()):
        assert torch.equal(cast.layers[1].moe.gate.bias, bias)
        assert cast.layers[1].moe.gate.bias.dtype == torch.float32
    assert "layers.1.moe.gate.bias" in model.state_dict()
    meta = DeepSeekV3(BASE, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    assert meta.layers[1].moe.gate.bias.dtype == torch.float32
    assert random_model(V2).layers[1].moe.gate.bias is None


# ---- balance loss ----
def plain_balance(logits, topk, score):
    """Equations 17 to 20 for one sequence [T, E], in loops."""
    tokens, experts = logits.shape
    s = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    total = 0.0
    for i in range(experts):
        chosen = sum(i in s[t].topk(topk).indices.tolist() for t in range(tokens))
        f = experts / (topk * tokens) * chosen
        total = total + f * (s[:, i] / s.sum(-1)).mean()
    return total


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_balance_loss(score):
    logits = torch.randn(2, 36, 6, dtype=torch.float64, requires_grad=True)  # two layers
    lengths = [9, 9, 9, 9]
    expected = sum(plain_balance(part, 2, score) for layer in logits for part in layer.split(lengths)) / 4
    found = balance_loss(logits, 4, topk=2, score=score)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads)

    segment = torch.repeat_interleave(torch.tensor(lengths))
    torch.testing.assert_close(balance_loss(logits, segment, topk=2, score=score), expected)


def test_balance_loss_of_unequal_sequences():
    logits = torch.randn(20, 6, dtype=torch.float64)
    lengths = [1, 12, 7]
    segment = torch.tensor([0] + [1] * 12 + [3] * 7)  # segment 2 is empty
    expected = sum(plain_balance(part, 2, "sigmoid") for part in logits.split(lengths)) / 3
    torch.testing.assert_close(balance_loss(logits, segment, topk=2, score="sigmoid"), expected)


def test_balance_is_wanted_in_every_sequence():
    """Two sequences, each on experts of its own: even over the batch, uneven in both."""
    logits = torch.full((2, 8, 4), -10.0)
    logits[0, :, :2] = 10.0
    logits[1, :, 2:] = 10.0
    assert abs(balance_loss(logits.view(16, 4), 2, topk=2, score="sigmoid") - 2) < 1e-3
    assert abs(balance_loss(logits.view(16, 4), 1, topk=2, score="sigmoid") - 1) < 1e-3


def test_balance_ignores_the_bias():
    """The bias moves the choice, not the logits that the loss is made of."""
    model = random_model(BASE)
    tokens = torch.randint(BASE.vocab_size, (40,))
    ctx = AttentionContext.batch(2, 20)
    before = model.hidden(tokens, ctx)[1][0]
    model.layers[1].moe.gate.bias += torch.randn(12)
    after = model.hidden(tokens, ctx)[1][0]
    assert torch.equal(before.logits, after.logits)
    assert not torch.equal(before.counts, after.counts)
