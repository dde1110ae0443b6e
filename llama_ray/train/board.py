"""What driver, controller and workers tell each other: events one way, orders the other."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from contextlib import suppress
from enum import IntEnum
from typing import Any

import ray
import torch.distributed as dist

from llama_ray.config.pretrain import PretrainConfig
from llama_ray.errors import UserError

NAMESPACE = "llama_ray"
# A driver that was killed takes a while to disappear, and its board with it.
RELEASE_SECONDS = 30
# Workers ask for orders this often.
POLL_SECONDS = 0.5

Event = dict[str, Any]


class Order(IntEnum):
    """What workers are asked to do after the step at hand. The greater prevails."""

    GO_ON = 0
    RESTART = 1
    """Save and leave; the run goes on with other workers."""
    STOP = 2
    """Save and end the run."""


@ray.remote(num_cpus=0)
class Board:
    """One a run. It ends with the driver, whose job owns it; its name, which no second actor can
    have, is what keeps a run from being trained twice at a time."""

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.arrived = asyncio.Event()
        self.order = Order.GO_ON

    async def put(self, events: list[Event]) -> Order:
        """Returns what is asked of the workers."""
        self.events += events
        self.arrived.set()
        if any(event["event"] == "start" for event in events) and self.order is Order.RESTART:
            self.order = Order.GO_ON  # obeyed
        return self.order

    async def take(self, timeout: float) -> list[Event]:
        """All that has arrived; waits for the first."""
        if not self.events:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.arrived.wait(), timeout)
        events = list(self.events)
        self.events.clear()
        self.arrived.clear()
        return events

    async def ask(self, order: Order) -> None:
        self.order = max(self.order, order)


def open_board(config: PretrainConfig) -> Any:
    """The handle of a run's board. Raises `UserError` where another job has it."""
    name = f"{config.storage.url}/runs/{config.name}"
    node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    deadline = time.monotonic() + RELEASE_SECONDS
    while True:
        try:
            return Board.options(  # type: ignore[attr-defined]
                name=name, namespace=NAMESPACE, scheduling_strategy=node
            ).remote()
        except ValueError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"name: {config.name!r} is being trained by another job; wait for it, stop it "
                    "(ray job stop), or choose another name"
                ) from None
            time.sleep(0.5)


class Reporter:
    """A worker's end of the board: a thread, so that training never waits for it. Rank 0's asks for
    orders; what any of them knows all do, by `control.Control`."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.asks = dist.get_rank() == 0
        self.order = Order.GO_ON
        self.outgoing: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self.thread.start()

    def put(self, event: Event) -> None:
        self.outgoing.put(event | {"time": time.time()})

    def close(self) -> None:
        """Until all is delivered."""
        self.outgoing.put(None)
        self.thread.join()

    def _run(self) -> None:
        while True:
            try:
                event = self.outgoing.get(timeout=POLL_SECONDS)
            except queue.Empty:
                events: list[Event] = []
            else:
                if event is None:
                    return
                events = [event]
            if not events and not self.asks:
                continue
            self.order = ray.get(self.board.put.remote(events))
