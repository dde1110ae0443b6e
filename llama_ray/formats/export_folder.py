"""The folder that an export writes: whose it is, and whether it is whole.

`export.json` says so: written first, as not complete, with the id of this attempt, and last as
complete. Whoever begins an export to a folder where another did not come to its end takes it over.
Should that one be alive still, it finds the id of another and stops: a file of its appears only
while the id is its own.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, ValidationError

from llama_ray.config.base import StrictModel
from llama_ray.errors import UserError
from llama_ray.formats.place import Place
from llama_ray.formats.stream import Counted
from llama_ray.transfer import abort_stale_uploads

MANIFEST = "export.json"
_MANIFEST_BYTES = 1 << 20


class Request(StrictModel):
    """What two exports must agree in to be the same."""

    source: str
    tokenizer_sha256: str | None
    format: str
    dtype: str
    model_parallel: int
    quantization: str | None


class Export(StrictModel):
    """`export.json`."""

    request: Request
    attempt: str
    complete: bool = False
    files: dict[str, int] = Field({})
    """Name → size in bytes of all files but this one."""


def state(folder: Place, request: Request) -> Literal["new", "cut", "complete"]:
    """What is there of this very export. Raises `UserError` where something else lies there."""
    files = folder.files()
    if not files:
        return "new"
    if MANIFEST not in files:
        raise UserError(f"to: {folder.url} holds files that no export wrote; choose another folder")
    file = folder.child(MANIFEST)
    found = _parsed(file, file.read_small(_MANIFEST_BYTES))
    if not found.complete:
        return "cut"
    if (other := found.request) != request:
        raise UserError(
            f"name: {folder.url} holds another export ({other.source} as {other.format}, dtype "
            f"{other.dtype}); choose another name or `to`, or delete it"
        )
    for name, size in found.files.items():
        if files.get(name) != size:
            raise UserError(
                f"{folder.child(name).url} is not as it was exported; delete the folder and export "
                "again"
            )
    return "complete"


@dataclass(frozen=True)
class Claim:
    """One attempt at an export."""

    folder: Place
    request: Request
    attempt: str
    files: dict[str, int] = field(default_factory=dict)
    """What was written: name → size in bytes."""

    def check(self) -> None:
        """Raises `UserError` where the folder is another's by now."""
        file = self.folder.child(MANIFEST)
        try:
            if _parsed(file, file.storage.read(file.path)).attempt == self.attempt:
                return
        except FileNotFoundError:
            pass  # it is being removed
        raise UserError(
            f"name: another export to {self.folder.url} has begun meanwhile, this one stopped; "
            "give each its own name or `to`"
        )

    def complete(self) -> None:
        self.check()
        self._write(complete=True)

    def _write(self, complete: bool) -> None:
        manifest = Export(
            request=self.request, attempt=self.attempt, complete=complete, files=self.files
        )
        file = self.folder.child(MANIFEST)
        file.storage.write_json(file.path, manifest.model_dump())


@dataclass(frozen=True)
class ClaimedPlace(Place):
    """A folder or file of an attempt."""

    claim: Claim

    def child(self, name: str) -> ClaimedPlace:
        place = super().child(name)
        return ClaimedPlace(place.storage, place.path, self.claim)

    def write(self, data: bytes) -> None:
        self.claim.check()
        super().write(data)
        self.claim.files[self.name] = len(data)

    @contextmanager
    def open_upload(self) -> Iterator[Counted]:
        with super().open_upload() as out:
            yield out
            self.claim.check()
        self.claim.files[self.name] = out.tell()


def begin(folder: Place, request: Request) -> ClaimedPlace:
    """Take the folder, and remove what a cut attempt has left in it."""
    claim = Claim(folder, request, secrets.token_hex(4))
    claim._write(complete=False)
    abort_stale_uploads(folder.storage, folder.path)
    for name in folder.files().keys() - {MANIFEST}:
        folder.storage.delete(folder.child(name).path)
    return ClaimedPlace(folder.storage, folder.path, claim)


def _parsed(file: Place, data: bytes) -> Export:
    try:
        return Export.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{file.url}: {error.errors()[0]['msg']}; delete the folder") from None
