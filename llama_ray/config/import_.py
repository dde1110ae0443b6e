"""`kind: import`: a model from elsewhere as the first checkpoint of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llama_ray.config.job_base import JobConfig


class ImportConfig(JobConfig):
    """Writes `runs/<name>/checkpoints/step-00000000`: weights and tokenizer, no optimizer."""

    kind: Literal["import"] = "import"
    path: str
    """The model, path or URL: a folder in Hugging Face's format (safetensors), one in Meta's
    (`consolidated.*.pth`), a llama2.c `.bin`, or a run of ours (`runs/<name>`). A name
    without a leading `/`, `~` or `.` lies under `storage.url`."""
    format: Literal["auto", "hf", "meta", "llama2c"] = "auto"
    """Which of them it is; `auto` finds out."""
    tokenizer: str | None = None
    """Path or URL of a `tokenizer.model` or `tokenizer.json`, where none lies beside the weights,
    or another is meant."""
    max_seq_len: int | None = Field(None, gt=0)
    """Longest sequence, in tokens, instead of what the files say. Meta's do not: 2,048 is taken,
    8,192 of Llama 3, so of Llama 2 name 4096."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Type of the weights: as they are stored, or converted."""
