"""What `import` and `export` have in common: a source, its table, progress of its weights."""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llama_ray.data.progress import Progress
from llama_ray.data.tokenizer import tokenizer_file
from llama_ray.format import count, si
from llama_ray.formats.source import WeightSource

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 1 << 20

DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def return_freed_memory() -> None:
    """From now on in this process, tensors go back to the kernel when they are freed. Otherwise
    glibc, which learns from the first that is freed, keeps those of up to 32 MB for later ones,
    which are of other sizes: twice the memory. To be called by a process that only converts."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class _Counted:
    """The source, which counts the bytes that are read from it."""

    def __init__(self, source: WeightSource) -> None:
        self.description = source.description
        self.config = source.config
        self.tokenizer = source.tokenizer
        self.tensors = source.tensors
        self.bytes = 0
        self._source = source

    def read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        self.bytes += tensor.nbytes
        return tensor


def total_bytes(source: WeightSource) -> int:
    return sum(info.nbytes for info in source.tensors.values())


@contextmanager
def reporting(source: WeightSource, stage: str) -> Iterator[WeightSource]:
    """Give the source, each of whose weights is read once, and print how far that is."""
    counted = _Counted(source)

    def totals() -> Counter[str]:
        return Counter(bytes=counted.bytes, done=counted.bytes)

    with Progress([stage]).stage(stage, totals, total_bytes(source)):
        yield counted


def source_rows(source: WeightSource) -> list[tuple[str, str]]:
    """What a table says of a source."""
    model = source.config
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in source.tensors.values())
    largest = max(info.nbytes for info in source.tensors.values())
    groups = f" ({model.n_kv_heads} of keys and values)" * (model.n_kv_heads != model.n_heads)
    tied = ", embeddings tied" * model.tie_embeddings
    tokenizer = tokenizer_file(source.tokenizer) if source.tokenizer is not None else "none"
    return [
        ("from", source.description),
        (
            "model",
            f"{count(model.n_params)} parameters ({model.n_params:,}): {model.n_layers} layers, "
            f"dim {model.dim}, {model.n_heads} heads{groups}, ffn {model.ffn_hidden_dim}, vocab "
            f"{model.vocab_size:,}{tied}",
        ),
        (
            "weights",
            f"{len(source.tensors):,} tensors, {si(total_bytes(source), 'B')} of "
            f"{' and '.join(dtypes)}, the largest {si(largest, 'B')}",
        ),
        ("tokenizer", tokenizer),
    ]
