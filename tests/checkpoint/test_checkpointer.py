"""Saving in the background: what is saved, what waits for what, and who wins."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from llama_ray.checkpoint import writer
from llama_ray.checkpoint.checkpointer import SaveError
from llama_ray.checkpoint.sharded import load_sharded
from llama_ray.checkpoint.store import CheckpointStore, read_info
from llama_ray.config import StorageConfig
from llama_ray.errors import UserError
from llama_ray.storage import Storage
from tests.checkpoint.saving import checkpointer, info, with_env
from tests.parallel.ranks import Ranks
from tests.s3 import BUCKET, S3Server
from tests.s3_proxy import LOST_ANSWER, RESET, SLOW_DOWN, Fault, Request, s3_proxy


def state_of(value: float, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((size,), value)}, "exp_avg": {"w": torch.zeros(size)}}


class Gate:
    """Uploads that wait until they are let go."""

    def __init__(self) -> None:
        self.open, self.upload = threading.Event(), writer.upload
        self.started = 0

    def __enter__(self) -> Gate:
        self.patch = mock.patch.object(writer, "upload", self)
        self.patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.open.set()
        self.patch.stop()

    def __call__(self, *args: object, **named: object) -> None:
        self.started += 1
        assert self.open.wait(60)
        self.upload(*args, **named)  # type: ignore[arg-type]


def loaded(config: StorageConfig, step: int) -> float:
    store, state = CheckpointStore(Storage(config), "run"), state_of(0.0)
    load_sharded(store.storage, store.path(step), state)
    values = state["model"]["w"].unique()
    assert len(values) == 1
    return values.item()


def update_meanwhile(rank: int, config: StorageConfig) -> None:
    saver, state = checkpointer(config), state_of(1.0, 1_000_000)
    for step in range(1, 4):
        with Gate() as gate:
            saver.save(state, info(step))
            saver.before_update()
            for tensor in state["model"].values():
                tensor += 1
            assert saver.committed == step - 1
            gate.open.set()
            saver.wait()
        assert saver.committed == step
    saver.close()


def test_what_is_saved_is_what_it_was_at_the_save(ranks: Ranks, tmp_path: Path) -> None:
    config = StorageConfig(url=f"file://{tmp_path}")
    ranks(1, update_meanwhile, config)
    for step in (1, 2, 3):
        store, state = CheckpointStore(Storage(config), "run"), state_of(0.0, 1_000_000)
        load_sharded(store.storage, store.path(step), state)
        assert (state["model"]["w"] == step).all()


def several_in_flight(rank: int, config: StorageConfig, limit: int) -> None:
    saver = checkpointer(config, keep=9, max_in_flight=limit)
    with Gate() as gate:
        for step in range(1, limit + 1):
            start = time.perf_counter()
            saver.save(state_of(float(step)), info(step))
            saver.before_update()
            assert time.perf_counter() - start < 5
        assert saver.committed == 0
        threading.Timer(1.0, gate.open.set).start()
        start = time.perf_counter()
        saver.save(state_of(9.0), info(9))  # one too many: waits for the first
        assert time.perf_counter() - start > 0.8
        assert saver.committed >= 1
        assert saver.blocked_seconds > 0.8
    saver.close()


@pytest.mark.parametrize("limit", [1, 3])
def test_never_more_in_flight_than_configured(ranks: Ranks, tmp_path: Path, limit: int) -> None:
    config = StorageConfig(url=f"file://{tmp_path}")
    ranks(1, several_in_flight, config, limit)
    steps = [*range(1, limit + 1), 9]
    assert CheckpointStore(Storage(config), "run").committed_steps() == steps
    assert [loaded(config, step) for step in steps] == steps


def two_starts(rank: int, config: StorageConfig) -> str:
    """One is taken for dead and goes on writing the same step."""
    first, second = checkpointer(config), checkpointer(config)
    with Gate() as gate:
        first.save(state_of(1.0), info(5))
        while not gate.started:
            time.sleep(0.01)
        with mock.patch.object(writer, "upload", gate.upload):
            second.save(state_of(2.0), info(5))
            second.close()
        gate.open.set()
        with pytest.raises(SaveError) as raised:
            first.close()
    return str(raised.value)


def test_of_two_starts_that_save_a_step_one_wins_whole(ranks: Ranks, tmp_path: Path) -> None:
    config = StorageConfig(url=f"file://{tmp_path}")
    (message,) = ranks(1, two_starts, config)
    assert "step-00000005 was committed by another start of this run" in message
    store = CheckpointStore(Storage(config), "run")
    assert loaded(config, 5) == 2.0
    removed = store.clean_up()
    # What the other left.
    assert {name.split(".")[0].rpartition("/")[2] for name in removed} == {
        "weights-00000", "optimizer-00000", "index"
    }  # fmt: skip
    assert loaded(config, 5) == 2.0
    read_info(store.storage, store.path(5))


def cleared_away(rank: int, config: StorageConfig) -> str:
    """Taken for dead, and what it wrote removed, while it is at it."""
    saver = checkpointer(config)
    commit = CheckpointStore.commit

    def clear_and_commit(store: CheckpointStore, *args: object) -> None:
        CheckpointStore(store.storage, "run").clean_up()
        commit(store, *args)  # type: ignore[arg-type]

    with mock.patch.object(CheckpointStore, "commit", clear_and_commit):
        saver.save(state_of(1.0), info(5))
        with pytest.raises(UserError) as raised:
            saver.close()
    return str(raised.value)


def test_what_was_cleared_away_is_not_committed(ranks: Ranks, tmp_path: Path) -> None:
    config = StorageConfig(url=f"file://{tmp_path}")
    (message,) = ranks(1, cleared_away, config)
    assert "safetensors is missing" in message
    assert CheckpointStore(Storage(config), "run").committed_steps() == []


def lost_answer(rank: int, config: StorageConfig) -> None:
    """The marker is written, but its writer is told that there already was one."""
    from llama_ray.checkpoint import store

    def put(*args: object) -> bool:
        assert store_put(*args)  # type: ignore[arg-type]
        return False

    store_put = store.put_if_absent
    with mock.patch.object(store, "put_if_absent", put):
        saver = checkpointer(config)
        saver.save(state_of(1.0), info(5))
        saver.close()
        assert saver.committed == 1


def test_a_marker_whose_answer_was_lost_is_ours(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, lost_answer, StorageConfig(url=f"file://{tmp_path}"))


def fill_disk(rank: int, config: StorageConfig) -> str:
    saver = checkpointer(config)
    saver.save(state_of(1.0, 500_000), info(1))
    saver.wait()
    saver.save(state_of(2.0, 1_000_000), info(2))
    with pytest.raises(UserError) as raised:
        saver.close()
    return str(raised.value)


def test_a_full_disk_is_told_and_hides_nothing(ranks: Ranks, small_disk: Path) -> None:
    config = StorageConfig(url=f"file://{small_disk}")
    (message,) = ranks(1, fill_disk, config)
    assert f"storage.url: file://{small_disk}: no space left" in message
    store, state = CheckpointStore(Storage(config), "run"), state_of(0.0, 500_000)
    store.clean_up()
    assert store.committed_steps() == [1]
    load_sharded(store.storage, store.path(1), state)
    assert (state["model"]["w"] == 1).all()


def save_in_trouble(rank: int, config: StorageConfig, deadline: float) -> str | None:
    saver = checkpointer(config, deadline_seconds=deadline)
    started = time.monotonic()
    saver.save(state_of(1.0), info(1))
    try:
        saver.close()
    except UserError as error:
        assert time.monotonic() - started < deadline + 20
        return str(error)
    return None


def test_storage_may_be_away_for_a_while(s3: S3Server, ranks: Ranks, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    failing = itertools.count()

    def rule(request: Request) -> Fault | None:
        fault = (SLOW_DOWN, RESET, LOST_ANSWER)[len(request.path) % 3]
        return fault if next(failing) % 3 != 2 else None

    with s3_proxy(s3.endpoint_url, rule) as proxy:
        config = StorageConfig(url=url, endpoint_url=proxy.endpoint_url)
        assert ranks(2, with_env, s3.env, save_in_trouble, config, 120.0) == [None, None]
        proxy.rule = lambda request: None
        with mock.patch.dict(os.environ, s3.env):
            assert loaded(config, 1) == 1.0


def test_after_its_deadline_a_save_fails_on_all_ranks(
    s3: S3Server, ranks: Ranks, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"
    with s3_proxy(s3.endpoint_url, lambda request: SLOW_DOWN) as proxy:
        config = StorageConfig(url=url, endpoint_url=proxy.endpoint_url)
        messages = ranks(2, with_env, s3.env, save_in_trouble, config, 2.0)
    for message in messages:
        assert f"storage.url: {url}: the server fails or is overloaded" in message
