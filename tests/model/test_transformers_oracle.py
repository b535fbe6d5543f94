"""transformers' DeepseekV3 and DeepseekV2 as the outside oracle: logits, greedy text and MTP drafts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dsv3 import DeepSeekV3
from dsv3.model import AttentionContext
from tests.model.cases import BASE, CASES, random_model, tokens_for


def save_and_open(model: DeepSeekV3, folder):
    """The model as transformers reads it."""
    model.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    kind = DeepseekV2ForCausalLM if model.config.model_type == "deepseek_v2" else DeepseekV3ForCausalLM
    assert isinstance(theirs, kind)
    return theirs.eval()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_text(model: DeepSeekV3, theirs) -> None:
    """The same greedy continuation of two prompts for 64 tokens."""
    prompts = tokens_for(model.config, 2, 9, seed=2)
    text = theirs.generate(prompts, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert text.shape == (2, 73)
    assert len(text[:, 9:].unique()) > 4, "a text of one token would say little"
    assert torch.equal(model(text[:, :-1])[:, 8:].argmax(-1), text[:, 9:])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_and_greedy_text(name, tmp_path):
    model = random_model(CASES[name])
    theirs = save_and_open(model, tmp_path)
    tokens = tokens_for(model.config, 4, 60)
    assert error(model(tokens), theirs(tokens, use_cache=False).logits) < 1e-4

    assert_same_text(model, theirs)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_their_checkpoints(name, tmp_path):
    config = CASES[name]
    theirs = save_and_open(random_model(config), tmp_path / "ours").eval()
    for parameter in theirs.parameters():
        parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = DeepSeekV3.from_pretrained(tmp_path / "theirs")
    tokens = tokens_for(config, 2, 40)
    assert error(model(tokens), theirs(tokens, use_cache=False).logits) < 1e-4
    assert_same_text(model, theirs)
    read = {key: getattr(model.config, key) for key in ("topk_method", "scoring_func", "q_lora_rank", "softmax_scale")}
    assert read == {key: getattr(config, key) for key in read}


@torch.no_grad()
def test_negative_biased_scores(tmp_path):
    """All choices below 0: experts of dropped groups must be at -inf, not at 0."""
    model = random_model(BASE)
    for layer in model.layers[1:]:
        layer.moe.gate.bias -= 2
    tokens = tokens_for(BASE, 2, 60)
    assert error(model(tokens), save_and_open(model, tmp_path)(tokens, use_cache=False).logits) < 1e-4


@pytest.mark.parametrize("depths", [1, 2])
@torch.no_grad()
def test_mtp_drafts(depths, tmp_path):
    model = random_model(replace(BASE, num_nextn_predict_layers=depths))
    theirs = save_and_open(model, tmp_path)
    layers = "|".join(str(BASE.num_hidden_layers + k) for k in range(depths))
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({layers})\."]
    mtp = MtpModel.from_pretrained(theirs).eval()

    tokens = tokens_for(model.config, 1, 30)
    prompt, shifted = tokens[:, :-1], tokens[:, 1:]
    hidden = theirs.model(prompt, use_cache=False).last_hidden_state
    positions = torch.arange(1, 30)[None]
    drafts, logits, _ = mtp(shifted, hidden, torch.ones_like(shifted), positions, None)
    assert drafts.shape == (1, depths)

    ctx = AttentionContext.batch(1, 29)
    h, _ = model.hidden(prompt[0], ctx)
    following = shifted[0]
    for depth in range(depths):
        h, _ = model.mtp[depth](h, following, ctx)
        ours = model.logits(h[-1:])
        assert error(ours, logits[0, depth]) < 1e-4
        assert ours.argmax() == drafts[0, depth]
        following = torch.cat([following[1:], drafts[0, depth : depth + 1]])
