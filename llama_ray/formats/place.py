"""Where foreign files lie: under `storage.url`, or anywhere by path or URL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llama_ray.checkpoint.files import as_bytes
from llama_ray.config.storage import SCHEMES
from llama_ray.errors import UserError
from llama_ray.format import si
from llama_ray.formats.stream import Counted
from llama_ray.storage import Storage
from llama_ray.transfer import Range, download, open_upload


@dataclass(frozen=True)
class Place:
    """A file or folder: `path` below `storage.url`. What moves large data (`llama_ray.transfer`)
    takes the two as they are."""

    storage: Storage
    path: str

    @property
    def url(self) -> str:
        return self.storage.url(self.path)

    @property
    def name(self) -> str:
        """Its last component."""
        return self.path.rpartition("/")[2]

    def child(self, name: str) -> Place:
        return Place(self.storage, f"{self.path}/{name}" if self.path else name)

    def files(self) -> dict[str, int]:
        """Every file below this folder → its size; the empty name where it is itself a file."""
        return self.storage.list(self.path)

    def exists(self) -> bool:
        return self.storage.exists(self.path)

    def read_small(self, limit: int) -> bytes:
        """A file that is read whole. Raises `UserError` where there is none, or one of more than
        `limit` bytes, which no file of its kind has."""
        size = self.files().get("")
        if size is None:
            raise UserError(f"{self.url}: there is no such file; the copy is incomplete")
        if size > limit:
            raise UserError(
                f"{self.url}: is {si(size, 'B')} long, which no file of this name is; nothing of "
                "it was read"
            )
        return self.storage.read(self.path)

    def read_range(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on. Raises `UserError` where the file ends before."""
        data = bytearray(size)
        self._fill(start, data)
        return bytes(data)

    def read_into(self, start: int, tensor: Tensor) -> None:
        """Fill a contiguous tensor with the file's bytes from `start` on."""
        self._fill(start, as_bytes(tensor))

    def write(self, data: bytes) -> None:
        self.storage.write(self.path, data)

    @contextmanager
    def open_upload(self) -> Iterator[Counted]:
        """A large file to write bit by bit; it is there when the block has ended."""
        with open_upload(self.storage, self.path) as out:
            yield Counted(out)

    def _fill(self, start: int, buffer: bytearray | memoryview) -> None:
        if size := len(buffer):
            download(self.storage, [Range(self.path, start, start + size)], [buffer])


def locate(where: str, storage: Storage, key: str) -> Place:
    """A path or URL → that place; a name like `runs/mine` → below `storage.url`.

    What begins with `/`, `~` or `.` is a local path. Raises `UserError` beginning with `key`.
    """
    scheme, separator, path = where.partition("://")
    if not separator and not re.match(r"[/~.]", where):
        return Place(storage, _inside(where, key))
    if not separator or scheme == "file":
        local = Path(path if separator else where).expanduser().absolute()
        scheme, path = "file", str(local)
    if scheme not in SCHEMES:
        raise UserError(
            f"{key}: {where}: this kind of URL is not known; use a path, "
            f"{', '.join(f'{known}://' for known in SCHEMES)}"
        )
    root, _, name = path.rstrip("/").rpartition("/")
    if not root and scheme != "file":
        raise UserError(f"{key}: {where} names a whole bucket; name a folder in it")
    config = storage.config.model_copy(update={"url": f"{scheme}://{root or '/'}"})
    return Place(Storage(config), name)


def _inside(name: str, key: str) -> str:
    parts = [part for part in name.split("/") if part]
    if not parts or ".." in parts:
        raise UserError(f"{key}: {name!r} is no name below storage.url; write runs/<name>")
    return "/".join(parts)
