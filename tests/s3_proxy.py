"""A proxy in front of an S3 server that goes wrong when told to.

    with s3_proxy(server.endpoint_url, once(SLOW_DOWN, at=2)) as proxy:
        …                                   # against proxy.endpoint_url
        proxy.rule = lambda request: RESET if request.method == "PUT" else None
        assert [r.method for r in proxy.requests] == …

Requests and answers are streamed as they are, the client's own `Host` included, so that its
signatures stay valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import aiohttp
from aiohttp import web
from yarl import URL

_BLOCK = 64 * 1024
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Request:
    """What a rule decides by, and what the proxy remembers."""

    index: int
    """How many came before, since the proxy started."""
    method: str
    path: str
    """`/bucket/key`, decoded."""
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""

    @property
    def is_part(self) -> bool:
        """Whether it uploads a part of a multipart upload."""
        return self.method == "PUT" and "partNumber" in self.query


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request, in the order of these fields."""

    before: Callable[[], object] | None = None
    """Called (in a thread) before anything is forwarded."""
    status: int | None = None
    """Answered instead of forwarding, with the XML S3 has for it."""
    reset: Literal["before", "after"] | None = None
    """The client's connection is reset: before forwarding, or when the server has answered, so
    that it has happened and the client does not know."""
    after: Callable[[], object] | None = None
    """Called (in a thread) when the server has answered, before the client is."""
    stall: float = 0.0
    """Seconds for which the answer is held back."""
    bytes_per_second: float | None = None
    """How fast the answer's body is passed on."""
    cut: int | None = None
    """After so many bytes of the answer's body the connection is closed."""


Rule = Callable[[Request], Fault | None]

SLOW_DOWN = Fault(status=503)
INTERNAL_ERROR = Fault(status=500)
FORBIDDEN = Fault(status=403)
RESET = Fault(reset="before")
LOST_ANSWER = Fault(reset="after")

_CODES = {403: "AccessDenied", 429: "SlowDown", 500: "InternalError", 501: "NotImplemented",
          503: "SlowDown"}  # fmt: skip


def once(
    fault: Fault, at: int = 0, where: Callable[[Request], bool] = lambda request: True
) -> Rule:
    """A rule: `fault` for the request number `at` (from 0) of those that are `where`."""
    seen = itertools.count()
    return lambda request: fault if where(request) and next(seen) == at else None


class S3Proxy:
    """Runs on a free loopback port, in a thread of its own."""

    def __init__(self, upstream: str, rule: Rule | None) -> None:
        self.upstream = upstream
        self.rule: Rule = rule or (lambda request: None)
        self.requests: list[Request] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._port = 0

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._thread.start()
        self._run(self._start())

    def stop(self) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nothing listens meanwhile: connections are refused, open ones closed."""
        self._run(self._unlisten())
        try:
            yield
        finally:
            self._run(self._listen())

    def _run(self, coroutine: object) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)  # type: ignore[arg-type]

    async def _start(self) -> None:
        # A kept connection that the server closes would look like a fault of ours.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        await self._listen()

    async def _stop(self) -> None:
        await self._unlisten()
        await self._client.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _listen(self) -> None:
        server = web.Server(self._handle, access_log=None)
        # 0 would wait for ever.
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = self._runner.addresses[0][1]

    async def _unlisten(self) -> None:
        await self._runner.cleanup()

    async def _handle(self, incoming: web.BaseRequest) -> web.StreamResponse:
        request = Request(
            len(self.requests),
            incoming.method,
            incoming.path,
            dict(incoming.query),
            {name.lower(): value for name, value in incoming.headers.items()},
        )
        self.requests.append(request)
        fault = self.rule(request) or Fault()
        if fault.before:
            await asyncio.to_thread(fault.before)
        if fault.status is not None:
            return _error(fault.status)
        if fault.reset == "before":
            return _reset(incoming)
        if "expect" in request.headers:
            assert incoming.transport is not None
            incoming.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with self._forward(incoming) as answer:
                return await _answer(incoming, answer, fault)
        except (aiohttp.ClientError, ConnectionError):
            # One of the two went away: the other sees the same.
            return _reset(incoming)

    @contextlib.asynccontextmanager
    async def _forward(self, incoming: web.BaseRequest) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = [
            (name, value)
            for name, value in incoming.headers.items()
            if name.lower() not in _HOP_BY_HOP
        ]
        async with self._client.request(
            incoming.method,
            URL(f"{self.upstream}{incoming.raw_path}", encoded=True),
            headers=headers,
            data=incoming.content.iter_chunked(_BLOCK) if incoming.can_read_body else None,
            skip_auto_headers=["User-Agent", "Content-Type", "Accept", "Accept-Encoding"],
            allow_redirects=False,
        ) as answer:
            yield answer


@contextmanager
def s3_proxy(upstream: str, rule: Rule | None = None) -> Iterator[S3Proxy]:
    """A proxy in front of the server at `upstream` (`http://host:port`). `rule` says for each
    request what goes wrong with it, if anything; assign `proxy.rule` to change it."""
    proxy = S3Proxy(upstream, rule)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


async def _answer(
    incoming: web.BaseRequest, answer: aiohttp.ClientResponse, fault: Fault
) -> web.StreamResponse:
    if fault.after:
        await asyncio.to_thread(fault.after)
    if fault.reset == "after":
        await answer.read()
        return _reset(incoming)
    await asyncio.sleep(fault.stall)
    outgoing = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in _HOP_BY_HOP:
            outgoing.headers.add(name, value)
    await outgoing.prepare(incoming)
    passed = 0
    async for block in answer.content.iter_chunked(_BLOCK):
        if fault.cut is not None and passed + len(block) > fault.cut:
            await outgoing.write(block[: fault.cut - passed])
            assert incoming.transport is not None
            incoming.transport.close()
            return outgoing
        await outgoing.write(block)
        passed += len(block)
        if fault.bytes_per_second:
            await asyncio.sleep(len(block) / fault.bytes_per_second)
    await outgoing.write_eof()
    return outgoing


def _error(status: int) -> web.StreamResponse:
    code = _CODES[status]
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{code}</Code><Message>told to</Message></Error>"
    )
    answer = web.Response(status=status, text=body, content_type="application/xml")
    answer.force_close()  # whatever of the request's body was not read
    return answer


def _reset(incoming: web.BaseRequest) -> web.StreamResponse:
    """RST rather than FIN: the client sees "connection reset by peer"."""
    if incoming.transport is not None:
        connection = incoming.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        incoming.transport.abort()
    return web.Response()
