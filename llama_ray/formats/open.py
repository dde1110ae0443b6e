"""Finds out what a path leads to, and opens it as a source of weights."""

from __future__ import annotations

import re
from typing import Literal

from llama_ray.checkpoint.manifest import MARKER
from llama_ray.checkpoint.store import is_run
from llama_ray.errors import UserError
from llama_ray.formats.checkpoint import CheckpointSource
from llama_ray.formats.hf_read import CONFIG, HuggingFaceSource
from llama_ray.formats.hf_tokenizer import check_vocabulary, read_tokenizer
from llama_ray.formats.llama2c import open_llama2c
from llama_ray.formats.meta import open_meta
from llama_ray.formats.meta_params import PARAMS_FILE
from llama_ray.formats.place import Place, locate
from llama_ray.formats.source import WeightSource
from llama_ray.storage import Storage

Format = Literal["auto", "hf", "meta", "llama2c"]


def open_source(
    path: str,
    storage: Storage,
    format: Format = "auto",
    tokenizer: str | None = None,
    key: str = "checkpoint",
) -> WeightSource:
    """`runs/<name>` or another folder below `storage.url`, or a local path or URL: a run or
    checkpoint of ours, a folder in Hugging Face's or Meta's format, or a llama2.c `.bin`.

    tokenizer: path or URL of the one to use instead of that beside the weights. Raises `UserError`
    beginning with `key`, which names `path` in the job file, or with the file that is wrong.
    """
    place = locate(path, storage, key)
    given = None
    if tokenizer is not None:
        given = _read_tokenizer(locate(tokenizer, storage, "tokenizer"))
    source = _open(place, format, given, key)
    check_vocabulary(source.tokenizer, source.config.vocab_size, source.description)
    return source


def _read_tokenizer(file: Place) -> bytes:
    found = file.files()
    if not found:
        raise UserError(f"tokenizer: {file.url} does not exist; check the path")
    if "" not in found:
        raise UserError(
            f"tokenizer: {file.url} is a folder; name the `tokenizer.model` or `tokenizer.json` in "
            "it"
        )
    return read_tokenizer(file)


def _open(place: Place, format: Format, tokenizer: bytes | None, key: str) -> WeightSource:
    if format == "auto" and _is_named_run(place):
        return _open_checkpoint(place, tokenizer, key)
    if not place.exists():
        raise UserError(
            f"{key}: {place.url} does not exist; check the path (names without a leading `/` or "
            "`./` lie below storage.url)"
        )
    kind = _guess(place, key) if format == "auto" else format
    if kind == "ours":
        return _open_checkpoint(place, tokenizer, key)
    if kind == "hf":
        return HuggingFaceSource(place, tokenizer)
    if kind == "meta":
        return open_meta(place, tokenizer)
    return open_llama2c(place, tokenizer)


def _is_named_run(place: Place) -> bool:
    """Whether this is named as a run or a checkpoint of ours, be it there or not."""
    return place.path.startswith("runs/")


def _open_checkpoint(place: Place, tokenizer: bytes | None, key: str) -> CheckpointSource:
    try:
        return CheckpointSource(place, tokenizer)
    except UserError as error:
        # Whoever reads checkpoints names the key that nearly all job files have them under.
        raise UserError(re.sub("^checkpoint:", f"{key}:", str(error))) from None


def _guess(place: Place, key: str) -> Literal["ours", "hf", "meta", "llama2c"]:
    if place.name.endswith(".bin"):
        return "llama2c"
    if place.child(MARKER).exists():
        return "ours"
    if place.child(CONFIG).exists():
        return "hf"
    if place.child(PARAMS_FILE).exists():
        return "meta"
    if is_run(place.storage, place.path):
        return "ours"
    hint = ""
    if any(f"{place.name}/{name}".rstrip("/").endswith(".gguf") for name in place.files()):
        hint = "; GGUF is written, not read: transformers makes a Hugging Face folder of one"
    raise UserError(
        f"{key}: {place.url} is no model of a known format: neither a run or checkpoint of ours "
        "nor a folder with config.json (Hugging Face) or params.json (Meta), nor a llama2.c .bin"
        f"{hint}"
    )
