"""DeepSeekMoE: fine-grained routed experts beside shared ones, no token dropped (V3 report, section 2.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3 import ops
from dsv3.comm import Dispatched, ExpertBuffer
from dsv3.config import Config
from dsv3.model.layers import MLP, QuantizedModule


class Gate(nn.Module):
    """Affinities in fp32, then the group-limited choice. `bias` (fp32 [E], noaux_tc only) chooses but does not weigh."""

    def __init__(self, config: Config, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, device=device, dtype=dtype))
        bias = torch.zeros(experts, device=device, dtype=torch.float32) if config.has_gate_bias else None
        self.register_buffer("bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Moves the module; a cast (`model.bfloat16()`) leaves the bias in fp32, whose last update would be lost."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        return self

    def forward(
        self, x: Tensor, wgrad: ops.WgradQueue | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """x [T, H] -> topk_idx, topk_weights and counts of ops.moe_gate; with cu_seqlens int32 [n+1] also chosen and affinity
        of ops.moe_gate_loads, for the balance loss. These are data, nothing is kept in the module."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if len(x) <= ops.FEW_TOKENS and x.dtype == self.weight.dtype and not torch.is_grad_enabled():
            (logits,) = ops.few_linear(x, [self.weight], out_dtype=wide)
        else:
            logits = ops.linear(x, self.weight, wgrad=wgrad, out_dtype=wide)
        if cu_seqlens is None:
            return ops.moe_gate(logits, self.bias, **self.settings)
        return ops.moe_gate_loads(logits, self.bias, cu_seqlens, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """How ops.moe_gate is to choose."""
        c = self.config
        groups, kept = c.gate_groups
        return {
            "num_groups": groups,
            "topk_groups": kept,
            "topk": c.num_experts_per_tok,
            "route_scale": c.routed_scaling_factor,
            "score": c.scoring_func,
            "group_score": "top2_sum" if c.topk_method == "noaux_tc" else "max",
            "normalize": c.norm_topk_prob,
        }


class Experts(QuantizedModule):
    """The routed experts of one rank: gate_up [G, 2I, H] and down [G, H, I]. With `fp8` (see DeepSeekV3.set_precision) they
    multiply in FP8 where I and H are multiples of 16."""

    def __init__(
        self,
        config: Config,
        *,
        num_experts: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        local = num_experts or config.n_routed_experts
        hidden, inter = config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(local, 2 * inter, hidden, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(local, hidden, inter, device=device, dtype=dtype))
        self.fp8, self.fp8_copies = False, ops.Fp8Weights()

    @property
    def in_fp8(self) -> bool:
        """Whether they multiply in FP8, and take rows that came so."""
        takes = self.fp8_copies.takes(self.gate_up) and self.fp8_copies.takes(self.down)
        return self.fp8 and takes and isinstance(self.gate_up, ops.Quantized) == isinstance(self.down, ops.Quantized)

    def fp8_weights(self) -> tuple[ops.Fp8Weight | ops.Quantized | None, ...]:
        """gate_up and down in FP8; None for one that has no such form. They are used where both have (`in_fp8`)."""
        return tuple(
            self.fp8_copies.of(name, getattr(self, name)) if self.fp8 else None for name in ("gate_up", "down")
        )

    def forward(
        self, x: Tensor, weights: Tensor, offsets: Tensor, *cast: Tensor, wgrad: ops.WgradQueue | None = None
    ) -> Tensor:
        """x [R, H] sorted by expert, routing weights fp32 [R], offsets int32 [G+1] -> [R, H], already weighted.

        cast: x as e4m3 [R, H] and its scales, where it came as FP8. Raises ValueError where the experts want it otherwise.
        """
        if self.in_fp8:
            return ops.fp8_experts(x, weights, offsets, *self.fp8_weights(), cast=cast or None, wgrad=wgrad)
        if cast:
            raise ValueError("rows came as FP8 to experts that do not compute in it: leave out the buffer's wire_dtype")
        gate_up = ops.grouped_linear(x, self.gate_up, offsets, wgrad=wgrad)
        return ops.grouped_linear(ops.swiglu(gate_up, weights), self.down, offsets, wgrad=wgrad)


class MoE(nn.Module):
    """gate -> dispatch -> experts -> combine, and the shared experts as one MLP. `buffer` is replaced by parallel/."""

    def __init__(self, config: Config, *, num_experts: int | None = None, **at: Any) -> None:
        super().__init__()
        self.gate = Gate(config, **at)
        self.experts = Experts(config, num_experts=num_experts, **at)
        inter = config.moe_intermediate_size * config.n_shared_experts
        self.shared = MLP(config.hidden_size, inter, **at) if inter else None
        self.buffer = self._local = ExpertBuffer(num_experts=config.n_routed_experts, transport="local")

    def dispatch(self, u: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Dispatched:
        """Sends the tokens to their experts' ranks; to experts that are all here and compute in FP8, as FP8."""
        if self.buffer is self._local:
            self._local.wire_dtype = torch.float8_e4m3fn if self.experts.in_fp8 else None
        return self.buffer.dispatch(u, topk_idx, topk_weights)


def balance_loss(chosen: Tensor, affinity: Tensor, cu_seqlens: Tensor, *, topk: int) -> Tensor:
    """Sequence-wise balance loss without its factor alpha (V3 report, equations 17 to 20), mean over the sequences: fp64 [].

    A sequence's loss is sum_i f_i P_i with f_i = E / (k T) * (tokens whose k best unbiased scores include expert i) and
    P_i = the mean of s_i / sum_j s_j over its T tokens. It is 1 when the load is even. A sequence without tokens has none.

    Args:
        chosen: int32 [..., n, E], and
        affinity: fp64 [..., n, E], of ops.moe_gate_loads; leading dimensions (layers) are summed.
        cu_seqlens: int [n+1], as it had it.
        topk: k.
    """
    length = cu_seqlens.diff()
    products = (chosen * affinity).sum(-1) / length.clamp(min=1).double().square()  # k / E times the sequences' losses
    return products.sum() * chosen.shape[-1] / (topk * (length > 0).sum())
