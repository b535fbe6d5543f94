"""Generation from a model: engine, paged cache, sampling, speculative decoding with MTP."""

from dsv3.inference.engine import Completion, Engine, Stats, generate
from dsv3.inference.sampling import SamplingParams

__all__ = ["Completion", "Engine", "SamplingParams", "Stats", "generate"]
