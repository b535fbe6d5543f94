"""The differentiable ops, in the order of the model. `torch.ops.dsv3.*` are the primitives beneath them."""

from dsv3.ops.attention import mla_append_kv, mla_attention, mla_decode
from dsv3.ops.gemm import Quantized, Recipe, WgradQueue, dense, grouped_linear, linear, linear_cross_entropy
from dsv3.ops.loss import cross_entropy
from dsv3.ops.moe import Permutation, moe_gate, moe_permute, moe_unpermute, swiglu
from dsv3.ops.norm import rmsnorm, rope_
from dsv3.ops.optim import adamw
from dsv3.ops.quant import cast_transpose, per_block_cast, per_token_cast

__all__ = [
    "Permutation",
    "Quantized",
    "Recipe",
    "WgradQueue",
    "adamw",
    "cast_transpose",
    "cross_entropy",
    "dense",
    "grouped_linear",
    "linear",
    "linear_cross_entropy",
    "mla_append_kv",
    "mla_attention",
    "mla_decode",
    "moe_gate",
    "moe_permute",
    "moe_unpermute",
    "per_block_cast",
    "per_token_cast",
    "rmsnorm",
    "rope_",
    "swiglu",
]
