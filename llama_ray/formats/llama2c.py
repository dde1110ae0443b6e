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
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo, check_layers, check_tensors

_HEADER = struct.Struct("<7i")
_MAGIC = b"24ka"  # first bytes of versions 1 and 2: 0x616b3432, little-endian
_NORM_EPS = 1e-5  # not in the file: `rmsnorm` in run.c


def open_llama2c(file: Place, tokenizer: bytes | None = None) -> Llama2cSource:
    """Raises `UserError` for anything but a whole version-0 file. tokenizer: none comes with it."""
    size = file.files().get("")
    if size is None:
        raise UserError(f"{file.url}: there is no such file; check the path")
    return Llama2cSource(file, size, tokenizer)


class Llama2cSource:
    """A `WeightSource`. The header is read at once, weights when asked for."""

    def __init__(self, file: Place, size: int, tokenizer: bytes | None) -> None:
        self.description = file.url
        self.tokenizer = tokenizer
        self._file = file
        self.config = _parse_header(file.read_range(0, min(_HEADER.size, size)), file.url)
        c = self.config
        arrays = list(_layout(c))
        expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in arrays)
        if size != expected:
            state = "truncated" if size < expected else "longer than it should be"
            raise UserError(
                f"{file.url}: the file is {state}: its header (dim {c.dim}, {c.n_layers} layers, "
                f"vocabulary {c.vocab_size}) asks for {expected:,} bytes, it has {size:,}"
            )
        check_layers(c, file.url)
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        start = _HEADER.size
        for name, shape in arrays:
            for tensor_name, tensor_shape in _each(name, shape):
                if tensor_name:
                    self.tensors[tensor_name] = TensorInfo(tensor_shape, torch.float32)
                    self._starts[tensor_name] = start
                start += 4 * math.prod(tensor_shape)
        check_tensors(self)

    def read(self, name: str) -> Tensor:
        tensor = torch.empty(self.tensors[name].shape)
        self._file.read_into(self._starts[name], tensor)
        return tensor


def _parse_header(data: bytes, where: str) -> ModelConfig:
    if len(data) < _HEADER.size:
        raise UserError(f"{where}: is no llama2.c checkpoint: only {len(data)} bytes long")
    if data.startswith(_MAGIC):
        raise UserError(
            f"{where}: is a llama2.c checkpoint of version 1 or later; "
            "export it again with `export.py --version 0`"
        )
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = _HEADER.unpack(data)
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


def _each(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors that an array of `_layout` is made of, in file order."""
    if "{}" not in name:
        yield name, shape
        return
    for layer in range(shape[0]):
        yield name.format(layer), shape[1:]
