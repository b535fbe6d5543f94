"""csrc/optim: AdamW over 1e9 parameters in 200 tensors, half of them matrices and half of them norms, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import Baseline, Case
from dsv3.reference import optim as reference

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def _run(*inputs: Any) -> list[Tensor]:
    torch.ops.dsv3.adamw(*inputs, *BETAS, EPS)
    return _results(*inputs)


def _plain(*inputs: Any) -> list[Tensor]:
    reference.adamw(*inputs, *BETAS, EPS)
    return _results(*inputs)


def _results(*inputs: Any) -> list[Tensor]:
    master, _, exp_avg, exp_avg_sq, weight = inputs[:5]
    return [*master, *weight, *exp_avg, *exp_avg_sq]


def _one_by_one(*inputs: Any) -> Iterator[tuple[Any, ...]]:
    """The arguments of one call a tensor: a graph over 200 tensors takes the compiler minutes."""
    lists, scalars, decay = inputs[:5], inputs[5:9], inputs[9]
    for i, factor in enumerate(decay):
        yield *([values[i]] if values else [] for values in lists), *scalars, [factor]


def _fused(*inputs: Any) -> Callable[[], Any]:
    """torch's own fused AdamW, which keeps fp32 moments, from the same state; then the copy to the bf16 weights."""
    master, grad, exp_avg, exp_avg_sq, weight, lr, _, _, step, decay = inputs
    params = [torch.nn.Parameter(m) for m in master]
    groups = [
        {"params": [p for p, d in zip(params, decay, strict=True) if d == factor], "weight_decay": factor}
        for factor in sorted(set(decay))
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True, capturable=master[0].is_cuda)
    for p, g, m, v in zip(params, grad, exp_avg, exp_avg_sq, strict=True):
        p.grad = g
        optimizer.state[p] = {"step": step.clone(), "exp_avg": m.float(), "exp_avg_sq": v.float()}

    def call() -> list[Tensor]:
        optimizer.step()
        if weight:
            torch._foreach_copy_(weight, [p.detach() for p in params])
        return [*(p.detach() for p in params), *weight]

    return call


def _case(sizes: list[int], with_weight: bool) -> Case:
    def inputs(device: torch.device) -> tuple[Any, ...]:
        master, grad, m, v = ([torch.randn(n, device=device).mul_(0.02) for n in sizes] for _ in range(4))
        weight = [x.bfloat16() for x in master] if with_weight else []
        scalars = [torch.tensor(value, device=device) for value in (1e-3, 1.0, False, 10.0)]  # lr, scale, skip, step
        moments = [x.bfloat16() for x in m], [x.square().bfloat16() for x in v]
        return master, grad, *moments, weight, *scalars, [DECAY if n > 10000 else 0.0 for n in sizes]

    count = sum(sizes)
    return Case(
        op="adamw",
        case={"parameters": count, "tensors": len(sizes), "weight": with_weight},
        flops=15 * count,
        bytes=(22 if with_weight else 20) * count,  # master rw 8, grad 4, moments rw 8, weight 2
        inputs=inputs,
        run=_run,
        baselines={
            "torch": Baseline(_plain),
            "torch.compile": Baseline(_plain, compiled=True, split=_one_by_one, tolerance=None),
            "AdamW(fused=True)": Baseline(_fused, binds=True, tolerance=1e-5 if not with_weight else 5e-3),
        },
    )


def cases(tiny: bool) -> list[Case]:
    """fp32 master weights and gradients, bf16 moments; with and without the bf16 weights."""
    sizes = [1000, 12345] * 2 if tiny else [7168, 9992832] * 100
    return [_case(sizes, with_weight) for with_weight in (True, False)]
