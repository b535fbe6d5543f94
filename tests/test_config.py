"""Config: presets and their published sizes, both forms of config.json, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, DeepseekV2Config, DeepseekV3Config

from dsv3 import Batch, Config, DeepSeekV3
from dsv3.config import PRESETS
from tests.model.cases import BASE, CASES

SIZES = {  # billions: total and active as published (V3 report; V2, arXiv 2405.04434), without MTP
    "671b": (671.03, 37.55),
    "236b": (235.7, 21.4),
    "16b": (15.7, 2.7),
    "2b": (2.75, 1.05),
    "mini": (0.854, None),
}
MIN = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip


def on_meta(config: Config) -> tuple[int, int]:
    """Parameters of the main model and of MTP."""
    model = DeepSeekV3(config, device="meta")
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    assert all(param.is_meta for param in model.parameters())
    mtp = sum(size for name, size in sizes.items() if name.startswith("mtp."))
    return sum(sizes.values()) - mtp, mtp


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name):
    config = Config.preset(name)
    total, active = SIZES[name]
    main, mtp = on_meta(config)
    assert main == config.num_params()
    assert round(main / 1e9, len(str(total).split(".")[1])) == total
    if active is not None:
        assert round(config.num_params(active=True) / 1e9, len(str(active).split(".")[1])) == active
    assert (mtp > 0) == (config.num_nextn_predict_layers > 0)
    if name == "671b":
        assert round(mtp / 1e9, 2) == 11.61


def test_tiny_has_every_feature():
    c = Config.preset("tiny")
    main, mtp = on_meta(c)
    assert 2e6 < main + mtp < 4e6
    assert (c.hidden_size, c.vocab_size, c.dtype, c.num_nextn_predict_layers) == (128, 4096, "float32", 1)
    assert c.q_lora_rank
    assert c.n_shared_experts
    assert c.first_k_dense_replace
    assert 1 < c.topk_group < c.n_group
    assert (c.scoring_func, c.topk_method, c.norm_topk_prob) == ("sigmoid", "noaux_tc", True)


def test_presets_differ_where_the_models_do():
    assert {c.initializer_range for c in PRESETS.values()} == {0.006}
    for name in ("16b", "236b"):
        c = Config.preset(name)
        assert (c.scoring_func, c.has_gate_bias, c.num_nextn_predict_layers) == ("softmax", False, 0)
    assert Config.preset("671b").has_gate_bias
    assert Config.preset("16b").q_lora_rank == 0
    with pytest.raises(ValueError, match="preset must be one of tiny, mini, 2b, 16b, 236b, 671b, got 'huge'"):
        Config.preset("huge")


def test_softmax_scale():
    c = Config.preset("671b")
    assert round(c.softmax_scale, 6) == 0.135234
    assert c.rope.attention_factor == 1.0
    pretraining = dataclasses.replace(c, rope_scaling=None)
    assert pretraining.softmax_scale == 192**-0.5
    # The factor belongs to yarn: mscale keys beside another rope type mean nothing.
    unscaled = {"type": "default", "factor": 40, "mscale_all_dim": 1.0}
    assert dataclasses.replace(c, rope_scaling=unscaled).softmax_scale == 192**-0.5


OLD = {
    **MIN, "model_type": "deepseek_v3", "rope_theta": 50000, "torch_dtype": "float16", "hidden_act": "silu",
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1, "mscale_all_dim": 1},
}  # fmt: skip
NEW = {
    **MIN, "model_type": "deepseek_v3", "dtype": "float16", "rope_interleave": True, "head_dim": 8,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 50000.0, "factor": 4, "original_max_position_embeddings": 64, "mscale": 1,
        "mscale_all_dim": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("values", [OLD, NEW], ids=["rope_scaling", "rope_parameters"])
def test_both_forms_of_the_file(values):
    c = Config.from_dict(values)
    assert (c.rope_theta, c.dtype, c.rope_type, c.yarn_factor) == (50000.0, "float16", "yarn", 4.0)
    assert c.rope == Config.from_dict(OLD).rope
    assert c.extra == ({"head_dim": 8} if values is NEW else {})
    default = Config.from_dict({**MIN, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}})
    assert (default.rope_theta, default.rope_scaling) == (10.0, None)


@pytest.mark.parametrize(
    ("values", "scoring", "method"),
    [
        ({"model_type": "deepseek_v3"}, "sigmoid", "noaux_tc"),
        ({"model_type": "deepseek_v2"}, "softmax", "greedy"),
        ({"model_type": "deepseek_v2", "n_group": 2, "topk_group": 1}, "softmax", "group_limited_greedy"),
        ({"model_type": "deepseek_v2", "n_group": 2, "topk_method": "greedy"}, "softmax", "greedy"),
        ({"model_type": "deepseek_v2", "scoring_func": "sigmoid"}, "sigmoid", "greedy"),
    ],
)
def test_absent_gate_keys_follow_the_model_type(values, scoring, method):
    c = Config.from_dict({**MIN, **values})
    assert (c.scoring_func, c.topk_method) == (scoring, method)


@pytest.mark.parametrize("absent", [{}, {"q_lora_rank": None}, {"q_lora_rank": 0}])
def test_no_query_compression(absent):
    c = Config.from_dict({**MIN, **absent})
    assert c.q_lora_rank == 0
    assert c.to_dict()["q_lora_rank"] is None


def test_keys_without_effect_are_kept_and_written_back():
    c = Config.from_dict({**MIN, "aux_loss_alpha": 0.001, "seq_aux": True, "use_cache": True})
    assert c.extra == {"aux_loss_alpha": 0.001, "seq_aux": True, "use_cache": True}
    written = json.loads(json.dumps(c.to_dict()))
    assert written["seq_aux"] is True
    assert Config.from_dict(written) == c


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_what_is_written(name, tmp_path):
    config = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, DeepseekV2Config if config.model_type == "deepseek_v2" else DeepseekV3Config)
    assert Config.from_pretrained(tmp_path) == config
    theirs.save_pretrained(tmp_path / "again")
    again = Config.from_pretrained(tmp_path / "again")
    for field in dataclasses.fields(Config):
        if field.name not in ("extra", "rope_scaling"):
            assert getattr(again, field.name) == getattr(config, field.name), field.name
    assert (again.rope, again.softmax_scale) == (config.rope, config.softmax_scale)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention_bias", True, "attention_bias must be False, got True"),
        ("tie_word_embeddings", True, "tie_word_embeddings must be False, got True"),
        ("rope_interleave", False, "rope_interleave must be True, got False"),
        ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("moe_layer_freq", 2, "moe_layer_freq must be 1, got 2"),
        ("num_key_value_heads", 1, "num_key_value_heads must equal num_attention_heads 2, got 1"),
        ("model_type", "llama", "model_type must be one of deepseek_v2, deepseek_v3, got 'llama'"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope type must be one of default, yarn, got 'linear'"),
        ("rope_parameters", {"rope_type": "llama3"}, "rope type must be one of default, yarn, got 'llama3'"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor must be 1"),
        ("scoring_func", "relu", "scoring_func must be sigmoid or softmax, got 'relu'"),
        ("topk_method", "best", "topk_method must be one of .* got 'best'"),
        ("hidden_size", None, "lacks hidden_size"),
        ("hidden_size", -1, "hidden_size must be an integer of at least 1, got -1"),
        ("vocab_size", "64", "vocab_size must be an integer of at least 1, got '64'"),
        ("qk_rope_head_dim", 7, "qk_rope_head_dim must be even, got 7"),
        ("dtype", "int8", "dtype must be one of .* got 'int8'"),
    ],
)
def test_what_cannot_be_computed_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict({**MIN, key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 5}, "n_routed_experts 12 must be a multiple of n_group 5"),
        ({"topk_group": 5}, "topk_group must be in 1..4, got 5"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok must be in 1..6, got 7"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be in 1..6, got 0"),
        ({"n_group": 12, "topk_group": 6}, "must be at least 2 \\* n_group 12"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be positive, got 0"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rms_norm_eps", "1e-6", "rms_norm_eps must be a positive number, got '1e-6'"),
        ("initializer_range", 0, "initializer_range must be a positive number, got 0"),
        ("rope_theta", "x", "rope_theta must be a positive number, got 'x'"),
        ("rope_scaling", [1], r"must be an object, got \[1\]"),
        ("rope_scaling", {"type": "yarn", "factor": 0}, "the rope factor must be a number of at least 1, got 0"),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 2, "beta_fast": "q"},
            "beta_fast of the rope scaling must be a number",
        ),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 2, "mscale_all_dim": [1]},
            "mscale_all_dim of the rope scaling must",
        ),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 2, "original_max_position_embeddings": -3},
            "original_max_position_embeddings must be a positive integer, got -3",
        ),
        ("norm_topk_prob", "maybe", "norm_topk_prob must be true or false, got 'maybe'"),
        ("model_type", ["deepseek_v3"], "model_type must be one of deepseek_v2, deepseek_v3, got"),
        ("quantization_config", 3, "quantization_config must be an object, got 3"),
        ("eos_token_id", "a", "eos_token_id must be a token number, got 'a'"),
    ],
)
def test_values_of_the_wrong_kind(key, value, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict({**MIN, key: value})


def test_null_numbers_take_their_defaults():
    nulls = dict.fromkeys(("routed_scaling_factor", "initializer_range", "norm_topk_prob"))
    config = Config.from_dict({**MIN, **nulls})
    assert (config.routed_scaling_factor, config.initializer_range, config.norm_topk_prob) == (1.0, 0.006, True)


def test_all_dense_is_written_so_that_others_make_no_empty_experts():
    assert (
        Config.from_dict({**MIN, "n_routed_experts": 0}).to_dict()["first_k_dense_replace"] == MIN["num_hidden_layers"]
    )


def test_sequences_longer_than_the_context_are_refused():
    model = DeepSeekV3(Config.from_dict({**MIN, "max_position_embeddings": 8}), dtype=torch.float32).init_weights()
    with pytest.raises(ValueError, match="at most max_position_embeddings 8 tokens, got 9"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most max_position_embeddings 8 tokens, got 9"):
        model.loss(Batch(torch.zeros(1, 10, dtype=torch.int64)))


def test_files(tmp_path):
    with pytest.raises(ValueError, match=r"expected a config.json in"):
        Config.from_pretrained(tmp_path)
    for text, message in (("{", "is not valid JSON"), ("[1]", "must hold one JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Config.from_pretrained(tmp_path)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.vocab_size = 3
    assert torch.float32 == getattr(torch, BASE.dtype)
