"""The whole model: names, initialisation, losses, MTP, recomputation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3 import Batch, Config, DeepSeekV3
from dsv3.model import AttentionContext, is_expert_param
from tests.model.cases import BASE, CASES, V2, random_model, tokens_for

MTP2 = replace(BASE, num_nextn_predict_layers=2)
BLOCK = [
    "attn_norm.weight", "attention.q_a.weight", "attention.q_a_norm.weight", "attention.q_b.weight",
    "attention.kv_a.weight", "attention.kv_a_norm.weight", "attention.kv_b.weight", "attention.o.weight",
    "mlp_norm.weight",
]  # fmt: skip
DENSE = [*BLOCK, "mlp.gate_up.weight", "mlp.down.weight"]
ROUTED = [
    *BLOCK, "moe.gate.weight", "moe.gate.bias", "moe.experts.gate_up", "moe.experts.down", "moe.shared.gate_up.weight",
    "moe.shared.down.weight",
]  # fmt: skip


# ---- names and initialisation ----
def test_names():
    expected = {"embed.weight", "norm.weight", "head.weight"}
    expected |= {f"layers.0.{name}" for name in DENSE} | {f"layers.{n}.{name}" for n in (1, 2) for name in ROUTED}
    for k in (0, 1):
        expected |= {f"mtp.{k}.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "norm")}
        expected |= {f"mtp.{k}.layer.{name}" for name in ROUTED}
    model = DeepSeekV3(MTP2)
    assert model.state_dict().keys() == expected
    assert {name for name, _ in model.named_parameters() if is_expert_param(name)} == {
        name for name in expected if ".experts." in name
    }
    plain_q = DeepSeekV3(replace(V2, q_lora_rank=0)).state_dict()
    assert "layers.1.attention.q.weight" in plain_q
    assert not any("q_a" in name or "gate.bias" in name for name in plain_q)
    assert all("moe" not in name for name in DeepSeekV3(CASES["all dense"]).state_dict())


def test_mtp_shares_embedding_and_head():
    model = random_model(MTP2)
    for shared in (model, copy.deepcopy(model)):
        assert all(mtp.embed is shared.embed for mtp in shared.mtp)
    tokens = tokens_for(BASE, 20)
    ctx, h = AttentionContext.batch(1, 20), torch.randn(20, BASE.hidden_size)
    before, _ = model.mtp[1](h, tokens, ctx)
    with torch.no_grad():
        model.embed.weight.mul_(2)
    assert not torch.allclose(model.mtp[1](h, tokens, ctx)[0], before)


@pytest.mark.parametrize("name", ["tiny", "default"])
def test_initial_std(name):
    config = Config.preset("tiny") if name == "tiny" else Config(**{
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "dtype": "float32",
    })  # fmt: skip
    for key, value in DeepSeekV3(config).init_weights().state_dict().items():
        if key.endswith("bias"):
            assert not value.any()
        elif value.dim() == 1:
            assert (value == 1).all()
        else:
            error = 6 * 0.006 / (2 * value.numel()) ** 0.5  # six standard errors
            assert abs(value.std().item() - 0.006) < error, key
            assert abs(value.mean().item()) < 2 * error, key


def test_initial_values_depend_on_the_seed_and_the_name_alone():
    with_mtp, without = (DeepSeekV3(c).init_weights(3).state_dict() for c in (MTP2, BASE))
    assert all(torch.equal(value, with_mtp[name]) for name, value in without.items())
    other = DeepSeekV3(BASE).init_weights(4).state_dict()
    assert not torch.equal(other["head.weight"], without["head.weight"])
    assert not torch.equal(without["layers.1.moe.experts.down"], without["layers.2.moe.experts.down"])
    experts = without["layers.1.moe.experts.down"]
    assert not torch.equal(experts[0], experts[1])
    meta = DeepSeekV3(BASE, device="meta")
    meta.to_empty(device="cpu").init_weights(3)
    assert all(torch.equal(value, without[name]) for name, value in meta.state_dict().items())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"tokens must be int64 \(B, S\), got torch.int64 \(3,\)"),
        (torch.zeros(1, 3), r"got torch.float32 \(1, 3\)"),
        (torch.zeros(1, 0, dtype=torch.int64), r"got torch.int64 \(1, 0\)"),
        (
            torch.tensor([[0, BASE.vocab_size]]),
            rf"tokens must lie in 0..{BASE.vocab_size - 1}, got 0..{BASE.vocab_size}",
        ),
        (torch.tensor([[-1, 2]]), "got -1..2"),
    ],
)
def test_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekV3(BASE)(tokens)


def test_bad_recompute():
    with pytest.raises(ValueError, match=r"recompute must be a subset of \['mla_up', 'norm'\], got \['all'\]"):
        DeepSeekV3(BASE, recompute=frozenset({"all"}))


# ---- loss ----
def test_loss_is_made_of_its_parts(device):
    model = random_model(MTP2, device=device)
    batch = Batch(tokens_for(BASE, 3, 18).to(device))
    tokens, inputs = batch.tokens, batch.tokens[:, :-1]
    loss = model.loss(batch, mtp_weight=0.5, balance_alpha=0.25)
    torch.testing.assert_close(loss.ce, F.cross_entropy(model(inputs).flatten(0, 1), tokens[:, 1:].flatten()))
    assert loss.num_tokens == 3 * 17

    ctx = AttentionContext.batch(3, 17, device)
    h, stats = model.hidden(inputs.flatten(), ctx)
    depths = []
    for k in (1, 2):
        # Depth k reads token i + k, of which the last k - 1 inputs have none: any token may stand there.
        following = F.pad(tokens[:, k : k + 17], (0, 17 - tokens[:, k : k + 17].shape[1]), value=5)
        h, block_stats = model.mtp[k - 1](h, following.flatten(), ctx)
        logits = model.logits(h).view(3, 17, -1)[:, : 17 - k]
        depths.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1 + k :].flatten()))
        stats.append(block_stats)
    torch.testing.assert_close(loss.mtp, sum(depths) / 2)
    assert loss.balance > 0.25 * len(stats)
    torch.testing.assert_close(loss.total, loss.ce + 0.5 * loss.mtp + loss.balance)
    assert loss.expert_load.dtype == torch.int32
    assert torch.equal(loss.expert_load[:2], torch.stack([s.counts for s in stats[:2]]))
    assert loss.expert_load.sum(-1).tolist() == [3 * 17 * 3] * 4
    without = model.loss(batch, mtp_weight=0.0)
    assert torch.equal(without.expert_load, torch.cat([loss.expert_load[:2], torch.zeros_like(loss.expert_load[2:])]))
    assert (without.ce, without.mtp) == (loss.ce, 0)
    assert loss.total.dtype == torch.float32


def test_loss_without_extras():
    dense = random_model(CASES["all dense"])
    loss = dense.loss(Batch(tokens_for(BASE, 2, 9)))
    assert (loss.mtp, loss.balance, loss.expert_load.numel()) == (0, 0, 0)
    assert loss.total == loss.ce
    loss = random_model(BASE).loss(Batch(tokens_for(BASE, 2, 9)), balance_alpha=0.0)
    assert loss.total == loss.ce


def test_targets_mask():
    model = random_model(MTP2)
    tokens = tokens_for(BASE, 2, 13)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    mask[1] = False
    loss = model.loss(Batch(tokens, mask))
    logits = model(tokens[:, :-1])[0, 5:]
    torch.testing.assert_close(loss.ce, F.cross_entropy(logits, tokens[0, 6:]))
    assert loss.num_tokens == 7
    unseen = tokens.clone()
    unseen[1] = 0
    torch.testing.assert_close(model.loss(Batch(unseen, mask)).mtp, loss.mtp)
    nothing = model.loss(Batch(tokens, torch.zeros_like(mask)))
    nothing.total.backward()
    assert (nothing.ce, nothing.mtp, nothing.num_tokens) == (0, 0, 0)
    assert all(param.grad is None or param.grad.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_shorter_than_the_depth(length):
    """Depth 2 has no target in a row of two tokens."""
    model, tokens = random_model(MTP2), tokens_for(BASE, 2, length + 1)
    loss = model.loss(Batch(tokens))
    loss.total.backward()
    torch.testing.assert_close(loss.ce, F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
    assert bool(loss.mtp > 0) == (length > 1)


def test_samples_do_not_see_each_other():
    """A row of three samples gives the losses of three rows of their own: what crosses a border is not learnt."""
    model = random_model(replace(BASE, num_nextn_predict_layers=1))
    tokens = tokens_for(BASE, 1, 25)
    lengths = [10, 3, 11]
    packed = model.loss(Batch(tokens, cu_seqlens=torch.tensor([0, 10, 13, 24])))
    ce = mtp1 = 0.0
    starts = [0, 10, 13]
    for start, n in zip(starts, lengths, strict=True):
        inputs = tokens[0, start : start + n]
        last = start + n == 24  # after the last sample the row goes on
        h, _ = model.hidden(inputs, AttentionContext.batch(1, n))
        targets = tokens[0, start + 1 : start + n + last]
        ce += F.cross_entropy(model.logits(h[: len(targets)]), targets, reduction="sum")
        following = tokens[0, start + 1 : start + n + 1]
        h, _ = model.mtp[0](h, following, AttentionContext.batch(1, n))
        targets = tokens[0, start + 2 : start + n + last]
        mtp1 += F.cross_entropy(model.logits(h[: len(targets)]), targets, reduction="sum")
    count = 24 - 2
    assert packed.num_tokens == count
    torch.testing.assert_close(packed.ce, ce / count)
    torch.testing.assert_close(packed.mtp, mtp1 / (count - 3))


def test_gradients_against_finite_differences():
    model = random_model(replace(BASE, num_nextn_predict_layers=1, num_hidden_layers=2)).double()
    batch = Batch(tokens_for(BASE, 2, 12))
    # Routing is piecewise constant: a small step along a random direction stays inside its piece.
    direction = {name: torch.randn_like(param) for name, param in model.named_parameters()}

    @torch.no_grad()
    def along(step):
        for name, param in model.named_parameters():
            param += step * direction[name]
        total = model.loss(batch, balance_alpha=0.1).total
        for name, param in model.named_parameters():
            param -= step * direction[name]
        return total

    model.loss(batch, balance_alpha=0.1).total.backward()
    slope = sum((direction[name] * param.grad).sum() for name, param in model.named_parameters())
    numeric = (along(1e-6) - along(-1e-6)) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=0)


def test_main_grad_takes_every_matrix():
    model = random_model(MTP2)
    batch = Batch(tokens_for(BASE, 2, 15))
    model.loss(batch).total.backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for param in model.parameters():
        param.main_grad = torch.zeros_like(param)
    model.loss(batch).total.backward()
    for name, param in model.named_parameters():
        if name != "embed.weight":
            assert param.grad is None, name
        found = param.main_grad if param.grad is None else param.grad
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("what", [{"norm"}, {"mla_up"}, {"norm", "mla_up"}])
@pytest.mark.parametrize("name", ["groups and q_lora", "without q_lora"])
def test_recomputation(name, what):
    config = replace(CASES[name], num_nextn_predict_layers=1)
    batch = Batch(tokens_for(config, 2, 33))

    def run(recompute):
        model = random_model(config)
        model.set_recompute(frozenset(recompute))
        kept = {}

        def keep(tensor):
            if not isinstance(tensor, torch.nn.Parameter):  # which is there anyway
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(batch).total
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        loss.backward()
        return loss, [param.grad for param in model.parameters()], size

    loss, grads, size = run(())
    again, grads_again, less = run(what)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert less < 0.95 * size


# ---- MTP traps ----
def mtp_by_hand(model, h, following, order):
    """One depth up to its block's input, by the formula."""
    mtp = model.mtp[0]

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    parts = {"e": norm(model.embed(following), mtp.enorm.weight), "h": norm(h, mtp.hnorm.weight)}
    return torch.cat([parts[part] for part in order], -1) @ mtp.eh_proj.weight.t()


@torch.no_grad()
def test_mtp_reads_embedding_first_and_normalised_h():
    model = random_model(replace(BASE, num_nextn_predict_layers=1))
    tokens, ctx = tokens_for(BASE, 20), AttentionContext.batch(1, 20)
    h, _ = model.hidden(tokens, ctx)
    torch.testing.assert_close(model.logits(h), model(tokens[None])[0], msg="h is what the head reads: after the norm")
    following = tokens.roll(-1)
    seen = []
    model.mtp[0].layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out, _ = model.mtp[0](h, following, ctx)
    torch.testing.assert_close(seen[0], mtp_by_hand(model, h, following, "eh"), rtol=1e-4, atol=1e-5)
    assert (seen[0] - mtp_by_hand(model, h, following, "he")).norm() > 0.1 * seen[0].norm()
    before_norm, _ = model.mtp[0].layer(seen[0], ctx)
    torch.testing.assert_close(out, model.mtp[0].norm(before_norm))


def test_later_depths_read_the_output_of_the_one_before():
    model = random_model(MTP2)
    seen = []
    for mtp in model.mtp:
        mtp.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    model.loss(Batch(tokens_for(BASE, 1, 9)))
    assert seen[1][0] is seen[0][1]


# ---- on a GPU nothing waits for the host ----
def test_no_host_sync(device):
    model = random_model(
        replace(BASE, num_nextn_predict_layers=1, hidden_size=64, moe_intermediate_size=32), device=device
    )
    model = model.bfloat16()
    batch = Batch(tokens_for(BASE, 2, 33).to(device))
    model.loss(batch).total.backward()
    expected = [param.grad.clone() for param in model.parameters()]
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        model.loss(batch).total.backward()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=0.1, atol=1e-3)
