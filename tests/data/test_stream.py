from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.config import StorageConfig
from llama_ray.config.pretrain import DataConfig
from llama_ray.data import windows as windows_module
from llama_ray.data.shards import TokenManifest
from llama_ray.data.stream import TokenStream
from llama_ray.errors import UserError
from llama_ray.storage import Storage
from tests.data.world import numbered_tokens
from tests.s3 import BUCKET, S3Server

SEQ_LEN, BATCH = 32, 12
SHARDS = {"books": [700, 900], "web": [4000, 4000, 2500]}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return numbered_tokens(tmp_path_factory.mktemp("store"), SHARDS)


def make(storage: Storage, seed: int = 0, **options: Any) -> TokenStream:
    manifest = TokenManifest.load(storage, "numbered")
    data = DataConfig.model_validate({"tokens": "numbered", "seq_len": SEQ_LEN, **options})
    return TokenStream(storage, manifest, data, batch_size=BATCH, seed=seed)


def read(tokens: TokenStream, start: int, stop: int, rows: slice = slice(0, BATCH)) -> np.ndarray:
    """Straight from storage; nothing of it replaced."""
    batches, replaced = tokens.reader.read(start, stop, rows)
    assert not replaced
    return batches


mixtures = st.fixed_dictionaries(
    {
        "weights": st.none() | st.just({"web": 2.0, "books": 1.0}),
        "stages": st.lists(st.integers(1, 210), max_size=3, unique=True).map(
            lambda steps: [
                {"from_step": step, "epochs": {"web": 1 + i, "books": 2}}
                for i, step in enumerate(sorted(steps))
            ]
        ),
    }
)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 9),
    start=st.integers(0, 200),
    mixture=mixtures,
    # Each with another window, and on another number of ranks: as if resumed.
    parts=st.lists(
        st.tuples(st.integers(1, 7), st.sampled_from([1, 2, 3, 4, 6])), min_size=1, max_size=4
    ),
)
def test_windows_ranks_and_resume_points_do_not_show(
    storage: Storage,
    seed: int,
    start: int,
    mixture: dict[str, Any],
    parts: list[tuple[int, int]],
) -> None:
    tokens = make(storage, seed, **mixture)
    whole = read(tokens, start, start + sum(window for window, _ in parts))
    step = start
    for window, dp_size in parts:
        share = BATCH // dp_size
        ranks = [
            read(tokens, step, step + window, slice(rank * share, (rank + 1) * share))
            for rank in range(dp_size)
        ]
        expected = whole[step - start : step - start + window]
        assert (np.concatenate(ranks, axis=1) == expected).all()
        step += window


def test_each_training_token_is_a_target_once_an_epoch(storage: Storage) -> None:
    tokens = make(storage)
    total = sum(map(sum, SHARDS.values()))
    steps = total // (SEQ_LEN * BATCH)
    batches = read(tokens, 0, steps)
    inputs = batches[:, :, :-1].reshape(-1)
    assert max(Counter(inputs.tolist()).values()) == 1
    # Within a sequence tokens follow each other (but for a seam between two epochs).
    assert (np.diff(batches.astype(np.int64), axis=-1) == 1).mean() > 0.999
    missing = total - len(inputs)
    assert missing < SEQ_LEN * BATCH
    later = read(tokens, 0, 40 * steps)[:, :, :-1].reshape(-1)
    counts = Counter(later.tolist())
    assert len(counts) == total
    assert set(counts.values()) <= {39, 40, 41}


def test_ray_data_delivers_what_direct_reads_give(ray_cluster: object, storage: Storage) -> None:
    tokens = make(storage, window_steps=2, prefetch_windows=4)
    # A chain of three datasets.
    got = list(tokens.rank_batches(1, 3, 5, 25))
    assert [batch.step for batch in got] == list(range(5, 25))
    expected = read(tokens, 5, 25, slice(4, 8))
    assert (np.stack([batch.tokens for batch in got]) == expected).all()
    assert got[0].tokens.dtype == np.int64
    got[0].tokens[0, 0] = 7  # the loop may write to it


def test_skipped_batches_are_not_read_and_steps_go_on(
    ray_cluster: object, storage: Storage
) -> None:
    tokens = make(storage, window_steps=2, prefetch_windows=3, skip_steps=[[3, 4], [9, 9]])
    got = list(tokens.rank_batches(0, 1, 1, 12))
    assert [batch.step for batch in got] == list(range(1, 12))
    batches = [1, 2, 5, 6, 7, 8, 10, 11, 12, 13, 14]
    expected = np.concatenate([read(tokens, n, n + 1) for n in batches])
    assert (np.stack([batch.tokens for batch in got]) == expected).all()
    # What is counted is what was delivered.
    first = list(tokens.rank_batches(0, 1, 0, 12))
    books = sum(int((batch.tokens[:, 0] < 1_000_000).sum()) for batch in first)
    assert sum(tokens.samples(12).values()) == 12 * BATCH
    assert sorted(tokens.samples(12).values()) == sorted((books, 12 * BATCH - books))


@settings(deadline=None, max_examples=4)
@given(
    mixture=mixtures,
    parts=st.lists(
        st.tuples(
            st.integers(1, 8),  # steps
            st.sampled_from([1, 2, 3]),  # ranks
            st.integers(1, 5),  # window
            st.integers(1, 3),  # prefetch
        ),
        min_size=2,
        max_size=2,
    ),
)
def test_resuming_on_other_ranks_neither_loses_nor_doubles(
    ray_cluster: object,
    storage: Storage,
    mixture: dict[str, Any],
    parts: list[tuple[int, int, int, int]],
) -> None:
    """Through Ray Data: stop after some steps, go on with another data-parallel degree."""
    step = 195  # in the midst of what stages there are
    for steps, dp_size, window, prefetch in parts:
        tokens = make(storage, window_steps=window, prefetch_windows=prefetch, **mixture)
        ranks = [
            np.stack([b.tokens for b in tokens.rank_batches(rank, dp_size, step, step + steps)])
            for rank in range(dp_size)
        ]
        assert (np.concatenate(ranks, axis=1) == read(tokens, step, step + steps)).all()
        step += steps


def test_a_read_task_whose_worker_is_killed_is_run_again(
    ray_cluster: object, storage: Storage, tmp_path: Path
) -> None:
    tokens = make(storage, window_steps=2, prefetch_windows=3)
    expected = read(tokens, 0, 12)
    killed = tmp_path / "killed"

    class Killed(windows_module.WindowReader):
        def read(self, start_step: int, stop_step: int, rows: slice) -> Any:
            if start_step == 4 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(start_step, stop_step, rows)

    tokens.reader = Killed(storage, tokens.manifest, tokens.order, BATCH, "stop")
    got = list(tokens.rank_batches(0, 1, 0, 12))
    assert killed.exists()
    assert [batch.step for batch in got] == list(range(12))
    assert (np.stack([batch.tokens for batch in got]) == expected).all()


def test_workers_that_hold_every_cpu_are_fed(ray_cluster: object, storage: Storage) -> None:
    """As in Ray Train: each rank iterates inside an actor, and no CPU is left for read tasks."""

    @ray.remote(num_cpus=1)
    class Worker:
        def run(self, rank: int) -> tuple[int, float, int]:
            batches = make(storage, window_steps=4).rank_batches(rank, 2, 0, 10**6)
            n = sum(int(b.tokens.sum()) for _, b in zip(range(10), batches, strict=False))
            start = time.monotonic()
            batches.close()
            return n, time.monotonic() - start, len(list(batches))

    workers = [Worker.remote() for _ in range(2)]
    results = ray.get([worker.run.remote(rank) for rank, worker in enumerate(workers)], timeout=120)
    expected = read(make(storage), 0, 10).astype(np.int64)
    assert sum(n for n, _, _ in results) == expected.sum()
    for _, closing_seconds, left in results:
        assert closing_seconds < 5
        assert left == 0


def test_few_windows_are_in_flight(ray_cluster: object, storage: Storage, tmp_path: Path) -> None:
    tokens = make(storage, window_steps=4, prefetch_windows=2)
    log = tmp_path / "reads"
    log.touch()

    class Logged(windows_module.WindowReader):
        def read(self, start_step: int, stop_step: int, rows: slice) -> Any:
            with log.open("a") as file:
                file.write(f"{start_step}\n")
            return super().read(start_step, stop_step, rows)

    tokens.reader = Logged(storage, tokens.manifest, tokens.order, BATCH, "stop")
    batches = tokens.rank_batches(0, 1, 0, 4000)
    for batch in batches:
        if batch.step == 20:
            break
    batches.close()
    # Step 20 is in the third dataset of eight steps; the fourth was being fetched.
    assert len(log.read_text().splitlines()) == 4 * 2


def test_validation_sequences_are_the_same_each_time(storage: Storage) -> None:
    tokens = make(storage)
    every = tokens.validation_sequences(1000)
    assert every.shape == ((200 - 1) // SEQ_LEN, SEQ_LEN + 1)
    assert (every == make(storage, seed=5).validation_sequences(1000)).all()
    few = tokens.validation_sequences(3)
    assert few.shape == (3, SEQ_LEN + 1)
    assert all((every == row).all(axis=1).any() for row in few)
    only_web = make(storage, weights={"web": 1.0}).validation_sequences(1000)
    assert (only_web >= 1_500_000).all()


def test_damaged_shards_name_themselves(ray_cluster: object, tmp_path: Path) -> None:
    storage = numbered_tokens(tmp_path, SHARDS)
    tokens = make(storage)
    shard = tmp_path / "tokens/numbered/train/web-00001.tokens"
    whole = shard.read_bytes()
    changed = bytes([whole[0] ^ 1]) + whole[1:]
    shard.write_bytes(changed)
    with pytest.raises(UserError, match=r"web-00001\.tokens has another checksum"):
        tokens.manifest.check(storage, checksums=True)
    tokens.manifest.check(storage)  # sizes alone do not tell
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=r"web-00001\.tokens has 15,998 bytes instead of 16,000"):
        tokens.manifest.check(storage)
    shard.unlink()
    with pytest.raises(UserError, match=r"web-00001\.tokens is missing"):
        tokens.manifest.check(storage)
    with pytest.raises(UserError, match=r"^data\.tokens: .*web-00001\.tokens is missing") as caught:
        list(tokens.rank_batches(0, 1, 0, 30))
    assert type(caught.value) is UserError


def test_shards_on_s3(storage: Storage, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    remote = Storage(StorageConfig(url=f"s3://{BUCKET}/stream", endpoint_url=s3.endpoint_url))
    for path in storage.list(""):
        remote.write(path, storage.read(path))
    assert (read(make(remote), 3, 9) == read(make(storage), 3, 9)).all()
    assert (make(remote).validation_sequences(5) == make(storage).validation_sequences(5)).all()
