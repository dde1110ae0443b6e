"""Documents out of one file, a bounded amount of it in memory at a time.

Every reader yields `(text, source, done)`: the source as the file names it (None: it does not),
and the share of the file read so far, 0 to 1. What cannot be read is a `UserError` naming
`corpus.path`, the file and the line.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from llama_ray.config.prepare import CorpusConfig
from llama_ray.errors import UserError

Document = tuple[str, str | None, float]
# (open file, its size in bytes, what to call it in errors, what to read from it)
Reader = Callable[[IO[bytes], int, str, CorpusConfig], Iterator[Document]]

READ_BYTES = 1 << 18
# A longer text file becomes several documents, each ending at the end of a line.
MAX_TEXT_DOCUMENT_BYTES = 1 << 24
PARQUET_BATCH_ROWS = 256


def reader_for(path: str) -> Reader | None:
    """By the file's name; None where the format is not known."""
    for suffix, reader in READERS.items():
        if path.endswith(suffix):
            return reader
    return None


def source_of_name(path: str) -> str:
    """`data/wikipedia.en-00.jsonl.zst` → `wikipedia`. A `.txt` file is one document, so its folder
    is the source: `data/books/moby.txt` → `books`."""
    *folders, name = path.split("/")
    if name.endswith(".txt") and folders and folders[-1]:
        return folders[-1]
    return name.partition(".")[0]


def read_jsonl(file: IO[bytes], size: int, name: str, config: CorpusConfig) -> Iterator[Document]:
    chunks: Iterator[bytes] = _raw_chunks(file)
    if name.endswith(".zst"):
        make = lambda: zstandard.ZstdDecompressor().decompressobj()  # noqa: E731
        chunks = _decompressed(chunks, make, name, "zstd")
    elif name.endswith(".gz"):
        chunks = _decompressed(chunks, lambda: zlib.decompressobj(wbits=31), name, "gzip")
    for number, line in enumerate(_lines(chunks), start=1):
        if line.isspace():
            continue
        text, source = _parse_json_line(line, f"corpus.path: {name}, line {number}", config)
        yield text, source, file.tell() / max(size, 1)


def read_parquet(file: IO[bytes], size: int, name: str, config: CorpusConfig) -> Iterator[Document]:
    try:
        parquet = pq.ParquetFile(file)
        columns = parquet.schema_arrow.names
        if config.text_field not in columns:
            raise UserError(
                f"corpus.path: {name}: has no column {config.text_field!r}; set corpus.text_field "
                f"to one of {', '.join(columns)}"
            )
        has_source = config.source_field in columns
        wanted = [config.text_field] + [config.source_field] * has_source
        done = 0
        for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, columns=wanted):
            texts = batch.column(config.text_field).to_pylist()
            sources = batch.column(config.source_field).to_pylist() if has_source else None
            for i, text in enumerate(texts):
                done += 1
                if not isinstance(text, str):
                    raise UserError(
                        f"corpus.path: {name}, row {done}: {config.text_field!r} is "
                        f"{_type_name(text)}, not text; remove the row or choose another "
                        "corpus.text_field"
                    )
                source = sources[i] if sources else None
                yield (
                    text,
                    None if source is None else str(source),
                    done / parquet.metadata.num_rows,
                )
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"corpus.path: {name}: is not a readable Parquet file ({_first_line(error)}); "
            "replace or remove it"
        ) from None


def read_text(file: IO[bytes], size: int, name: str, config: CorpusConfig) -> Iterator[Document]:
    """The file is the document."""
    done = 0
    while data := file.read(MAX_TEXT_DOCUMENT_BYTES):
        if len(data) == MAX_TEXT_DOCUMENT_BYTES:
            data += file.readline()
        done += len(data)
        try:
            yield data.decode("utf-8"), None, done / max(size, 1)
        except UnicodeDecodeError as error:
            position = done - len(data) + error.start
            raise UserError(
                f"corpus.path: {name}: is not UTF-8 at byte {position:,}; convert it "
                "(iconv -t UTF-8) or remove it"
            ) from None


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def _raw_chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(READ_BYTES):
        yield chunk


def _decompressed(
    chunks: Iterator[bytes], make: Callable[[], Any], name: str, kind: str
) -> Iterator[bytes]:
    """`make` returns a fresh `decompressobj`: a file may hold several frames, one after another."""
    frame = None
    try:
        for chunk in chunks:
            while chunk:
                frame = frame or make()
                yield frame.decompress(chunk)
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except (zstandard.ZstdError, zlib.error) as error:
        raise UserError(
            f"corpus.path: {name}: is damaged ({kind}: {_first_line(error)}); fetch it again or "
            "remove it"
        ) from None
    if frame is not None:
        raise UserError(
            f"corpus.path: {name}: is cut short (its {kind} data has no end); fetch it again or "
            "remove it"
        )


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*parts, line, b"\n"])
            parts = []
        if rest:
            parts.append(rest)
    if parts:
        yield b"".join(parts)


def _parse_json_line(line: bytes, where: str, config: CorpusConfig) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where}: is not JSON ({_first_line(error)}); every line must hold one object"
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is {_type_name(row)}, not an object with {config.text_field!r}")
    text = row.get(config.text_field)
    if text is None:
        raise UserError(
            f"{where}: has no {config.text_field!r}; set corpus.text_field to one of "
            f"{', '.join(row) or '(the object is empty)'}"
        )
    if not isinstance(text, str):
        raise UserError(f"{where}: {config.text_field!r} is {_type_name(text)}, not text")
    source = row.get(config.source_field)
    return text, None if source is None else str(source)


def _type_name(value: Any) -> str:
    names = {"NoneType": "empty", "dict": "an object", "list": "a list", "str": "a string"}
    return names.get(type(value).__name__, f"a value of type {type(value).__name__}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
