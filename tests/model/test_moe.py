"""DeepSeekMoE: no dropping, fp32 gate, the balance loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3 import Batch, DeepSeekV3, ops
from dsv3.model import AttentionContext
from dsv3.model.moe import balance_loss
from tests.model.cases import BASE, CASES, V2, random_model, tokens_for


def run(block, u):
    """The MoE part of a block on u [T, H]."""
    topk_idx, topk_weights, counts = block.moe.gate(u)
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


def test_gate_computes_in_fp32(device, monkeypatch):
    """bf16 logits would choose other experts."""
    gate = random_model(BASE, device=device).bfloat16().layers[1].moe.gate
    u = torch.randn(500, BASE.hidden_size, device=device).bfloat16()
    seen, choose = [], ops.moe_gate
    monkeypatch.setattr(ops, "moe_gate", lambda logits, *a, **k: seen.append(logits) or choose(logits, *a, **k))
    index, weights, _ = gate(u)
    (logits,) = seen
    exact = u.double() @ gate.weight.double().t()
    assert logits.dtype == weights.dtype == torch.float32
    assert (logits - exact).norm() < 1e-6 * exact.norm()
    expected, expected_weights, _ = choose(exact, gate.bias.double(), **gate.settings)
    assert torch.equal(index, expected)
    assert (weights - expected_weights).norm() < 1e-6 * expected_weights.norm()
    (logits.square().sum() + weights.sum()).backward()
    assert gate.weight.grad.dtype == torch.bfloat16


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


def balance_of(layers, lengths, score):
    """balance_loss of logits [L, T, E] in sequences of these lengths, two experts a token."""
    cu_seqlens = torch.tensor([0, *lengths], device=layers.device).cumsum(0).int()
    settings = {"num_groups": 1, "topk_groups": 1, "topk": 2, "route_scale": 1.0, "score": score}
    bias = torch.rand(layers.shape[-1], device=layers.device)
    loads = [ops.moe_gate_loads(logits, bias, cu_seqlens, **settings)[3:] for logits in layers]
    return balance_loss(*map(torch.stack, zip(*loads, strict=True)), cu_seqlens, topk=2)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("lengths", [[9] * 4, [1, 24, 0, 11], [36]])
def test_balance_loss(score, lengths, device):
    """In fp64 on a CPU; natively in fp32, whose rounding of s and of its gradient the bounds leave room for."""
    native = device.type == "cuda"
    dtype = torch.float32 if native else torch.float64
    logits = torch.randn(2, 36, 6, device=device, dtype=dtype, requires_grad=True)  # two layers
    parts = [part for layer in logits.double() for part in layer.split([n for n in lengths if n])]
    expected = sum(plain_balance(part, 2, score) for part in parts) / sum(n > 0 for n in lengths)
    found = balance_of(logits, lengths, score)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, **({"rtol": 1e-6, "atol": 0} if native else {}))
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, **({"rtol": 1e-4, "atol": 1e-7} if native else {}))


def test_balance_is_wanted_in_every_sequence(device):
    """Two sequences, each on experts of its own: even over the batch, uneven in both."""
    logits = torch.full((2, 8, 4), -10.0, device=device)
    logits[0, :, :2] = 10.0
    logits[1, :, 2:] = 10.0
    assert abs(balance_of(logits.view(1, 16, 4), [8, 8], "sigmoid") - 2) < 1e-3
    assert abs(balance_of(logits.view(1, 16, 4), [16], "sigmoid") - 1) < 1e-3


def test_balance_ignores_the_bias():
    """The bias moves the choice, not what the loss is made of."""
    model = random_model(BASE)
    tokens = torch.randint(BASE.vocab_size, (40,))
    ctx = replace(AttentionContext.batch(2, 20), balanced=True)
    before = model.hidden(tokens, ctx)[1][0]
    model.layers[1].moe.gate.bias += torch.randn(12)
    after = model.hidden(tokens, ctx)[1][0]
    assert torch.equal(before.chosen, after.chosen)
    assert torch.equal(before.affinity, after.affinity)
    assert not torch.equal(before.counts, after.counts)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["groups and q_lora", "one group", "v2 greedy", "v2 groups"])
def test_the_models_balance_is_that_of_its_logits(name, packed, monkeypatch):
    """The loss and its gradients are those of the formula over the logits of all layers, MTP's among them."""
    model = random_model(replace(CASES[name], num_nextn_predict_layers=1)).double()
    lengths = [7, 1, 12, 16] if packed else [18, 18]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    batch = Batch(tokens_for(BASE, 2, 19), cu_seqlens=cu_seqlens)
    seen, gate = [], ops.moe_gate_loads
    monkeypatch.setattr(ops, "moe_gate_loads", lambda logits, *a, **k: seen.append(logits) or gate(logits, *a, **k))
    loss = model.loss(batch, balance_alpha=0.5)
    assert len(seen) == 3
    parts = [part for logits in seen for part in logits.split(lengths)]
    expected = 0.5 * sum(plain_balance(part, 3, model.config.scoring_func) for part in parts) / len(lengths)
    torch.testing.assert_close(loss.balance, expected)

    def gradients(total):
        return torch.autograd.grad(total, list(model.parameters()), retain_graph=True, materialize_grads=True)

    without = gradients(model.loss(batch, balance_alpha=0.0).total)
    assert len(seen) == 3, "without the loss nothing is summed up"
    for all_of_it, rest, of_balance in zip(gradients(loss.total), without, gradients(expected), strict=True):
        torch.testing.assert_close(all_of_it - rest, of_balance, rtol=1e-6, atol=1e-10)
