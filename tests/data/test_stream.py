from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.config import StorageConfig
from llama_ray.data import stream as stream_module
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


def make(storage: Storage, seed: int = 0, weights: dict[str, float] | None = None) -> TokenStream:
    manifest = TokenManifest.load(storage, "numbered")
    return TokenStream(
        storage, manifest, seq_len=SEQ_LEN, batch_size=BATCH, seed=seed, weights=weights
    )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 9),
    start=st.integers(0, 200),
    windows=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    dp_size=st.sampled_from([1, 2, 3, 4, 6]),
)
def test_windows_ranks_and_resume_points_do_not_show(
    storage: Storage, seed: int, start: int, windows: list[int], dp_size: int
) -> None:
    reader = make(storage, seed, {"web": 2.0, "books": 1.0}).reader
    stop = start + sum(windows)
    whole = reader.read(start, stop, slice(0, BATCH))
    share = BATCH // dp_size
    step = start
    for window in windows:
        parts = [
            reader.read(step, step + window, slice(rank * share, (rank + 1) * share))
            for rank in range(dp_size)
        ]
        expected = whole[step - start : step - start + window]
        assert (np.concatenate(parts, axis=1) == expected).all()
        step += window


def test_each_training_token_is_a_target_once_an_epoch(storage: Storage) -> None:
    reader = make(storage).reader
    total = sum(map(sum, SHARDS.values()))
    steps = total // (SEQ_LEN * BATCH)
    batches = reader.read(0, steps, slice(0, BATCH))
    inputs = batches[:, :, :-1].reshape(-1)
    assert max(Counter(inputs.tolist()).values()) == 1
    # Within a sequence tokens follow each other (but for a seam between two epochs).
    assert (np.diff(batches.astype(np.int64), axis=-1) == 1).mean() > 0.999
    missing = total - len(inputs)
    assert missing < SEQ_LEN * BATCH
    later = reader.read(0, 40 * steps, slice(0, BATCH))[:, :, :-1].reshape(-1)
    counts = Counter(later.tolist())
    assert len(counts) == total
    assert set(counts.values()) <= {39, 40, 41}


def test_ray_data_delivers_what_direct_reads_give(ray_cluster: object, storage: Storage) -> None:
    tokens = make(storage)
    # A chain of three datasets.
    got = list(tokens.rank_batches(1, 3, 5, 25, window_steps=2, prefetch_windows=4))
    assert [step for step, _ in got] == list(range(5, 25))
    expected = tokens.reader.read(5, 25, slice(4, 8))
    assert (np.stack([batch for _, batch in got]) == expected).all()
    assert got[0][1].dtype == np.int64
    got[0][1][0, 0] = 7  # the loop may write to it


def test_workers_that_hold_every_cpu_are_fed(ray_cluster: object, storage: Storage) -> None:
    """As in Ray Train: each rank iterates inside an actor, and no CPU is left for read tasks."""

    @ray.remote(num_cpus=1)
    class Worker:
        def run(self, rank: int) -> tuple[int, float, int]:
            batches = make(storage).rank_batches(rank, 2, 0, 10**6, window_steps=4)
            n = sum(int(batch.sum()) for _, (_, batch) in zip(range(10), batches, strict=False))
            start = time.monotonic()
            batches.close()
            return n, time.monotonic() - start, len(list(batches))

    workers = [Worker.remote() for _ in range(2)]
    results = ray.get([worker.run.remote(rank) for rank, worker in enumerate(workers)], timeout=120)
    expected = make(storage).reader.read(0, 10, slice(0, BATCH)).astype(np.int64)
    assert sum(n for n, _, _ in results) == expected.sum()
    for _, closing_seconds, left in results:
        assert closing_seconds < 5
        assert left == 0


def test_few_windows_are_in_flight(ray_cluster: object, storage: Storage, tmp_path: Path) -> None:
    tokens = make(storage)
    log = tmp_path / "reads"
    log.touch()

    class Logged(stream_module.WindowReader):
        def read(self, start_step: int, stop_step: int, rows: slice) -> np.ndarray:
            with log.open("a") as file:
                file.write(f"{start_step}\n")
            return super().read(start_step, stop_step, rows)

    tokens.reader = Logged(storage, tokens.manifest, tokens.order, BATCH)
    batches = tokens.rank_batches(0, 1, 0, 4000, window_steps=4, prefetch_windows=2)
    for step, _ in batches:
        if step == 20:
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
    rows = slice(0, BATCH)
    assert (make(remote).reader.read(3, 9, rows) == make(storage).reader.read(3, 9, rows)).all()
    assert (make(remote).validation_sequences(5) == make(storage).validation_sequences(5)).all()
