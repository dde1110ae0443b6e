"""`kind: inspect`: verify what a `prepare` or a `pretrain` job wrote, and show it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llama_ray.config.job_base import NAME, JobConfig


class InspectConfig(JobConfig):
    """Reads every file of `tokens` or of `checkpoint`; writes nothing."""

    kind: Literal["inspect"] = "inspect"
    name: str = Field("inspect", pattern=NAME)
    """Names the job; it writes nothing."""
    tokens: str | None = Field(None, pattern=NAME)
    """Name of the `prepare` job whose tokens to read: `tokens/<name>` under `storage.url`."""
    checkpoint: str | None = None
    """`runs/<name>` (the newest committed checkpoint) or the folder of one, under `storage.url`; or
    either by path or URL."""
    documents: int = Field(2, ge=0)
    """Documents of each source of `tokens` to show."""
    characters: int = Field(300, gt=0)
    """Of each, at most this much."""

    @model_validator(mode="after")
    def _one_of_them(self) -> InspectConfig:
        if (self.tokens is None) == (self.checkpoint is None):
            raise ValueError(
                "tokens, checkpoint: give one of them and no other (the other is null)"
            )
        return self
