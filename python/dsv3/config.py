"""The model configuration: one frozen dataclass whose fields are the keys of a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCORING = {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid"}
ROPE_TYPES = ("default", "yarn")
DTYPES = ("bfloat16", "float16", "float32", "float64")
POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "n_group", "topk_group",
)  # fmt: skip
NOT_NEGATIVE = (
    "q_lora_rank", "moe_intermediate_size", "first_k_dense_replace", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "num_nextn_predict_layers",
)  # fmt: skip
POSITIVE_NUMBERS = ("routed_scaling_factor", "rms_norm_eps", "rope_theta", "initializer_range")
# Keys that this code computes in one way only; a file that asks for anything else is refused.
FIXED = {
    "attention_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "rope_interleave": (True, None),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
}
# Restated by other fields, so neither kept in `extra` nor checked.
DERIVED = ("rope_parameters", "torch_dtype", "num_mtp_layers", "num_local_experts", "num_experts")


@dataclass(frozen=True)
class Rope:
    """Everything that decides the rotary tables; hashable, so the tables can be cached by it."""

    dim: int
    theta: float
    max_positions: int
    factor: float = 1.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError where it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one JSON object, got {type(values).__name__}")
    return values


@dataclass(frozen=True)
class Config:
    """A DeepSeek-V2 or V3 model. Field names and meanings are those of config.json (facts: report 4.2, arXiv 2412.19437).

    `n_routed_experts` 0 and `q_lora_rank` 0 mean none. `extra` holds keys of the file without effect; they are written back.
    Raises ValueError for sizes that do not fit together and for values that this code cannot compute.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006
    dtype: str = "bfloat16"
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    model_type: str = "deepseek_v3"
    quantization_config: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate(self)
        if self.n_routed_experts == 0:  # transformers would make layers past first_k_dense_replace with no experts
            object.__setattr__(self, "first_k_dense_replace", self.num_hidden_layers)

    # ---- construction ----
    @staticmethod
    def preset(name: str) -> Config:
        """One of PRESETS: tiny (2 CPU cores), mini and 2b (one GPU), 16b (V2-Lite), 236b (V2), 671b (V3)."""
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Read the contents of a config.json, with rope_theta + rope_scaling + torch_dtype or rope_parameters + dtype."""
        return cls(**_read(values))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Config:
        """Read `folder`/config.json."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            run = Path(folder) / "train_config.json"
            hint = f": `dsv3 export {folder} {folder}-hf` makes a folder that has one" if run.is_file() else ""
            raise ValueError(f"expected a config.json in {folder}, found none{hint}")
        return cls.from_dict(read_object(path))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json that transformers (and DeepSeek's own code) opens."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("extra", "dtype")}
        if self.quantization_config is None:
            del values["quantization_config"]
        version = self.model_type[-2:].upper()
        fixed = {
            "architectures": [f"Deepseek{version}ForCausalLM"],
            "q_lora_rank": self.q_lora_rank or None,
            "num_key_value_heads": self.num_attention_heads,
            "torch_dtype": self.dtype,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "moe_layer_freq": 1,
        }
        if self.rope_scaling is not None and self.rope_type == "yarn" and not self.rope_scaling.get("factor"):
            values["rope_scaling"] = {**self.rope_scaling, "factor": self.yarn_factor}  # which others do not work out
        return {**self.extra, **values, **fixed}

    # ---- what follows from the fields ----
    @property
    def is_known_elsewhere(self) -> bool:
        """Whether transformers computes this gate: it knows one of each model_type, whatever config.json says."""
        if not self.n_routed_experts:
            return True
        if self.model_type == "deepseek_v3":
            return (self.scoring_func, self.topk_method) == ("sigmoid", "noaux_tc")
        return self.scoring_func == "softmax" and self.topk_method != "noaux_tc" and not self.norm_topk_prob

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached a token and layer: the normalised latent and the rotated key shared by the heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_blocks(self) -> int:
        """Of the main model and of MTP; each has a cache."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` routes; MTP blocks (layer >= num_hidden_layers) do whenever there are experts."""
        return self.n_routed_experts > 0 and layer >= min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def has_gate_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def gate_groups(self) -> tuple[int, int]:
        """(groups, groups kept) as the gate uses them: plain greedy ignores the groups."""
        return (1, 1) if self.topk_method == "greedy" else (self.n_group, self.topk_group)

    @property
    def rope(self) -> Rope:
        base = Rope(self.qk_rope_head_dim, float(self.rope_theta), self.max_position_embeddings)
        if self.rope_type == "default":
            return base
        s = self.rope_scaling
        assert s is not None
        original = s.get("original_max_position_embeddings") or self.max_position_embeddings
        factor = self.yarn_factor
        scale = s.get("attention_factor")
        if scale is None:
            # The rule of transformers: equal mscales cancel, a missing one means the paper's default.
            both = s.get("mscale") and s.get("mscale_all_dim")
            scale = yarn_mscale(factor, s["mscale"] if both else 1)
            scale /= yarn_mscale(factor, s["mscale_all_dim"]) if both else 1
        return dataclasses.replace(
            base,
            factor=factor,
            original_max_positions=original,
            beta_fast=s.get("beta_fast") or 32.0,
            beta_slow=s.get("beta_slow") or 1.0,
            attention_factor=float(scale),
            truncate=s.get("truncate", True),
        )

    @property
    def rope_type(self) -> str:
        s = self.rope_scaling or {}
        return s.get("rope_type") or s.get("type") or "default"

    @property
    def yarn_factor(self) -> float:
        s = self.rope_scaling or {}
        original = s.get("original_max_position_embeddings") or self.max_position_embeddings
        return float(s.get("factor") or self.max_position_embeddings / original)

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times mscale(factor, mscale_all_dim)^2 when the rope type is yarn (0.135234 in V3 at factor 40)."""
        scale = self.qk_head_dim**-0.5
        all_dim = (self.rope_scaling or {}).get("mscale_all_dim")
        if self.rope_type == "yarn" and all_dim:
            scale *= yarn_mscale(self.yarn_factor, all_dim) ** 2
        return scale

    def num_params(self, *, active: bool = False) -> int:
        """Parameters of the main model without MTP, gate biases not counted (the published 671B / 37B and 236B / 21B).

        active: only those that one token uses: its top-k and the shared experts; embedding and head included.
        """
        h, heads = self.hidden_size, self.num_attention_heads
        q_out = heads * self.qk_head_dim
        q = h * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * q_out if self.q_lora_rank else h * q_out
        kv = h * self.latent_dim + self.kv_lora_rank * (1 + heads * (self.qk_nope_head_dim + self.v_head_dim))
        block = q + kv + heads * self.v_head_dim * h + 2 * h
        experts = (self.num_experts_per_tok if active else self.n_routed_experts) + self.n_shared_experts
        moe = 3 * h * self.moe_intermediate_size * experts + h * self.n_routed_experts
        num_moe = sum(self.is_moe(n) for n in range(self.num_hidden_layers))
        dense = 3 * h * self.intermediate_size * (self.num_hidden_layers - num_moe)
        return 2 * self.vocab_size * h + h + self.num_hidden_layers * block + num_moe * moe + dense


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 where nothing is extended (YaRN, arXiv 2309.00071, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of Config from the keys of a config.json; what has no field goes to `extra`."""
    names = {f.name for f in dataclasses.fields(Config)} - {"extra"}
    model_type = values.get("model_type", "deepseek_v3")
    if model_type not in tuple(SCORING):
        raise ValueError(f"model_type must be one of {', '.join(SCORING)}, got {model_type!r}")
    for key, allowed in FIXED.items():
        if key in values and values[key] not in allowed:
            raise ValueError(f"config.json: {key} must be {allowed[0]!r}, got {values[key]!r}")
    heads = values.get("num_attention_heads")
    if values.get("num_key_value_heads") not in (None, heads):
        raise ValueError(
            f"config.json: num_key_value_heads must equal num_attention_heads {heads}, got {values['num_key_value_heads']}"
        )
    out = {
        key: value
        for key, value in values.items()
        if key in names and (value is not None or key not in POSITIVE_NUMBERS)
    }
    for short, name in (
        ("num_mtp_layers", "num_nextn_predict_layers"),
        ("num_local_experts", "n_routed_experts"),
        ("num_experts", "n_routed_experts"),
    ):
        if short in values:
            out.setdefault(name, values[short])
    out["model_type"] = model_type
    for key in NOT_NEGATIVE:
        out[key] = out.get(key) or 0
    for key in ("n_group", "topk_group"):
        out[key] = out.get(key) or 1
    if out.get("norm_topk_prob") is None:
        out["norm_topk_prob"] = model_type == "deepseek_v3"
    if out.get("scoring_func") is None:
        out["scoring_func"] = SCORING[model_type]
    if out.get("topk_method") is None:
        v2 = "group_limited_greedy" if out["n_group"] > 1 else "greedy"
        out["topk_method"] = v2 if model_type == "deepseek_v2" else "noaux_tc"
    dtype = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    out["dtype"] = str(dtype).removeprefix("torch.")
    out.update(_read_rope(values))
    required = [f.name for f in dataclasses.fields(Config) if f.default is dataclasses.MISSING and f.name != "extra"]
    missing = [key for key in required if out.get(key) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    ignored = {*FIXED, *DERIVED, "architectures", "num_key_value_heads"}
    out["extra"] = {key: value for key, value in values.items() if key not in names and key not in ignored}
    return out


def _read_rope(values: dict[str, Any]) -> dict[str, Any]:
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"config.json: rope_parameters or rope_scaling must be an object, got {parameters!r}")
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    partial = parameters.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1
    if partial != 1:
        raise ValueError(f"config.json: partial_rotary_factor must be 1, got {partial}")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(f"config.json: the rope type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else parameters}


def _validate(c: Config) -> None:
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"config: {message}")

    for name in POSITIVE + NOT_NEGATIVE:
        value, least = getattr(c, name), int(name in POSITIVE)
        need(type(value) is int and value >= least, f"{name} must be an integer of at least {least}, got {value!r}")
    for name in POSITIVE_NUMBERS:
        value = getattr(c, name)
        need(type(value) in (int, float) and value > 0, f"{name} must be a positive number, got {value!r}")
    for name in ("bos_token_id", "eos_token_id"):
        ids = getattr(c, name)
        found = ids if name == "eos_token_id" and isinstance(ids, list) else [ids]
        need(all(i is None or type(i) is int for i in found), f"{name} must be a token number, got {ids!r}")
    for name in ("rope_scaling", "quantization_config"):
        value = getattr(c, name)
        need(value is None or isinstance(value, dict), f"{name} must be an object, got {value!r}")
    need(isinstance(c.extra, dict), f"extra must be an object, got {c.extra!r}")
    need(type(c.norm_topk_prob) is bool, f"norm_topk_prob must be true or false, got {c.norm_topk_prob!r}")
    _validate_rope(c.rope_scaling or {}, need)
    need(c.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, got {c.dtype!r}")
    need(c.model_type in SCORING, f"model_type must be one of {', '.join(SCORING)}, got {c.model_type!r}")
    need(c.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim must be even, got {c.qk_rope_head_dim}")
    need(c.rope_type in ROPE_TYPES, f"the rope type must be one of {', '.join(ROPE_TYPES)}, got {c.rope_type!r}")
    need(c.scoring_func in ("sigmoid", "softmax"), f"scoring_func must be sigmoid or softmax, got {c.scoring_func!r}")
    methods = ("noaux_tc", "greedy", "group_limited_greedy")
    need(c.topk_method in methods, f"topk_method must be one of {', '.join(methods)}, got {c.topk_method!r}")
    experts = c.n_routed_experts
    if experts == 0:
        return
    need(c.moe_intermediate_size > 0, f"moe_intermediate_size must be positive, got {c.moe_intermediate_size}")
    groups, kept = c.gate_groups
    need(experts % groups == 0, f"n_routed_experts {experts} must be a multiple of n_group {groups}")
    need(1 <= kept <= groups, f"topk_group must be in 1..{groups}, got {kept}")
    top = c.num_experts_per_tok
    need(
        1 <= top <= kept * (experts // groups),
        f"num_experts_per_tok must be in 1..{kept * (experts // groups)}, got {top}",
    )
    pairs = c.topk_method != "noaux_tc" or groups == 1 or experts // groups >= 2
    need(
        pairs,
        f"noaux_tc sums the two best of a group, so n_routed_experts {experts} must be at least 2 * n_group {groups}",
    )
    ambiguous = c.model_type == "deepseek_v2" and c.norm_topk_prob and c.routed_scaling_factor != 1
    need(not ambiguous, "deepseek_v2 with norm_topk_prob and a routed_scaling_factor other than 1 is not supported")


def _validate_rope(scaling: dict[str, Any], need: Callable[[bool, str], None]) -> None:
    factor = scaling.get("factor", 1)
    number = type(factor) in (int, float)
    need(number and 1 <= factor < math.inf, f"the rope factor must be a number of at least 1, got {factor!r}")
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"):
        value = scaling.get(key)
        good = value is None or (type(value) in (int, float) and 0 <= value < math.inf)
        need(good, f"{key} of the rope scaling must be a number of at least 0, got {value!r}")
    value = scaling.get("original_max_position_embeddings")
    good = value is None or (type(value) is int and value > 0)
    need(good, f"original_max_position_embeddings must be a positive integer, got {value!r}")


_V3_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_HEAD = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2 = {
    **_HEAD, "model_type": "deepseek_v2", "vocab_size": 102400, "first_k_dense_replace": 1, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "scoring_func": "softmax", "norm_topk_prob": False, "bos_token_id": 100000,
    "eos_token_id": 100001, "max_position_embeddings": 163840,
    "rope_scaling": {**_V3_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip

PRESETS = {
    "tiny": Config(
        vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
        moe_intermediate_size=128, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, n_group=4, topk_group=2, num_nextn_predict_layers=1, max_position_embeddings=2048,
        dtype="float32",
    ),
    "mini": Config(
        **_HEAD, vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, q_lora_rank=768, moe_intermediate_size=512, first_k_dense_replace=1,
        n_routed_experts=64, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1,
    ),
    "2b": Config(
        **_HEAD, vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16,
        num_attention_heads=16, q_lora_rank=1536, moe_intermediate_size=768, first_k_dense_replace=1,
        n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=8, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1,
    ),
    "16b": Config(
        **_V2, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16,
        moe_intermediate_size=1408, n_routed_experts=64, topk_method="greedy",
    ),
    "236b": Config(
        **_V2, hidden_size=5120, intermediate_size=12288, num_hidden_layers=60, num_attention_heads=128,
        q_lora_rank=1536, moe_intermediate_size=1536, n_routed_experts=160, n_group=8, topk_group=3,
        topk_method="group_limited_greedy", routed_scaling_factor=16.0,
    ),
    "671b": Config(
        **_HEAD, vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=128, q_lora_rank=1536, moe_intermediate_size=2048, first_k_dense_replace=3,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=163840, rope_scaling=_V3_YARN,
    ),
}  # fmt: skip
