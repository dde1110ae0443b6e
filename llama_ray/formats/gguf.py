"""Writes GGUF, the one-file format of llama.cpp, through its own `gguf` library.

Rows of wq and wk stay as they are: llama.cpp rotates neighbours, as Meta's code and ours do. (What
its converter permutes are Hugging Face's, back to this order.) Norm weights are float32 always, as
its kernels want them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFWriter
from gguf.gguf_writer import WriterState
from torch import Tensor

from llama_ray.config.model import ModelConfig
from llama_ray.errors import UserError
from llama_ray.formats.gguf_tokenizer import add_tokenizer
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo, WeightSource, expected_shapes, read_checked
from llama_ray.formats.stream import Counted

_TYPES = {
    torch.float32: GGMLType.F32,
    torch.float16: GGMLType.F16,
    torch.bfloat16: GGMLType.BF16,
}
_FILE_TYPES = {
    GGMLType.F32: gguf.LlamaFileType.ALL_F32,
    GGMLType.F16: gguf.LlamaFileType.MOSTLY_F16,
    GGMLType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    GGMLType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
_PART_VALUES = 1 << 20


def write_gguf(
    source: WeightSource, folder: Place, name: str, quantization: Literal["Q8_0"] | None = None
) -> None:
    """One file, `<name>-<type>.gguf`, in `folder`. Matrices are stored in the type they have in
    `source`, or quantized; those whose rows are no multiple of Q8_0's 32 then in float32.

    Holds one tensor, and the few rows under way. Raises `UserError` where the tokenizer cannot be
    expressed in GGUF, and where a value is not finite.
    """
    main = _main_type(source, quantization)
    with folder.child(f"{name}-{main.name}.gguf").open_upload() as out:
        writer = _StreamWriter(out)
        _add_config(writer, source.config, name, main)
        _add_tokenizer(writer, source)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config.n_layers)
        types = {}
        for ours in expected_shapes(source.config):
            info = source.tensors[ours]
            types[ours] = _tensor_type(info, main)
            shape = gguf.quant_shape_to_byte_shape(info.shape, types[ours])
            theirs = names.get_name(ours, try_suffixes=(".weight",))
            assert theirs is not None, ours
            writer.add_tensor_info(
                theirs, shape, np.dtype(np.uint8), int(np.prod(shape)), types[ours]
            )
        writer.begin()
        for ours, tensor in read_checked(source):
            writer.write_values(_encoded(tensor, types[ours]))
            del tensor  # before the next is read


class _StreamWriter(GGUFWriter):
    """The library's, writing forwards to a stream, a few rows at a time. Itself it opens a local
    file, and writes whole arrays."""

    def __init__(self, out: Counted) -> None:
        super().__init__(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        self._stream = out

    def begin(self) -> None:
        """Everything before the first tensor."""
        self.fout = [self._stream]  # type: ignore[list-item]
        self.state = WriterState.EMPTY
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_ti_data_to_file()
        self.write_padding(self._stream, self._stream.tell())  # type: ignore[arg-type]

    def write_values(self, parts: Iterator[np.ndarray]) -> None:
        """The next tensor, in the order of `add_tensor_info`."""
        for part in parts:
            self._stream.write(part)
        self.write_padding(self._stream, self._stream.tell())  # type: ignore[arg-type]


def check_gguf(source: WeightSource) -> None:
    """Raises `UserError` where llama.cpp could not load the file, or would run the tokenizer
    otherwise."""
    if source.tokenizer is None:
        raise UserError(
            f"tokenizer: {source.description} brings none, without which llama.cpp loads no model; "
            "name its `tokenizer.model` or `tokenizer.json`"
        )
    _add_tokenizer(GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA]), source)


def _add_tokenizer(writer: GGUFWriter, source: WeightSource) -> None:
    if source.tokenizer is not None:
        where = f"{source.description}: its tokenizer"
        add_tokenizer(writer, source.tokenizer, source.config.vocab_size, where)


def _add_config(writer: GGUFWriter, config: ModelConfig, name: str, main: GGMLType) -> None:
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[main])
    if main == GGMLType.Q8_0:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ffn_hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _main_type(source: WeightSource, quantization: Literal["Q8_0"] | None) -> GGMLType:
    if quantization is not None:
        return GGMLType[quantization]
    return _TYPES[source.tensors["tok_embeddings.weight"].dtype]


def _tensor_type(info: TensorInfo, main: GGMLType) -> GGMLType:
    if len(info.shape) == 1:
        return GGMLType.F32
    if main == GGMLType.Q8_0:
        block, _ = gguf.GGML_QUANT_SIZES[main]
        return main if info.shape[-1] % block == 0 else GGMLType.F32
    return _TYPES[info.dtype]


def _encoded(tensor: Tensor, ggml_type: GGMLType) -> Iterator[np.ndarray]:
    """The rows of `tensor` as GGUF holds them, some at a time: the library works in float32."""
    rows = tensor.view(-1, tensor.shape[-1])
    for part in rows.split(max(1, _PART_VALUES // rows.shape[1])):
        yield np.ascontiguousarray(gguf.quantize(part.float().numpy(), ggml_type))
