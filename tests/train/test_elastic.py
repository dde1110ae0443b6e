"""Nodes are lost, return and are announced to go: the run goes on with what there is, on the same
tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from llama_ray.storage import Storage
from tests.nodes import Nodes, cluster
from tests.train.driver import Driver
from tests.train.runs import learnable_tokens, losses, records, run_config

STEPS = 300
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": STEPS, "batch_size": 64, "micro_batch_size": 8, "validate_every": STEPS},
    "parallel": {"data": 2, "cpus_per_worker": 1, "resize_seconds": 2},
    "checkpoint": {"every": 20},
}


def whole(storage: Storage, nodes: Nodes, folder: Path) -> dict[int, tuple[float, float]]:
    """Losses of a run that was left in peace."""
    driver = Driver(run_config(storage, "whole", **SECTIONS), folder, nodes.head.address)
    assert driver.end(200) == 0, driver.output
    return losses(storage, "whole")


@pytest.mark.slow
def test_a_run_waits_for_the_node_that_it_lost(tmp_path: Path) -> None:
    storage = learnable_tokens(tmp_path)
    with cluster(0, [1, 1]) as nodes:
        expected = whole(storage, nodes, tmp_path)
        driver = Driver(run_config(storage, "lost", **SECTIONS), tmp_path, nodes.head.address)
        driver.wait_for_step(45)
        nodes.kill_node(1)
        driver.wait_for(r"rank \d failed: its process or its node is gone")
        driver.wait_for("waiting for CPUs")
        nodes.add_node(1)
        assert driver.end(200) == 0, driver.output
    assert "resuming from the checkpoint of step" in driver.output
    assert losses(storage, "lost") == expected


@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_cluster(tmp_path: Path) -> None:
    storage = learnable_tokens(tmp_path)
    with cluster(0, [1, 1]) as nodes:
        expected = whole(storage, nodes, tmp_path)
        sections = SECTIONS | {"parallel": SECTIONS["parallel"] | {"min_data": 1}}
        driver = Driver(run_config(storage, "elastic", **sections), tmp_path, nodes.head.address)
        driver.wait_for("starting on 2 ranks")
        driver.wait_for_step(45)
        nodes.kill_node(1)
        driver.wait_for(r"rank \d failed: its process or its node is gone")
        driver.wait_for(r"resuming from the checkpoint of step (\d+) on 1 ranks")
        nodes.add_node(1)
        grown = driver.wait_for(r"saved at step (\d+); the workers are started anew")
        at = len(driver.lines)
        resumed = driver.wait_for(r"resuming from the checkpoint of step (\d+) on 2 ranks")
        assert resumed[1] == grown[1]  # to grow, no step is done twice
        driver.wait_for_step(int(resumed[1]) + 3, after=at)
        nodes.drain_node(2, deadline_seconds=60)
        left = driver.wait_for(r"saved at step (\d+); the workers are started anew", after=at)
        again = driver.wait_for(r"resuming from the checkpoint of step (\d+) on 1 ranks", after=at)
        assert again[1] == left[1]
        assert driver.end(200) == 0, driver.output
        assert not re.search(r"rank \d failed", "\n".join(driver.lines[at:]))

    assert [len(r["places"]) for r in records(storage, "elastic", "start")] == [2, 1, 2, 1]
    got = losses(storage, "elastic")
    assert got.keys() == expected.keys()
    for step in expected:
        assert got[step] == pytest.approx(expected[step], rel=2e-4), step
