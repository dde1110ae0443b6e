"""A `.pth` file (what `torch.save` writes), read by byte ranges from anywhere, trusted in nothing.

It is a zip of uncompressed records: `data.pkl`, a pickle of the dictionary, and `data/0`, `data/1`,
…, the memory of its tensors. A pickle is a program. So before `torch.load(weights_only=True)`,
which refuses all but a few functions, sees it, the zip must be what `torch.save` writes, and the
pickle name nothing but tensors. It is loaded onto `meta`: what comes of it are shapes and places of
tensors, whose bytes are then read one tensor at a time.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, cast

import torch
from torch import Tensor

from llama_ray.errors import UserError
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_RECORD_BYTES = 64 << 20
"""Of the pickle, and of the zip's directory. 65B's are under 0.2 MB."""
LOCAL_HEADER_BYTES = 30
"""Before a record; then come its name, and up to 64 KiB of extra fields."""
_BLOCK = 1 << 16
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch HalfStorage",
    "torch BFloat16Storage",
}


@dataclass(frozen=True)
class Entry:
    info: TensorInfo
    start: int
    """First byte of the tensor, from the beginning of the file."""


def read_archive(place: Place, size: int) -> dict[str, Entry]:
    """The tensors of a file of `size` bytes, by name. Raises `UserError` with the reason, before
    anything of the file is executed, or allocated because the file says so."""
    file = RangeFile(place, size)
    try:
        with zipfile.ZipFile(file) as archive:
            records = _check_records(archive, place.url)
            _check_pickle(archive, place.url)
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # zipfile raises many kinds on bytes that are no zip
        raise UserError(
            f"{place.url}: is truncated or no PyTorch file ({error}); copy it again (files from "
            "before PyTorch 1.6 are bare pickles and are not read: load and save them with PyTorch)"
        ) from None
    file.seek(0)
    try:
        state = torch.load(cast(IO[bytes], file), map_location="meta", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle provokes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{place.url}: its pickle cannot be read ({reason})") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{place.url}: holds no dictionary of tensors")
    return {name: _entry(name, value, records, place.url) for name, value in state.items()}


def _check_records(archive: zipfile.ZipFile, where: str) -> list[tuple[int, int, int]]:
    """(offset of its header, of the next one's, size) of each record, in file order. Raises unless
    they lie side by side in the file, uncompressed, in one folder, under names of their own."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if not infos:
        raise UserError(f"{where}: is an empty zip file")
    if infos[0].header_offset != 0:
        # `torch.load` takes what begins otherwise for a bare pickle.
        raise UserError(f"{where}: does not begin with its first record; this is no PyTorch file")
    names = [info.filename for info in infos]
    folder = PurePosixPath(names[0]).parts[:1]
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise UserError(f"{where}: holds a record named {name!r}, which points out of the file")
        if path.parts[:1] != folder or len(path.parts) < 2:
            raise UserError(f"{where}: holds {name!r}; PyTorch writes one folder and nothing else")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: two of its records have the same name")
    ends = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    for info, end in zip(infos, ends, strict=True):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UserError(
                f"{where}: record {info.filename} is compressed ({info.compress_size:,} bytes for "
                f"{info.file_size:,}), which PyTorch never does"
            )
        room = end - info.header_offset - LOCAL_HEADER_BYTES - len(info.orig_filename)
        if info.file_size > room:
            raise UserError(
                f"{where}: record {info.filename} is said to have {info.file_size:,} bytes, there "
                f"is room for {max(room, 0):,}: the zip's directory lies, or the file is damaged"
            )
        is_data = PurePosixPath(info.filename).parent.name == "data"
        if not is_data and info.file_size > MAX_RECORD_BYTES:
            raise UserError(f"{where}: record {info.filename} has {info.file_size:,} bytes")
    return [
        (info.header_offset, end, info.file_size) for info, end in zip(infos, ends, strict=True)
    ]


def _check_pickle(archive: zipfile.ZipFile, where: str) -> None:
    folder = PurePosixPath(archive.namelist()[0]).parts[0]
    try:
        pickled = archive.read(f"{folder}/data.pkl")
    except KeyError:
        raise UserError(f"{where}: holds no data.pkl; this is no PyTorch file") from None
    order = f"{folder}/byteorder"  # files from before PyTorch 2 have none
    if order in archive.namelist() and archive.read(order) == b"big":
        raise UserError(f"{where}: was written on a big-endian machine, which is not supported")
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            # INST too names a function; STACK_GLOBAL takes its name from the stack.
            named = None
            if opcode.name in ("GLOBAL", "INST") and argument not in _ALLOWED:
                named = str(argument).replace(" ", ".", 1)
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                named = f"a function by {opcode.name}"
            if named is not None:
                raise UserError(
                    f"{where}: its pickle asks for {named}: it is a program rather than weights "
                    "alone, and was not run; do not use this file"
                )
    except UserError:
        raise
    except Exception as error:  # pickletools raises many kinds on bytes that are no pickle
        raise UserError(f"{where}: data.pkl is no pickle ({error})") from None


def _entry(name: Any, value: Any, records: list[tuple[int, int, int]], where: str) -> Entry:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise UserError(f"{where}: {name!r} is {type(value).__name__}, not a tensor; give weights")
    if value.dtype not in DTYPES:
        raise UserError(
            f"{where}: {name} is of {value.dtype}; float32, float16 or bfloat16 is read"
        )
    if not value.is_contiguous():
        raise UserError(f"{where}: {name} is not stored row by row; call .contiguous() and save")
    storage = value.untyped_storage()
    offset = storage._checkpoint_offset or 0
    record = next((r for r in records if r[0] < offset < r[1]), None)
    first = int(value.storage_offset())
    last = first + value.numel()
    itemsize = value.dtype.itemsize
    if record is None or storage.nbytes() != record[2] or offset + storage.nbytes() > record[1]:
        raise UserError(f"{where}: {name} is said to be where no data of its size are")
    if first < 0 or last * itemsize > storage.nbytes():
        raise UserError(
            f"{where}: {name} of shape {list(value.shape)} takes {last * itemsize:,} bytes, the "
            f"record it lies in has {storage.nbytes():,}"
        )
    return Entry(TensorInfo(tuple(value.shape), value.dtype), offset + first * itemsize)


class RangeFile(io.RawIOBase):
    """A remote file for libraries that seek in one; what they read is little, so it is fetched in
    blocks of which one is kept."""

    def __init__(self, place: Place, size: int) -> None:
        super().__init__()
        self._place, self._size = place, size
        self._position = 0
        self._first, self._block = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"seek to {base + offset}, before the beginning")
        self._position = base + offset
        return self._position

    def read(self, n: int | None = -1) -> bytes:
        stop = self._size if n is None or n < 0 else min(self._position + n, self._size)
        if stop - self._position > MAX_RECORD_BYTES:
            raise UserError(
                f"{self._place.url}: its directory or pickle would be "
                f"{stop - self._position:,} bytes long, which no model's is"
            )
        if stop <= self._position:
            return b""
        inside = self._first <= self._position and stop <= self._first + len(self._block)
        if not inside:
            end = min(max(stop, self._position + _BLOCK), self._size)
            self._block = self._place.read_range(self._position, end - self._position)
            self._first = self._position
        data = self._block[self._position - self._first : stop - self._first]
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)
