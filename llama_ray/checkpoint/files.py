"""The data files of a checkpoint: safetensors, each entry one chunk of a tensor.

    weights-<rank>.<attempt>.safetensors       what serving reads
    optimizer-<rank>.<attempt>.safetensors     moments, counts, random number generators

An entry is called like its tensor, with the chunk's place in it unless it is the whole:
`layers.0.attention.wq.weight@512,0`. Other programs can read these files; we find our way by the
index, not by their headers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_ray.checkpoint.manifest import FileInfo
from llama_ray.formats.safetensors import make_header
from llama_ray.formats.source import TensorInfo

WEIGHTS = "model."
"""What the names of weights begin with in a training state; their entries leave it out."""
SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor."""

    tensor: str
    """Its name in the training state: `model.norm.weight`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.sizes, self.dtype)

    @property
    def entry(self) -> str:
        name = self.tensor.removeprefix(WEIGHTS)
        return name if self.sizes == self.shape else f"{name}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class WrittenFile:
    name: str
    info: FileInfo
    chunks: list[tuple[Chunk, int]]
    """With the first byte of each."""


def file_name(kind: str, number: int, attempt: str) -> str:
    """kind: "weights" or "optimizer"."""
    return f"{kind}-{number:05d}.{attempt}.safetensors"


def kind_of(tensor: str) -> str:
    return "weights" if tensor.startswith(WEIGHTS) else "optimizer"


def write_file(
    name: str,
    chunks: Sequence[tuple[Chunk, Tensor]],
    upload: Callable[[Sequence[memoryview]], None],
) -> WrittenFile:
    """Give `upload` the bytes of a file of `chunks` with their values (on the CPU, contiguous): the
    tensors' own memory, checksummed while it is on its way."""
    # Widest first, so that all are aligned. Among these small ones first: they are next to each
    # other, and whoever wants them, which is every rank, reads a single block.
    order = sorted(
        chunks, key=lambda pair: (-pair[0].dtype.itemsize, pair[0].info.nbytes > SMALL_BYTES)
    )
    header = make_header({chunk.entry: chunk.info for chunk, _ in order}, {"format": "pt"})
    buffers = [memoryview(header), *(as_bytes(values) for _, values in order)]
    with ThreadPoolExecutor(1, thread_name_prefix="checksum") as thread:
        info = thread.submit(FileInfo.of, buffers)
        upload(buffers)
    begins, end = [], len(header)
    for chunk, _ in order:
        begins.append(end)
        end += chunk.info.nbytes
    placed = [(chunk, begin) for (chunk, _), begin in zip(order, begins, strict=True)]
    return WrittenFile(name, info.result(), placed)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, writable."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy().data)
