"""The differentiable ops, in the order of the model; gradients of their gradients raise. `torch.ops.dsv3.*` are the primitives
beneath them."""

import dsv3.ops.mla_attention_backward  # noqa: F401  (registers the primitive)
from dsv3.ops.attention import mla_append_kv, mla_cached_rows, mla_decode, mla_schedule
from dsv3.ops.decode import (
    FEW_TOKENS,
    combine_norm,
    few_experts,
    few_gate,
    few_heads,
    few_linear,
    mla_absorb,
)
from dsv3.ops.few_attention import attends_few, few_attention
from dsv3.ops.fp8_linear import Fp8Weight, Fp8Weights, fp8_experts, fp8_linear, fp8_mlp
from dsv3.ops.gemm import fp8_gemm, grouped_fp8_gemm, grouped_fp8_wgrad, masked_grouped_fp8_gemm
from dsv3.ops.invariance import batch_invariance, is_batch_invariant
from dsv3.ops.linear import Quantized, Recipe, WgradQueue, dense, grouped_linear, linear, linear_cross_entropy
from dsv3.ops.loss import cross_entropy
from dsv3.ops.mla_attention import mla_attention, mla_merge, split_kv
from dsv3.ops.moe import Permutation, moe_gate, moe_gate_loads, moe_permute, moe_unpermute
from dsv3.ops.norm import NormCast, rmsnorm, rmsnorm_cast, rope_
from dsv3.ops.optim import adamw
from dsv3.ops.quant import cast_transpose, per_block_cast, per_token_cast, per_token_cast_and_transpose
from dsv3.ops.round import decode_positions, greedy_round
from dsv3.ops.swiglu import (
    SwigluBothCastsGradients,
    SwigluCastGradients,
    swiglu,
    swiglu_backward_both_casts,
    swiglu_cast,
    swiglu_cast_backward,
)

__all__ = [
    "FEW_TOKENS",
    "Fp8Weight",
    "Fp8Weights",
    "NormCast",
    "Permutation",
    "Quantized",
    "Recipe",
    "SwigluBothCastsGradients",
    "SwigluCastGradients",
    "WgradQueue",
    "adamw",
    "attends_few",
    "batch_invariance",
    "cast_transpose",
    "combine_norm",
    "cross_entropy",
    "decode_positions",
    "dense",
    "few_attention",
    "few_experts",
    "few_gate",
    "few_heads",
    "few_linear",
    "fp8_experts",
    "fp8_gemm",
    "fp8_linear",
    "fp8_mlp",
    "greedy_round",
    "grouped_fp8_gemm",
    "grouped_fp8_wgrad",
    "grouped_linear",
    "is_batch_invariant",
    "linear",
    "linear_cross_entropy",
    "masked_grouped_fp8_gemm",
    "mla_absorb",
    "mla_append_kv",
    "mla_attention",
    "mla_cached_rows",
    "mla_decode",
    "mla_merge",
    "mla_schedule",
    "moe_gate",
    "moe_gate_loads",
    "moe_permute",
    "moe_unpermute",
    "per_block_cast",
    "per_token_cast",
    "per_token_cast_and_transpose",
    "rmsnorm",
    "rmsnorm_cast",
    "rope_",
    "split_kv",
    "swiglu",
    "swiglu_backward_both_casts",
    "swiglu_cast",
    "swiglu_cast_backward",
]
