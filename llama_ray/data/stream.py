"""Batches of tokens for one data-parallel rank, fetched by Ray Data ahead of the training loop.

`TokenOrder` decides what each batch holds; here it is only moved. A read task fetches a *window* of
steps: a few long ranges of a few shards. A few windows make a dataset, and a run is a chain of
datasets: one is fetched while the one before is trained on. (One endless dataset would do, but its
executor spins while it is held back: measured, 70 % of a core in the training process.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask
from ray.data.extensions import ArrowTensorArray

from llama_ray.data.execution import data_context
from llama_ray.data.order import SourceStream, TokenOrder
from llama_ray.data.shards import SplitManifest, TokenManifest, read_tokens
from llama_ray.errors import UserError, user_error_cause
from llama_ray.storage import Storage

# Requests to storage at a time: object stores answer late but in parallel.
READ_THREADS = 8
# Reading this much in vain is cheaper than another request.
MERGE_GAP_TOKENS = 1 << 16


class WindowReader:
    """Reads any samples straight from storage. Small to send: shards, not tokens."""

    def __init__(
        self, storage: Storage, manifest: TokenManifest, order: TokenOrder, batch_size: int
    ) -> None:
        self.storage, self.manifest, self.order = storage, manifest, order
        self.batch_size = batch_size
        self.splits = manifest.split("train")

    def read(self, start_step: int, stop_step: int, rows: slice) -> np.ndarray:
        """Rows `rows` of the batches of steps [start_step, stop_step): [steps, rows, seq_len + 1]
        in the manifest's dtype."""
        steps, length = stop_step - start_step, self.order.seq_len
        first = start_step * self.batch_size
        reads: list[Future[None]] = []
        sources, numbers = (
            part.reshape(steps, self.batch_size)[:, rows]
            for part in self.order.samples(first, first + steps * self.batch_size)
        )
        out = np.empty((*sources.shape, length + 1), self.manifest.dtype)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for index, stream in enumerate(self.order.streams):
                steps_of, rows_of = np.nonzero(sources == index)
                starts = numbers[steps_of, rows_of] * length  # ascending
                cuts = np.flatnonzero(np.diff(starts) > length + MERGE_GAP_TOKENS) + 1
                for run in np.split(np.arange(len(starts)), cuts):
                    where = steps_of[run], rows_of[run]
                    reads.append(pool.submit(self._read_run, stream, starts[run], out, where))
        for read in reads:
            read.result()
        return out

    def _read_run(
        self, stream: SourceStream, starts: np.ndarray, out: np.ndarray, where: tuple[Any, Any]
    ) -> None:
        """Neighbouring sequences in one read: those at `starts` to `out[where]`."""
        if not len(starts):
            return
        length, base = self.order.seq_len + 1, int(starts[0])
        split = self.splits[stream.name]
        tokens = read_stream(
            self.storage, self.manifest, split, stream, base, int(starts[-1]) + length
        )
        out[where] = np.lib.stride_tricks.sliding_window_view(tokens, length)[starts - base]


def read_stream(
    storage: Storage,
    manifest: TokenManifest,
    split: SplitManifest,
    stream: SourceStream,
    start: int,
    stop: int,
) -> np.ndarray:
    """Positions [start, stop) of a source's endless stream, in the manifest's dtype."""
    return np.concatenate(
        [
            read_tokens(storage, manifest, split.shards[part.shard], part.start, part.stop)
            for part in stream.ranges(start, stop)
        ]
    )


class TokenStream:
    """The training batches and the validation sequences of a run."""

    def __init__(
        self,
        storage: Storage,
        manifest: TokenManifest,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """batch_size: sequences in a step, over all ranks. weights: share of training tokens per
        source, those left out are not read; default in proportion to their tokens.

        Raises `UserError` where weights or sequence length do not fit the sources. Shards are not
        looked at (`manifest.check` does that, once for all ranks); one that is missing is named
        when it is read.
        """
        self.storage, self.manifest = storage, manifest
        self.seq_len, self.batch_size = seq_len, batch_size
        train = manifest.split("train")
        shard_tokens = {
            source: [shard.tokens for shard in split.shards] for source, split in train.items()
        }
        self.order = TokenOrder(shard_tokens, seq_len, seed, weights)
        self.reader = WindowReader(storage, manifest, self.order, batch_size)

    def rank_batches(
        self,
        dp_rank: int,
        dp_size: int,
        start_step: int,
        stop_step: int,
        window_steps: int = 16,
        prefetch_windows: int = 16,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step, tokens int64 [batch_size / dp_size, seq_len + 1]) for each step of
        [start_step, stop_step): the rank's rows [r·B/dp, (r+1)·B/dp) of the step's batch.

        Up to 2 × `prefetch_windows` windows of `window_steps` steps are in Ray's object store.
        Read tasks take no CPU from the scheduler, so that workers holding all CPUs can be fed.
        """
        assert self.batch_size % dp_size == 0
        assert 0 <= dp_rank < dp_size
        share = self.batch_size // dp_size
        rows = slice(dp_rank * share, (dp_rank + 1) * share)
        reader = ray.put(self.reader)
        length = window_steps * prefetch_windows

        def fetch(first: int) -> list[Any]:
            last = min(first + length, stop_step)
            return _fetch(WindowDatasource(reader, range(first, last, window_steps), last, rows))

        with ThreadPoolExecutor(1, thread_name_prefix="tokens") as pool:
            ahead = pool.submit(fetch, start_step)
            for first in range(start_step, stop_step, length):
                windows = _result(ahead)
                if first + length < stop_step:
                    ahead = pool.submit(fetch, first + length)
                for window in windows:
                    yield from _steps(window)

    def validation_sequences(self, n: int) -> np.ndarray:
        """int64 [n, seq_len + 1]: held-out sequences, the same ones each time, spread evenly over
        all there are; fewer than n where there are fewer. Raises `UserError` where there is none.
        """
        used = {stream.name for stream in self.order.streams}
        splits = {
            source: split
            for source, split in self.manifest.split("validation").items()
            if source in used
        }
        # All sources' shards in a row: a source may have less than one sequence of its own.
        shards = [shard for split in splits.values() for shard in split.shards]
        tokens = sum(shard.tokens for shard in shards)
        available = (tokens - 1) // self.seq_len
        if available < 1:
            raise UserError(
                f"data.tokens: {self.manifest.name!r} has {tokens:,} validation tokens, less than "
                f"one sequence of data.seq_len {self.seq_len:,} + 1; prepare it with a larger "
                "corpus.validation_fraction, or lower data.seq_len"
            )
        together = SplitManifest(tokens=tokens, documents=0, shards=shards)
        stream = SourceStream("validation", [shard.tokens for shard in shards], seed=0)
        chosen = np.arange(min(n, available)) * available // min(n, available)
        return np.stack(
            [
                read_stream(
                    self.storage, self.manifest, together, stream, start, start + self.seq_len + 1
                )
                for start in (chosen * self.seq_len).tolist()
            ]
        ).astype(np.int64)


class WindowDatasource(Datasource):
    """One read task a window; a row a step: `step`, `tokens` [rows, seq_len + 1]."""

    def __init__(self, reader: Any, starts: range, stop_step: int, rows: slice) -> None:
        super().__init__()
        self.reader, self.starts, self.stop_step, self.rows = reader, starts, stop_step, rows

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        def task(start: int) -> ReadTask:
            reader, rows = self.reader, self.rows
            stop = min(start + self.starts.step, self.stop_step)
            metadata = BlockMetadata(
                num_rows=stop - start, size_bytes=None, input_files=None, exec_stats=None
            )
            return ReadTask(lambda: [_window(reader, start, stop, rows)], metadata)

        return [task(start) for start in self.starts]


def _window(reader: Any, start: int, stop: int, rows: slice) -> pa.Table:
    tokens = ray.get(reader).read(start, stop, rows)
    return pa.table(
        {
            "step": np.arange(start, stop),
            "tokens": ArrowTensorArray.from_numpy(tokens),
        }
    )


def _fetch(source: WindowDatasource) -> list[Any]:
    """References to the windows, in order, all of them in the object store."""
    with data_context():
        dataset = ray.data.read_datasource(
            source, num_cpus=0, concurrency=1, override_num_blocks=len(source.starts)
        )
        return dataset.materialize().to_arrow_refs()


def _result(fetched: Future[list[Any]]) -> list[Any]:
    try:
        return fetched.result()
    except Exception as error:
        if (cause := user_error_cause(error)) is not None:
            raise cause from None
        raise


def _steps(window: Any) -> Iterator[tuple[int, np.ndarray]]:
    columns = BlockAccessor.for_block(ray.get(window)).to_numpy()
    for step, tokens in zip(columns["step"], columns["tokens"], strict=True):
        yield int(step), tokens.astype(np.int64)
