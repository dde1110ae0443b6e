"""Reads any samples of a run straight from storage, and others in the place of damaged ones."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llama_ray.data.blocks import DamagedShardError
from llama_ray.data.order import SourceStream, TokenOrder
from llama_ray.data.shards import SplitManifest, TokenManifest, read_tokens
from llama_ray.storage import Storage

# Requests to storage at a time: object stores answer late but in parallel.
READ_THREADS = 8
# Reading this much in vain is cheaper than another request.
MERGE_GAP_TOKENS = 1 << 16
# Places looked at for a sample to train on in a damaged one's place.
REPLACEMENTS = 100
SKIP_REMEDY = ", or set data.on_corrupt=skip to train on other samples"


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be read, in whose place another is trained on."""

    step: int
    """Place of its batch in the token order."""
    index: int
    """In the batch of all ranks."""
    shard: str
    """Path of the file that is damaged."""
    what: str
    """is wrong with it."""


class WindowReader:
    """Reads any samples straight from storage. Small to send: shards, not tokens."""

    def __init__(
        self,
        storage: Storage,
        manifest: TokenManifest,
        order: TokenOrder,
        batch_size: int,
        on_corrupt: Literal["stop", "skip"],
    ) -> None:
        self.storage, self.manifest, self.order = storage, manifest, order
        self.batch_size, self.on_corrupt = batch_size, on_corrupt
        self.splits = manifest.split("train")

    def read(
        self, start_step: int, stop_step: int, rows: slice
    ) -> tuple[np.ndarray, list[Replaced]]:
        """Rows `rows` of the batches of steps [start_step, stop_step): [steps, rows, seq_len + 1]
        in the manifest's dtype; and those among them that are not what the order says."""
        steps, length = stop_step - start_step, self.order.seq_len
        first = start_step * self.batch_size
        reads: list[Future[list[Replaced]]] = []
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
        replaced = [
            replace(sample, step=start_step + sample.step, index=(rows.start or 0) + sample.index)
            for read in reads
            for sample in read.result()
        ]
        return out, sorted(replaced, key=lambda sample: (sample.step, sample.index))

    def _read_run(
        self, stream: SourceStream, starts: np.ndarray, out: np.ndarray, where: tuple[Any, Any]
    ) -> list[Replaced]:
        """Neighbouring sequences in one read: those at `starts` to `out[where]`."""
        if not len(starts):
            return []
        length, base = self.order.seq_len + 1, int(starts[0])
        try:
            tokens = self._read(stream, base, int(starts[-1]) + length)
        except DamagedShardError as error:
            if self.on_corrupt == "skip":
                return self._read_one_by_one(stream, starts, out, where)
            raise error.explained(self.storage, SKIP_REMEDY) from None
        out[where] = np.lib.stride_tricks.sliding_window_view(tokens, length)[starts - base]
        return []

    def _read_one_by_one(
        self, stream: SourceStream, starts: np.ndarray, out: np.ndarray, where: tuple[Any, Any]
    ) -> list[Replaced]:
        replaced, length = [], self.order.seq_len + 1
        for start, step, row in zip(starts.tolist(), *map(np.ndarray.tolist, where), strict=True):
            try:
                out[step, row] = self._read(stream, start, start + length)
            except DamagedShardError as error:
                out[step, row] = self._replacement(stream, start, error)
                replaced.append(Replaced(step, row, error.path, error.what))
        return replaced

    def _replacement(
        self, stream: SourceStream, start: int, damage: DamagedShardError
    ) -> np.ndarray:
        """A sequence for that at `start`: the first of `stream.replacements` that can be read."""
        length = self.order.seq_len + 1
        for place in stream.replacements(start, length, REPLACEMENTS):
            with suppress(DamagedShardError):
                return self._read(stream, place, place + length)
        raise damage.explained(
            self.storage,
            f" (data.on_corrupt=skip found nothing whole in source {stream.name!r} in "
            f"{REPLACEMENTS} places)",
        )

    def _read(self, stream: SourceStream, start: int, stop: int) -> np.ndarray:
        split = self.splits[stream.name]
        return read_stream(self.storage, self.manifest, split, stream, start, stop)


def read_stream(
    storage: Storage,
    manifest: TokenManifest,
    split: SplitManifest,
    stream: SourceStream,
    start: int,
    stop: int,
) -> np.ndarray:
    """Positions [start, stop) of a source's endless stream, in the manifest's dtype. Raises
    `DamagedShardError`."""
    parts = [
        read_tokens(storage, manifest, split.shards[part.shard], part.start, part.stop)
        for part in stream.ranges(start, stop)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
