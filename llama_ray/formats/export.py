"""`kind: export`: weights, wherever they lie, in the format of other programs.

    exports/<name>/
        export.json     of what and as what, and whether it is complete (`export_folder`)
        …               the format's own files, those that make it loadable last

A job that was cut leaves `export.json` not complete: the same job then starts over.
"""

from __future__ import annotations

import hashlib
import time

from llama_ray.config.export import ExportConfig
from llama_ray.errors import UserError
from llama_ray.format import duration, print_table, si
from llama_ray.formats.conversion import DTYPES, reporting, source_rows, total_bytes
from llama_ray.formats.export_folder import Request, begin, state
from llama_ray.formats.gguf import check_gguf, write_gguf
from llama_ray.formats.hf_write import other_files, write_hf
from llama_ray.formats.meta_write import check_model_parallel, write_meta
from llama_ray.formats.open import open_source
from llama_ray.formats.place import Place, locate
from llama_ray.formats.source import WeightSource, as_dtype
from llama_ray.storage import Storage


def describe_export(config: ExportConfig, dry_run: bool) -> None:
    """Print what the job will do. In a dry run model and target are looked at too, and refused as
    the job would; nothing is written."""
    storage = Storage(config.storage)
    rows, target = [("from", config.checkpoint)], _target(config, storage)
    if dry_run:
        source = _open(config, storage)
        _check(source, config)
        state(target, _request(source, config))
        rows = source_rows(source)
    print_table(f"export {config.name}", [*rows, ("as", _as(config)), ("writes to", target.url)])


def export(config: ExportConfig) -> None:
    """Raises `UserError` where the source or the target is not what it should be."""
    started = time.monotonic()
    storage = Storage(config.storage)
    source, target = _open(config, storage), _target(config, storage)
    _check(source, config)
    request = _request(source, config)
    if (found := state(target, request)) == "complete":
        print(f"{target.url} is exported already; nothing to do")
        return
    if found == "cut":
        print(f"starting over: an export to {target.url} did not come to its end")
    _check_writable(target, config)
    target.storage.require_space(total_bytes(source))
    folder = begin(target, request)
    try:
        with reporting(source, "export") as counted:
            _write(counted, folder, config)
    except Exception:
        folder.claim.check()  # another that takes the folder removes what is under way
        raise
    folder.claim.complete()
    files, seconds = folder.claim.files, time.monotonic() - started
    rows = [
        *source_rows(source),
        ("as", _as(config)),
        ("files", f"{len(files)}, {si(sum(files.values()), 'B')} in {duration(seconds)}"),
        ("written to", target.url),
    ]
    print_table(f"export {config.name}", rows)


def _open(config: ExportConfig, storage: Storage) -> WeightSource:
    source = open_source(config.checkpoint, storage, tokenizer=config.tokenizer)
    return as_dtype(source, DTYPES[config.dtype])


def _check(source: WeightSource, config: ExportConfig) -> None:
    """Raises `UserError` where the format cannot express the model or its tokenizer."""
    if config.format == "hf":
        other_files(source)
    elif config.format == "meta":
        check_model_parallel(source.config, config.model_parallel)
    else:
        check_gguf(source)


def _check_writable(target: Place, config: ExportConfig) -> None:
    if config.to is None:
        target.storage.check_writable()
        return
    try:
        target.storage.check_writable()
    except (UserError, OSError) as error:
        reason = str(error).removeprefix(f"storage.url: {target.storage.config.url}: ")
        raise UserError(f"to: {target.url} cannot be written: {reason}") from None


def _write(source: WeightSource, folder: Place, config: ExportConfig) -> None:
    if config.format == "hf":
        write_hf(source, folder)
    elif config.format == "meta":
        write_meta(source, folder, config.model_parallel)
    else:
        write_gguf(source, folder, config.name, config.quantization)


def _target(config: ExportConfig, storage: Storage) -> Place:
    return locate(config.to or f"exports/{config.name}", storage, "to")


def _request(source: WeightSource, config: ExportConfig) -> Request:
    pieces = source.tokenizer
    return Request(
        source=source.description,
        tokenizer_sha256=None if pieces is None else hashlib.sha256(pieces).hexdigest(),
        format=config.format,
        dtype=config.dtype,
        model_parallel=config.model_parallel,
        quantization=config.quantization,
    )


def _as(config: ExportConfig) -> str:
    dtype = "types as stored" if config.dtype == "stored" else config.dtype
    return {
        "hf": f"Hugging Face, {dtype}",
        "meta": f"Meta, model parallel {config.model_parallel}, {dtype}",
        "gguf": f"GGUF, {config.quantization or dtype}",
    }[config.format]
