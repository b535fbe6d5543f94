"""Parallelism applied to the model from outside."""

from dsv3.parallel.balance import Placement, rebalance

__all__ = ["Placement", "rebalance"]
