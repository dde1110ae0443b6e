"""Where every tensor of a checkpoint is: `index.<attempt>.json`.

A tensor is cut along each dimension, as sharding does, so its chunks form a grid: the cuts and, for
each chunk, its file and first byte say all. That leaves no room for chunks to overlap or to be
missing, and it is small: 65B on 512 ranks has 1.1 million chunks, in 16 MB.
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import NonNegativeInt, ValidationError
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from llama_ray.checkpoint.files import WrittenFile
from llama_ray.checkpoint.manifest import FileInfo, FileName
from llama_ray.config.base import StrictModel
from llama_ray.errors import UserError
from llama_ray.formats.safetensors import STATE_DTYPES
from llama_ray.formats.source import TensorInfo

_DTYPE_NAMES = {dtype: name for name, dtype in STATE_DTYPES.items()}

Cuts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Place:
    """Where a chunk lies, and its shape."""

    file: str
    begin: int
    """Its first byte."""
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    info: TensorInfo
    cuts: Cuts
    """Per dimension: where chunks begin, and the end."""
    places: np.ndarray
    """int64 [chunks, 2]: number of the file, first byte; chunks in row-major order."""

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(len(cuts) - 1 for cuts in self.cuts)

    def boxes(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(offsets, sizes) of each chunk, in row-major order."""
        intervals = [list(itertools.pairwise(cuts)) for cuts in self.cuts]
        for box in itertools.product(*intervals):
            yield tuple(a for a, _ in box), tuple(b - a for a, b in box)

    def chunk_bytes(self) -> np.ndarray:
        """int64 [chunks]."""
        volume = np.full((), self.info.dtype.itemsize, np.int64)
        for cuts in self.cuts:
            volume = np.multiply.outer(volume, np.diff(np.array(cuts, np.int64)))
        return volume.reshape(-1)


class Index:
    """The tensors of a checkpoint by their names in the training state."""

    def __init__(self, files: Sequence[str], tensors: Mapping[str, SavedTensor]) -> None:
        self.files, self.tensors = list(files), dict(tensors)

    def place(self, name: str, offsets: Sequence[int]) -> Place:
        """Of the chunk of a tensor that begins at `offsets`."""
        tensor = self.tensors[name]
        cell = [bisect_left(cuts, at) for cuts, at in zip(tensor.cuts, offsets, strict=True)]
        number = int(np.ravel_multi_index(cell, tensor.grid)) if cell else 0
        sizes = (cuts[i + 1] - cuts[i] for cuts, i in zip(tensor.cuts, cell, strict=True))
        file, begin = tensor.places[number].tolist()
        return Place(self.files[file], begin, tuple(sizes))

    def metadata(self, name: str) -> TensorStorageMetadata:
        """What torch distributed checkpoint plans reads by."""
        tensor = self.tensors[name]
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.info.dtype),
            size=torch.Size(tensor.info.shape),
            chunks=[
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes in tensor.boxes()
            ],
        )

    def to_json(self) -> bytes:
        tensors = {
            name: {
                "dtype": _DTYPE_NAMES[tensor.info.dtype],
                "shape": tensor.info.shape,
                "cuts": tensor.cuts,
                "places": tensor.places.reshape(-1).tolist(),
            }
            for name, tensor in self.tensors.items()
        }
        return json.dumps(
            {"version": 1, "files": self.files, "tensors": tensors}, separators=(",", ":")
        ).encode()

    @classmethod
    def of(cls, written: Sequence[WrittenFile]) -> Index:
        """The index of files that are written. What they hold is whole: it was planned so."""
        chunks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], int, int]]] = {}
        infos: dict[str, TensorInfo] = {}
        for number, file in enumerate(written):
            for chunk, begin in file.chunks:
                infos[chunk.tensor] = TensorInfo(chunk.shape, chunk.dtype)
                box = (chunk.offsets, chunk.sizes, number, begin)
                chunks.setdefault(chunk.tensor, []).append(box)
        return cls(
            [file.name for file in written],
            {name: _grid(name, info, chunks[name]) for name, info in infos.items()},
        )


def _grid(
    name: str, info: TensorInfo, chunks: list[tuple[tuple[int, ...], tuple[int, ...], int, int]]
) -> SavedTensor:
    chunks = sorted(chunks)
    cuts = tuple(
        tuple(sorted({offsets[axis] for offsets, *_ in chunks} | {0, size}))
        for axis, size in enumerate(info.shape)
    )
    tensor = SavedTensor(info, cuts, np.array([chunk[2:] for chunk in chunks], np.int64))
    assert list(tensor.boxes()) == [chunk[:2] for chunk in chunks], f"{name}: chunks form no grid"
    return tensor


class _TensorEntry(StrictModel):
    dtype: str
    shape: list[NonNegativeInt]
    cuts: list[list[NonNegativeInt]]
    places: list[NonNegativeInt]


class _IndexFile(StrictModel):
    version: int
    files: list[FileName]
    tensors: dict[str, _TensorEntry]


def parse_index(data: bytes, files: Mapping[str, FileInfo], where: str) -> Index:
    """Read an index and believe nothing: files are ones of `files` (the manifest's), every tensor
    is covered once, no two chunks share a byte. Raises `UserError` beginning with `where`."""
    try:
        parsed = _IndexFile.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if parsed.version != 1:
        raise UserError(f"{where}: is of version {parsed.version}, which this one does not read")
    for file in parsed.files:
        if file not in files:
            raise UserError(f"{where}: names {file}, which the manifest does not")
    tensors = {
        name: _checked(entry, len(parsed.files), f"{where}: {name}")
        for name, entry in parsed.tensors.items()
    }
    index = Index(parsed.files, tensors)
    _check_bytes(index, [files[file].size for file in parsed.files], where)
    return index


def _checked(entry: _TensorEntry, n_files: int, where: str) -> SavedTensor:
    if entry.dtype not in STATE_DTYPES:
        raise UserError(f"{where}: dtype {entry.dtype!r} is not one of {', '.join(STATE_DTYPES)}")
    if len(entry.cuts) != len(entry.shape):
        raise UserError(f"{where}: has {len(entry.shape)} dimensions, {len(entry.cuts)} of cuts")
    for axis, (size, cuts) in enumerate(zip(entry.shape, entry.cuts, strict=True)):
        rising = all(a < b for a, b in itertools.pairwise(cuts))
        if not rising or not cuts or cuts[0] != 0 or cuts[-1] != size:
            raise UserError(
                f"{where}: its chunks do not cover dimension {axis} of {size:,} once: cuts {cuts}"
            )
    n_chunks = math.prod(len(cuts) - 1 for cuts in entry.cuts)
    if len(entry.places) != 2 * n_chunks:
        raise UserError(f"{where}: {n_chunks} chunks, but places of {len(entry.places) / 2:g}")
    try:
        places = np.array(entry.places, np.int64).reshape(-1, 2)
    except OverflowError:
        raise UserError(f"{where}: lies beyond the end of any file") from None
    if (places[:, 0] >= n_files).any():
        raise UserError(f"{where}: is in a file without a name")
    info = TensorInfo(tuple(entry.shape), STATE_DTYPES[entry.dtype])
    return SavedTensor(info, tuple(map(tuple, entry.cuts)), places)


def _check_bytes(index: Index, sizes: Sequence[int], where: str) -> None:
    names = list(index.tensors)
    tensors = list(index.tensors.values())
    if not tensors:
        raise UserError(f"{where}: holds no tensor")
    for name, tensor in index.tensors.items():
        if tensor.info.nbytes > sum(sizes):
            raise UserError(f"{where}: {name} of {list(tensor.info.shape)} exceeds all files")
    files, begins = np.concatenate([tensor.places for tensor in tensors]).T
    ends = begins + np.concatenate([tensor.chunk_bytes() for tensor in tensors])
    owners = np.repeat(np.arange(len(tensors)), [len(tensor.places) for tensor in tensors])
    room = np.array(sizes, np.int64)[files]
    beyond = np.flatnonzero((begins > room) | (ends > room))  # a sum may be past what int64 holds
    if len(beyond):
        owner, file = names[owners[beyond[0]]], index.files[files[beyond[0]]]
        raise UserError(f"{where}: {owner} lies beyond the end of {file}")
    order = np.lexsort((begins, files))
    same_file = files[order][1:] == files[order][:-1]
    shared = np.flatnonzero(same_file & (begins[order][1:] < ends[order][:-1]))
    if len(shared):
        one, other = (names[owners[order[shared[0] + i]]] for i in (0, 1))
        file = index.files[files[order[shared[0]]]]
        raise UserError(f"{where}: {one} and {other} overlap in {file}")
