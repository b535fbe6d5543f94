"""precision="fp8": which products are in FP8, how far gradients are from fp32, and what does not change."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3 import DeepSeekV3, Engine, SamplingParams, ops
from dsv3.comm import ExpertBuffer
from dsv3.model import Batch
from dsv3.model.moe import MoE
from dsv3.ops.fp8_linear import Gathered
from dsv3.testing import relative_error
from dsv3.train.buffers import ParamBuffers
from dsv3.train.optimizer import AdamW
from tests.model.cases import BASE, random_model, tokens_for
from tests.ops import emulation

# Sizes are multiples of 16, not of 128. Every token goes to every expert: a choice that a rounding flips says nothing of FP8.
CONFIG = replace(
    BASE, hidden_size=96, intermediate_size=160, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, moe_intermediate_size=48, num_nextn_predict_layers=1, num_hidden_layers=2, n_routed_experts=4, n_group=1,
    topk_group=1, num_experts_per_tok=4, initializer_range=0.02,
)  # fmt: skip
PLAIN = ("embed.weight", "head.weight", "eh_proj.weight", "gate.weight")  # matrices that are never FP8
LOSS = {"balance_alpha": 1e-3}


def model_of(precision, device, config=CONFIG):
    model = random_model(config, device=device)
    model.set_precision(precision)
    return model


def moes_of(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def copies_of(model):
    """The FP8 copies that have been made, by the parameter's name."""
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "fp8_copies")]
    return {f"{layer}.{name}": weight for layer, module in layers for name, weight in module.fp8_copies.made.items()}


def batch_of(device, rows=4, length=64, seed=1):
    return Batch(tokens_for(CONFIG, rows, length + 1, seed=seed).to(device))


def gradients(model, batch, queue=None):
    """The loss, and every parameter's gradient by name."""
    model.zero_grad(set_to_none=True)
    loss = model.loss(batch, wgrad=queue, **LOSS).total
    loss.backward()
    if queue is not None:
        queue.flush()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_gradients_are_those_of_the_recipe(device, monkeypatch):
    """Per parameter against fp32: no more than 1.3 times the error of an emulation in plain PyTorch; matrices point the
    same way."""
    batch = batch_of(device)
    exact_loss, exact = gradients(model_of("bf16", device), batch)
    loss, found = gradients(model_of("fp8", device), batch)
    for name in ("fp8_linear", "fp8_mlp", "fp8_experts"):
        monkeypatch.setattr(ops, name, getattr(emulation, name))
    emulated_loss, emulated = gradients(model_of("fp8", device), batch)
    assert 0 < abs(loss - exact_loss) < 3e-3 * exact_loss
    assert abs(loss - emulated_loss) < 1e-3 * exact_loss
    for name, grad in exact.items():
        error, expected = relative_error(found[name], grad), relative_error(emulated[name], grad)
        assert error <= 1.3 * expected, f"{name}: {error:.3e} against an emulation's {expected:.3e}"
        if grad.dim() > 1:
            assert F.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0) > 0.99, name


def test_steps_of_another_optimizer_are_noticed(device):
    """Without refresh_fp8, and after some in bf16."""
    model, batch = model_of("fp8", device), batch_of(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for precision in ("fp8", "bf16", "fp8"):
        model.set_precision(precision)
        optimizer.zero_grad()
        model.loss(batch, **LOSS).total.backward()
        optimizer.step()
    fresh = DeepSeekV3(CONFIG, device=device, precision="fp8")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.loss(batch, **LOSS).total, fresh.loss(batch, **LOSS).total)


def test_layers_that_stay_as_they_are_are_counted(device, caplog):
    model = random_model(CONFIG, device=device)
    model.set_precision("fp8")
    assert not caplog.records
    model_of("fp8", device, BASE)
    assert re.search(r"\d+ of \d+ linear layers and experts do not multiply in FP8: ", caplog.text)


def test_layers_compile_before_anything_has_been_cast(device):
    model = model_of("fp8", device)
    layer = model.layers[0].attention.o
    x = torch.randn(5, layer.weight.shape[1], device=device)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, layer(x))


def test_which_products_are_in_fp8(device, monkeypatch):
    """The linear layers of attention, MLPs and experts, and nothing else; the projection after attention keeps its input."""
    model = model_of("fp8", device)
    names = {p: name for name, p in model.named_parameters()}
    used, shared = set(), set()

    def spy(name, take):
        real = getattr(ops, name)

        def call(*args, **options):
            for weight in take(*args):
                used.add(names[weight.param])
                if options.get("shared_input"):
                    shared.add(names[weight.param])
            return real(*args, **options)

        monkeypatch.setattr(ops, name, call)

    spy("fp8_linear", lambda x, weight: [weight])
    spy("fp8_mlp", lambda x, *weights: weights)
    spy("fp8_experts", lambda x, w, offsets, *weights: weights)
    model.loss(batch_of(device))
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert used == {name for name in matrices if not name.endswith(PLAIN)}
    assert shared == {name for name in matrices if name.endswith("attention.o.weight")}
    assert copies_of(model).keys() == used


def test_rows_reach_the_experts_as_fp8(device):
    """Where the experts compute in it, and no longer: not in bf16, not with sizes that do not fit, not where another buffer has
    taken the place of the model's own."""

    def wires(model, config=CONFIG):
        model.loss(Batch(tokens_for(config, 2, 33).to(device)))
        return [moe.buffer.wire_dtype for moe in moes_of(model)]

    fp8 = torch.float8_e4m3fn
    model = model_of("fp8", device)
    assert set(wires(model)) == {fp8}
    assert set(wires(model_of("fp8", device, BASE), BASE)) == {None}
    model.set_precision("bf16")
    assert set(wires(model)) == {None}
    model.set_precision("fp8")
    moes_of(model)[1].buffer = ExpertBuffer(num_experts=CONFIG.n_routed_experts, transport="local")
    assert wires(model)[:2] == [fp8, None]


@torch.no_grad()
def test_weights_in_fp8_multiply_as_the_copies_of_others_do(device):
    model, tokens = model_of("fp8", device), tokens_for(CONFIG, 2, 33).to(device)
    expected, loss = model(tokens), model.loss(Batch(tokens)).total
    assert model.quantize_() is model
    assert not copies_of(model)
    kept = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1}
    assert kept == {"embed", "head", "mtp.0.eh_proj", "layers.1.moe.gate", "mtp.0.layer.moe.gate"}
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model.loss(Batch(tokens)).total, loss)
    assert {moe.buffer.wire_dtype for moe in moes_of(model)} == {torch.float8_e4m3fn}
    model.set_precision("bf16")
    assert 0 < relative_error(model(tokens), expected) < 0.1


@torch.no_grad()
def test_a_quantised_model_generates_and_notices_other_weights(device):
    """What decoding keeps of a weight follows it, in place and elsewhere; copies and other devices make their own."""
    model = model_of("fp8", device, replace(CONFIG, num_attention_heads=8, num_nextn_predict_layers=0)).quantize_()
    prompts, params = [[1, 2, 3], [5] * 20], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

    def check(changed):
        found = [c.token_ids for c in engine.generate(prompts, params)]
        fresh = copy.deepcopy(model)
        assert all(block.attention._dense_kv_b is None for block in fresh.layers)
        assert found == [c.token_ids for c in Engine(fresh).generate(prompts, params)]
        assert (found != before[-1]) == changed
        before.append(found)

    engine, before = Engine(model), [None]
    check(True)
    kept = [block.attention._dense_kv_b for block in model.layers]
    check(False)
    kv_b = model.layers[0].attention.kv_b
    kv_b.weight.sf.mul_(-4)
    check(True)
    assert kept == [block.attention._dense_kv_b for block in model.layers], "in place"
    assert kv_b.weight.sf.numel() > 1
    kv_b.weight = ops.Quantized(kv_b.weight.data.clone(), kv_b.weight.sf * -0.25)
    check(True)
    same = kv_b.weight
    assert model.to(device).layers[0].attention.kv_b.weight is same


@torch.no_grad()
def test_a_quantised_model_is_saved_as_it_computes(device, tmp_path):
    """Also where the halves of gate_up do not begin with a block, as those of 160 rows here: they are cast again."""
    model = model_of("bf16", device).quantize_()
    tokens = tokens_for(CONFIG, 2, 33).to(device)
    expected = model(tokens)
    model.save_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(DeepSeekV3.from_pretrained(tmp_path / "dense", device=device)(tokens), expected)
    for dtype in (None, "fp8"):
        model.save_pretrained(tmp_path / "fp8", dtype=dtype)
        found = DeepSeekV3.from_pretrained(tmp_path / "fp8", dtype=torch.float32, device=device)(tokens)
        assert relative_error(found, expected) < 0.03


@torch.no_grad()
def test_one_half_of_a_pair_in_fp8(device):
    """As a checkpoint may have it: then the pair is multiplied in bf16, or layer by layer; and without `parameters` nothing but
    Quantized weights is in FP8."""
    model, tokens = model_of("fp8", device), tokens_for(CONFIG, 2, 33).to(device)
    expected = model(tokens)
    for layer, name in ((moes_of(model)[0].experts, "down"), (model.layers[0].mlp.gate_up, "weight")):
        made = ops.Quantized(*ops.per_block_cast(getattr(layer, name)))
        delattr(layer, name)
        setattr(layer, name, made)
    assert 0 < relative_error(model(tokens), expected) < 0.05
    model.set_precision("fp8", parameters=False)
    fp8 = {name for name, module in model.named_modules() if getattr(module, "fp8", False)}
    assert fp8 == {"layers.1.moe.experts", "layers.0.mlp.gate_up"}
    assert relative_error(model(tokens), expected) < 0.05


@torch.no_grad()
def test_a_weight_that_cannot_be_cast_stays(device):
    model = model_of("bf16", device).double()
    with pytest.raises(ValueError, match="expected bfloat16 or float32, got float64"):
        model.quantize_()
    assert model(tokens_for(CONFIG, 2, 33).to(device)).isfinite().all()


def test_other_scales_than_those_of_the_tokens(device):
    """Experts that are given other scales keep these rows, not the tokens."""
    experts, x = moes_of(model_of("fp8", device))[0].experts, torch.randn(40, CONFIG.hidden_size, device=device)
    buffer = ExpertBuffer(num_experts=4, transport="local", wire_dtype=torch.float8_e4m3fn)
    index = torch.rand(40, 4, device=device).topk(2).indices
    found = []
    for keeps in (True, False):
        handle = buffer.dispatch(x.requires_grad_(), index, torch.ones(40, 2, device=device))
        data, sf = handle.cast
        if not keeps:
            data = data.clone()
        experts.zero_grad()
        experts(handle.rows, handle.topk_weights, handle.offsets, data, sf.mul(4)).sum().backward()
        found.append(experts.gate_up.grad.clone())
    assert torch.equal(*found)


def test_weights_in_fp8_do_not_train(device):
    """What needs a gradient runs, and says so when the gradient is asked for."""
    model, tokens = model_of("fp8", device).quantize_(), tokens_for(CONFIG, 2, 33).to(device)
    loss = model.loss(Batch(tokens)).total
    with pytest.raises(RuntimeError, match="weights in FP8 do not train"):
        loss.backward()


@torch.no_grad()
def test_only_one_half_of_an_mlp_in_fp8_is_an_error(device):
    model = model_of("fp8", device)
    experts, x = moes_of(model)[0].experts, torch.randn(4, CONFIG.hidden_size, device=device)
    first, second = (experts.fp8_copies.of(name, getattr(experts, name)) for name in ("gate_up", "down"))
    offsets, weights = torch.tensor([0, 4, 4, 4, 4], dtype=torch.int32, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match="fp8_experts: gate_up and down must both be Quantized or both of parameters"):
        ops.fp8_experts(x, weights, offsets, first, second.data)


def test_sizes_that_do_not_fit_stay_as_they_are(device):
    """kv_a has 40 rows and the experts' inner size is 24: no multiples of 16."""
    model = model_of("fp8", device, BASE)
    _, grads = gradients(model, Batch(tokens_for(BASE, 2, 33).to(device)))
    made = copies_of(model)
    assert "layers.0.attention.o.weight" in made
    assert not any(name.endswith(("kv_a.weight", "experts.down", "shared.down.weight")) for name in made)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_experts_keep_tokens_instead_of_their_rows(device, monkeypatch):
    """For their weight gradients these, and their gradients, are transposed from the tokens, to the same bits."""
    model, batch, taken = model_of("fp8", device), batch_of(device), []

    def spy(x, *args, source=None, **settings):
        if isinstance(x, tuple):
            taken.append((len(x[0]), source is not None))
        return ops.cast_transpose(x, *args, source=source, **settings)

    monkeypatch.setattr(sys.modules["dsv3.ops.fp8_linear"], "cast_transpose", spy)
    _, found = gradients(model, batch)
    experts = len(moes_of(model))
    assert taken.count((4 * 64, True)) == 2 * experts
    monkeypatch.setattr(Gathered, "of", lambda cast: None)
    taken.clear()
    _, expected = gradients(model, batch)
    assert taken.count((4 * 64 * CONFIG.num_experts_per_tok, False)) == 2 * experts
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_weight_gradients_can_wait(device):
    """The same bits, at any later time."""
    model, batch = model_of("fp8", device), batch_of(device)
    (_, early), (_, late) = gradients(model, batch), gradients(model, batch, ops.WgradQueue())
    for name, grad in early.items():
        assert torch.equal(grad, late[name]), name


@pytest.mark.parametrize("what", ["norm", "mla_up"])
def test_recomputation_changes_no_bit(what, device):
    model, batch = model_of("fp8", device), batch_of(device)
    _, kept = gradients(model, batch)
    model.set_recompute(frozenset({what}))
    _, made_again = gradients(model, batch)
    for name, grad in kept.items():
        assert torch.equal(grad, made_again[name]), name


def test_the_state_dict_does_not_depend_on_it(device):
    plain, fp8 = model_of("bf16", device), model_of("fp8", device)
    fp8.loss(batch_of(device))
    assert copies_of(fp8)
    for (name, a), (other, b) in zip(plain.state_dict().items(), fp8.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="precision must be one of bf16, fp8, got 'fp4'"):
        fp8.set_precision("fp4")


def test_weights_are_cast_again_after_a_step(device):
    """In place; then the model computes what one that is made with the new weights does."""
    model, batch = model_of("fp8", device), batch_of(device)
    optimizer = AdamW(ParamBuffers(model))
    model.loss(batch, **LOSS).total.backward()
    copies = {name: weight.data.data.data_ptr() for name, weight in copies_of(model).items()}
    before = model.loss(batch, **LOSS).total.detach()
    optimizer.step(1e-2, before)
    model.refresh_fp8()
    after = model.loss(batch, **LOSS).total.detach()
    assert copies == {name: weight.data.data.data_ptr() for name, weight in copies_of(model).items()}
    fresh = DeepSeekV3(CONFIG, device=device, precision="fp8")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(after, fresh.loss(batch, **LOSS).total)
    assert after < before


def test_back_to_bf16(device):
    model, batch = model_of("fp8", device), batch_of(device)
    in_fp8 = model.loss(batch).total
    model.set_precision("bf16")
    assert torch.equal(model.loss(batch).total, model_of("bf16", device).loss(batch).total)
    assert not torch.equal(in_fp8, model.loss(batch).total)


def test_copies_go_with_their_parameters(device):
    """Other parameters in a layer's place leave none of the old ones behind; a copy of a layer, and its file, hold none."""
    model, batch = model_of("fp8", device), batch_of(device)
    expected = model.loss(batch, **LOSS).total
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made, gone = len(copies_of(model)), [weakref.ref(p) for p in model.parameters()]
    model.load_state_dict(state, assign=True)
    assert torch.equal(model.loss(batch, **LOSS).total, expected)
    del expected
    gc.collect()
    assert len(copies_of(model)) == made
    assert not any(ref() is not None for ref in gone)

    layer = model.layers[0].attention.o
    x = torch.randn(5, layer.weight.shape[1], device=device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.fp8_copies.made
        with torch.no_grad():
            assert torch.equal(other(x), layer(x))
            other.weight.mul_(2.0)
            assert not torch.equal(other(x), layer(x))
