"""What a checkpoint is, which files it consists of, and how each of their bytes is checked.

    COMMITTED ──sha256──▶ checkpoint.<attempt>.json ──size, CRC-32──▶ every other file

The manifest holds a checksum of every block of every file, so that a part of one is checked without
reading the rest. Reading what is below ends in `UserError`s that begin with `checkpoint:`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from llama_ray.config.base import StrictModel
from llama_ray.config.model import ModelConfig
from llama_ray.data.tokenizer import TokenizerFile
from llama_ray.errors import UserError
from llama_ray.storage import Storage

MARKER = "COMMITTED"
BLOCK_BYTES: Final = 4194304
ATTEMPT = r"[0-9a-f]{8}"
FILE_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"  # in the checkpoint's folder itself
_LIBRARIES = ("torch", "ray", "numpy")

FileName = Annotated[str, Field(pattern=FILE_NAME)]


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


class CheckpointInfo(StrictModel):
    """What a checkpoint is, as who saves it says."""

    model: ModelConfig
    step: int = Field(ge=0)
    """Optimizer steps done."""
    tokens_seen: int = Field(ge=0)
    tokenizer_sha256: str
    tokenizer_file: TokenizerFile = "tokenizer.model"
    """Its name in the folder. Filled in when it is saved."""
    seed: int | None = None
    validation_loss: Annotated[float | None, BeforeValidator(_finite)] = None
    """In nats per token, at this very step; none was measured, or it was no number."""
    layout: dict[str, int] = Field({})
    """How many ranks of which kind saved it. Any other number loads it."""
    config: dict[str, Any] = Field({})
    """The whole job file, defaults included."""


class FileInfo(StrictModel):
    size: int = Field(ge=0)
    crc32: str = Field(pattern="^([0-9a-f]{8})*$")
    """zlib's CRC-32 of each block of `BLOCK_BYTES`, the last of which may be shorter: eight
    digits each."""

    @model_validator(mode="after")
    def _whole(self) -> FileInfo:
        if len(self.crc32) != 8 * block_count(self.size):
            raise ValueError(f"has checksums of {len(self.crc32) // 8} blocks, not of its size")
        return self

    @classmethod
    def of(cls, buffers: Iterable[bytes | memoryview]) -> FileInfo:
        """Of a file whose bytes are `buffers` (memory as bytes), one after the other."""
        size, crc, checksums = 0, 0, []
        for buffer in buffers:
            view = memoryview(buffer)
            while len(view):
                room = BLOCK_BYTES - size % BLOCK_BYTES
                part, view = view[:room], view[room:]
                crc = zlib.crc32(part, crc)
                size += len(part)
                if size % BLOCK_BYTES == 0:
                    checksums.append(crc)
                    crc = 0
        if size % BLOCK_BYTES:
            checksums.append(crc)
        return cls(size=size, crc32="".join(f"{checksum:08x}" for checksum in checksums))

    @property
    def checksums(self) -> np.ndarray:
        """uint32 [blocks]."""
        return np.frombuffer(bytes.fromhex(self.crc32), ">u4")


def block_count(size: int) -> int:
    return -(-size // BLOCK_BYTES)


class Manifest(StrictModel):
    """`checkpoint.<attempt>.json`."""

    version: Literal[1] = 1
    attempt: str = Field(pattern=f"^{ATTEMPT}$")
    """Of the run that saved it; part of its files' names, so that no other can overwrite them."""
    written: str
    """When, in UTC."""
    versions: dict[str, str]
    """Of the libraries it was written with."""
    info: CheckpointInfo
    index: FileName
    """The file that says where each tensor is."""
    block_bytes: Literal[4194304] = BLOCK_BYTES
    files: dict[FileName, FileInfo]
    """All but this one and the marker."""

    @classmethod
    def now(
        cls, attempt: str, info: CheckpointInfo, index: str, files: dict[str, FileInfo]
    ) -> Manifest:
        versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
        return cls(
            attempt=attempt,
            written=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"python": platform.python_version(), **versions},
            info=info,
            index=index,
            files=files,
        )


class Marker(StrictModel):
    """`COMMITTED`: what makes a folder a checkpoint. Small, for it alone is read of those that are
    only compared."""

    step: int
    attempt: str = Field(pattern=f"^{ATTEMPT}$")
    manifest: FileName
    sha256: str
    """Of the manifest."""
    validation_loss: float | None


def manifest_name(attempt: str) -> str:
    return f"checkpoint.{attempt}.json"


def read_marker(storage: Storage, folder: str) -> Marker:
    where = f"checkpoint: {storage.url(folder)}"
    try:
        data = storage.read(f"{folder}/{MARKER}")
    except FileNotFoundError:
        raise UserError(f"{where} is no committed checkpoint") from None
    try:
        return Marker.model_validate_json(data)
    except ValidationError:
        raise UserError(
            f"{where}/{MARKER} is damaged, or was written by a version of llama_ray that this one "
            "does not read; use another checkpoint"
        ) from None


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """What the committed checkpoint in `folder` consists of. Raises `UserError` where it is not
    committed, or this is not what was committed."""
    marker = read_marker(storage, folder)
    where = f"checkpoint: {storage.url(folder)}/{marker.manifest}"
    try:
        data = storage.read(f"{folder}/{marker.manifest}")
    except FileNotFoundError:
        raise UserError(f"{where} is missing; {_DAMAGED}") from None
    if hashlib.sha256(data).hexdigest() != marker.sha256:
        raise UserError(f"{where} is not what was committed (another SHA-256); {_DAMAGED}")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key}: {first['msg']}; {_DAMAGED}") from None


def check_sizes(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Raises `UserError` naming the first file that is missing or of another size."""
    sizes = storage.list(folder)
    for name, file in manifest.files.items():
        if sizes.get(name) != file.size:
            found = f"has {sizes[name]:,} bytes" if name in sizes else "is missing"
            raise UserError(
                f"checkpoint: {storage.url(folder)}/{name} {found} where {file.size:,} were "
                f"written; {_DAMAGED}"
            )


def read_small_file(storage: Storage, folder: str, manifest: Manifest, name: str) -> bytes:
    """A whole file of a checkpoint, checked."""
    where = f"checkpoint: {storage.url(folder)}/{name}"
    try:
        data = storage.read(f"{folder}/{name}")
    except FileNotFoundError:
        raise UserError(f"{where} is missing; {_DAMAGED}") from None
    if FileInfo.of([data]) != manifest.files.get(name):
        raise UserError(f"{where} is not what was written (another size or checksum); {_DAMAGED}")
    return data


_DAMAGED = "the checkpoint is damaged, use another"
