"""Processes to kill. They are forked from one that has imported everything and done nothing else,
so that starting them takes next to no time."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from llama_ray.parallel import destroy_mesh

MODULES = ["tests.checkpoint.saving", "s3fs", "aiobotocore.session"]


class Nursery:
    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_nurse, args=(theirs,))
        self.process.start()
        theirs.close()
        self.pids: list[int] = []

    def run(self, n: int, function: Callable[..., Any], *args: Any) -> list[int]:
        """Call `function(rank, *args)` in n new processes of a gloo group; their exit codes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.pipe.send((n, address, function, args))
        self.pids = self.pipe.recv()
        self.pipe.send("go")
        assert self.pipe.poll(120), "processes hang"
        codes: list[int] = self.pipe.recv()
        return codes

    def kill(self) -> None:
        """All at once, from any thread."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _nurse(pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for module in MODULES:
        importlib.import_module(module)
    fork = multiprocessing.get_context("fork")
    while True:
        try:
            n, address, function, args = pipe.recv()
        except EOFError:
            return
        go = fork.Event()
        children = [
            fork.Process(target=_child, args=(rank, n, address, go, function, args))
            for rank in range(n)
        ]
        for child in children:
            child.start()
        pipe.send([child.pid for child in children])
        pipe.recv()
        go.set()
        for child in children:
            child.join()
        pipe.send([child.exitcode for child in children])


def _child(
    rank: int, n: int, address: str, go: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    go.wait()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=n)
    try:
        function(rank, *args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    destroy_mesh()
    dist.destroy_process_group()
