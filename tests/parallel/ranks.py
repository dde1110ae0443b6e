"""Processes that stay, for tests of what several ranks do together.

A test of a layout takes a fraction of a second, starting the processes for it many times that. So
they are forked once from a process that has imported everything, and each run makes a group anew.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from llama_ray.parallel import destroy_mesh

TIMEOUT_SECONDS = 300


class Ranks:
    """ranks(n, function, *args): what function(rank, *args) returned in each of n processes of a
    gloo group, one thread each. The first failure of any ends all."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["llama_ray.parallel", "tests.parallel.layouts"])
        self.workers: list[tuple[Any, Connection]] = []

    def __call__(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        while len(self.workers) < world_size:
            self._start()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            store = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        pipes = [pipe for _, pipe in self.workers[:world_size]]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, world_size, store, function, args))
        try:
            return self._results(pipes)
        except BaseException:
            self.close()  # the others may wait for the one that failed
            raise

    def close(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers.clear()

    def _start(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self.workers.append((process, ours))

    def _results(self, pipes: list[Connection]) -> list[Any]:
        results: dict[Connection, Any] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(results) < len(pipes):
            ready = wait([p for p in pipes if p not in results], deadline - time.monotonic())
            assert ready, f"ranks hang: only {len(results)} of {len(pipes)} have answered"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                failure, results[pipe] = pipe.recv()
                if failure is not None:
                    raise AssertionError(f"rank {pipes.index(pipe)}: {failure}")
        return [results[pipe] for pipe in pipes]


def _serve(pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, store, function, args = pipe.recv()
        except EOFError:
            return
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        try:
            answer = None, function(rank, *args)
        except BaseException:
            pipe.send((traceback.format_exc(), None))
            return
        destroy_mesh()
        dist.destroy_process_group()
        pipe.send(answer)
