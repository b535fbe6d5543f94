"""Expert-parallel buffers: how tokens reach the ranks that hold their experts, and how the results come back."""

from dsv3.comm.alive import RankLost
from dsv3.comm.buffer import Dispatched, ExpertBuffer
from dsv3.comm.low_latency import Masked, Pending

__all__ = ["Dispatched", "ExpertBuffer", "Masked", "Pending", "RankLost"]
