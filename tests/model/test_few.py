"""Decoding steps of few tokens of models with FP8 weights: what they compute, where they stand aside, and in which order."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3 import Engine, SamplingParams, ops
from dsv3.model import AttentionContext, few
from dsv3.model.layers import Linear, identity
from dsv3.model.moe import Experts
from tests.model.cases import random_model, tokens_for
from tests.model.test_decode import Paged
from tests.model.test_fp8 import CONFIG

PLAIN = replace(CONFIG, num_nextn_predict_layers=0)


def quantised(model):
    model.quantize_()


def quantised_in_fp8(model):
    model.quantize_().set_precision("fp8")


def with_copies(model):
    model.set_precision("fp8")


def of_both_kinds(model):
    """kv_a beside a q_a, and shared beside routed experts, of another kind."""
    model.quantize_()
    for layer in (model.layers[0].attention.kv_a, model.layers[1].moe.shared.down):
        weight = layer.weight.dequantize(torch.float32)
        del layer.weight
        layer.weight = torch.nn.Parameter(weight)


def twin_of(model, plain):
    """`plain`, whose weights are those that the model's FP8 weights stand for. Absorbed, kv_b is multiplied as it is kept."""
    for here, there in zip(model.modules(), plain.modules(), strict=True):
        if not isinstance(here, (Linear, Experts)):
            continue
        for name in ("weight",) if isinstance(here, Linear) else ("gate_up", "down"):
            kept = getattr(here, name)
            made = here.fp8_copies.of(name, kept) if here.fp8 and here is not kv_b_of(model, here) else kept
            made = made.data if isinstance(made, ops.Fp8Weight) else made
            getattr(there, name).copy_(ops.dense(made, torch.float32))
    return plain


def kv_b_of(model, module):
    return next((b.attention.kv_b for b in model.layers if b.attention.kv_b is module), None)


def step(model, paged, tokens, position, **changes):
    """Logits behind token number `position`."""
    slots = paged.slots(0, torch.tensor([position]))
    ctx = AttentionContext.decode(paged.table, torch.tensor([position + 1], dtype=torch.int32), slots)
    h, _ = model.hidden(tokens[position : position + 1], replace(ctx, **changes), paged.cache)
    return model.logits(h)


def decode(model, tokens, **changes):
    paged = Paged(model.config, 1, tokens.device)
    return torch.cat([step(model, paged, tokens, n, **changes) for n in range(len(tokens))])


class Calls(TorchDispatchMode):
    """The names of our ops, in the order of their calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dsv3":
            self.names.append(func._schema.name.removeprefix("dsv3::"))
        return func(*args, **(kwargs or {}))


def calls(f, *args, **kwargs):
    with Calls() as recorded:
        f(*args, **kwargs)
    return recorded.names


@pytest.mark.parametrize("change", [quantised, quantised_in_fp8, with_copies, of_both_kinds])
@torch.no_grad()
def test_fp8_weights_decode_as_what_they_stand_for(change):
    """Token by token, so that nothing comes of a prefill, where precision "fp8" casts activations."""
    model, tokens = random_model(PLAIN), tokens_for(PLAIN, 9)
    plain = copy.deepcopy(model)
    before = decode(plain, tokens)
    change(model)
    found = decode(model, tokens)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, decode(twin_of(model, plain), tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_copies_are_made_before_the_first_norm():
    """Kernels of few tokens read their weights before the one ahead has ended."""
    model, tokens = random_model(PLAIN), tokens_for(PLAIN, 2)
    with_copies(model)
    paged = Paged(PLAIN, 1, tokens.device)

    def casts(position):
        """How many of a step, all of them ahead of the first norm and of whatever reads weights."""
        names = calls(step, model, paged, tokens, position)
        found = [n for n, name in enumerate(names) if name.startswith("per_block_cast")]
        assert max(found, default=-1) < names.index("rmsnorm") < names.index("few_linear")
        assert "rmsnorm_cast" not in names
        return len(found)

    assert casts(0) == 2 * 4 + 2 + 4  # projections of both layers, the dense MLP, the experts
    assert casts(1) == 0
    model.layers[0].attention.o.weight.mul_(2)
    assert casts(1) == 1


@pytest.mark.parametrize("change", [quantised, with_copies])
@torch.no_grad()
def test_the_most_tokens_of_a_step_decide(change):
    """Where a step may have more tokens than `few` takes, FP8 layers do not go its way in any; others go by this step alone."""
    model, tokens = random_model(PLAIN), tokens_for(PLAIN, 1)
    paged = Paged(PLAIN, 1, tokens.device)

    def goes(most):
        return "few_experts" in calls(step, model, paged, tokens, 0, max_tokens=most)

    assert goes(0)
    assert goes(ops.FEW_TOKENS + 1)
    change(model)
    assert goes(0)
    assert goes(ops.FEW_TOKENS)
    assert not goes(ops.FEW_TOKENS + 1)


@torch.no_grad()
def test_other_weights_are_noticed_between_steps():
    model, tokens = random_model(PLAIN), tokens_for(PLAIN, 5)
    with_copies(model)
    before = decode(model, tokens)
    model.layers[1].moe.experts.down.mul_(1.5)
    model.layers[0].attention.q_a.weight.add_(0.01)
    found = decode(model, tokens)
    assert not torch.allclose(found, before)
    fresh = copy.deepcopy(model)
    assert torch.equal(found, decode(fresh, tokens))


@pytest.mark.parametrize("change", [quantised_in_fp8, with_copies])
@pytest.mark.parametrize(("sequences", "depth"), [(5, 1), (40, 1), (20, 2)])
def test_speculative_equals_plain(sequences, depth, change):
    """Also where rounds with drafts have more tokens than `few` takes, and those without have not, and as a batch runs dry."""
    model = random_model(replace(CONFIG, max_position_embeddings=64, num_nextn_predict_layers=depth))
    change(model)
    prompts = [tokens_for(CONFIG, 3 + n % 7, seed=n).tolist() for n in range(sequences)]
    params = [SamplingParams(max_tokens=2 + n % 9, temperature=0, ignore_eos=True) for n in range(sequences)]
    plain, drafted = (
        Engine(model, speculative=speculative, max_batch=sequences).generate(prompts, params)
        for speculative in (False, True)
    )
    assert [c.token_ids for c in plain] == [c.token_ids for c in drafted]
    assert sum(c.num_drafted for c in drafted) > 0


@torch.no_grad()
def test_gradients_and_other_ways_of_experts_go_elsewhere():
    model, tokens = random_model(PLAIN), tokens_for(PLAIN, 1)
    paged = Paged(PLAIN, 1, tokens.device)
    ctx = AttentionContext.decode(paged.table, torch.tensor([1], dtype=torch.int32), paged.slots(0, torch.tensor([0])))
    assert few.prepare(model.layers[1:2], ctx, 64)
    assert not few.prepare(model.layers[1:2], ctx, 65)
    with torch.enable_grad():
        assert not few.prepare(model.layers[1:2], ctx, 1)
    shared = model.layers[1].moe.shared
    shared.reduce = lambda y: y  # tensor parallelism
    assert not few.prepare(model.layers[1:2], ctx, 1)
    shared.reduce = identity
    assert few.prepare(model.layers[1:2], ctx, 1)
    model.layers[1].moe.buffer.room = 64
    assert not few.prepare(model.layers[1:2], ctx, 1)
