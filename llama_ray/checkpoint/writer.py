"""Torch distributed checkpoint writes through this: safetensors files instead of pickles, and a
checkpoint that counts only when it is whole."""

from __future__ import annotations

import os
import secrets
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llama_ray.checkpoint.files import (
    SMALL_BYTES,
    WEIGHTS,
    Chunk,
    WrittenFile,
    file_name,
    kind_of,
    write_file,
)
from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.errors import UserError
from llama_ray.formats.source import TensorInfo, expected_shapes
from llama_ray.parallel import local_part
from llama_ray.storage import Storage
from llama_ray.transfer import upload

UPLOAD_SECONDS = 1800.0


@dataclass(frozen=True)
class Attempt:
    """One rank's part in one start of a run's workers."""

    id: str
    rank: int
    upload_seconds: float
    """For how long the upload of a file is tried."""


def new_attempt() -> str:
    """An id for `Attempt`."""
    return secrets.token_hex(4)


class CopyPlanner(DefaultSavePlanner):
    """Plans by the training state, and finds the values in its copy.

    The plan of a rank's first save is kept, under `key`: ranks then tell each other only that
    nothing has changed, where a million chunks would have to be planned anew.
    """

    def __init__(self, copy: Mapping[str, Tensor], key: str) -> None:
        super().__init__(
            flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=True
        )
        self._cached_plans_key = key
        self.copy = copy

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # Of a dimension that does not divide evenly, the last ranks may have nothing.
        filled = {name: tensor for name, tensor in state_dict.items() if local_part(tensor).numel()}
        super().set_up_planner(filled, storage_meta, is_coordinator)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return super().create_global_plan(small_ones_once(all_plans))

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copy[index.fqn]


def small_ones_once(plans: list[SavePlan]) -> list[SavePlan]:
    """Of small tensors that many ranks have alike, only the first rank's is written: side by side
    in one file they are quickly read. (Large ones torch distributes evenly.)"""
    seen: set[MetadataIndex] = set()
    thinned = []
    for plan in plans:
        items = [item for item in plan.items if _chunk(item).info.nbytes > SMALL_BYTES or
                 item.index not in seen]  # fmt: skip
        seen.update(item.index for item in items)
        thinned.append(replace(plan, items=items))
    return thinned


class CheckpointWriter(StorageWriter):
    """Uploads this rank's files; on rank 0, commits when all ranks have."""

    def __init__(
        self, store: CheckpointStore, info: CheckpointInfo, tokenizer: bytes, attempt: Attempt
    ) -> None:
        self.store, self.info, self.tokenizer, self.attempt = store, info, tokenizer, attempt
        self.deadline = time.monotonic() + attempt.upload_seconds

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            files = self._write(plan, planner)
        except UserError:
            raise
        except Exception:
            # It is sent to the other ranks, and not every library's exceptions can be.
            raise RuntimeError(f"rank {self.attempt.rank}: {traceback.format_exc()}") from None
        results = [
            WriteResult(MetadataIndex(file.name), file.info.size, storage_data=file)
            for file in files
        ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result.storage_data for of_rank in results for result in of_rank]
        self.store.commit(self.info, self.attempt.id, self.tokenizer, written)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # an id alone says too little

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WrittenFile]:
        chunks: dict[str, list[tuple[Chunk, Tensor]]] = {}
        for item in plan.items:
            values = planner.resolve_data(item)
            chunk = _chunk(item)
            assert isinstance(values, Tensor)
            assert TensorInfo(tuple(values.shape), values.dtype) == chunk.info, chunk.tensor
            chunks.setdefault(kind_of(chunk.tensor), []).append((chunk, values))
        folder = self.store.path(self.info.step)
        return [
            upload_file(
                self.store.storage,
                folder,
                file_name(kind, self.attempt.rank, self.attempt.id),
                of_kind,
                self.deadline,
            )
            for kind, of_kind in chunks.items()
        ]


def upload_file(
    storage: Storage,
    folder: str,
    name: str,
    chunks: Sequence[tuple[Chunk, Tensor]],
    deadline: float,
) -> WrittenFile:
    """deadline: until when it is tried, in `time.monotonic()`."""
    path = f"{folder}/{name}"
    return write_file(
        name, chunks, lambda buffers: upload(storage, path, buffers, deadline=deadline)
    )


def write_weights(
    storage: Storage,
    run: str,
    info: CheckpointInfo,
    tokenizer: bytes,
    tensors: Iterable[tuple[str, Tensor]],
) -> str:
    """Commit a checkpoint of weights alone, of which `tensors` gives (name, values) one at a time;
    returns its folder. Takes memory for twice the largest: files are about as large as that."""
    store = CheckpointStore(storage, run)
    folder, attempt = store.path(info.step), new_attempt()
    largest = max(map(_numel, expected_shapes(info.model).values()))
    written: list[WrittenFile] = []
    waiting: list[tuple[Chunk, Tensor]] = []

    def flush() -> None:
        name = file_name("weights", len(written), attempt)
        deadline = time.monotonic() + UPLOAD_SECONDS
        written.append(upload_file(storage, folder, name, waiting, deadline))
        waiting.clear()

    for name, values in tensors:
        values = values.detach().contiguous()
        shape = tuple(values.shape)
        chunk = Chunk(f"{WEIGHTS}{name}", shape, values.dtype, (0,) * len(shape), shape)
        held = sum(chunk.info.nbytes for chunk, _ in waiting)
        if waiting and held + chunk.info.nbytes > largest * values.dtype.itemsize:
            flush()
        waiting.append((chunk, values))
        del values  # or it would stay while the next one is made
    flush()
    store.commit(info, attempt, tokenizer, written)
    return folder


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _chunk(item: WriteItem) -> Chunk:
    data = item.tensor_data
    assert data is not None
    return Chunk(
        item.index.fqn,
        tuple(data.size),
        data.properties.dtype,
        tuple(data.chunk.offsets),
        tuple(data.chunk.sizes),
    )
