"""Runs that are interrupted in every way come out bitwise as one that was not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.checkpoint.reader import Checkpoint
from llama_ray.checkpoint.store import CheckpointStore, resolve
from llama_ray.config import PretrainConfig, StorageConfig
from llama_ray.local import Head
from llama_ray.storage import Storage
from tests.s3 import BUCKET, S3Server
from tests.s3_proxy import SLOW_DOWN, s3_proxy
from tests.train.driver import Driver
from tests.train.runs import learnable_tokens, losses, records, run_config


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return learnable_tokens(tmp_path_factory.mktemp("failures"))


@pytest.fixture
def start(ray_head: Head, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts drivers, and ends those that are left."""
    drivers: list[Driver] = []

    def start(config: PretrainConfig, env: dict[str, str] | None = None) -> Driver:
        drivers.append(Driver(config, tmp_path, ray_head.address, env))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.process.kill()


@pytest.fixture(scope="module")
def reference(ray_head: Head, storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a run that was left in peace."""
    folder = tmp_path_factory.mktemp("reference")
    driver = Driver(run_config(storage, "reference"), folder, ray_head.address)
    assert driver.end() == 0, driver.output
    return "reference"


def weights(storage: Storage, run: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(storage, resolve(storage, f"runs/{run}"))
    return {name: checkpoint.read_weight(name) for name in checkpoint.weights}


def assert_same(storage: Storage, run: str, reference: str) -> None:
    assert losses(storage, run) == losses(storage, reference)
    assert len(losses(storage, run)) == 40
    expected = weights(storage, reference)
    for name, weight in weights(storage, run).items():
        assert torch.equal(weight, expected[name]), name


def worker_pids(driver: Driver, storage: Storage, run: str) -> list[int]:
    """Of the ranks that train now, by rank."""
    # Written with the first checkpoint of these workers.
    places = records(storage, run, "start")[-1]["places"]
    return [int(re.search(r"pid (\d+)", place)[1]) for place in places]  # type: ignore[index]


def test_a_worker_is_killed(start: Callable[..., Driver], storage: Storage, reference: str) -> None:
    driver = start(run_config(storage, "killed"))
    driver.wait_for_step(12)
    os.kill(worker_pids(driver, storage, "killed")[1], signal.SIGKILL)
    assert driver.end() == 0, driver.output
    assert re.search(r"rank 1 failed: its process or its node is gone", driver.output)
    resumed = int(re.search(r"resuming from the checkpoint of step (\d+)", driver.output)[1])  # type: ignore[index]
    assert resumed >= 8
    assert_same(storage, "killed", reference)


@pytest.mark.slow
def test_the_driver_is_killed_and_the_job_submitted_again(
    start: Callable[..., Driver], storage: Storage, reference: str
) -> None:
    config = run_config(storage, "driverless")
    driver = start(config)
    driver.wait_for_step(12)
    driver.send(signal.SIGKILL)
    again = start(config)  # at once: the first one's workers are still there
    assert again.end() == 0, again.output
    assert "resuming from the checkpoint of step" in again.output
    assert_same(storage, "driverless", reference)


@pytest.mark.slow
def test_one_name_is_for_one_job_at_a_time(start: Callable[..., Driver], storage: Storage) -> None:
    config = run_config(storage, "twice", train={"steps": 4000})
    first = start(config)
    first.wait_for_step(2)
    second = start(config)
    assert second.end() == 1
    assert "error: name: 'twice' is being trained by another job" in second.lines[-1]
    assert first.process.poll() is None


@pytest.mark.slow
def test_sigterm_saves_and_leaves(
    start: Callable[..., Driver], storage: Storage, reference: str
) -> None:
    config = run_config(storage, "stopped")
    driver = start(config)
    driver.wait_for_step(11)
    driver.send(signal.SIGTERM)
    assert driver.end() == 128 + signal.SIGTERM, driver.output
    stopped = int(
        re.search(r"stopped: saved at step (\d+); submit the job again", driver.output)[1]
    )  # type: ignore[index]
    assert CheckpointStore(storage, "stopped").committed_steps()[-1] == stopped
    again = start(config)
    assert again.end() == 0, again.output
    assert f"resuming from the checkpoint of step {stopped} " in again.output
    assert_same(storage, "stopped", reference)


@pytest.mark.slow
def test_a_worker_that_gets_sigterm_saves_and_leaves(
    start: Callable[..., Driver], storage: Storage, reference: str
) -> None:
    driver = start(run_config(storage, "asked"))
    driver.wait_for_step(12)
    os.kill(worker_pids(driver, storage, "asked")[1], signal.SIGTERM)
    assert driver.end() == 0, driver.output
    left = int(re.search(r"saved at step (\d+); the workers are started anew", driver.output)[1])  # type: ignore[index]
    assert f"resuming from the checkpoint of step {left} " in driver.output
    # No step was done twice.
    steps = [line.split()[0] for line in driver.lines if re.match(r" +\d+ +\d", line)]
    assert len(steps) == len(set(steps))
    assert_same(storage, "asked", reference)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(
    start: Callable[..., Driver], storage: Storage, reference: str
) -> None:
    driver = start(run_config(storage, "hung", failures={"hang_seconds": 10}))
    driver.wait_for_step(12)
    pid = worker_pids(driver, storage, "hung")[1]
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    found = driver.wait_for(r"rank 1 \(.*\) holds up \w+ #\d+ of \w+ \[0, 1\]: .*stopped, dead")
    assert f"pid {pid}" in found[0]
    assert time.monotonic() - began < 20
    assert driver.end() == 0, driver.output
    assert_same(storage, "hung", reference)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nothing listens", "503"])
def test_storage_that_is_down_for_a_while_is_waited_for(
    start: Callable[..., Driver],
    storage: Storage,
    reference: str,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """While checkpoints are due and tokens are read."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    run = f"outage-{len(how)}"
    with s3_proxy(s3.endpoint_url) as proxy:
        remote = Storage(StorageConfig(url=f"s3://{BUCKET}/{run}", endpoint_url=proxy.endpoint_url))
        learnable_tokens(remote)
        windows = {"window_steps": 4, "prefetch_windows": 2}
        driver = start(run_config(remote, run, data=windows), s3.env)
        driver.wait_for_step(12)
        if how == "503":
            proxy.rule = lambda request: SLOW_DOWN
            time.sleep(8)
            proxy.rule = lambda request: None
        else:
            with proxy.down():
                time.sleep(8)
        assert driver.end() == 0, driver.output
        assert "failed" not in driver.output
        assert losses(remote, run) == losses(storage, reference)
        assert CheckpointStore(remote, run).committed_steps() == [24, 32, 40]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(
    start: Callable[..., Driver], storage: Storage, reference: str, small_disk: Path
) -> None:
    small = learnable_tokens(small_disk)
    config = run_config(small, "full")
    driver = start(config)
    driver.wait_for_step(10)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    assert driver.end() == 1
    assert re.search(r"error: storage\.url: .*no space left", driver.lines[-1])
    committed = CheckpointStore(small, "full").committed_steps()
    assert committed
    ballast.unlink()
    again = start(config)
    assert again.end() == 0, again.output
    assert f"resuming from the checkpoint of step {committed[-1]} " in again.output
    expected, got = weights(storage, reference), weights(small, "full")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_run_that_diverges_stops_and_names_the_samples(
    start: Callable[..., Driver], storage: Storage
) -> None:
    broken: dict[str, Any] = {"lr": 1e30, "warmup_steps": 1, "max_skipped": 3}
    driver = start(run_config(storage, "diverged", optimizer=broken, train={"log_every": 4}))
    assert driver.end() == 1
    assert re.search(
        r"error: optimizer.max_skipped: 3 steps in a row.*batches \d+ to \d+ \(samples .*"
        r"data\.skip_steps=\[\[\d+, \d+\]\]",
        driver.lines[-1],
    )
    assert "failed" in driver.output
    assert "resuming" not in driver.output  # what the user has to put right is not tried again
