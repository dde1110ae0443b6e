"""What can be wrong with the files of a checkpoint. Reads every byte."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama_ray.checkpoint.files import WEIGHTS, Chunk
from llama_ray.checkpoint.index import Index
from llama_ray.checkpoint.manifest import BLOCK_BYTES, FileInfo, Manifest
from llama_ray.errors import UserError
from llama_ray.formats.safetensors import (
    PREFIX_BYTES,
    STATE_DTYPES,
    Entry,
    header_length,
    parse_header,
)
from llama_ray.formats.source import expected_shapes
from llama_ray.storage import Storage
from llama_ray.transfer import Range, download

READ_BYTES = 16 * BLOCK_BYTES

Placed = tuple[Chunk, int]
"""A chunk and its first byte."""


@dataclass(frozen=True)
class FileToCheck:
    path: str
    info: FileInfo
    chunks: list[Placed]
    """What the index says that it holds."""


def size_damage(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, str]:
    """Name → what is wrong, of the files that are missing or of another size; sizes: those there
    are."""
    return {
        name: f"has {sizes[name]:,} bytes where {file.size:,} were written"
        if name in sizes
        else "is missing"
        for name, file in manifest.files.items()
        if sizes.get(name) != file.size
    }


def index_damage(index: Index, manifest: Manifest) -> Iterator[str]:
    """What the index lacks that the model has, or has that it lacks."""
    expected = expected_shapes(manifest.info.model)
    saved = {n.removeprefix(WEIGHTS): t for n, t in index.tensors.items() if n.startswith(WEIGHTS)}
    for name, shape in expected.items():
        if name not in saved:
            yield f"lacks {name}"
        elif saved[name].info.shape != shape:
            yield f"has {name} of shape {list(saved[name].info.shape)}, not {list(shape)}"
    for name in sorted(saved.keys() - expected.keys()):
        yield f"has {name}, which is no weight of the model"


def by_file(index: Index) -> dict[str, list[Placed]]:
    """What the index says each file holds, in the order of its bytes."""
    found: dict[str, list[Placed]] = {name: [] for name in index.files}
    for name, tensor in index.tensors.items():
        info = tensor.info
        for (offsets, sizes), (file, begin) in zip(
            tensor.boxes(), tensor.places.tolist(), strict=True
        ):
            chunk = Chunk(name, info.shape, info.dtype, offsets, sizes)
            found[index.files[file]].append((chunk, begin))
    for chunks in found.values():
        chunks.sort(key=lambda placed: placed[1])
    return found


def file_damage(
    storage: Storage, file: FileToCheck, report: Callable[[int], None]
) -> Iterator[str]:
    """What is wrong with a data file of the right size. report: told how many bytes were read."""
    size, checksums = file.info.size, file.info.checksums
    memory = bytearray(min(READ_BYTES, size))
    not_finite: dict[str, None] = {}  # in order
    for begin in range(0, size, READ_BYTES):
        end = min(begin + READ_BYTES, size)
        data = memoryview(memory)[: end - begin]
        download(storage, [Range(file.path, begin, end)], [data])
        if begin == 0:
            yield from _header_damage(storage, file, data)
        for start in range(begin, end, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, end)
            if zlib.crc32(data[start - begin : stop - begin]) != checksums[start // BLOCK_BYTES]:
                yield f"is not what was written at bytes {start:,} to {stop:,} (another checksum)"
        not_finite |= dict.fromkeys(_not_finite(file.chunks, begin, data))
        report(end)
    for name in not_finite:
        yield f"holds values of {name} that are not finite"


def _header_damage(storage: Storage, file: FileToCheck, start: memoryview) -> Iterator[str]:
    """start: the first bytes of the file, which are longer than any header of ours."""
    try:
        length = header_length(bytes(start[:PREFIX_BYTES]), file.info.size, "")
        text = bytes(start[PREFIX_BYTES : PREFIX_BYTES + length])
        found = parse_header(text, file.info.size, "", STATE_DTYPES)
    except UserError as error:
        yield str(error).removeprefix(": ")
        return
    expected = {chunk.entry: Entry(chunk.info, begin) for chunk, begin in file.chunks}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield f"has another {name} in its header than in the index"


def _not_finite(chunks: Sequence[Placed], begin: int, data: memoryview) -> Iterator[str]:
    """Tensors with such values among bytes `begin` to `begin + len(data)`."""
    for chunk, first in chunks:
        start, stop = max(first, begin), min(first + chunk.info.nbytes, begin + len(data))
        if start < stop and chunk.dtype.is_floating_point:
            values: Any = torch.frombuffer(data[start - begin : stop - begin], dtype=chunk.dtype)
            if not all(bool(part.isfinite().all()) for part in values.split(1 << 22)):
                yield chunk.tensor
