"""Batched generation: continuous batching over a block-paged KV cache."""

from llama_ray.engine.async_engine import AsyncEngine, EngineOverloadedError, EngineStoppedError
from llama_ray.engine.engine import Completion, Engine, Load
from llama_ray.engine.sequence import Request, SamplingParams, TokenDelta, TokenLogprob

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineOverloadedError",
    "EngineStoppedError",
    "Load",
    "Request",
    "SamplingParams",
    "TokenDelta",
    "TokenLogprob",
]
