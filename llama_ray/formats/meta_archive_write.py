"""A `.pth` file, written forwards and a tensor at a time: `torch.save` wants all of them in memory,
and a file to seek in.

The same zip of uncompressed records, their CRC-32s included, so `torch.load` with `weights_only`,
mapped into memory or not, reads it as one of its own (`meta_archive` says what is in it). There is
no `.format_version`: by it `torch.save` promises that records lie where its own writer puts them.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor

from llama_ray.formats.meta_archive import LOCAL_HEADER_BYTES
from llama_ray.formats.source import TensorInfo
from llama_ray.formats.stream import Counted, Out

STORAGES: dict[torch.dtype, Any] = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
_FOLDER = "archive"
_ALIGNMENT = 64  # bytes: `torch.load(mmap=True)` makes tensors over the file's own pages
_ZIP64_BYTES = 20  # of a local header's extra fields
_PADDING = struct.Struct("<2sH")  # the extra field that `torch.save` pads with as well


class ArchiveWriter:
    """The dictionary `tensors`, in its order; their values then come in any order."""

    def __init__(self, out: Out, tensors: Mapping[str, TensorInfo]) -> None:
        self._out = Counted(out)
        self._zip = zipfile.ZipFile(cast(IO[bytes], self._out), "w")
        self._keys = {name: str(i) for i, name in enumerate(tensors)}
        self._record("data.pkl", [_pickled(tensors, self._keys)])
        self._record("byteorder", [b"little"])

    def write(self, name: str, parts: Iterable[Tensor]) -> None:
        """The tensor `name`, whose rows come in contiguous parts."""
        self._record(
            f"data/{self._keys[name]}", (part.view(-1).view(torch.uint8).numpy() for part in parts)
        )

    def close(self) -> None:
        self._record("version", [b"3\n"])
        self._zip.close()

    def abandon(self) -> None:
        """Of a file that is not to be: `zipfile` would write its end when it is collected."""
        self._out.closed = True

    def _record(self, name: str, parts: Iterable[Any]) -> None:
        info = zipfile.ZipInfo(f"{_FOLDER}/{name}")
        header = LOCAL_HEADER_BYTES + len(info.filename) + _ZIP64_BYTES + _PADDING.size
        padding = -(self._out.tell() + header) % _ALIGNMENT
        info.extra = _PADDING.pack(b"FB", padding) + b"\0" * padding
        with self._zip.open(info, "w", force_zip64=True) as record:
            for part in parts:
                record.write(part)


@dataclass(frozen=True)
class _Storage:
    key: str
    info: TensorInfo


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.storage.info.shape
        strides = torch.empty(shape, device="meta").stride()
        hooks: OrderedDict[Any, Any] = OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, strides, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        numel = obj.info.nbytes // obj.info.dtype.itemsize
        return "storage", STORAGES[obj.info.dtype], obj.key, "cpu", numel


def _pickled(tensors: Mapping[str, TensorInfo], keys: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    state = {name: _Tensor(_Storage(keys[name], info)) for name, info in tensors.items()}
    _Pickler(buffer, protocol=2).dump(state)
    return buffer.getvalue()
