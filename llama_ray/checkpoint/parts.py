"""Parts of files, read in large requests, checked, and laid where they belong.

A rank that loads wants parts of many files: whole ones, rows of some, here and there a number.
Reads are widened to the blocks that checksums are of, neighbouring blocks are read at once, and
where one tensor wants all of a request it is read straight into that tensor's memory.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_ray.checkpoint.files import as_bytes
from llama_ray.checkpoint.manifest import BLOCK_BYTES, FileInfo, block_count
from llama_ray.errors import UserError
from llama_ray.storage import Storage
from llama_ray.transfer import Range, download

REQUEST_BLOCKS = 4
BATCH_BYTES = 64 << 20
BATCHES = 2
"""At a time: one arrives while another is checked."""


class Part:
    """Rows of a chunk in a file, and the tensor that takes them, or some of their columns."""

    def __init__(
        self,
        file: str,
        begin: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        region: tuple[slice, ...],
        into: Tensor,
    ) -> None:
        """shape: of the rows, which begin at byte `begin`; region: what of them goes `into`, a
        tensor of any dtype on any device."""
        self.file, self.begin = file, begin
        self.dtype, self.shape, self.region, self.into = dtype, tuple(shape), region, into.detach()
        self.end = begin + torch.Size(shape).numel() * dtype.itemsize
        self.direct = (
            into.shape == self.shape
            and into.dtype == dtype
            and into.device.type == "cpu"
            and into.is_contiguous()
        )
        self._missing = self.end - begin
        self._rows: Tensor | None = None
        self._lock = threading.Lock()

    def memory(self) -> memoryview:
        """Where its bytes go: made when the first of them come."""
        with self._lock:
            if self._rows is None:
                self._rows = self.into if self.direct else torch.empty(self.shape, dtype=self.dtype)
            return as_bytes(self._rows)

    def arrived(self, n_bytes: int) -> None:
        """So many more bytes are in `memory()`."""
        with self._lock:
            self._missing -= n_bytes
            if self._missing:
                return
        assert self._rows is not None
        if self.direct:
            # Numpy wrote it: who keeps copies of weights is not told otherwise.
            torch.autograd.graph.increment_version(self.into)
        else:
            self.into.copy_(self._rows[self.region])
        self._rows = None


@dataclass(frozen=True)
class Request:
    """Consecutive blocks of a file."""

    file: str
    begin: int
    end: int
    parts: Sequence[Part]
    """Those that want something of it."""

    @property
    def straight(self) -> bool:
        """Whether one part wants all of it."""
        one = self.parts[0]
        return len(self.parts) == 1 and one.begin <= self.begin and self.end <= one.end


def read_parts(
    storage: Storage, folder: str, files: Mapping[str, FileInfo], parts: Iterable[Part]
) -> None:
    """files: of the manifest. Raises `UserError` naming file and bytes that are not what was
    written."""
    requests = plan(files, parts)
    with ThreadPoolExecutor(BATCHES, thread_name_prefix="checkpoint-read") as threads:
        reads = [
            threads.submit(_read, storage, folder, files, batch) for batch in _batches(requests)
        ]
        try:
            for read in reads:
                read.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def plan(files: Mapping[str, FileInfo], parts: Iterable[Part]) -> Iterator[Request]:
    """Requests for all of `parts`, file by file and from beginning to end."""
    by_file: dict[str, list[Part]] = {}
    for part in parts:
        by_file.setdefault(part.file, []).append(part)
    for file, wanted in by_file.items():
        wanted = sorted((part for part in wanted if part.end > part.begin), key=lambda p: p.begin)
        ends = np.maximum.accumulate([part.end for part in wanted]).tolist()
        for first, last in _runs(wanted, files[file].size):
            begin, end = first * BLOCK_BYTES, min(last * BLOCK_BYTES, files[file].size)
            low = bisect.bisect_right(ends, begin)
            high = bisect.bisect_left(wanted, end, key=lambda part: part.begin)
            inside = [part for part in wanted[low:high] if part.end > begin]
            yield Request(file, begin, end, inside)


def _runs(parts: Sequence[Part], size: int) -> Iterator[tuple[int, int]]:
    """[first, last) blocks of each request, for parts in their order in a file of `size`."""
    runs: list[tuple[int, int]] = []
    edges: list[int] = []  # of many blocks in a row that one part alone wants
    for part in parts:
        first, last = part.begin // BLOCK_BYTES, block_count(part.end)
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], last)
        else:
            runs.append((first, last))
        own = block_count(part.begin), last if part.end == size else part.end // BLOCK_BYTES
        if own[1] - own[0] >= REQUEST_BLOCKS:
            edges += own
    for start, stop in runs:
        inside = edges[bisect.bisect_right(edges, start) : bisect.bisect_left(edges, stop)]
        for first, last in itertools.pairwise([start, *inside, stop]):
            for block in range(first, last, REQUEST_BLOCKS):
                yield block, min(last, block + REQUEST_BLOCKS)


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    batch: list[Request] = []
    for request in requests:
        batch.append(request)
        if sum(r.end - r.begin for r in batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _read(
    storage: Storage, folder: str, files: Mapping[str, FileInfo], batch: Sequence[Request]
) -> None:
    targets = [_target(request) for request in batch]
    ranges = [Range(f"{folder}/{r.file}", r.begin, r.end) for r in batch]
    try:
        download(storage, ranges, targets)
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint: {storage.url(folder)} has lost a file ({error}); use another checkpoint"
        ) from None
    for request, data in zip(batch, targets, strict=True):
        _check(storage, folder, request, files[request.file].checksums, data)
        for part in request.parts:
            begin, end = max(part.begin, request.begin), min(part.end, request.end)
            if not request.straight:
                wanted = data[begin - request.begin : end - request.begin]
                part.memory()[begin - part.begin : end - part.begin] = wanted
            part.arrived(end - begin)


def _target(request: Request) -> memoryview:
    if not request.straight:
        return memoryview(bytearray(request.end - request.begin))
    (part,) = request.parts
    return part.memory()[request.begin - part.begin : request.end - part.begin]


def _check(
    storage: Storage, folder: str, request: Request, checksums: np.ndarray, data: memoryview
) -> None:
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        begin = request.begin + start
        if zlib.crc32(block) != checksums[begin // BLOCK_BYTES]:
            raise UserError(
                f"checkpoint: {storage.url(f'{folder}/{request.file}')} is not what was written at "
                f"bytes {begin:,} to {begin + len(block):,} (another checksum); the checkpoint is "
                "damaged, use another"
            )
