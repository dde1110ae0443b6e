"""`kind: prepare`: raw text → deduplicated documents → tokenizer → token shards + manifest."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llama_ray.config.base import StrictModel
from llama_ray.config.job_base import JobConfig


class CorpusConfig(StrictModel):
    path: str = "installed-packages"
    """Text to read: a directory, glob, file or URL (`s3://`, `gs://`, `hf://`) of `.jsonl`
    (`.zst`, `.gz`), `.parquet` or `.txt`. `installed-packages` is the Python source and
    documentation of this environment's own packages: on every machine, no download."""
    text_field: str = "text"
    """Column or key that holds the document."""
    source_field: str = "source"
    """Column or key that names the document's source (the mixture's unit); absent: the file's
    name up to the first dot, or the folder's name for `.txt`."""
    max_bytes: int | None = Field(None, gt=0)
    """Read no more than about this many bytes of text."""
    min_document_chars: int = Field(200, ge=1)
    """Shorter documents are dropped (and counted)."""
    validation_fraction: float = Field(0.01, gt=0, lt=0.5)
    """Share of documents held out, chosen by content hash: the same documents on every run."""


class TokenizerConfig(StrictModel):
    """SentencePiece BPE as in section 2.1 of the paper: digits split, bytes as fallback."""

    model: str | None = None
    """An existing SentencePiece `tokenizer.model` (path or URL) to use instead of training one."""
    vocab_size: int = Field(32_000, ge=300)
    """Pieces, the 256 bytes and 3 control pieces included."""
    sample_bytes: int = Field(20_000_000, gt=0)
    """Text to train on, sampled from the training documents; one node's memory must hold it."""


class ShardsConfig(StrictModel):
    tokens_per_shard: int = Field(16_777_216, gt=0)
    """Size of one shard file: 2 bytes a token up to 65,536 pieces, else 4."""
    max_document_tokens: int | None = Field(None, gt=0)
    """Longer documents are cut into pieces of this many tokens, which are shuffled apart. For
    batches so small that a long document would fill several of them."""


class PrepareConfig(JobConfig):
    kind: Literal["prepare"] = "prepare"
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    shards: ShardsConfig = ShardsConfig()
