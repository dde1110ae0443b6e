"""Committed checkpoints are told to Ray Train, which shows them and passes them on; where they lie,
no second copy."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray.train
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode

from llama_ray.checkpoint.store import CheckpointInfo, CheckpointStore
from llama_ray.storage import Storage


class Registrar:
    """One rank's part: all call alike, for Ray Train waits for all of them."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        # Ray Train's own object: it takes another of the same kind for another place.
        self.filesystem = ray.train.get_context().get_storage().storage_filesystem
        self.saved: list[CheckpointInfo] = []
        self.registered = 0

    def register(self, committed: int) -> None:
        """committed: of `saved`, so many are known to every rank to be committed."""
        for info in self.saved[self.registered : committed]:
            path = self.store.storage.path(self.store.path(info.step))
            ray.train.report(
                {
                    "step": info.step,
                    "tokens": info.tokens_seen,
                    "validation_loss": info.validation_loss,
                },
                checkpoint=Checkpoint(path, self.filesystem),
                checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            )
            self.registered += 1


def patient_filesystem(storage: Storage) -> pyarrow.fs.FileSystem:
    """Storage as Ray Train wants it, for the few small files it keeps of a run. It ends a run whose
    files it cannot write at once; with this one it waits as we do."""
    return pyarrow.fs.PyFileSystem(_Patient(storage))


class _Patient(pyarrow.fs.FSSpecHandler):
    def __init__(self, storage: Storage) -> None:
        super().__init__(storage.fs)
        self.storage = storage

    def get_file_info(self, paths: list[str]) -> Any:
        return self.storage.retries.call(partial(super().get_file_info, paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.storage.retries.call(partial(super().get_file_info_selector, selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self.storage.retries.call(partial(super().create_dir, path, recursive))

    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_WrittenAtOnce(self.storage, path), mode="w")


class _WrittenAtOnce(io.BytesIO):
    def __init__(self, storage: Storage, path: str) -> None:
        super().__init__()
        self.storage, self.path = storage, path

    def close(self) -> None:
        if not self.closed:
            put = partial(self.storage.fs.pipe_file, self.path, self.getvalue())
            self.storage.retries.call(put)
        super().close()
