"""Training steps in processes of their own, taken when asked for: so that each variant has the
threads, the allocator and the process group that it would have, and can be timed in turn."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llama_ray.train.allocator import keep_freed_memory

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
            arguments = (theirs, build, threads, group, keep_freed)
            mp.get_context("spawn").Process(target=_serve, args=arguments, daemon=True).start()
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


def _serve(
    connection: Connection,
    build: Build,
    threads: int,
    group: tuple[int, int, int] | None,
    keep_freed: bool,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep_freed:
        keep_freed_memory()
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
