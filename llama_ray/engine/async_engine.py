"""The engine for an event loop: its steps run in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from llama_ray.engine.engine import Engine
from llama_ray.engine.sequence import Request, Sequence, TokenDelta
from llama_ray.errors import UserError


class EngineOverloadedError(RuntimeError):
    """As many requests wait as may wait: try again later."""


class EngineStoppedError(RuntimeError):
    """The engine's thread has ended; its cause is this error's."""


@dataclass(eq=False, frozen=True, slots=True)
class _Client:
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[list[TokenDelta] | EngineStoppedError]


class AsyncEngine:
    def __init__(self, engine: Engine, max_queued_requests: int) -> None:
        self.engine = engine
        self._capacity = engine.scheduler.max_batch_size + max_queued_requests
        self._clients: dict[str, _Client] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, *requests: Request) -> AsyncGenerator[TokenDelta]:
        """Tokens of all `requests` as they come; leaving the iterator (`aclose`) cancels what is
        not over.

        All requests are taken on or none. Raises, before the first token, `UserError` for a bad
        request and `EngineOverloadedError` where the queue is full; `EngineStoppedError` any time.
        """
        client = _Client(asyncio.get_running_loop(), asyncio.Queue())
        unfinished: set[str] = set()
        try:
            # In a thread: a long prompt takes a while to encode, and others wait for the loop.
            sequences = await asyncio.to_thread(lambda: [self.engine.prepare(r) for r in requests])
            self._submit(sequences, client)
            unfinished = {request.id for request in requests}
            while unfinished:
                deltas = await client.queue.get()
                if isinstance(deltas, EngineStoppedError):
                    raise deltas
                for delta in deltas:
                    if delta.finish_reason:
                        unfinished.discard(delta.request_id)
                    yield delta
        finally:
            self._abandon(unfinished)

    def check_alive(self) -> None:
        """Raises `EngineStoppedError` where no request can be answered any more."""
        if not self._thread.is_alive():
            raise EngineStoppedError("the engine has stopped") from self._failure

    def stop(self) -> None:
        """End the thread after the step it is in."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _submit(self, sequences: list[Sequence], client: _Client) -> None:
        with self._changed:
            self.check_alive()
            if len(sequences) > self._capacity:
                raise UserError(f"prompt: at most {self._capacity} prompts in one request")
            if self.engine.n_unfinished + len(sequences) > self._capacity:
                raise EngineOverloadedError(
                    f"{self.engine.n_unfinished} requests are running or waiting, of at most "
                    f"{self._capacity}"
                )
            for seq in sequences:
                # Known before it is submitted, or its first token might find no taker.
                self._clients[seq.id] = client
                self.engine.submit(seq)
            self._changed.notify()

    def _abandon(self, request_ids: set[str]) -> None:
        with self._changed:
            for request_id in request_ids:
                self._clients.pop(request_id, None)
                self.engine.cancel(request_id)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self.engine.n_unfinished)
                    if self._stopped:
                        break
                self._publish(self.engine.step())
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._close()

    def _publish(self, deltas: list[TokenDelta]) -> None:
        """One message a client and step, however many requests it has."""
        by_client: dict[_Client, list[TokenDelta]] = defaultdict(list)
        with self._changed:
            for delta in deltas:
                pop = self._clients.pop if delta.finish_reason else self._clients.get
                if client := pop(delta.request_id, None):
                    by_client[client].append(delta)
        for client, own in by_client.items():
            _post(client, own)

    def _close(self) -> None:
        with self._changed:
            clients, self._clients = set(self._clients.values()), {}
        for client in clients:
            error = EngineStoppedError("the engine has stopped")
            error.__cause__ = self._failure
            _post(client, error)


def _post(client: _Client, message: list[TokenDelta] | EngineStoppedError) -> None:
    # A loop that was closed has no one left to tell.
    if not client.loop.is_closed():
        client.loop.call_soon_threadsafe(client.queue.put_nowait, message)
