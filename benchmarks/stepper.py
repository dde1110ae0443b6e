"""Training steps in processes of their own, taken when asked for: so that each variant has the
threads, the allocator and the process group that it would have, and can be timed in turn."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llama_ray.train.allocator import KEEP_FREED_MEMORY

# Called once in the process; returns what takes a step.
Build = Callable[[], Callable[[], None]]


class Stepper:
    """One rank, or several in a gloo group, that take a step together when called."""

    def __init__(self, build: Build, threads: int, ranks: int = 1, keep_freed: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.connections: list[Connection] = []
        for rank in range(ranks):
            ours, theirs = mp.Pipe()
            group = (rank, ranks, port) if ranks > 1 else None
            arguments = (theirs, build, threads, group)
            process = mp.get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
            with mock.patch.dict(os.environ, KEEP_FREED_MEMORY if keep_freed else {}):
                process.start()
            self.connections.append(ours)
        self._wait()

    def __call__(self) -> None:
        self._tell("step")
        self._wait()

    def close(self) -> int:
        """End the processes. Returns the peak resident memory of the largest, in bytes."""
        self._tell("end")
        return max(self._wait())

    def _tell(self, what: str) -> None:
        for connection in self.connections:
            connection.send(what)

    def _wait(self) -> list[int]:
        return [connection.recv() for connection in self.connections]


def _serve(*arguments: Any) -> None:
    # In a thread, as Ray Train runs the training function: heaps of threads are not the main one's.
    thread = threading.Thread(target=_take_steps, args=arguments)
    thread.start()
    thread.join()


def _take_steps(
    connection: Connection, build: Build, threads: int, group: tuple[int, int, int] | None
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if group is not None:
        rank, ranks, port = group
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    step = build()
    connection.send(0)
    while connection.recv() == "step":
        step()
        connection.send(0)
    if group is not None:
        dist.destroy_process_group()
    connection.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
