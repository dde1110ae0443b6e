"""`kind: export`: a checkpoint in the format of other programs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llama_ray.config.job_base import JobConfig


class ExportConfig(JobConfig):
    """Reads a tensor at a time and writes it: in memory for less than twice the largest, and some
    60 MB."""

    kind: Literal["export"] = "export"
    checkpoint: str
    """What to export: `runs/<name>` under `storage.url` (its newest committed checkpoint), one of
    its checkpoints (`runs/<name>/checkpoints/step-00000500`), or whatever `kind: import` reads."""
    tokenizer: str | None = None
    """Path or URL of the tokenizer, where none comes with the checkpoint."""
    format: Literal["hf", "meta", "gguf"] = "hf"
    """Hugging Face's (safetensors), Meta's (`consolidated.*.pth`), or llama.cpp's."""
    dtype: Literal["stored", "float32", "bfloat16"] = "stored"
    """Type of the weights: as they are stored, or converted."""
    model_parallel: int = Field(1, gt=0)
    """Files that the weights are split over, in Meta's format."""
    quantization: Literal["Q8_0"] | None = None
    """In GGUF, instead of `dtype`: 8 bits a weight and a scale for each 32 of them."""
    to: str | None = None
    """Folder to write to, path or URL. Default: `exports/<name>` under `storage.url`."""

    @model_validator(mode="after")
    def _of_its_format(self) -> ExportConfig:
        if self.model_parallel != 1 and self.format != "meta":
            raise ValueError(f"model_parallel: is for format meta, not {self.format}; leave it out")
        if self.quantization is not None and self.format != "gguf":
            raise ValueError(f"quantization: is for format gguf, not {self.format}; leave it out")
        if self.quantization is not None and self.dtype != "stored":
            raise ValueError(
                f"dtype: {self.dtype} and quantization: {self.quantization} are both given; leave "
                "one out"
            )
        return self
