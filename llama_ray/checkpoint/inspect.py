"""Is a checkpoint whole, and what is it? `kind: inspect` with `checkpoint`.

manifest ─▶ its table ─▶ every byte of every file, read on Ray
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray

from llama_ray.checkpoint.index import Index, parse_index
from llama_ray.checkpoint.manifest import Manifest, read_manifest, read_small_file
from llama_ray.checkpoint.store import resolve
from llama_ray.checkpoint.verify import (
    FileToCheck,
    by_file,
    file_damage,
    index_damage,
    size_damage,
)
from llama_ray.data.progress import Progress, Tally
from llama_ray.errors import UserError, user_error_cause
from llama_ray.format import count, print_table, si
from llama_ray.formats.place import locate
from llama_ray.local import connect
from llama_ray.storage import Storage

Damage = tuple[str, str]
"""A file, and what is wrong with it."""


def inspect_checkpoint(checkpoint: str, storage: Storage) -> None:
    """Print what the checkpoint is: `runs/<name>`, a checkpoint's folder, or either by path or URL.
    Raises `UserError` naming every damaged file."""
    place = locate(checkpoint, storage, "checkpoint")
    storage, folder = place.storage, resolve(place.storage, place.path)
    manifest = read_manifest(storage, folder)
    print_manifest(storage.url(folder), manifest)
    missing = size_damage(manifest, storage.list(folder))
    damage: list[Damage] = list(missing.items())
    index, found = _read_index(storage, folder, manifest)
    damage += found
    damage += _tokenizer_damage(storage, folder, manifest)
    connect()
    try:
        damage += _verify(storage, _to_check(folder, manifest, index, missing))
    except Exception as error:
        # Ray's wrapper is a UserError too, whose message is a traceback.
        cause = user_error_cause(error)
        if cause is None or cause is error:
            raise
        raise cause from None
    if damage:
        lines = [f"{storage.url(folder)}/{file} {what}" for file, what in dict.fromkeys(damage)]
        n_files = len({file for file, _ in damage})
        plural = "s" * (n_files > 1)
        raise UserError(
            f"checkpoint: {n_files:,} damaged file{plural}; use another checkpoint:\n  "
            + "\n  ".join(lines)
        )
    print(f"every file of {storage.url(folder)} is as it was written")


def print_manifest(url: str, manifest: Manifest) -> None:
    info = manifest.info
    size = sum(file.size for file in manifest.files.values())
    layout = ", ".join(f"{name} {n:,}" for name, n in info.layout.items())
    loss = info.validation_loss
    optimizer = any(name.startswith("optimizer") for name in manifest.files)
    print_table(
        f"checkpoint {url}",
        [
            ("step", f"{info.step:,}"),
            ("tokens seen", f"{info.tokens_seen:,}"),
            ("validation loss", "not measured at this step" if loss is None else f"{loss:.4f}"),
            ("model", f"{count(info.model.n_params)} parameters ({info.model})"),
            ("optimizer", "with it" if optimizer else "weights alone"),
            ("saved by", layout or "one process"),
            ("size", f"{si(size, 'B')} in {len(manifest.files):,} files"),
            ("tokenizer", f"{info.tokenizer_file}, sha256 {info.tokenizer_sha256[:12]}…"),
            ("written", f"{manifest.written}, attempt {manifest.attempt}"),
            ("with", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())),
        ],
    )


def _read_index(
    storage: Storage, folder: str, manifest: Manifest
) -> tuple[Index | None, list[Damage]]:
    try:
        data = read_small_file(storage, folder, manifest, manifest.index)
        index = parse_index(data, manifest.files, "is no index")
    except UserError as error:
        return None, [(manifest.index, _without_name(error, storage, folder, manifest.index))]
    return index, [(manifest.index, what) for what in index_damage(index, manifest)]


def _tokenizer_damage(storage: Storage, folder: str, manifest: Manifest) -> Iterator[Damage]:
    name = manifest.info.tokenizer_file
    try:
        data = read_small_file(storage, folder, manifest, name)
    except UserError as error:
        yield name, _without_name(error, storage, folder, name)
        return
    if hashlib.sha256(data).hexdigest() != manifest.info.tokenizer_sha256:
        yield name, "is not the tokenizer that the weights were trained with (another SHA-256)"


def _without_name(error: UserError, storage: Storage, folder: str, name: str) -> str:
    return str(error).removeprefix(f"checkpoint: {storage.url(folder)}/{name} ").partition(";")[0]


def _to_check(
    folder: str, manifest: Manifest, index: Index | None, missing: dict[str, str]
) -> list[FileToCheck]:
    small = {manifest.index, manifest.info.tokenizer_file}
    held = {} if index is None else by_file(index)
    return [
        FileToCheck(f"{folder}/{name}", info, held.get(name, []))
        for name, info in manifest.files.items()
        if name not in small and name not in missing
    ]


def _verify(storage: Storage, files: list[FileToCheck]) -> list[Damage]:
    """A task a file; what is wrong, in the manifest's order."""
    tally, progress = Tally.start(), Progress(["verify"])

    def totals() -> Counter[str]:
        return ray.get(tally.totals.remote("verify"))

    with progress.stage("verify", totals, sum(file.info.size for file in files)):
        tasks = [
            _verify_file.remote(storage, file, tally, number) for number, file in enumerate(files)
        ]
        found = ray.get(tasks)
    return [damage for of_file in found for damage in of_file]


@ray.remote
def _verify_file(storage: Storage, file: FileToCheck, tally: Any, number: int) -> list[Damage]:
    report = Tally.reporter(tally, "verify", number)
    name = file.path.rpartition("/")[2]
    damage = [
        (name, what)
        for what in file_damage(storage, file, lambda n: report({"bytes": n, "done": n}))
    ]
    report({"bytes": file.info.size, "done": file.info.size}, wait=True)
    return damage
