"""TrainConfig: files, overrides, and one clear line for everything that is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.train.config import TrainConfig


def test_toml_json_and_overrides_agree(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'preset = "mini"\nmax_tokens = 1e9\nlr = 1\ndeterministic = true\n[model]\nvocab_size = 300\n'
    )
    values = {"preset": "mini", "max_tokens": 10**9, "lr": 1.0, "deterministic": True, "model": {"vocab_size": 300}}
    (tmp_path / "a.json").write_text(json.dumps(values))
    overrides = ["preset=mini", "max_tokens=1e9", "lr=1", "deterministic=true", "model.vocab_size=300"]
    expected = TrainConfig(**values)
    assert TrainConfig.load(tmp_path / "a.toml") == expected
    assert TrainConfig.load(tmp_path / "a.json") == expected
    assert TrainConfig.load(None, overrides) == expected
    assert TrainConfig.from_dict(expected.to_dict()) == expected
    changed = TrainConfig.load(
        tmp_path / "a.toml", ["lr=2e-3", "model.hidden_size=64", 'model.rope_scaling={"factor": 4}']
    )
    assert changed.lr == 2e-3
    assert changed.model == {"vocab_size": 300, "hidden_size": 64, "rope_scaling": {"factor": 4}}
    assert TrainConfig.load(None, ["out=12", "max_steps=3"]).out == "12"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("leraning_rate=1", "unknown training config key 'leraning_rate', did you mean"),
        ("wamup_steps=1", "unknown training config key 'wamup_steps', did you mean 'warmup_steps'"),
        ("xyzzy=1", "unknown training config key 'xyzzy'; known keys: preset, "),
        ("lr=fast", "lr must be float, got str 'fast'"),
        ("batch=1.5", "batch must be int, got float 1.5"),
        ("batch=true", "batch must be int, got bool True"),
        ("deterministic=1", "deterministic must be bool, got int 1"),
        ("model=3", "model must be dict, got int 3"),
        ("precision=fp16", "precision must be one of bf16, fp8, fp32, got 'fp16'"),
        ("lr_schedule=linear", "lr_schedule must be one of v3, cosine, wsd, constant, got 'linear'"),
        ("batch=0", "batch must be positive, got 0"),
        ("lr=NaN", "lr must be positive, got nan"),
        ("weight_decay=-1", "weight_decay must be finite and not negative, got -1"),
        ("fim_rate=1.5", "fim_rate must lie between 0 and 1, got 1.5"),
        ("batch=12", "batch must be a multiple of micro_batch x ranks = 8, got 12"),
        ("batch", "expected key=value, got 'batch'"),
        ("lr.x=1", "lr holds no keys of its own, got 'lr.x=1'"),
        ("beta1=1", "beta1 must be at most 0.99, as moments are bf16, got 1.0"),
        ("beta2=1", "beta2 must be at most 0.99, as moments are bf16, got 1.0"),
        ("beta2=0.999", "beta2 must be at most 0.99, as moments are bf16, got 0.999"),
        ("eps=0", "eps must be positive, got 0.0"),
        ("seed=99999999999999999999", "seed must be below 2^63, got 99999999999999999999"),
    ],
)
def test_bad_values_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is compared below
        TrainConfig.load(None, ["max_steps=1", override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_as_python_writes_them() -> None:
    config = TrainConfig.load(None, ["max_steps=1", "lr=.001", "out=1e3", "weight_decay=1_0"])
    assert (config.lr, config.out, config.weight_decay) == (0.001, "1e3", 10.0)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a run needs an end"):
        TrainConfig()
    with pytest.raises(ValueError, match=r"no training config at .*missing\.toml"):
        TrainConfig.load(tmp_path / "missing.toml")
    with pytest.raises(ValueError, match=r"a \.toml or \.json file, got .*a\.yaml"):
        TrainConfig.load(tmp_path / "a.yaml")
    for name, text in (("a.toml", "lr = = 3"), ("a.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="is not valid"):
            TrainConfig.load(tmp_path / name)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object of keys and values, got list"):
        TrainConfig.load(tmp_path / "list.json")
