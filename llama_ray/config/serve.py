"""The endpoint's arguments: what `serve/config.yaml` may say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llama_ray.config.base import StrictModel
from llama_ray.config.storage import StorageConfig


class EngineConfig(StrictModel):
    """Limits of one engine: how much it takes on at a time."""

    max_batch_size: int = Field(16, gt=0)
    """Sequences generated together."""
    max_batch_tokens: int = Field(2048, gt=0)
    """Tokens in one forward pass: prompts being read plus one per running sequence."""
    block_size: int = Field(16, gt=0)
    """Tokens in one block of the KV cache."""
    kv_cache_tokens: int = Field(32_768, gt=0)
    """Size of the KV cache: this many tokens over all sequences."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights and KV cache."""

    @model_validator(mode="after")
    def _fits(self) -> EngineConfig:
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} is less than max_batch_size "
                f"{self.max_batch_size}: each running sequence needs one token a step"
            )
        return self


class ServeConfig(StrictModel):
    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """What clients put in the request's `model`."""
    checkpoint: str
    """What to serve: `runs/<name>` under `storage.url` (its newest committed checkpoint), one of
    its checkpoints (`runs/<name>/checkpoints/step-00000500`), or a model from elsewhere, path or
    URL: a folder in Hugging Face's or Meta's format, or a llama2.c `.bin`."""
    tokenizer: str | None = None
    """Path or URL of a `tokenizer.model` or `tokenizer.json`, where none lies beside the weights
    (`.bin`)."""
    storage: StorageConfig = StorageConfig()
    engine: EngineConfig = EngineConfig()
    num_replicas: int = Field(1, gt=0)
    """Copies of the model, each with its own engine."""
    cpus_per_replica: float = Field(1.0, gt=0)
    """CPUs that Ray reserves per replica; also its compute threads, rounded up."""
    gpus_per_replica: float = Field(0.0, ge=0)
    """GPUs that Ray reserves per replica; 0: it runs on the CPU."""
    max_queued_requests: int = Field(256, gt=0)
    """Requests a replica lets wait; past that it answers 429."""
