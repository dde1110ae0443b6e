"""A save that is killed at any request of its upload is never loaded, hides nothing and leaves
nothing that is not cleared away. Against the real server, with whole processes that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from llama_ray import upload
from llama_ray.checkpoint import writer
from llama_ray.checkpoint.checkpointer import SaveError
from llama_ray.checkpoint.manifest import MARKER
from llama_ray.checkpoint.sharded import load_sharded
from llama_ray.checkpoint.store import CheckpointStore, resolve
from llama_ray.config import StorageConfig
from llama_ray.storage import Storage
from tests.checkpoint.nursery import Nursery
from tests.checkpoint.saving import checkpointer, info, with_env
from tests.s3 import BUCKET, S3Server
from tests.s3_proxy import Fault, Request, S3Proxy, s3_proxy

PART_BYTES = 5 << 20  # what S3 asks of every part but the last
ROWS = 1_500_000  # of float32: two parts


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def state_of(value: float) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.full((ROWS,), value)}, "exp_avg": {"w": torch.full((9,), value)}}


def save(rank: int, config: StorageConfig, step: int) -> None:
    saver = checkpointer(config, keep=2)
    state = state_of(float(step))
    state["exp_avg"][f"of {rank}"] = torch.full((9,), float(step))  # or one had nothing to upload
    with mock.patch.object(upload, "PART_BYTES", PART_BYTES):
        saver.save(state, info(step))
        saver.close()


def check_loads(store: CheckpointStore, step: int) -> None:
    assert resolve(store.storage, "runs/run") == store.path(step)
    state = state_of(0.0)
    load_sharded(store.storage, store.path(step), state)
    for section in state.values():
        for tensor in section.values():
            assert (tensor == step).all()


def check_clean(store: CheckpointStore, steps: list[int]) -> None:
    """Nothing is left but whole checkpoints; not even a part of an upload."""
    store.clean_up()
    assert store.committed_steps() == steps
    found = {path.partition("/")[0] for path in store.storage.list(store.root)}
    assert found == {"latest", *(store.path(step).rpartition("/")[2] for step in steps)}
    assert store.storage.read_json(f"{store.root}/latest")["step"] == steps[-1]
    pending = store.storage.fs.call_s3("list_multipart_uploads", Bucket=BUCKET)
    key = f"{store.storage.root.partition('/')[2]}/"
    assert not [u for u in pending.get("Uploads", []) if u["Key"].startswith(key)]


def killed_at(proxy: S3Proxy, nursery: Nursery, number: int, when: str) -> list[Request]:
    """A rule that kills at the request of that number from now on."""
    seen: list[Request] = []

    def rule(request: Request) -> Fault | None:
        seen.append(request)
        if len(seen) == number + 1:
            return Fault(before=nursery.kill) if when == "before" else Fault(after=nursery.kill)
        return None

    proxy.rule = rule
    return seen


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_killed_at_every_request(
    s3: S3Server, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before the server has seen it, or when it has done it and nobody knows."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    store = CheckpointStore(Storage(StorageConfig(url=url, endpoint_url=s3.endpoint_url)), "run")
    with s3_proxy(s3.endpoint_url) as proxy:
        config = StorageConfig(url=url, endpoint_url=proxy.endpoint_url)
        steps = [1]
        assert nursery.run(2, with_env, s3.env, save, config, 1) == [0, 0]
        number = killed = 0
        while True:
            step = steps[-1] + 1
            seen = killed_at(proxy, nursery, number, when)
            codes = nursery.run(2, with_env, s3.env, save, config, step)
            if codes == [0, 0]:
                assert len(seen) <= number  # it made fewer requests than that
                break
            killed += 1
            marked = any(r.method == "PUT" and r.path.endswith(MARKER) for r in seen)
            committed = store.committed_steps()
            if when == "after" and seen[-1].method == "PUT" and seen[-1].path.endswith(MARKER):
                assert committed[-1] == step
            if committed[-1] == step:
                assert marked
                steps.append(step)
            check_loads(store, steps[-1])
            check_clean(store, committed)
            number += 1
        assert killed > 20
        check_loads(store, step)


def die(*args: object, **named: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def survive(rank: int, config: StorageConfig, victim: int, notes: Path) -> None:
    saver = checkpointer(config, timeout_seconds=5.0)
    mine = {"model": {f"w{rank}": torch.zeros(3)}}
    if rank == victim:
        with mock.patch.object(writer, "upload", die):
            saver.save(mine, info(5))
            time.sleep(60)
    start = time.perf_counter()
    saver.save(mine, info(5))
    with pytest.raises(SaveError) as raised:
        saver.wait()
    notes.with_name(f"{rank}").write_text(f"{time.perf_counter() - start} {raised.value}")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_ends_the_saves_of_others(
    nursery: Nursery, tmp_path: Path, victim: int
) -> None:
    config = StorageConfig(url=f"file://{tmp_path}/storage")
    codes = nursery.run(3, survive, config, victim, tmp_path / "notes")
    assert codes == [-9 if rank == victim else 0 for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        seconds, _, message = (tmp_path / f"{rank}").read_text().partition(" ")
        assert float(seconds) < 15
        assert "checkpoint of step 5 failed: a rank is gone" in message
    assert CheckpointStore(Storage(config), "run").committed_steps() == []
