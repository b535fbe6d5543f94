"""The differentiable ops, in the order of the model. `torch.ops.dsv3.*` are the primitives beneath them."""

from dsv3.ops.norm import rmsnorm

__all__ = ["rmsnorm"]
