"""Run a function in several processes with a gloo group: the shape of every parallel test."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from llama_ray.parallel import destroy_mesh


def run_distributed(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Call `function(rank, *args)` in `world_size` processes; any failure fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(
        _worker, (function, world_size, port, args), nprocs=world_size, start_method="spawn"
    )


def _worker(
    rank: int, function: Callable[..., None], world_size: int, port: int, args: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    try:
        function(rank, *args)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        destroy_mesh()
        dist.destroy_process_group()
