"""The safetensors file: its header, read from anywhere by byte range and believed in nothing, and
written before the tensors are there.

Eight bytes little-endian (length of the header), the header as JSON (name → dtype, shape, first and
last + 1 byte of its data), the data: https://huggingface.co/docs/safetensors. The `safetensors`
library reads whole local files only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llama_ray.errors import UserError
from llama_ray.formats.source import TensorInfo

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights are stored in."""
STATE_DTYPES = DTYPES | {"F64": torch.float64, "I64": torch.int64, "I32": torch.int32,
                         "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
"""What the state of a training run may be stored in besides."""
_NAMES = {dtype: name for name, dtype in STATE_DTYPES.items()}
_LENGTH = struct.Struct("<Q")
PREFIX_BYTES = _LENGTH.size
MAX_HEADER_BYTES = 32 << 20
"""65B's is 0.1 MB in all. The format allows 100 MB: as Python objects, over 1 GB."""
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    info: TensorInfo
    start: int
    """First byte, from the beginning of the file."""

    @property
    def stop(self) -> int:
        return self.start + self.info.nbytes


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The file's first `PREFIX_BYTES` → bytes of JSON that follow them."""
    if len(prefix) < PREFIX_BYTES:
        raise UserError(f"{where}: is no safetensors file: only {file_size} bytes long")
    (length,) = _LENGTH.unpack(prefix)
    if length > file_size - PREFIX_BYTES:
        raise UserError(
            f"{where}: is truncated or no safetensors file: {length:,} bytes of header are "
            f"announced, the file has {file_size:,}"
        )
    if length > MAX_HEADER_BYTES:
        raise UserError(
            f"{where}: its header is {length:,} bytes long, which no model's is; it was not read"
        )
    return int(length)


def parse_header(
    data: bytes, file_size: int, where: str, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, Entry]:
    """The header's JSON → its tensors. Raises `UserError`, beginning with `where`, unless they
    fill the file without gap or overlap, as the format demands."""
    try:
        header = json.loads(data, object_pairs_hook=_no_duplicates)
    except _DuplicateError as error:
        raise UserError(f"{where}: its header has {str(error)!r} twice") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserError(f"{where}: its header is no JSON object")
    first = PREFIX_BYTES + len(data)
    entries = {
        name: _entry(name, value, first, where, dtypes)
        for name, value in header.items()
        if name != _METADATA
    }
    end = first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "follows a gap"
            raise UserError(f"{where}: {name} {fault}: the header lies about the data")
        end = entry.stop
    if end != file_size:
        state = "is truncated" if end > file_size else "is longer than it should be"
        raise UserError(
            f"{where}: {state}: its header asks for {end:,} bytes, the file has {file_size:,}; "
            "copy it again"
        )
    return entries


def make_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file whose data are `tensors`, in this order. Raises KeyError for a dtype
    that is not of `STATE_DTYPES`."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin aligned, as the library writes them
    return _LENGTH.pack(len(text)) + text


def _entry(
    name: str, value: Any, first: int, where: str, dtypes: Mapping[str, torch.dtype]
) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not isinstance(shape, list) or not isinstance(dtype, str):
        raise UserError(f"{where}: what its header says of {name} is no description of a tensor")
    if dtype not in dtypes:
        raise UserError(
            f"{where}: {name} is stored as {dtype}, which is read as no weight; use the model in "
            f"one of {', '.join(dtypes)} (not quantized)"
        )
    info = TensorInfo(tuple(shape), dtypes[dtype])
    if stop - start != info.nbytes:
        raise UserError(
            f"{where}: {name} of {dtype} {shape} takes {info.nbytes:,} bytes, its header gives it "
            f"{stop - start:,}"
        )
    return Entry(info, first + start)


class _DuplicateError(Exception):
    pass


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateError(key)
        result[key] = value
    return result
