"""Runs a case once at a tiny size, on any device, and compares the op with its baselines."""

from __future__ import annotations

import torch

from bench.cases import Case
from bench.timing import baseline_binder, clone, tensors
from dsv3.ops import registry
from dsv3.testing import relative_error


def check_case(case: Case, device: torch.device, *, compiled: bool) -> None:
    """Asserts that the results of every baseline are the op's first results, within the baseline's tolerance.

    Args:
        compiled: whether compiled baselines take part too (without code generation: the aot_eager backend).
    """
    if case.measure is not None:
        errors = case.measure(device, True).errors
        assert not errors, f"{case.title}: {errors[0]}"
        return
    inputs = case.inputs(device)
    ours = tensors(case.run(*clone(inputs)))
    assert ours, f"{case.title}: run returns no tensor to compare"
    for name, baseline in case.baselines.items():
        if baseline.compiled and not compiled:
            continue
        theirs = tensors(baseline_binder(baseline, "aot_eager")(*clone(inputs))())
        assert 0 < len(theirs) <= len(ours), f"{case.title}: {name} returns {len(theirs)} tensors, the op {len(ours)}"
        if baseline.tolerance is None:
            continue
        for i, (x, y) in enumerate(zip(ours, theirs, strict=False)):
            assert x.shape == y.shape, f"{case.title}: result {i} of {name} is {tuple(y.shape)}, ours {tuple(x.shape)}"
            error = relative_error(x, y)
            assert error <= baseline.tolerance, f"{case.title}: result {i} differs from {name} by {error:.2e}"


def require_native(op: str) -> None:
    """Raises RuntimeError if what ran was not the native kernel of an op. What is no primitive of ours always passes."""
    if op in registry.OPS and not registry.OPS[op].native:
        raise RuntimeError("no native kernel")
    for name, reason in registry.FALLBACKS:
        if name == op:
            raise RuntimeError(f"ran on its reference: {reason}")
