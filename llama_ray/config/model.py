"""The shape of a LLaMA: presets of the paper's Table 2 and the fields they set."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from llama_ray.config.base import StrictModel

# name: (dim, n_layers, n_heads, ffn_hidden_dim). 7B to 65B: Touvron et al. 2023, Table 2; the FFN
# widths are those of the released weights. The small ones are ours.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "debug": (128, 4, 4, 352),
    "5M": (256, 6, 8, 704),
    "134M": (768, 12, 12, 2048),
    "7B": (4096, 32, 32, 11008),
    "13B": (5120, 40, 40, 13824),
    "33B": (6656, 60, 52, 17920),
    "65B": (8192, 80, 64, 22016),
}


class ModelConfig(StrictModel):
    """LLaMA-1, widened by `n_kv_heads` and `tie_embeddings` to the rest of its family."""

    preset: str | None = None
    """A size to start from: debug, 5M, 134M, 7B, 13B, 33B or 65B. Fields given beside it win."""
    dim: int = Field(gt=0)
    """Width of the residual stream."""
    n_layers: int = Field(gt=0)
    """Blocks of attention and SwiGLU."""
    n_heads: int = Field(gt=0)
    """Query heads; each is `dim / n_heads` wide."""
    n_kv_heads: int = Field(gt=0)
    """Key and value heads, `n_heads` unless given (fewer: grouped-query attention)."""
    ffn_hidden_dim: int = Field(gt=0)
    """Width of the SwiGLU layer; unless given, 2/3 of 4 × dim rounded up to a multiple of 256."""
    vocab_size: int = Field(32_000, gt=0)
    """Must equal the tokenizer's."""
    max_seq_len: int = Field(2048, gt=0)
    """Longest sequence, in tokens: rotary angles are computed up to here."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square in RMSNorm."""
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    tie_embeddings: bool = False
    """Output projection shares the token embedding's weights (not so in LLaMA-1)."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        if (preset := data.get("preset")) is not None:
            if preset not in PRESETS:
                raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
            names = ("dim", "n_layers", "n_heads", "ffn_hidden_dim")
            data = dict(zip(names, PRESETS[preset], strict=True)) | data
        if isinstance(data.get("n_heads"), int):
            data.setdefault("n_kv_heads", data["n_heads"])
        if isinstance(data.get("dim"), int):
            data.setdefault("ffn_hidden_dim", -(-(8 * data["dim"] // 3) // 256) * 256)
        return data

    @model_validator(mode="after")
    def _divides(self) -> ModelConfig:
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(
                f"dim / n_heads = {self.head_dim} is odd; rotary embeddings need pairs"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def n_params(self) -> int:
        """Parameters, embeddings included."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        block = attention + 3 * self.dim * self.ffn_hidden_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * block + embeddings + self.dim

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token, for MFU: Chowdhery et al. 2022 (PaLM),
        appendix B: 6 × matrix parameters + 12 × layers × dim × sequence length.

        Recomputation does not count; attention counts whole, though half of it is masked, as is
        the custom. The embedding look-up multiplies nothing, the output projection does.
        """
        matrices = self.n_params - (0 if self.tie_embeddings else self.vocab_size * self.dim)
        return 6 * matrices + 12 * self.n_layers * self.dim * seq_len

    def tensor_parallel_choices(self, limit: int = 64) -> list[int]:
        """Degrees up to `limit` that split heads, KV heads, FFN and vocabulary evenly."""
        sizes = (self.n_heads, self.n_kv_heads, self.ffn_hidden_dim, self.vocab_size, self.dim)
        return [n for n in range(1, limit + 1) if all(size % n == 0 for size in sizes)]
