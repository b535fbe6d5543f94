"""dsv3: train a DeepSeek-V3 style model on Hopper GPUs and serve the same weights.

The public names load on first use, so that `from dsv3 import ops` costs a framework only the ops.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "dsv3.config",
    "DeepSeekV3": "dsv3.model",
    "Batch": "dsv3.model",
    "SamplingParams": "dsv3.inference",
    "generate": "dsv3.inference",
    "Engine": "dsv3.inference",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
