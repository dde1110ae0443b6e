"""Meta's `params.json` ↔ our model config.

It does not say all: the width of the feed-forward layer follows from `multiple_of` and
`ffn_dim_multiplier` by a rule that changed with the releases, the vocabulary is the tokenizer's
(-1), and the longest sequence is an argument of Meta's programs. The first two the weights tell.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_ray.config.model import ModelConfig
from llama_ray.errors import UserError
from llama_ray.formats.place import Place

PARAMS_FILE = "params.json"
_MAX_BYTES = 1 << 20


class Params(BaseModel):
    """The keys of `ModelArgs` in Meta's code. Another one is of a model that is not this one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dim: int = Field(gt=0)
    n_layers: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    n_kv_heads: int | None = Field(None, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    rope_theta: float = Field(10_000.0, gt=0)
    vocab_size: int = Field(-1, ge=-1)
    use_scaled_rope: bool = False
    max_seq_len: int | None = Field(None, gt=0)
    max_batch_size: int | None = None
    multiple_of: int | None = None
    ffn_dim_multiplier: float | None = None


def read_params(place: Place) -> Params:
    """Raises `UserError` naming the file, where it is none, or of a model we cannot represent."""
    data = place.read_small(_MAX_BYTES)
    try:
        params = Params.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "(all)"
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"{place.url}: {key} is no parameter of a LLaMA of this family; the model has "
                "parts that this project does not"
            ) from None
        raise UserError(f"{place.url}: {key}: {first['msg']} (is {first['input']!r})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place.url}: is no JSON ({error})") from None
    if params.use_scaled_rope:
        raise UserError(
            f"{place.url}: use_scaled_rope: rotary frequencies rescaled for long contexts (Llama "
            "3.1 and later) are not supported; take Llama 3 or earlier"
        )
    return params


def model_config(
    params: Params, ffn_hidden_dim: int, vocab_size: int, tied: bool, where: str
) -> ModelConfig:
    # Meta's programs are told on the command line. What the releases were trained with: LLaMA 2048,
    # Llama 3 8192, and it has another rope_theta.
    max_seq_len = 2048 if params.rope_theta < 500_000 else 8192
    try:
        return ModelConfig(
            dim=params.dim,
            n_layers=params.n_layers,
            n_heads=params.n_heads,
            n_kv_heads=params.n_kv_heads or params.n_heads,
            ffn_hidden_dim=ffn_hidden_dim,
            vocab_size=vocab_size,
            max_seq_len=params.max_seq_len or max_seq_len,
            norm_eps=params.norm_eps,
            rope_theta=params.rope_theta,
            tie_embeddings=tied,
        )
    except ValidationError as error:
        raise UserError(f"{where}: {error.errors()[0]['msg']}") from None


def write_params(config: ModelConfig) -> bytes:
    """What Meta's `ModelArgs(**params)` takes: no `max_seq_len`, which its programs pass beside it.
    `rope_theta` and `n_kv_heads` only where not LLaMA-1's, whose code knows neither."""
    params: dict[str, Any] = {
        "dim": config.dim,
        **ffn_rule(config.dim, config.ffn_hidden_dim),
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10_000.0:
        params["rope_theta"] = config.rope_theta
    return json.dumps(params).encode() + b"\n"


def ffn_rule(dim: int, ffn_hidden_dim: int) -> dict[str, Any]:
    """`multiple_of` (and `ffn_dim_multiplier`) with which Meta's code comes to `ffn_hidden_dim`:
    2/3 of 4 × dim, times the multiplier, each rounded down, then up to the multiple."""
    for multiple_of in (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
        if _ffn_hidden_dim(dim, multiple_of, None) == ffn_hidden_dim:
            return {"multiple_of": multiple_of}
    # Half a unit more than needed: rounded down it is right, and a multiple of 1 as it is.
    multiplier = (ffn_hidden_dim + 0.5) / int(2 * (4 * dim) / 3)
    assert _ffn_hidden_dim(dim, 1, multiplier) == ffn_hidden_dim
    return {"multiple_of": 1, "ffn_dim_multiplier": multiplier}


def _ffn_hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)
