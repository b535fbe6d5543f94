"""The linear work of one expert layer of V3 as one GPU of a large cluster does it: forward, dgrad and wgrad, with their casts.

4096 tokens go through the shared expert, and 32768 rows, what 64 ranks send where the load is even, through 4 local experts.
The model's own modules run it, with the copies of the weights made before, as they are between two optimizer steps.

Published beside it: kernel times of DeepSeek's production trace (profile-data, train.json), which ran on 112 of an H800's 132
SMs beside communication, hence times 112/132. It lists no gradients of the shared expert, and casts only as a sum over the
layer, attention's among them. So the comparable time lies between the two entries: its products alone, and with those casts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Baseline, Case
from dsv3.config import Config
from dsv3.model.layers import MLP
from dsv3.model.moe import Experts
from dsv3.ops import Fp8Weight, Quantized

EXPERTS = 4
SM_SHARE = 112 / 132
PUBLISHED_PRODUCTS = {
    "gate_up": 1933, "down": 1066, "dgrad of down": 848.5, "dgrad of gate_up": 1905,
    "wgrad of 4 experts": 4 * (595.5 + 681), "shared gate_up": 256, "shared down": 139,
}  # us; the middle where the trace has a range  # fmt: skip
PUBLISHED_CASTS = 4200  # us, casts and transpositions of the whole layer


def published() -> dict[str, float]:
    """Microseconds that the published kernels would take on all SMs."""
    products = sum(PUBLISHED_PRODUCTS.values())
    return {
        "published products x 112/132": products * SM_SHARE,
        "published products and casts x 112/132": (products + PUBLISHED_CASTS) * SM_SHARE,
    }


def _inputs(config: Config, rows: int, tokens: int, device: torch.device) -> tuple[Any, ...]:
    """(rows, tokens, gradients of both outputs, routing weights, offsets, parameters, main_grads, FP8 copies). Parameters:
    the experts' gate_up and down, then the shared expert's."""
    hidden, inter = config.hidden_size, config.moe_intermediate_size

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * scale

    activations = [draw(size, hidden) for size in (rows, tokens, rows, tokens)]
    offsets = torch.arange(EXPERTS + 1, device=device, dtype=torch.int32) * (rows // EXPERTS)
    sizes = [(*group, *shape) for group in ((EXPERTS,), ()) for shape in ((2 * inter, hidden), (hidden, inter))]
    params = [draw(*size, scale=size[-1] ** -0.5) for size in sizes]
    grads = [torch.zeros(size, device=device) for size in sizes]
    made = [Fp8Weight.make(param) for param in params]
    copies = [[t for copy in (weight.data, weight.transposed) for t in (copy.data, copy.sf)] for weight in made]
    return *activations, torch.rand(rows, device=device), offsets, params, grads, copies


def _layer(
    config: Config,
    fp8: bool,
    rows: Tensor,
    tokens: Tensor,
    drows: Tensor,
    dtokens: Tensor,
    weights: Tensor,
    offsets: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    copies: list[list[Tensor]],
) -> tuple[Tensor, ...]:
    """Forward and backward; returns both outputs, the gradients of rows, tokens and routing weights, and main_grads."""
    rows, tokens, weights = (t.detach().requires_grad_() for t in (rows, tokens, weights))
    experts = Experts(config, num_experts=EXPERTS, device="meta")
    shared = MLP(config.hidden_size, config.moe_intermediate_size, device="meta", dtype=rows.dtype)
    owned = [nn.Parameter(param) for param in params]
    experts.gate_up, experts.down, shared.gate_up.weight, shared.down.weight = owned
    for param, grad in zip(owned, grads, strict=True):
        param.main_grad = grad
    if fp8:
        made = [Fp8Weight(p, Quantized(*c[:2]), Quantized(*c[2:])) for p, c in zip(owned, copies, strict=True)]
        names = (experts, "gate_up"), (experts, "down"), (shared.gate_up, "weight"), (shared.down, "weight")
        for (layer, name), weight in zip(names, made, strict=True):
            layer.fp8, layer.fp8_copies.made[name] = True, weight
    outputs = experts(rows, weights, offsets), shared(tokens)
    torch.autograd.backward(outputs, (drows, dtokens))
    return *(out.detach() for out in outputs), rows.grad, tokens.grad, weights.grad, *grads


def expert_layer(tiny: bool) -> Case:
    """Bytes: outputs and inputs of the layer and their gradients in bf16, both copies of the weights, main_grad read and
    written; what is between the products is not counted, nor are scales."""
    config, rows, tokens = (Config.preset("tiny"), 64, 16) if tiny else (Config.preset("671b"), 32768, 4096)
    hidden, inter = config.hidden_size, config.moe_intermediate_size
    expert = 3 * hidden * inter
    return Case(
        op="expert_layer",
        case={"tokens": tokens, "hidden": hidden, "inner": inter, "groups": EXPERTS, "rows": rows // EXPERTS},
        flops=6.0 * (rows + tokens) * expert,
        bytes=8 * (rows + tokens) * hidden + 8 * rows + (2 + 8) * (EXPERTS + 1) * expert,
        fp8=True,
        inputs=functools.partial(_inputs, config, rows, tokens),
        run=functools.partial(_layer, config, True),
        baselines={"dsv3 bf16": Baseline(functools.partial(_layer, config, False), tolerance=0.1)},
        published=published(),
    )
