"""After which step all ranks leave, and which checkpoints all of them know to be committed: agreed
on in every step, by one small reduction that runs while the step is computed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from llama_ray.train.board import Order


class Leaving(Exception):  # noqa: N818 – no error: the checkpoint is saved
    """Raised by every rank once it has left; Ray Train restarts the run elsewhere."""


_terminated = threading.Event()


def catch_sigterm() -> None:
    """To be called on a worker's main thread, which alone may: from here on the first SIGTERM asks
    for a checkpoint, the second ends the process as Ray would have."""
    before: Any = signal.getsignal(signal.SIGTERM)

    def handle(signum: int, frame: Any) -> None:
        if _terminated.is_set():
            before(signum, frame)
        _terminated.set()

    signal.signal(signal.SIGTERM, handle)


def wished_here() -> Order:
    """What this process alone knows of: its SIGTERM, or that its node is to be taken away."""
    # What ray.train.get_preemption_info returns, without its barrier over all workers.
    preempted = get_train_context().preemption_context.preemption_info is not None
    return Order.RESTART if preempted or _terminated.is_set() else Order.GO_ON


class Control:
    """One rank's part of the agreement."""

    def __init__(self, wish: Callable[[], Order]) -> None:
        self.wish = wish
        self.group = dist.new_group(backend="gloo", group_desc="control")

    def begin(self, committed: int) -> None:
        """committed: checkpoints that this rank knows to be committed."""
        self.values = torch.tensor([self.wish(), -committed])
        self.work = dist.all_reduce(
            self.values, op=dist.ReduceOp.MAX, group=self.group, async_op=True
        )

    def agree(self) -> tuple[Order, int]:
        """The greatest wish of any rank; how many checkpoints every rank knows to be committed."""
        self.work.wait()
        order, committed = self.values.tolist()
        return Order(order), -committed
