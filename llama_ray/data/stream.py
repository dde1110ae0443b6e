"""Batches of tokens for one data-parallel rank, fetched by Ray Data ahead of the training loop.

`TokenOrder` decides what each batch holds; here it is only moved. A read task fetches a *window* of
steps: a few long ranges of a few shards. A few windows make a dataset, and a run is a chain of
datasets: one is fetched while the one before is trained on. (One endless dataset would do, but its
executor spins while it is held back: measured, 70 % of a core in the training process.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import ReadTask
from ray.data.extensions import ArrowTensorArray

from llama_ray.config.pretrain import DataConfig
from llama_ray.data.blocks import DamagedShardError
from llama_ray.data.execution import data_context
from llama_ray.data.mixture import stages
from llama_ray.data.order import SourceStream, TokenOrder
from llama_ray.data.shards import SplitManifest, TokenManifest
from llama_ray.data.skips import SkippedBatches
from llama_ray.data.windows import Replaced, WindowReader, read_stream
from llama_ray.errors import UserError, user_error_cause
from llama_ray.storage import Storage

REPLACED_TYPE = pa.list_(
    pa.struct(
        [
            ("step", pa.int64()),
            ("index", pa.int64()),
            ("shard", pa.string()),
            ("what", pa.string()),
        ]
    )
)


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a step's batch."""

    step: int
    """Of the training, not of the token order: see `data.skip_steps`."""
    tokens: np.ndarray
    """int64 [rows, seq_len + 1]"""
    replaced: list[Replaced]


class TokenStream:
    """The training batches and the validation sequences of a run."""

    def __init__(
        self,
        storage: Storage,
        manifest: TokenManifest,
        data: DataConfig,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        """batch_size: sequences in a step, over all ranks.

        Raises `UserError` where the mixture or the sequence length do not fit the sources. Shards
        are not looked at (`manifest.check` does that, once for all ranks); one that is missing is
        named when it is read.
        """
        self.storage, self.manifest, self.data = storage, manifest, data
        self.seq_len, self.batch_size = data.seq_len, batch_size
        train = manifest.split("train")
        shard_tokens = {
            source: [shard.tokens for shard in split.shards] for source, split in train.items()
        }
        tokens = {source: split.tokens for source, split in train.items()}
        self.stages = stages(data, tokens, batch_size)
        self.order = TokenOrder(shard_tokens, data.seq_len, seed, self.stages)
        self.skipped = SkippedBatches(data.skip_steps)
        self.reader = WindowReader(storage, manifest, self.order, batch_size, data.on_corrupt)

    def rank_batches(
        self, dp_rank: int, dp_size: int, start_step: int, stop_step: int
    ) -> Iterator[Batch]:
        """The batches of [start_step, stop_step): of each the rank's rows [r·B/dp, (r+1)·B/dp).

        Up to 2 × `data.prefetch_windows` windows of `data.window_steps` steps are in Ray's object
        store. Read tasks take no CPU from the scheduler, so that workers holding all CPUs can be
        fed.
        """
        assert self.batch_size % dp_size == 0
        assert 0 <= dp_rank < dp_size
        share = self.batch_size // dp_size
        rows = slice(dp_rank * share, (dp_rank + 1) * share)
        reader = ray.put(self.reader)
        windows = self._windows(start_step, stop_step)
        datasets = [
            windows[i : i + self.data.prefetch_windows]
            for i in range(0, len(windows), self.data.prefetch_windows)
        ]
        if not datasets:
            return
        steps = itertools.count(start_step)
        with ThreadPoolExecutor(1, thread_name_prefix="tokens") as pool:

            def fetch(windows: list[range]) -> Future[list[Any]]:
                return pool.submit(_fetch, WindowDatasource(reader, windows, rows))

            ahead = fetch(datasets[0])
            for following in [*datasets[1:], None]:
                fetched = _result(ahead)
                if following is not None:
                    ahead = fetch(following)
                for window in fetched:
                    for tokens, replaced in _batches(window):
                        yield Batch(next(steps), tokens, replaced)

    def _windows(self, start_step: int, stop_step: int) -> list[range]:
        """The batches of the steps, up to `data.window_steps` together."""
        n = self.data.window_steps
        return [
            run[i : i + n]
            for run in self.skipped.runs(start_step, stop_step)
            for i in range(0, len(run), n)
        ]

    def samples(self, steps: int) -> dict[str, int]:
        """How many sequences of each source the first `steps` steps train on."""
        size, order = self.batch_size, self.order
        counts = [0] * len(order.streams)
        for run in self.skipped.runs(0, steps):
            before, after = (order.counts_before(n * size) for n in (run.start, run.stop))
            counts = [n + b - a for n, a, b in zip(counts, before, after, strict=True)]
        return {stream.name: n for stream, n in zip(order.streams, counts, strict=True)}

    def validation_sequences(self, n: int) -> np.ndarray:
        """int64 [n, seq_len + 1]: held-out sequences, the same ones each time, spread evenly over
        all there are; fewer than n where there are fewer. Raises `UserError` where there is none,
        or a shard is damaged, whatever `data.on_corrupt`: other sequences would be another measure.
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
        length = self.seq_len + 1
        try:
            return np.stack(
                [
                    read_stream(
                        self.storage, self.manifest, together, stream, start, start + length
                    )
                    for start in (chosen * self.seq_len).tolist()
                ]
            ).astype(np.int64)
        except DamagedShardError as error:
            raise error.explained(self.storage) from None


class WindowDatasource(Datasource):
    """One read task a window; a row a batch: `tokens` [rows, seq_len + 1], `replaced`."""

    def __init__(self, reader: Any, windows: Sequence[range], rows: slice) -> None:
        super().__init__()
        self.reader, self.windows, self.rows = reader, windows, rows

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        def task(window: range) -> ReadTask:
            reader, rows = self.reader, self.rows
            metadata = BlockMetadata(
                num_rows=len(window), size_bytes=None, input_files=None, exec_stats=None
            )
            return ReadTask(lambda: [_window(reader, window, rows)], metadata)

        return [task(window) for window in self.windows]


def _window(reader: Any, window: range, rows: slice) -> pa.Table:
    tokens, replaced = ray.get(reader).read(window.start, window.stop, rows)
    by_batch = [[asdict(sample) for sample in replaced if sample.step == n] for n in window]
    return pa.table(
        {
            "tokens": ArrowTensorArray.from_numpy(tokens),
            "replaced": pa.array(by_batch, REPLACED_TYPE),
        }
    )


def _fetch(source: WindowDatasource) -> list[Any]:
    """References to the windows, in order, all of them in the object store."""
    with data_context():
        dataset = ray.data.read_datasource(
            source, num_cpus=0, concurrency=1, override_num_blocks=len(source.windows)
        )
        return dataset.materialize().to_arrow_refs()


def _result(fetched: Future[list[Any]]) -> list[Any]:
    try:
        return fetched.result()
    except Exception as error:
        if (cause := user_error_cause(error)) is not None:
            raise cause from None
        raise


def _batches(window: Any) -> Iterator[tuple[np.ndarray, list[Replaced]]]:
    table = ray.get(window)
    tokens = BlockAccessor.for_block(table.select(["tokens"])).to_numpy()["tokens"]
    replaced = table["replaced"].to_pylist()
    for rows, samples in zip(tokens, replaced, strict=True):
        yield rows.astype(np.int64), [Replaced(**sample) for sample in samples]
