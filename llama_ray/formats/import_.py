"""`kind: import`: a model from elsewhere becomes the first checkpoint of a run."""

from __future__ import annotations

import time

from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.store import CheckpointStore, read_info
from llama_ray.checkpoint.writer import write_weights
from llama_ray.config.import_ import ImportConfig
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.format import duration, print_table
from llama_ray.formats.conversion import DTYPES, reporting, source_rows, total_bytes
from llama_ray.formats.open import open_source
from llama_ray.formats.source import WeightSource, as_dtype, read_checked
from llama_ray.storage import Storage

# What two imports must agree in to be the same.
_REQUEST = ("kind", "path", "format", "tokenizer", "max_seq_len", "dtype")


def describe_import(config: ImportConfig, dry_run: bool) -> None:
    """Print what the job will do. In a dry run model and target are looked at too, and refused as
    the job would; nothing is written."""
    storage = Storage(config.storage)
    rows = [("from", config.path)]
    if dry_run:
        _is_done(config, storage)
        rows = source_rows(_open(config, storage)[0])
    rows += [("dtype", config.dtype), ("writes to", storage.url(f"runs/{config.name}"))]
    print_table(f"import {config.name}", rows)


def import_model(config: ImportConfig) -> None:
    """Raises `UserError` where the model cannot be read or expressed, or the run is another's."""
    started = time.monotonic()
    storage = Storage(config.storage)
    if _is_done(config, storage):
        print(f"{storage.url(f'runs/{config.name}')} is imported already; nothing to do")
        return
    source, tokenizer = _open(config, storage)
    storage.check_writable()
    CheckpointStore(storage, config.name).clean_up()
    storage.require_space(total_bytes(source))
    info = CheckpointInfo(
        model=source.config,
        step=0,
        tokens_seen=0,
        tokenizer_sha256=Tokenizer(tokenizer).sha256,
        config=config.model_dump(),
    )
    with reporting(source, "import") as counted:
        tensors = read_checked(counted)
        folder = write_weights(storage, config.name, info, tokenizer, tensors)
    rows = [
        *source_rows(source),
        ("took", duration(time.monotonic() - started)),
        ("written to", storage.url(folder)),
    ]
    print_table(f"import {config.name}", rows)


def _open(config: ImportConfig, storage: Storage) -> tuple[WeightSource, bytes]:
    """The model and its tokenizer, without which there is no run."""
    source = open_source(config.path, storage, config.format, config.tokenizer, key="path")
    if config.max_seq_len is not None:
        source.config = source.config.model_copy(update={"max_seq_len": config.max_seq_len})
    if source.tokenizer is None:
        raise UserError(
            f"tokenizer: {source.description} brings none; name its `tokenizer.model` or "
            "`tokenizer.json`"
        )
    return as_dtype(source, DTYPES[config.dtype]), source.tokenizer


def _is_done(config: ImportConfig, storage: Storage) -> bool:
    """Whether the run is this very import. Raises `UserError` where it is another run."""
    store = CheckpointStore(storage, config.name)
    steps = store.committed_steps()
    if not steps:
        return False
    before, now = read_info(storage, store.path(steps[0])).config, config.model_dump()
    differing = [key for key in _REQUEST if before.get(key) != now[key]]
    url = storage.url(f"runs/{config.name}")
    if "kind" in differing or "path" in differing:
        raise UserError(
            f"name: {url} holds checkpoints already (up to step "
            f"{steps[-1]:,}) that were not imported from {config.path}; choose another name"
        )
    if differing:
        key = differing[0]
        raise UserError(
            f"{key}: {url} was imported with {key} {before.get(key)!r}, not {now[key]!r}; choose "
            "another name"
        )
    return True
