"""Hugging Face's `config.json` ↔ `ModelConfig`, and which Llamas ours is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from llama_ray.config.model import ModelConfig
from llama_ray.errors import UserError

# Ours → theirs, where a number is a number.
_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
}
_THEIRS = _SIZES | {
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_ROPE_FIELDS = ("rope_scaling", "rope_parameters")
_MAX_SEQ_LEN = 1 << 24  # 10 million is the most yet claimed; rotary angles are computed up to here
# What `LlamaConfig` takes where config.json says nothing.
_DEFAULT_NORM_EPS, _DEFAULT_ROPE_THETA, _DEFAULT_MAX_SEQ_LEN = 1e-6, 10_000.0, 2048


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of `LlamaConfig` (a `config.json`) that describe `config`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        # Readers older than transformers 5 look here.
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def parse_hf_config(data: bytes, where: str) -> ModelConfig:
    """A `config.json` → our config. Raises `UserError` beginning with `where` for what is no Llama,
    or one that ours cannot express, naming the field."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: is no JSON object")
    for field, fault in _differences(content):
        raise UserError(f"{where}: {field} {fault}")
    for theirs in _SIZES.values():
        if theirs not in content and theirs != "max_position_embeddings":
            raise UserError(f"{where}: {theirs} is missing")
    fields = {ours: content[theirs] for ours, theirs in _SIZES.items() if theirs in content}
    values = {"max_seq_len": _DEFAULT_MAX_SEQ_LEN} | fields | {
        "n_kv_heads": content.get("num_key_value_heads"),
        "norm_eps": content.get("rms_norm_eps", _DEFAULT_NORM_EPS),
        "rope_theta": _rope(content).get("rope_theta", _DEFAULT_ROPE_THETA),
        "tie_embeddings": content.get("tie_word_embeddings", False),
    }  # fmt: skip
    try:
        return ModelConfig.model_validate(values, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        text = ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
        raise UserError(f"{where}: {_in_their_names(text)}") from None


def _in_their_names(message: str) -> str:
    names = "|".join(_THEIRS)
    return re.sub(rf"\b({names})\b", lambda match: _THEIRS[match[0]], message)


def _differences(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Fields that say that the model computes something else than ours, and what."""
    kind = content.get("model_type")
    if kind != "llama":
        yield "model_type", f"is {kind!r}; only 'llama' can be read"
    if content.get("quantization_config") is not None:
        yield "quantization_config", "says the weights are quantized; use the model as released"
    for field in _ROPE_FIELDS:
        rope = content.get(field) or {}
        if not isinstance(rope, dict):
            yield field, "is no JSON object"
        elif (kind := rope.get("rope_type") or rope.get("type") or "default") != "default":
            yield field, f"is {kind!r}; rotary embeddings are not scaled here"
    if _rope(content).get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor", "is not 1; whole heads are rotated here"
    length = content.get("max_position_embeddings")
    if isinstance(length, int) and length > _MAX_SEQ_LEN:
        yield "max_position_embeddings", f"is {length:,}; no model reads so far"
    for bias in ("attention_bias", "mlp_bias"):
        if content.get(bias, False) is not False:
            yield bias, f"is {content[bias]!r}; there are no biases here"
    if (activation := content.get("hidden_act", "silu")) != "silu":
        yield "hidden_act", f"is {activation!r}; only 'silu' (SwiGLU) can be read"
    head_dim, dim = content.get("head_dim"), content.get("hidden_size")
    n_heads = content.get("num_attention_heads")
    whole = isinstance(head_dim, int) and isinstance(n_heads, int)
    if head_dim is not None and not (whole and head_dim * n_heads == dim):
        yield "head_dim", f"is {head_dim!r}, not hidden_size / num_attention_heads"


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 has all of it in `rope_parameters`, 4 in two fields."""
    found: dict[str, Any] = {
        key: content[key] for key in ("rope_theta", "partial_rotary_factor") if key in content
    }
    for field in _ROPE_FIELDS:
        if isinstance(inner := content.get(field), dict):
            found |= inner
    return found
