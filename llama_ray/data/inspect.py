"""Is what a `prepare` job wrote whole, and what is in it? (Checkpoints: `llama_ray.checkpoint`.)

manifest ─▶ its table ─▶ every file of every shard, read on Ray ─▶ a few documents as text
"""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from llama_ray.checkpoint.inspect import inspect_checkpoint
from llama_ray.config.inspect import InspectConfig
from llama_ray.data.execution import data_context
from llama_ray.data.progress import Progress, Tally
from llama_ray.data.shards import (
    OFFSET_DTYPE,
    SPLITS,
    Shard,
    TokenManifest,
    folder,
    read_tokens,
    tokenizer_path,
    unigrams_path,
)
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.data.verify import Expected, shard_damage
from llama_ray.errors import UserError, user_error_cause
from llama_ray.format import print_table, si
from llama_ray.formats.place import locate
from llama_ray.local import connect
from llama_ray.storage import Storage

TOKENS_PER_CHARACTER = 4  # at most: one a byte
MAX_TASKS = 2000

Damage = tuple[str, str]
"""A file, and what is wrong with it."""


def describe_inspect(config: InspectConfig) -> None:
    """Print what the job will do. Touches nothing."""
    what = config.checkpoint or folder(config.tokens or "")
    place = locate(what, Storage(config.storage), "checkpoint")
    print_table(f"inspect {what}", [("reads", f"{place.url}, every byte")])


def inspect(config: InspectConfig) -> None:
    """Print what the tokens or the checkpoint are. Raises `UserError` naming every damaged file."""
    storage = Storage(config.storage)
    if config.checkpoint is not None:
        inspect_checkpoint(config.checkpoint, storage)
    if config.tokens is not None:
        inspect_tokens(config, config.tokens, storage)


def inspect_tokens(config: InspectConfig, name: str, storage: Storage) -> None:
    """Their table, and some documents."""
    manifest = TokenManifest.find(storage, name)
    if manifest is None:
        raise UserError(
            f"tokens: {storage.url(folder(name))} holds no prepared tokens; run the "
            f"`prepare` job whose name is {name!r} first, or correct tokens"
        )
    print_manifest(manifest)
    damage = list(_other_damage(storage, manifest))
    tokenizer = None
    if not damage:
        tokenizer = manifest.tokenizer(storage)
    connect()
    try:
        with data_context():
            damage += _verify(storage, manifest, tokenizer)
    except Exception as error:
        # Ray's wrapper is a UserError too, whose message is a traceback.
        cause = user_error_cause(error)
        if cause is None or cause is error:
            raise
        raise cause from None
    if tokenizer is not None:
        damaged = {file.rpartition(".")[0] for file, _ in damage}
        _print_documents(storage, manifest, tokenizer, config, damaged)
    if damage:
        raise UserError(_explained(storage, damage))
    print(f"every file of {storage.url(folder(manifest.name))} is as it was written")


def print_manifest(manifest: TokenManifest) -> None:
    header = ("", "source", "shards", "documents", "tokens", "share", "bytes/token")
    rows: list[Sequence[str]] = [header]
    for split in SPLITS:
        total = manifest.tokens(split)
        for source, part in manifest.split(split).items():
            per_token = part.text_bytes / part.tokens if part.tokens else 0.0
            rows.append(
                (
                    split,
                    source,
                    f"{len(part.shards):,}",
                    f"{part.documents:,}",
                    f"{part.tokens:,}",
                    f"{part.tokens / total:.2%}",
                    f"{per_token:.2f}",
                )
            )
    print(f"\ntokens {manifest.name}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if column > 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(["", *cells]))
    extends = f", extends {manifest.extends}" if manifest.extends else ""
    print(
        f"\n  vocabulary {manifest.vocab_size:,} ({manifest.tokenizer_file}, sha256 "
        f"{manifest.tokenizer_sha256[:12]}…), {manifest.dtype}{extends}\n"
        f"  {manifest.bytes_per_token:.2f} bytes a token, unigram entropy "
        f"{manifest.unigram_entropy_nats:.3f} nats a token\n"
    )


def _other_damage(storage: Storage, manifest: TokenManifest) -> Iterator[Damage]:
    """Of what is no shard: the tokenizer, the counts, the manifest itself."""
    files = {tokenizer_path(manifest.name, manifest.tokenizer_file): manifest.tokenizer_sha256}
    if manifest.unigrams_sha256 is not None:
        files[unigrams_path(manifest.name)] = manifest.unigrams_sha256
    for path, sha256 in files.items():
        try:
            data = storage.read(path)
        except FileNotFoundError:
            yield path, "is missing"
            continue
        if hashlib.sha256(data).hexdigest() != sha256:
            yield path, "has another checksum than the manifest says"
    for source, splits in manifest.sources.items():
        for split, part in splits.items():
            sums = [sum(getattr(s, key) for s in part.shards) for key in ("tokens", "documents")]
            if sums != [part.tokens, part.documents]:
                yield (
                    f"{folder(manifest.name)}/manifest.json",
                    f"gives {source}, {split} other totals than those of its shards",
                )


def _verify(storage: Storage, manifest: TokenManifest, tokenizer: Tokenizer | None) -> list[Damage]:
    """Read every shard; what is wrong with them, in the manifest's order."""
    expected = _expected(storage, manifest, tokenizer)
    shards = manifest.shards()
    tally, progress = Tally.start(), Progress(["verify"])
    total = sum(size for shard in shards for size, _ in shard.files(manifest.dtype).values())
    work = [
        {"number": number, "folder": manifest.folder_of(shard), "shard": shard.model_dump_json()}
        for number, shard in enumerate(shards)
    ]

    def totals() -> Counter[str]:
        return ray.get(tally.totals.remote("verify"))

    with progress.stage("verify", totals, total):
        found = (
            ray.data.from_items(work, override_num_blocks=min(len(work), MAX_TASKS))
            .map_batches(
                _verify_shards,  # type: ignore[arg-type]  # Ray's hint knows no fn_args
                fn_args=(storage, expected, tally),
                batch_size=None,
                batch_format="pyarrow",
            )
            .take_all()
        )
    return [(row["file"], row["what"]) for row in found]


def _expected(
    storage: Storage, manifest: TokenManifest, tokenizer: Tokenizer | None
) -> dict[str, Expected]:
    """By tokens folder: those that are extended may have been cut otherwise."""
    names = {shard.folder or manifest.name for shard in manifest.shards()}
    found = {}
    for name in names:
        owner = manifest if name == manifest.name else TokenManifest.load(storage, name)
        found[folder(name)] = Expected(
            manifest.dtype,
            manifest.vocab_size,
            None if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id),
            owner.config.get("shards", {}).get("max_document_tokens"),
        )
    return found


def _verify_shards(
    work: pa.Table, storage: Storage, expected: dict[str, Expected], tally: Any
) -> pa.Table:
    damage: list[Damage] = []
    for row in work.to_pylist():
        shard = Shard.model_validate_json(row["shard"])
        mine = expected[row["folder"]]
        damage += shard_damage(storage, row["folder"], shard, mine)
        size = sum(size for size, _ in shard.files(mine.dtype).values())
        counts = {"documents": shard.documents, "tokens": shard.tokens, "bytes": size, "done": size}
        Tally.reporter(tally, "verify", row["number"])(counts, wait=True)
    files, whats = zip(*damage, strict=True) if damage else ((), ())
    return pa.table({"file": pa.array(files, pa.string()), "what": pa.array(whats, pa.string())})


def _print_documents(
    storage: Storage,
    manifest: TokenManifest,
    tokenizer: Tokenizer,
    config: InspectConfig,
    damaged: set[str],
) -> None:
    """The first documents of each source's first whole training shard: documents are shuffled, so
    these are as good as any."""
    for source, part in manifest.split("train").items():
        paths = {f"{manifest.folder_of(shard)}/{shard.path}": shard for shard in part.shards}
        whole = [path for path in paths if path not in damaged]
        if not whole:
            continue
        path, shard = whole[0], paths[whole[0]]
        n = min(config.documents, shard.documents)
        data = storage.read_range(f"{path}.offsets", 0, (n + 1) * OFFSET_DTYPE.itemsize)
        offsets = np.frombuffer(data, OFFSET_DTYPE).tolist()
        for number, (start, stop) in enumerate(pairwise(offsets)):
            shown = min(stop, start + config.characters * TOKENS_PER_CHARACTER)
            ids = read_tokens(storage, manifest, shard, start, shown).tolist()
            text = tokenizer.decode(ids)
            cut = " …" if len(text) > config.characters or shown < stop else ""
            print(f"── {source}, document {number} of {shard.path}: {si(stop - start)} tokens")
            print(textwrap.indent(text[: config.characters] + cut, "   "), end="\n\n")


def _explained(storage: Storage, damage: list[Damage]) -> str:
    lines = [f"{storage.url(file)} {what}" for file, what in damage]
    folders = sorted({"/".join(file.split("/")[:2]) for file, _ in damage})
    remedy = f"restore them, or delete {' and '.join(folders)} and prepare again"
    files = len({file for file, _ in damage})
    return f"tokens: {files:,} damaged file{'s' * (files > 1)}; {remedy}:\n  " + "\n  ".join(lines)
