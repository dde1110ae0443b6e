"""The clusters of `tests/nodes.py`: nodes are lost, added and drained as real ones are."""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import ray

from llama_ray.local import connect
from llama_ray.train.watchdog import place
from tests.nodes import cluster


def drive(address: str, pipe: Connection) -> None:
    """For each (node, file, seconds) received, run a task there that makes the file and takes so
    long; sends the id of the node it ran on and what that node calls itself in reports."""
    os.environ["RAY_ADDRESS"] = address
    connect()

    @ray.remote(num_cpus=1)
    def work(file: Path, seconds: float) -> tuple[str, str]:
        file.touch()
        time.sleep(seconds)
        return str(ray.get_runtime_context().get_node_id()), place()

    while message := pipe.recv():
        number, *arguments = message
        pipe.send(ray.get(work.options(resources={f"node_{number}": 1}).remote(*arguments)))


@pytest.mark.slow
def test_tasks_run_on_nodes_that_are_there(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with cluster(1, [1, 1]) as nodes:
        driver = context.Process(target=drive, args=(nodes.head.address, theirs), daemon=True)
        driver.start()
        ours.send((1, tmp_path / "first", 0))
        node, where = ours.recv()
        assert node == nodes.node_id(1)
        assert re.fullmatch(r"node 127\.0\.0\.1, pid \d+", where)

        nodes.kill_node(1)
        nodes.wait_until(lambda: not nodes.is_alive(1), "Ray has noticed")
        ours.send((2, tmp_path / "second", 0))  # waits for a node that is not there yet
        assert not ours.poll(0.5)
        assert nodes.add_node(1) == 2
        assert ours.recv()[0] == nodes.node_id(2)

        ours.send((0, tmp_path / "third", 2))
        nodes.wait_until((tmp_path / "third").exists, "the task runs")
        drained = nodes.node_id(0)
        nodes.drain_node(0, deadline_seconds=60)
        assert nodes.is_draining(0)
        assert ours.recv()[0] == drained  # what runs goes on
        nodes.wait_until(lambda: not nodes.is_alive(0), "the node has left")
        ours.send(None)
        driver.join()
