"""Requests to S3 that fsspec has no words for, on the session of an `s3fs` filesystem.

Coroutines, for fsspec's event loop. Each request is repeated while the server fails. A request
whose answer was lost has perhaps worked: objects carry a random token in their metadata, by which
a writer recognises its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from s3fs import S3FileSystem

from llama_ray.retry import GaveUpError, ShortReadError, http_answer
from llama_ray.storage import Storage

T = TypeVar("T")

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 18
"""Handed to a socket at a time."""
ABORT_SECONDS = 5.0
"""How long a failed upload tries to remove its parts; what stays, `abort_uploads` finds."""
GRACE_SECONDS, SLOWEST_BYTES_PER_SECOND = 30.0, 1 << 18
"""A request that takes longer than the first and its bytes at the second is stuck: made anew."""
TOKEN = "llama-ray-writer"


def run(storage: Storage, coroutine: Coroutine[Any, Any, T]) -> T:
    """On fsspec's event loop, which has a thread of its own."""
    future = asyncio.run_coroutine_threadsafe(coroutine, storage.fs.loop)
    try:
        return future.result()
    except BaseException:  # Ctrl-C, too
        future.cancel()
        raise


@asynccontextmanager
async def until(deadline: float | None) -> AsyncIterator[None]:
    began = time.monotonic()
    try:
        async with asyncio.timeout(None if deadline is None else deadline - began):
            yield
    except TimeoutError as error:
        raise GaveUpError(time.monotonic() - began) from error


class Body:
    """Bytes to send that lie in several pieces of memory: a file as botocore wants it to sign, and
    an iterable that aiohttp sends without copying them together."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = pieces
        self.size = sum(piece.nbytes for piece in pieces)
        self.position = 0

    def __len__(self) -> int:
        return self.size

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def read(self, size: int | None = None) -> bytes:
        stop = self.size if size is None or size < 0 else min(self.position + size, self.size)
        found = cut(self.pieces, self.position, stop)
        self.position = max(self.position, stop)
        return b"".join(found)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for piece in cut(self.pieces, self.position, self.size):
            for start in range(0, piece.nbytes, BLOCK_BYTES):
                yield piece[start : start + BLOCK_BYTES]


def cut(pieces: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Bytes [start, stop) of the concatenation of `pieces`, not copied."""
    found, offset = [], 0
    for piece in pieces:
        begin, end = max(start - offset, 0), min(stop - offset, piece.nbytes)
        if begin < end:
            found.append(piece[begin:end])
        offset += piece.nbytes
    return found


class S3Object:
    """One object of a bucket, be it there or not, and how patiently it is asked for."""

    def __init__(self, storage: Storage, relative: str, deadline: float | None = None) -> None:
        """`deadline`: when attempts end, in `time.monotonic()`."""
        self.fs: S3FileSystem = storage.fs
        self.retries, self.deadline = storage.retries, deadline
        self.bucket, self.key, _ = self.fs.split_path(storage.path(relative))

    async def call(
        self, method: str, body: Sequence[memoryview] = (), **arguments: Any
    ) -> dict[str, Any]:
        """A request that may be made twice; `body` is what it sends."""
        n_bytes = sum(piece.nbytes for piece in body)
        return await self.repeated(lambda: self.once(method, body, **arguments), n_bytes)

    async def once(
        self, method: str, body: Sequence[memoryview] = (), **arguments: Any
    ) -> dict[str, Any]:
        if body:
            arguments["Body"] = Body(body)
        arguments = {"Bucket": self.bucket, "Key": self.key} | arguments
        return dict(await self.fs._call_s3(method, **arguments))

    async def repeated(self, request: Callable[[], Awaitable[T]], n_bytes: int = 0) -> T:
        async def attempt() -> T:
            async with asyncio.timeout(GRACE_SECONDS + n_bytes / SLOWEST_BYTES_PER_SECOND):
                return await request()

        return await self.retries.call_async(attempt, self.deadline)

    async def put_if_absent(self, data: bytes) -> bool:
        """Whether `data` was put; False where there is an object already. One of several writers
        wins where the server knows conditional puts; where it does not, they had better not come
        at the same moment."""
        if await self.token() is not None:
            return False
        body, token = [memoryview(data)], uuid.uuid4().hex
        try:
            await self.call("put_object", body, IfNoneMatch="*", Metadata={TOKEN: token})
        except OSError as error:
            status, code = http_answer(error)
            if status == 412:  # perhaps by an attempt of ours whose answer was lost
                return await self.token() == token
            if status != 501 and code != "NotImplemented":
                raise
            await self.call("put_object", body, Metadata={TOKEN: token})
        return True

    async def get_range(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on. Raises FileNotFoundError, and EOFError where
        the object ends before."""
        stop = start + into.nbytes

        async def attempt() -> None:
            answer = await self.once("get_object", Range=f"bytes={start}-{stop - 1}")
            stream = answer["Body"].raw_stream
            try:
                if answer["ContentLength"] != into.nbytes:
                    raise EOFError
                offset = 0
                async for block, _ in stream.content.iter_chunks():
                    into[offset : offset + len(block)] = block
                    offset += len(block)
                if offset != into.nbytes:
                    raise ShortReadError(f"{offset:,} bytes came of {into.nbytes:,}")
            except BaseException:
                stream.close()  # else the connection is kept with the rest of the answer in it
                raise
            stream.release()

        try:
            await self.repeated(attempt, into.nbytes)
        except OSError as error:
            if http_answer(error)[0] == 416:
                raise EOFError from error
            raise

    async def abort_uploads(self, below: bool = False) -> int:
        """Abort the multipart uploads that nobody has completed, of this object or of all whose
        key begins with its key and "/". Returns how many."""
        prefix = f"{self.key}/" if below else self.key
        found = 0
        after: dict[str, Any] | None = {}
        while after is not None:
            page = await self.call("list_multipart_uploads", Prefix=prefix, **after)
            for upload in page.get("Uploads", []):
                if below or upload["Key"] == self.key:
                    which = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    with suppress(FileNotFoundError):
                        await self.call("abort_multipart_upload", **which)
                        found += 1
            markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
            after = {k: page[v] for k, v in markers.items()} if page.get("IsTruncated") else None
        return found

    async def token(self) -> str | None:
        """Of the writer of the object: empty where it left none, None where there is no object."""
        try:
            return str((await self.call("head_object")).get("Metadata", {}).get(TOKEN, ""))
        except FileNotFoundError:
            return None


class Multipart:
    """An object sent in parts, some at a time. Not there before `finish`; whoever does not get
    through that calls `abort`."""

    def __init__(self, target: S3Object, in_flight: int) -> None:
        self.target = target
        self.token = uuid.uuid4().hex
        self.upload: dict[str, Any] = {}
        self.attempts = 0
        """To create the upload: each may have."""
        self.parts: list[asyncio.Task[dict[str, Any]]] = []
        self.failure: BaseException | None = None
        self.slots = asyncio.Semaphore(in_flight)
        self.n_bytes = 0

    async def send(self, pieces: Sequence[memoryview]) -> None:
        """Begin to send the next part; waits while `in_flight` others are on their way. Raises what
        one of them has failed with. The memory must stay as it is until `finish`."""
        if not self.upload:
            self.upload = {"UploadId": (await self.target.repeated(self._create))["UploadId"]}
        await self.slots.acquire()
        if self.failure:
            raise self.failure
        number = len(self.parts) + 1
        request = self.target.call("upload_part", pieces, PartNumber=number, **self.upload)
        part = asyncio.create_task(request)
        part.add_done_callback(self._sent)
        self.parts.append(part)
        self.n_bytes += sum(piece.nbytes for piece in pieces)

    async def finish(self) -> None:
        answers = await asyncio.gather(*self.parts)
        tags = [{"PartNumber": i, "ETag": answer["ETag"]} for i, answer in enumerate(answers, 1)]
        try:
            # Servers may take minutes to put many parts together.
            await self.target.repeated(lambda: self._complete(tags), self.n_bytes)
        except FileNotFoundError:
            # No such upload: it was completed before, and the answer was lost.
            if await self.target.token() != self.token:
                raise
        if self.attempts > 1:
            await self.target.abort_uploads()

    async def abort(self) -> None:
        """Leave nothing of it, as far as the server answers."""
        for part in self.parts:
            part.cancel()
        await asyncio.gather(*self.parts, return_exceptions=True)
        if not self.attempts:
            return
        self.target.deadline = time.monotonic() + ABORT_SECONDS
        try:
            async with asyncio.timeout(ABORT_SECONDS):
                await self.target.abort_uploads()
        except Exception as error:
            logger.warning("%s: parts of a failed upload stay: %s", self.target.key, error)

    async def _create(self) -> dict[str, Any]:
        self.attempts += 1
        return await self.target.once("create_multipart_upload", Metadata={TOKEN: self.token})

    async def _complete(self, tags: list[dict[str, Any]]) -> dict[str, Any]:
        return await self.target.once(
            "complete_multipart_upload", MultipartUpload={"Parts": tags}, **self.upload
        )

    def _sent(self, part: asyncio.Task[dict[str, Any]]) -> None:
        self.slots.release()
        if not part.cancelled() and part.exception():
            self.failure = part.exception()
