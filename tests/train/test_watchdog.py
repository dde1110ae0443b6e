"""Runs of four processes that come to a standstill: the rank that is to blame is named in time."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from llama_ray.config.storage import StorageConfig
from llama_ray.parallel.mesh import init_mesh
from llama_ray.storage import Storage
from llama_ray.train.collectives import set_timeouts
from llama_ray.train.verdict import verdict
from llama_ray.train.watchdog import Watchdog
from tests.conftest import free_port

TIMEOUT = 2.0  # of the collectives, in seconds
Fault = Callable[..., None]


@dataclass
class Run:
    """What came from the ranks: reports, and the errors that ended them, each with its time."""

    places: list[str]
    reports: list[dict[str, Any]] = field(default_factory=list)
    reported_at: list[float] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)

    def verdict(self, event: str = "stall") -> str:
        return verdict([r for r in self.reports if r["event"] == event], self.places)


def run(fault: Fault, *args: Any, without_end: int | None = None) -> Run:
    """Three steps of four ranks, in the last of which each calls fault(rank, mesh, *args). Until
    all have ended but the rank `without_end`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama_ray.parallel", "llama_ray.train.watchdog"])
    store = f"tcp://127.0.0.1:{free_port()}"
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in range(4):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, store, theirs, fault, args))
        process.start()
        theirs.close()
        pipes[ours] = rank
        processes.append(process)
    result = Run([f"node 10.0.0.{rank}, pid {p.pid}" for rank, p in enumerate(processes)])
    try:
        deadline = time.monotonic() + 60
        while set(pipes.values()) - {without_end}:
            ready = wait(list(pipes), deadline - time.monotonic())
            assert ready, f"only {result.ended_at} have ended"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                _receive(result, pipe, pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return result


def _receive(result: Run, pipe: Connection, pipes: dict[Connection, int]) -> None:
    rank = pipes[pipe]
    try:
        message = pipe.recv()
    except EOFError:
        del pipes[pipe]
        return
    if isinstance(message, dict):
        result.reports.append(message)
        result.reported_at.append(time.monotonic())
    else:
        result.errors[rank] = message
        result.ended_at[rank] = time.monotonic()


def _rank(rank: int, store: str, pipe: Connection, fault: Fault, args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=4)
    mesh = init_mesh(2, 2, "cpu")
    set_timeouts(TIMEOUT)
    watchdog = Watchdog(rank, TIMEOUT, pipe.send)
    try:
        for step in range(3):
            watchdog.beat(step, "data")
            if step == 2:
                fault(rank, mesh, *args)
            watchdog.beat(step, "train")
            one_step(mesh)
        watchdog.close()
    except RuntimeError as error:
        watchdog.close()
        if event := watchdog.describe_failure(error):
            pipe.send(event)
        pipe.send(str(error))
        # Its connections stay while the others look at theirs, as a Ray worker's do.
        time.sleep(TIMEOUT / 4)


def one_step(mesh: DeviceMesh) -> None:
    group = mesh.get_group("tp")
    dist.broadcast(torch.ones(4), dist.get_global_rank(group, 0), group)
    dist.all_reduce(torch.ones(4), group=group)
    dist.all_reduce(torch.ones(4), group=mesh.get_group("dp"))
    dist.all_reduce(torch.ones(4))


def read_what_never_comes(rank: int, mesh: DeviceMesh, folder: Path) -> None:
    """Meanwhile three ranks have finished an upload, and wait for the fourth's."""
    uploads = dist.new_group(group_desc="checkpoint")
    if rank != 0:
        threading.Thread(target=dist.barrier, args=(uploads,), daemon=True).start()
    if rank == 3:
        Storage(StorageConfig(url=f"file://{folder}")).read("pipe")  # nobody writes into it


def test_a_rank_that_waits_for_data_is_named_with_where_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = run(read_what_never_comes, tmp_path, without_end=3)
    assert re.fullmatch(
        r"rank 3 \(node 10.0.0.3, pid \d+\) holds up "
        r"(all_reduce #3 of dp \[1, 3\]|broadcast #5 of tp \[2, 3\]): "
        r"it has been in Storage.read.<locals>.read \(storage.py:\d+\) for 2 s "
        r"\(step 2, data\)",
        result.verdict(),
    )
    stalls = [report for report in result.reports if report["event"] == "stall"]
    assert sorted(report["rank"] for report in stalls) == [0, 1, 2, 3]
    assert set(result.ended_at) == {0, 1, 2}  # by the timeout
    assert max(result.reported_at[:4]) < min(result.ended_at.values())
    # Those that wait are seen to wait from what their timeouts say too.
    assert "no report from there" in result.verdict("failure")
    assert "rank 3" in result.verdict("failure")


def stop_rank_1(rank: int, mesh: DeviceMesh) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_named_by_the_others() -> None:
    result = run(stop_rank_1, without_end=1)
    assert re.fullmatch(
        r"rank 1 \(node 10.0.0.1, pid \d+\) holds up "
        r"(all_reduce #3 of dp \[1, 3\]|broadcast #5 of tp \[0, 1\]): "
        r"no report from there: stopped, dead, or the node cannot be reached",
        result.verdict(),
    )


def kill_rank_3(rank: int, mesh: DeviceMesh) -> None:
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_rank_is_named_by_what_the_others_collectives_raise() -> None:
    result = run(kill_rank_3, without_end=3)
    assert re.match(r"rank 3 .* no report from there: stopped, dead", result.verdict("failure"))


def another_operation(rank: int, mesh: DeviceMesh) -> None:
    if rank == 3:
        dist.barrier()
    else:
        dist.all_reduce(torch.ones(5, 2))


@pytest.mark.slow
def test_a_rank_in_another_operation_is_named_with_both() -> None:
    assert re.fullmatch(
        r"ranks differ in collective #3 of world \[0, 1, 2, 3\]: barrier on rank 3 \(.*\), now in "
        r"barrier \(.*\); all_reduce of 5 × 2 on ranks 0 \(.*\), 1 \(.*\), 2 \(.*\), now in "
        r"all_reduce \(.*\)",
        run(another_operation).verdict(),
    )


def another_size(rank: int, mesh: DeviceMesh) -> None:
    dist.all_reduce(torch.ones(3 if rank == 3 else 5))


@pytest.mark.slow
def test_a_rank_with_tensors_of_another_size_is_named_with_both() -> None:
    assert re.match(
        r"ranks differ in collective #3 of world .*: all_reduce of 3 on rank 3 \(.*"
        r"; all_reduce of 5 on ranks 0 \(",
        run(another_size).verdict(),
    )


def another_order(rank: int, mesh: DeviceMesh) -> None:
    for axis in ("tp", "dp") if rank in (0, 3) else ("dp", "tp"):
        dist.all_reduce(torch.ones(7), group=mesh.get_group(axis))


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_in_different_groups_are_named() -> None:
    assert re.fullmatch(
        r"ranks wait for each other: "
        r"rank 0 \(.*\) for 1 in all_reduce #5 of tp \[0, 1\] at all_reduce \(.*\); "
        r"rank 1 \(.*\) for 3 in all_reduce #3 of dp \[1, 3\] at .*; "
        r"rank 3 \(.*\) for 2 in all_reduce #5 of tp \[2, 3\] at .*; "
        r"rank 2 \(.*\) for 0 in all_reduce #3 of dp \[0, 2\] at .*",
        run(another_order).verdict(),
    )


def slow(rank: int, mesh: DeviceMesh) -> None:
    """Nothing but collectives for longer than the timeout; then one rank works for long."""
    for _ in range(12):
        time.sleep(TIMEOUT / 8)
        dist.all_reduce(torch.ones(4))
    time.sleep(0.5 * TIMEOUT * (rank == 2))


@pytest.mark.slow
def test_a_slow_run_that_moves_is_left_in_peace() -> None:
    result = run(slow)
    assert not result.reports
    assert not result.errors


def raise_in_python(rank: int, mesh: DeviceMesh) -> None:
    raise RuntimeError("not a collective")


def test_errors_that_no_collective_raised_are_not_reported() -> None:
    result = run(raise_in_python)
    assert not result.reports
    assert set(result.errors.values()) == {"not a collective"}
