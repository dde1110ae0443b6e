"""The checkpoints of a run: which count, which are kept, what is cleared away.

    runs/<run>/checkpoints/
        latest                                 step and folder of the newest, for other programs
        step-00000500/
            weights-….safetensors  optimizer-….safetensors  tokenizer.model (.json)
            index.<attempt>.json               where each tensor is
            checkpoint.<attempt>.json          the manifest: what it is, checksums of all files
            COMMITTED                          written last; without it there is no checkpoint

An attempt is one start of a run's workers. Its id is in the names of what it writes, so that one
given up for dead that still writes cannot spoil what another has written since; and of two that
write the same step one gets the marker.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from llama_ray.checkpoint.files import WrittenFile
from llama_ray.checkpoint.index import Index
from llama_ray.checkpoint.manifest import (
    MARKER,
    CheckpointInfo,
    FileInfo,
    Manifest,
    Marker,
    check_sizes,
    manifest_name,
    read_manifest,
    read_marker,
)
from llama_ray.config.pretrain import CheckpointConfig
from llama_ray.data.tokenizer import TOKENIZER_FILES, tokenizer_file
from llama_ray.errors import UserError
from llama_ray.storage import Storage
from llama_ray.transfer import abort_stale_uploads, put_if_absent

LATEST = "latest"


class TakenError(RuntimeError):
    """Another start of the run has saved this step: whoever is started next goes on from there."""


class CheckpointStore:
    """The checkpoints of one run, oldest first."""

    def __init__(self, storage: Storage, run: str) -> None:
        self.storage = storage
        self.run = run
        self.root = f"runs/{run}/checkpoints"

    @classmethod
    def of_folder(cls, storage: Storage, folder: str) -> CheckpointStore:
        """Of a run that may lie elsewhere than in `runs/` below `storage.url`."""
        store = cls(storage, folder.rpartition("/")[2])
        store.root = f"{folder}/checkpoints"
        return store

    def path(self, step: int) -> str:
        """Folder of a step's checkpoint, relative to `storage.url`."""
        return f"{self.root}/step-{step:08d}"

    def committed_steps(self) -> list[int]:
        """Steps of the checkpoints that are whole, ascending."""
        return sorted(step for step, files in self._folders().items() if _is_committed(files))

    def commit(
        self, info: CheckpointInfo, attempt: str, tokenizer: bytes, written: Sequence[WrittenFile]
    ) -> None:
        """Everything is uploaded: say what and where it is, then mark it. From here on it is
        loaded. Raises `TakenError` where another attempt has marked this step."""
        folder = self.path(info.step)
        info = info.model_copy(update={"tokenizer_file": tokenizer_file(tokenizer)})
        small = {
            info.tokenizer_file: tokenizer,
            f"index.{attempt}.json": Index.of(written).to_json(),
        }
        files = {file.name: file.info for file in written}
        for name, data in small.items():
            self.storage.write(f"{folder}/{name}", data)
            files[name] = FileInfo.of([data])
        manifest = Manifest.now(attempt, info, f"index.{attempt}.json", files)
        # Another start of this run may have taken us for dead and cleared our files away.
        check_sizes(self.storage, folder, manifest)
        text = manifest.model_dump_json().encode()
        self.storage.write(f"{folder}/{manifest_name(attempt)}", text)
        marker = Marker(
            step=info.step,
            attempt=attempt,
            manifest=manifest_name(attempt),
            sha256=hashlib.sha256(text).hexdigest(),
            validation_loss=info.validation_loss,
        )
        self._mark(folder, marker)
        self.point_to_latest([info.step])

    def _mark(self, folder: str, marker: Marker) -> None:
        if put_if_absent(self.storage, f"{folder}/{MARKER}", marker.model_dump_json().encode()):
            return
        # Ours may be there although its answer was lost.
        if (found := read_marker(self.storage, folder)) != marker:
            # Beside the other's marker ours would say that something is committed.
            self.storage.delete(f"{folder}/{marker.manifest}")
            raise TakenError(
                f"{self.storage.url(folder)} was committed by another start of this run (attempt "
                f"{found.attempt}; this is {marker.attempt})"
            )

    def point_to_latest(self, steps: Sequence[int]) -> None:
        """Let `latest` name the last of `steps`. For other programs: we go by the markers."""
        if steps:
            pointer = {"step": steps[-1], "folder": self.path(steps[-1]).rpartition("/")[2]}
            self.storage.write_json(f"{self.root}/{LATEST}", pointer)

    def prune(self, config: CheckpointConfig) -> None:
        """Remove the committed checkpoints that `config` does not keep, marker first."""
        steps = self.committed_steps()
        losses: dict[int, float | None] = dict.fromkeys(steps)
        if config.keep_best:
            for step in steps:
                losses[step] = read_marker(self.storage, self.path(step)).validation_loss
        for step in sorted(losses.keys() - kept(losses, config)):
            self.storage.delete(f"{self.path(step)}/{MARKER}")
            self.storage.delete(self.path(step))

    def clean_up(self) -> list[str]:
        """Remove what interrupted saves have left, and set `latest` right: at a run's start, when
        nobody saves. Returns what was removed, relative to the checkpoints' folder."""
        removed = []
        for step, files in self._folders().items():
            folder = self.path(step)
            if not _is_committed(files):
                removed.append(folder)
                continue
            try:
                attempt = read_marker(self.storage, folder).attempt
            except UserError:
                continue  # damaged, or of another version: not ours to remove
            ours = {MARKER, *TOKENIZER_FILES}
            for name in files:
                if name not in ours and not re.fullmatch(rf"[\w-]+\.{attempt}\.\w+", name):
                    removed.append(f"{folder}/{name}")
        for path in removed:
            self.storage.delete(path)
        abort_stale_uploads(self.storage, self.root)
        self.point_to_latest(self.committed_steps())
        return [path.removeprefix(f"{self.root}/") for path in removed]

    def _folders(self) -> dict[int, list[str]]:
        """Step → names of the files in its folder."""
        folders: dict[int, list[str]] = {}
        for path in self.storage.list(self.root):
            if match := re.fullmatch(r"step-(\d+)/(.+)", path):
                folders.setdefault(int(match[1]), []).append(match[2])
        return folders


def _is_committed(files: Iterable[str]) -> bool:
    """By the names in a folder. A marker alone may be left where two starts of a run have got into
    each other's way: it says nothing."""
    names = set(files)
    return MARKER in names and any(
        re.fullmatch(r"checkpoint\.(\w+\.)?json", name) for name in names
    )


def kept(losses: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """The steps to keep, of those given with their validation losses."""
    newest = set(sorted(losses)[-config.keep :])
    regular = {step for step in losses if config.keep_every and step % config.keep_every == 0}
    measured = [(loss, step) for step, loss in losses.items() if loss is not None]
    best = {step for _, step in sorted(measured)[: config.keep_best]}
    return newest | regular | best


def read_info(storage: Storage, folder: str) -> CheckpointInfo:
    """Describe the committed checkpoint in `folder`; sizes are checked against what is there.

    Raises `UserError` where it is not committed, damaged or incomplete.
    """
    manifest = read_manifest(storage, folder)
    check_sizes(storage, folder, manifest)
    return manifest.info


def resolve(storage: Storage, checkpoint: str) -> str:
    """`runs/<name>`, or the folder of a run elsewhere → the folder of its newest committed
    checkpoint; a checkpoint's own folder stays as it is."""
    checkpoint = checkpoint.rstrip("/")
    if not re.fullmatch(r"runs/[^/]+", checkpoint) and not is_run(storage, checkpoint):
        return checkpoint
    store = CheckpointStore.of_folder(storage, checkpoint)
    if not (steps := store.committed_steps()):
        raise UserError(
            f"checkpoint: {storage.url(checkpoint)} holds no committed checkpoint; "
            "train it first (ray job submit jobs/pretrain.yaml), or correct the name"
        )
    return store.path(steps[-1])


def is_run(storage: Storage, folder: str) -> bool:
    """Whether the folder holds the checkpoints of a run."""
    return storage.exists(f"{folder}/checkpoints")
