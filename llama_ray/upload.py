"""Large files to storage, from memory or bit by bit: see `llama_ray.transfer`."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from llama_ray.s3 import Multipart, S3Object, run, until
from llama_ray.storage import Storage, WholeFile, explained

Buffer = bytes | bytearray | memoryview

PART_BYTES = 16 << 20
"""Of an upload whose size is known."""
STREAM_PART_BYTES = 8 << 20
"""Of an upload that is written bit by bit, which keeps copies of the parts on their way."""
MAX_PARTS = 10_000
"""S3's limit."""
IN_FLIGHT, STREAM_IN_FLIGHT = 8, 4
"""Parts on their way at a time."""


def upload(
    storage: Storage, relative: str, buffers: Sequence[Buffer], *, deadline: float | None = None
) -> None:
    """Write the concatenation of `buffers` as one file. On S3 it is sent from where it lies.

    Raises `UserError` at the `deadline`, be a request stuck or repeated.
    """
    if storage.scheme == "s3":
        with explained(storage.config):
            pieces = [memoryview(buffer).cast("B") for buffer in buffers]
            run(storage, _upload_s3(storage, relative, pieces, deadline))
        return
    with open_upload(storage, relative) as out:
        for buffer in buffers:
            out.write(buffer)


@contextmanager
def open_upload(
    storage: Storage, relative: str, *, deadline: float | None = None
) -> Iterator[Upload]:
    """A file to write bit by bit, there when the block has ended without an error. On S3 it keeps
    at most some 40 MB in memory (more from 8 GB on: parts grow with their number)."""
    out = Upload(storage, relative, deadline)
    try:
        yield out
        out.finish()
    except BaseException:
        out.abort()
        raise


class Upload:
    """A file that is being written, by `open_upload`."""

    def __init__(self, storage: Storage, relative: str, deadline: float | None) -> None:
        self._config = storage.config
        with explained(storage.config):
            self._sink: _Sink
            if storage.scheme == "s3":
                self._sink = _S3Sink(storage, relative, deadline)
            elif storage.scheme == "file":
                self._sink = WholeFile(Path(storage.path(relative)))
            else:
                self._sink = _OtherSink(storage, relative)

    def write(self, buffer: Buffer) -> None:
        """Append; the buffer may be used again at once."""
        with explained(self._config):
            self._sink.write(memoryview(buffer).cast("B"))

    def finish(self) -> None:
        with explained(self._config):
            self._sink.finish()

    def abort(self) -> None:
        self._sink.abort()


def split(pieces: Iterable[memoryview], size: int) -> Iterator[list[memoryview]]:
    """The concatenation of `pieces` in parts of `size` bytes (the last: what is left), each a list
    of views."""
    part: list[memoryview] = []
    room = size
    for piece in pieces:
        while piece.nbytes:
            part.append(piece[:room])
            room -= part[-1].nbytes
            piece = piece[part[-1].nbytes :]
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part


async def _upload_s3(
    storage: Storage, relative: str, pieces: Sequence[memoryview], deadline: float | None
) -> None:
    target = S3Object(storage, relative, deadline)
    size = sum(piece.nbytes for piece in pieces)
    if size <= PART_BYTES:
        async with until(deadline):
            await target.call("put_object", pieces)
        return
    multipart = Multipart(target, IN_FLIGHT)
    try:
        async with until(deadline):
            for part in split(pieces, max(PART_BYTES, -(-size // MAX_PARTS))):
                await multipart.send(part)
            await multipart.finish()
    except BaseException:
        await multipart.abort()
        raise


class _Sink(Protocol):
    def write(self, data: memoryview, /) -> None: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...


class _S3Sink:
    def __init__(self, storage: Storage, relative: str, deadline: float | None) -> None:
        self.storage, self.deadline = storage, deadline
        self.target = S3Object(storage, relative, deadline)
        self.multipart = Multipart(self.target, STREAM_IN_FLIGHT)
        self.n_parts = 0
        self._next_part()

    def write(self, data: memoryview) -> None:
        while data.nbytes:
            n = min(data.nbytes, len(self.part) - self.filled)
            self.part[self.filled : self.filled + n] = data[:n]
            self.filled += n
            data = data[n:]
            if self.filled == len(self.part):
                self._run(self.multipart.send([memoryview(self.part)]))
                self.n_parts += 1
                self._next_part()

    def finish(self) -> None:
        rest = [memoryview(self.part)[: self.filled]] if self.filled else []
        if not self.n_parts:
            self._run(self.target.call("put_object", rest))
            return
        if rest:
            self._run(self.multipart.send(rest))
        self._run(self.multipart.finish())

    def abort(self) -> None:
        run(self.storage, self.multipart.abort())

    def _next_part(self) -> None:
        # The first thousand are of one size, as some servers want all to be; then they double.
        self.part = bytearray(STREAM_PART_BYTES << self.n_parts // 1000)
        self.filled = 0

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        async def in_time() -> None:
            async with until(self.deadline):
                await coroutine

        run(self.storage, in_time())


class _OtherSink:
    """fsspec's own way: the file is there from `commit` on."""

    def __init__(self, storage: Storage, relative: str) -> None:
        self.file = storage.fs.open(storage.path(relative), "wb", autocommit=False)

    def write(self, data: memoryview) -> None:
        self.file.write(data)

    def finish(self) -> None:
        self.file.close()
        self.file.commit()

    def abort(self) -> None:
        with suppress(Exception):  # what is buffered cannot be sent
            self.file.close()
        self.file.discard()
