"""Checkpoints to and from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from dsv3 import DeepSeekV3
from dsv3.weights import load_pretrained
from tests.checkpoints import assert_same, file_tensors, random_model, small_config, state


def oracle_config(**changes: object) -> DeepseekV3Config:
    values = small_config().to_dict() | {"num_nextn_predict_layers": 0} | changes
    return DeepseekV3Config(**{k: v for k, v in values.items() if k not in ("architectures", "model_type")})


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) - 0.5)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "n_shared_experts": 2},
        {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
    ],
)
def test_transformers_to_ours_to_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    oracle = randomised(DeepseekV3ForCausalLM(oracle_config(**changes)))
    oracle.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=50_000)
    assert_same(file_tensors(tmp_path / "ours"), file_tensors(tmp_path / "theirs"))
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert_same(back.state_dict(), oracle.state_dict())


def test_the_folder_opens_in_transformers(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<|eos|>": 3}, [("a", "b")]))
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok/tokenizer.json"))
    model = random_model(small_config(bos_token_id=5, eos_token_id=3))
    model.save_pretrained(tmp_path / "a", tokenizer_dir=tmp_path / "tok")
    assert AutoTokenizer.from_pretrained(tmp_path / "a")("abba")["input_ids"] == [2, 1, 0]
    DeepSeekV3.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")  # with the tokenizer that came with it
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert config.architectures == ["DeepseekV3ForCausalLM"]
    oracle, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(oracle) is DeepseekV3ForCausalLM
    assert not info["missing_keys"]
    assert all(key.startswith("model.layers.3.") for key in info["unexpected_keys"])
    assert (oracle.generation_config.bos_token_id, oracle.generation_config.eos_token_id) == (5, 3)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), oracle(tokens).logits, rtol=1e-4, atol=1e-4)


def test_keys_of_the_config_that_we_do_not_use_are_kept(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    model = random_model(small_config(extra={"aux_loss_alpha": 0.001, "auto_map": auto_map}))
    model.save_pretrained(tmp_path / "a")
    written = json.loads((tmp_path / "a/config.json").read_text())
    assert written["aux_loss_alpha"] == 0.001
    # The Python files that it names are not in this folder.
    assert "auto_map" not in written
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "a")) is DeepseekV3ForCausalLM


def test_v2_models_too(tmp_path: Path) -> None:
    changes = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
    config = small_config(model_type="deepseek_v2", num_nextn_predict_layers=0, **changes)
    model = random_model(config)
    model.save_pretrained(tmp_path / "a")
    oracle, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(oracle).__name__ == "DeepseekV2ForCausalLM"
    assert not info["missing_keys"] | info["unexpected_keys"]
    oracle.save_pretrained(tmp_path / "b")
    assert_same(state(load_pretrained(tmp_path / "b")), state(model))


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, True),
        ({"scoring_func": "softmax"}, False),
        ({"topk_method": "greedy"}, False),
        (
            {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
            True,
        ),
        (
            {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": True},
            False,
        ),
        ({"model_type": "deepseek_v2"}, False),
    ],
)
def test_what_transformers_would_compute_otherwise_is_said(
    changes: dict[str, Any], known: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random_model(small_config(routed_scaling_factor=1.0, **changes)).save_pretrained(tmp_path / "a")
    assert ("transformers computes this model otherwise, or refuses it" in caplog.text) != known


def test_yarn_is_written_with_its_factor(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "original_max_position_embeddings": 64}
    config = small_config(rope_scaling=scaling, max_position_embeddings=256)
    random_model(config).save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_scaling"]["factor"] == 4
    assert load_pretrained(tmp_path / "a").config.rope == config.rope
