"""Read llama2.c checkpoints (https://github.com/karpathy/llama2.c, `export.py`, version 0).

Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len), then all
weights as float32 in a fixed order. A negative vocab_size says that the output projection is not
the embedding and stands at the end. Rows of wq and wk are in Meta's order, as ours are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from llama_ray.config.model import ModelConfig
from llama_ray.errors import UserError

_HEADER = struct.Struct("<7i")
_MAGIC = b"24ka"  # first bytes of versions 1 and 2: 0x616b3432, little-endian
_NORM_EPS = 1e-5  # not in the file: `rmsnorm` in run.c


def load_llama2c(data: bytes, where: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The file's bytes → its config and float32 weights under our names.

    All names of `LLaMA.state_dict()`; a tied output projection is the embedding's very tensor.
    Raises `UserError`, starting with `where`, for anything but a whole version-0 file.
    """
    config = _parse_header(data, where)
    tensors = list(_layout(config))
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in tensors)
    if len(data) != expected:
        state = "truncated" if len(data) < expected else "longer than it should be"
        raise UserError(
            f"{where}: the file is {state}: its header (dim {config.dim}, {config.n_layers} layers,"
            f" vocabulary {config.vocab_size}) asks for {expected:,} bytes, it has {len(data):,}"
        )
    # A copy of our own: tensors over `bytes` would be read-only memory.
    values = torch.frombuffer(bytearray(data), dtype=torch.float32, offset=_HEADER.size)
    parts = values.split([math.prod(shape) for _, shape in tensors])
    state_dict: dict[str, Tensor] = {}
    for (name, shape), part in zip(tensors, parts, strict=True):
        tensor = part.view(shape)
        if not name:
            continue
        if "{}" in name:
            state_dict |= {name.format(i): layer for i, layer in enumerate(tensor)}
        else:
            state_dict[name] = tensor
    state_dict.setdefault("output.weight", state_dict["tok_embeddings.weight"])
    return config, state_dict


def _parse_header(data: bytes, where: str) -> ModelConfig:
    if len(data) < _HEADER.size:
        raise UserError(f"{where}: is no llama2.c checkpoint: only {len(data)} bytes long")
    if data.startswith(_MAGIC):
        raise UserError(
            f"{where}: is a llama2.c checkpoint of version 1 or later; "
            "export it again with `export.py --version 0`"
        )
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = _HEADER.unpack(
        data[: _HEADER.size]
    )
    try:
        return ModelConfig(
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            ffn_hidden_dim=hidden_dim,
            vocab_size=abs(vocab_size),
            max_seq_len=max_seq_len,
            norm_eps=_NORM_EPS,
            tie_embeddings=vocab_size > 0,
        )
    except ValueError:
        raise UserError(
            f"{where}: is no llama2.c checkpoint: its header reads dim {dim}, {n_layers} layers, "
            f"{n_heads} heads, {n_kv_heads} key/value heads, vocabulary {vocab_size}"
        ) from None


def _layout(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name (`{}`: one per layer; empty: not kept) and shape of each array, in file order."""
    c, n = config, config.n_layers
    kv_dim = c.n_kv_heads * c.head_dim
    yield "tok_embeddings.weight", (c.vocab_size, c.dim)
    yield "layers.{}.attention_norm.weight", (n, c.dim)
    yield "layers.{}.attention.wq.weight", (n, c.dim, c.dim)
    yield "layers.{}.attention.wk.weight", (n, kv_dim, c.dim)
    yield "layers.{}.attention.wv.weight", (n, kv_dim, c.dim)
    yield "layers.{}.attention.wo.weight", (n, c.dim, c.dim)
    yield "layers.{}.ffn_norm.weight", (n, c.dim)
    yield "layers.{}.feed_forward.w1.weight", (n, c.ffn_hidden_dim, c.dim)
    yield "layers.{}.feed_forward.w2.weight", (n, c.dim, c.ffn_hidden_dim)
    yield "layers.{}.feed_forward.w3.weight", (n, c.ffn_hidden_dim, c.dim)
    yield "norm.weight", (c.dim,)
    yield "", (2, c.max_seq_len, c.head_dim // 2)  # rotary cos and sin: computed instead
    if not c.tie_embeddings:
        yield "output.weight", (c.vocab_size, c.dim)
