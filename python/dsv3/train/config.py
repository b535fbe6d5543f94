"""TrainConfig: everything that decides a training run, read from a TOML or JSON file and `key=value` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from dsv3.train.schedules import GAMMA_UNTIL, MTP_SWITCH, BatchSize, LearningRate, Switch

_CHOICES = {
    "precision": ("bf16", "fp8", "fp32"),
    "init_optimizer": ("keep", "fresh"),
    "ep_transport": ("auto", "collective", "ipc", "nvshmem"),
    "lr_schedule": LearningRate.SHAPES,
}
_POSITIVE = (
    "ep", "seq_len", "batch", "micro_batch", "lr", "eps", "clip", "save_every", "keep", "max_skips", "log_load_every",
)  # fmt: skip
MAX_BETA = 0.99  # moments are bf16: slower averages stop far from where they should, and at 0.999 do not move
_FRACTIONS = ("beta1", "beta2", "ema_decay", "fim_rate", "mtp_switch", "gamma_until", "lr_final", "decay_fraction")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Defaults are the published recipe (report 4.2) at the scale of one machine.

    The run ends at the first of max_steps, max_tokens and max_seconds that is set; schedules follow the largest of the
    three fractions, so a run bounded by seconds anneals to its end (its learning rate then depends on the clock: only
    runs without max_seconds resume bit-identically).
    Raises ValueError, naming the key, for a value out of range or of the wrong type.
    """

    # what to train, on what, and where to
    preset: str = "tiny"  # a preset of dsv3.Config, or a folder with a config.json
    model: dict[str, Any] = field(default_factory=dict)  # keys of Config to replace, e.g. model.rope_scaling
    data: str = ""  # token folder (dsv3 tokenize): splits train and valid
    out: str = "runs/train"  # checkpoints, metrics.jsonl, TensorBoard events
    init_from: str = (
        ""  # training checkpoint to start from, whose model counts instead of preset's: second stages, e.g. YaRN
    )
    init_optimizer: str = "keep"  # "keep" the moments of init_from, or start "fresh"
    # how
    device: str = "auto"
    precision: str = "bf16"  # dtype of weights and activations: "bf16" or "fp32"; "fp8": bf16 with FP8 linear layers
    deterministic: bool = False  # same bits from run to run on a GPU; a CPU always gives them
    seed: int = 0
    ep: int = 1  # consecutive ranks that share the routed experts among them
    ep_transport: str = "auto"  # of dsv3.comm.ExpertBuffer, between these ranks
    # Replay forward and backward as CUDA graphs, on a Hopper GPU in bf16 and fp8 with ep 1; unset: there, if no ranks share it.
    cuda_graphs: bool | None = None
    recompute: bool = False  # norms and MLA up-projections again in backward, instead of keeping their outputs
    # batch, in sequences
    seq_len: int = 4096
    batch: int = 32
    micro_batch: int = 8  # of one rank; gradients of the micro-batches of a step are summed
    batch_start: int = 0  # first size of the ramp to `batch`; 0: no ramp
    batch_ramp_tokens: int = 0
    fim_rate: float = 0.1  # documents turned into fill-in-the-middle (PSM)
    # end of the run: at least one
    max_steps: int = 0
    max_tokens: int = 0
    max_seconds: float = 0.0
    # optimizer
    lr: float = 2.2e-4
    lr_schedule: str = "v3"
    lr_final: float = 0.1  # last learning rate of cosine and wsd, relative to lr
    decay_fraction: float = 0.2  # last part of wsd
    warmup_steps: int = 2000
    warmup_tokens: int = 0  # instead of warmup_steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    ema_decay: float = 0.0  # of the average of the parameters kept on the CPU; 0: none
    # loss and balance
    mtp_weight: float = 0.3
    mtp_weight_final: float = 0.1
    mtp_switch: float = MTP_SWITCH  # fraction of the run at which mtp_weight changes
    balance_alpha: float = 1e-4  # weight of the sequence-wise balance loss
    gamma: float = 1e-3  # update speed of the routing bias
    gamma_until: float = GAMMA_UNTIL  # fraction of the run after which gamma is 0
    # records
    save_every: int = 1000  # steps
    keep: int = 3  # checkpoints
    eval_every: int = 0  # steps; 0: only at the end
    eval_sequences: int = 0  # validation sequences a time before the end, in whole micro-batches; 0: all
    log_load_every: int = 50  # steps between expert loads in metrics.jsonl
    max_skips: int = 10  # non-finite steps in a row that stop the run
    tensorboard: bool = True

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for key in hints:
            object.__setattr__(self, key, _typed(key, getattr(self, key), hints[key]))
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"{key} must be one of {', '.join(choices)}, got {getattr(self, key)!r}")
        for key in _POSITIVE:
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be positive, got {getattr(self, key)}")
        for key in _FRACTIONS:
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must lie between 0 and 1, got {getattr(self, key)}")
        for key, kind in hints.items():
            if kind in (int, float) and not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be finite and not negative, got {getattr(self, key)}")
        for key in ("beta1", "beta2"):
            if getattr(self, key) > MAX_BETA:
                raise ValueError(f"{key} must be at most {MAX_BETA}, as moments are bf16, got {getattr(self, key)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2^63, got {self.seed}")
        if not (self.max_steps or self.max_tokens or self.max_seconds):
            raise ValueError("set max_steps, max_tokens or max_seconds: a run needs an end")
        self.batch_size(ranks=1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Raises ValueError for an unknown key, suggesting the nearest one."""
        for key in values:
            check_key(key)
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads a .toml or .json file, then applies `key=value` overrides (`model.key=value` for the model's)."""
        values = {} if path is None else _read(Path(path))
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"expected key=value, got {override!r}")
            key, _, inner = key.strip().partition(".")
            check_key(key)
            if inner:
                outer = values.get(key, {})
                if key != "model" or not isinstance(outer, dict):
                    raise ValueError(f"{key} holds no keys of its own, got {override!r}")
                values[key] = {**outer, inner: _parse(text)}
            else:
                values[key] = text if get_type_hints(cls)[key] is str else _parse(text)
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def learning_rate(self) -> LearningRate:
        return LearningRate(
            self.lr, self.lr_schedule, self.lr_final, self.decay_fraction, self.warmup_steps, self.warmup_tokens
        )

    @property
    def mtp_schedule(self) -> Switch:
        return Switch(self.mtp_weight, self.mtp_weight_final, self.mtp_switch)

    @property
    def gamma_schedule(self) -> Switch:
        return Switch(self.gamma, 0.0, self.gamma_until)

    def batch_size(self, *, ranks: int) -> BatchSize:
        return BatchSize(self.batch, self.batch_start, self.batch_ramp_tokens, self.micro_batch * ranks)

    def progress(self, *, step: int, tokens: int, seconds: float) -> float:
        """The largest of the fractions of the limits that are set; 1 or more ends the run."""
        used = ((step, self.max_steps), (tokens, self.max_tokens), (seconds, self.max_seconds))
        return max(value / limit for value, limit in used if limit)


def check_key(key: str, owner: type = TrainConfig, prefix: str = "") -> None:
    """Raises ValueError where `key` is no field of the dataclass `owner`, suggesting the nearest one."""
    names = [f.name for f in dataclasses.fields(owner)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
        hint = f", did you mean {prefix + near[0]!r}?" if near else f"; known keys: {', '.join(names)}"
        raise ValueError(f"unknown training config key {prefix + key!r}{hint}")


def _read(path: Path) -> dict[str, Any]:
    readers = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise ValueError(f"a training config is a .toml or .json file, got {path}")
    if not path.is_file():
        raise ValueError(f"no training config at {path}")
    try:
        values = readers[path.suffix](path.read_text(encoding="utf-8"))
    except ValueError as error:  # both decoders' errors, and a text that is not UTF-8
        raise ValueError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object of keys and values, got {type(values).__name__}")
    return values


def _parse(text: str) -> Any:
    """The value of an override: what JSON reads (true, 3, 1e-4, {...}) or Python as a number (.001), otherwise the text."""
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; a whole float counts as an int (max_tokens = 1e9), an int as a float."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind == bool | None:
        if value is None:
            return None
        kind = bool
    wanted = kind if kind in (int, float, bool, str) else dict
    if type(value) is not wanted:
        raise ValueError(f"{key} must be {wanted.__name__}, got {type(value).__name__} {value!r}")
    return value
