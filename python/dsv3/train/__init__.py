"""Training. The public names load on first use, so that the data tools do not pay for the trainer."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "TrainConfig": "dsv3.train.config",
    "Trainer": "dsv3.train.trainer",
    "Diverged": "dsv3.train.trainer",
    "Callback": "dsv3.train.metrics",
    "StepReport": "dsv3.train.metrics",
    "EvalReport": "dsv3.train.metrics",
    "CheckpointError": "dsv3.train.checkpoint",
    "run": "dsv3.train.launch",
    "export": "dsv3.train.launch",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dsv3.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
