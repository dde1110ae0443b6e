"""Large files to and from storage, and files that must not be overwritten.

    upload(storage, "a/b", [tensor_bytes, …])                # one file, parts in parallel
    with open_upload(storage, "a/c") as out:                  # the same, bit by bit
        out.write(bytes)
    download(storage, [Range("a/b", 0, 4096)], [view])        # straight into memory
    put_if_absent(storage, "a/COMMITTED", b"…")               # one of several writers wins

A file appears whole or not at all. Requests are repeated while storage fails, each for
`storage.retry_seconds` and none beyond the `deadline` (in `time.monotonic()`) where there is one;
then, and at once where repeating cannot help, it is a `UserError` that names `storage.url`.
Any thread may call, and several at a time.
"""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llama_ray.errors import UserError
from llama_ray.s3 import S3Object, run, until
from llama_ray.storage import Storage, explained
from llama_ray.upload import Upload, open_upload, upload

__all__ = ["Range", "Upload", "abort_stale_uploads", "download", "open_upload", "put_if_absent",
           "upload"]  # fmt: skip

REQUEST_BYTES = 16 << 20
"""The most that one request downloads."""
IN_FLIGHT = 8
"""Requests at a time."""
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
"""A draft of a local file, left by a process that was killed."""

Piece = tuple[str, int, memoryview]
"""File, first byte, where to."""


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file, `relative` to `storage.url`."""

    relative: str
    start: int
    stop: int


def download(
    storage: Storage,
    ranges: Sequence[Range],
    into: Sequence[memoryview | bytearray],
    *,
    deadline: float | None = None,
) -> None:
    """Fill each of the writable buffers `into` with its range: in any order, several at a time.

    Raises FileNotFoundError naming the file, and `UserError` where a file ends before its range.
    """
    pieces = list(_pieces(ranges, into))
    with explained(storage.config):
        if storage.scheme == "s3":
            run(storage, _download_s3(storage, pieces, deadline))
            return
        read = _read_local if storage.scheme == "file" else _read_other
        with ThreadPoolExecutor(IN_FLIGHT) as threads:
            for _ in threads.map(partial(read, storage), pieces):
                pass


def put_if_absent(storage: Storage, relative: str, data: bytes) -> bool:
    """Write `data` where there is no file yet: whether it did. It appears whole, and of several
    writers one wins (on S3 servers without conditional puts: if they do not come at once)."""
    with explained(storage.config):
        if storage.scheme == "s3":
            return run(storage, S3Object(storage, relative).put_if_absent(data))
        if storage.scheme == "file":
            return _link_if_absent(storage, relative, data)
        try:
            storage.retries.call(
                lambda: storage.fs.pipe_file(storage.path(relative), data, mode="create")
            )
        except FileExistsError:
            return False
        return True


def abort_stale_uploads(storage: Storage, folder: str) -> int:
    """Remove what uploads below `folder` have left that never came to their end: how many. Those
    under way fail."""
    with explained(storage.config):
        if storage.scheme == "s3":
            return run(storage, S3Object(storage, folder).abort_uploads(below=True))
        stale = [name for name in storage.list(folder) if TEMPORARY.search(name)]
        for name in stale:
            storage.delete(f"{folder}/{name}")
        return len(stale)


async def _download_s3(storage: Storage, pieces: Iterable[Piece], deadline: float | None) -> None:
    remaining = iter(pieces)

    async def work() -> None:
        for relative, start, view in remaining:
            with _damage_named(storage, relative, start + view.nbytes):
                await S3Object(storage, relative, deadline).get_range(start, view)

    workers = [asyncio.create_task(work()) for _ in range(IN_FLIGHT)]
    try:
        async with until(deadline):
            await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _read_local(storage: Storage, piece: Piece) -> None:
    relative, start, view = piece
    with _damage_named(storage, relative, start + view.nbytes):
        file = os.open(storage.path(relative), os.O_RDONLY)
        try:
            while view.nbytes:
                n = os.preadv(file, [view], start)
                if not n:
                    raise EOFError
                view, start = view[n:], start + n
        finally:
            os.close(file)


def _read_other(storage: Storage, piece: Piece) -> None:
    relative, start, view = piece
    with _damage_named(storage, relative, start + view.nbytes):
        data = storage.read_range(relative, start, start + view.nbytes)
        if len(data) < view.nbytes:
            raise EOFError
        view[:] = data


@contextmanager
def _damage_named(storage: Storage, relative: str, stop: int) -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise UserError(
            f"storage.url: {storage.url(relative)} is damaged: it ends before byte {stop:,}, up to "
            "which it is wanted"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{storage.url(relative)}: {error}") from error


def _pieces(ranges: Sequence[Range], into: Sequence[memoryview | bytearray]) -> Iterator[Piece]:
    """What one request each asks for."""
    for wanted, buffer in zip(ranges, into, strict=True):
        view = memoryview(buffer).cast("B")
        assert view.nbytes == wanted.stop - wanted.start, f"{wanted}: into {view.nbytes:,} bytes"
        for offset in range(0, view.nbytes, REQUEST_BYTES):
            piece = view[offset : offset + REQUEST_BYTES]
            yield wanted.relative, wanted.start + offset, piece


def _link_if_absent(storage: Storage, relative: str, data: bytes) -> bool:
    draft = f"{relative}.{uuid.uuid4().hex}.tmp"
    storage.write(draft, data)
    try:
        Path(storage.path(relative)).hardlink_to(storage.path(draft))  # a rename would replace
    except FileExistsError:
        return False
    finally:
        storage.delete(draft)
    return True
