"""Small corpora and tokens for the tests of `llama_ray.data`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from llama_ray.config import PrepareConfig, StorageConfig
from llama_ray.data.shards import (
    CorpusStatistics,
    Shard,
    Split,
    SplitManifest,
    TokenManifest,
    write_shard,
)
from llama_ray.storage import Storage

SENTENCE = (
    "the model of a language predicts what comes next given all that came before and nothing "
    "else so every word costs as much as it surprises αβγ 🙂 12345 naïve\tcafé "
)
WORDS = SENTENCE.split(" ")


def text(seed: int, words: int = 80) -> str:
    choose = random.Random(seed)
    lines = [" ".join(choose.choices(WORDS, k=9)) for _ in range(words // 9)]
    return f"document {seed}\n" + "\n".join(lines)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def prepare_config(
    root: Path, corpus_path: Path | str, /, name: str = "world", **sections: Any
) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "name": name,
            "storage": sections.pop("storage", {"url": f"file://{root}"}),
            "corpus": {
                "path": str(corpus_path),
                "min_document_chars": 20,
                "validation_fraction": 0.1,
                **sections.pop("corpus", {}),
            },
            "tokenizer": {"vocab_size": 400, **sections.pop("tokenizer", {})},
            "shards": {"tokens_per_shard": 20_000, **sections.pop("shards", {})},
            **sections,
        }
    )


def numbered_tokens(
    root: Path | Storage, shards: dict[str, list[int]], name: str = "numbered"
) -> Storage:
    """Tokens without a corpus: source → tokens per shard. Each training token is its own position
    in its source, plus a million per source, so that a test sees where it came from."""
    storage = root if isinstance(root, Storage) else Storage(StorageConfig(url=f"file://{root}"))
    sources: dict[str, dict[Split, SplitManifest]] = {}
    for number, (source, sizes) in enumerate(shards.items()):
        ids = np.arange(sum(sizes), dtype=np.uint32) + number * 1_000_000
        pieces = np.split(ids, np.cumsum(sizes)[:-1])
        sources[source] = {
            "train": _split(storage, name, "train", source, pieces),
            "validation": _split(storage, name, "validation", source, [ids[:100] + 500_000]),
        }
    manifest = TokenManifest(
        name=name,
        vocab_size=100_000,
        dtype="uint32",
        tokenizer_sha256="",
        sources=sources,
        bytes_per_token=1.0,
        unigram_entropy_nats=1.0,
        corpus=CorpusStatistics(
            documents_read=1, bytes_read=1, documents_too_short=0, documents_duplicate=0,
            documents_kept=1, bytes_kept=1,
        ),
        config={},
        config_sha256="",
    )  # fmt: skip
    storage.write_json(f"tokens/{name}/manifest.json", manifest.model_dump(mode="json"))
    return storage


def _split(
    storage: Storage, name: str, split: Split, source: str, pieces: list[np.ndarray]
) -> SplitManifest:
    shards: list[Shard] = [
        write_shard(
            storage, name, f"{split}/{source}-{i:05}", piece, np.array([len(piece)]), bytes(16)
        )
        for i, piece in enumerate(pieces)
    ]
    tokens = sum(shard.tokens for shard in shards)
    return SplitManifest(tokens=tokens, documents=len(shards), shards=shards)
