"""The DeepSeek-V3 model: shapes and calls; no kernel choice, no collective."""

from dsv3.model.attention import AttentionContext
from dsv3.model.block import Block, BlockStats
from dsv3.model.transformer import Batch, DeepSeekV3, Loss, is_expert_param

__all__ = ["AttentionContext", "Batch", "Block", "BlockStats", "DeepSeekV3", "Loss", "is_expert_param"]
