"""`python -m dsv3.ops`: every primitive with its schema, its shapes and dtypes, and where it runs."""

from __future__ import annotations

import os
import sys

import dsv3.ops  # noqa: F401  (registers the ops)
from dsv3.ops import registry


def main() -> None:
    available = registry.NATIVE_ERROR or "available"
    print(f"native module: {available}; native ops run on Hopper GPUs, everything else on the references\n")
    native = "reference" if registry.NATIVE_ERROR else "native"
    for op in registry.OPS.values():
        print(f"dsv3::{op.schema}\n    {op.shapes}\n    {native if op.native else 'reference'}\n")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
