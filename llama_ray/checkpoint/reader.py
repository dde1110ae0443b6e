"""A committed checkpoint, opened for reading."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llama_ray.checkpoint.files import WEIGHTS
from llama_ray.checkpoint.index import parse_index
from llama_ray.checkpoint.manifest import (
    CheckpointInfo,
    check_sizes,
    read_manifest,
    read_small_file,
)
from llama_ray.checkpoint.parts import Part, read_parts
from llama_ray.formats.source import TensorInfo
from llama_ray.storage import Storage


class Checkpoint:
    """Manifest and index are read once, tensors when asked for; every byte is checked on its way.

    Raises `UserError` where there is none, or it is damaged.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage, self.folder = storage, folder
        self.manifest = read_manifest(storage, folder)
        check_sizes(storage, folder, self.manifest)
        data = read_small_file(storage, folder, self.manifest, self.manifest.index)
        where = f"checkpoint: {storage.url(folder)}/{self.manifest.index}"
        self.index = parse_index(data, self.manifest.files, where)

    @property
    def info(self) -> CheckpointInfo:
        return self.manifest.info

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """By the model's names."""
        return {
            name.removeprefix(WEIGHTS): tensor.info
            for name, tensor in self.index.tensors.items()
            if name.startswith(WEIGHTS)
        }

    def read_weight(self, name: str) -> Tensor:
        """A whole one on the CPU, in the type it is stored in."""
        name = f"{WEIGHTS}{name}"
        tensor = self.index.tensors[name]
        whole = torch.empty(tensor.info.shape, dtype=tensor.info.dtype)
        self.read(
            self.part(name, offsets, (0,) * len(sizes), sizes, whole[_region(offsets, sizes)])
            for offsets, sizes in tensor.boxes()
        )
        return whole

    def read_tokenizer(self) -> bytes:
        return read_small_file(self.storage, self.folder, self.manifest, self.info.tokenizer_file)

    def part(
        self,
        name: str,
        chunk: Iterable[int],
        offsets: Iterable[int],
        lengths: Iterable[int],
        into: Tensor,
    ) -> Part:
        """To read into a tensor: the box of `lengths` that begins at `offsets` within the chunk
        that begins at `chunk`."""
        place = self.index.place(name, tuple(chunk))
        offsets, lengths = tuple(offsets), tuple(lengths)
        dtype = self.index.tensors[name].info.dtype
        if not offsets:
            return Part(place.file, place.begin, dtype, (), (), into)
        row_bytes = torch.Size(place.sizes[1:]).numel() * dtype.itemsize
        begin = place.begin + offsets[0] * row_bytes
        rows = (lengths[0], *place.sizes[1:])
        region = (slice(None), *_region(offsets[1:], lengths[1:]))
        return Part(place.file, begin, dtype, rows, region, into)

    def read(self, parts: Iterable[Part]) -> None:
        read_parts(self.storage, self.folder, self.manifest.files, parts)


def _region(offsets: Iterable[int], sizes: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
