"""Raw text → token shards.

    read → drop short ─ shuffle into buckets ─ deduplicate ─┬─ sample → train the tokenizer
                                                            └─ tokenize → chunks → shards → manifest

All on Ray Data; the driver holds the list of files, the tokenizer's sample and a few numbers per
chunk. The result is a function of the corpus and the configuration: a document's split and place
follow from its content's hash, so neither scheduling nor the cluster's size shows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, Dataset

from llama_ray.config.load import differences
from llama_ray.config.prepare import PrepareConfig
from llama_ray.data.corpus import CorpusFile, check_sources, find_files, read_corpus
from llama_ray.data.describe import describe_prepare, print_summary
from llama_ray.data.documents import Deduplicate, Place, bucket_count
from llama_ray.data.execution import data_context
from llama_ray.data.progress import Progress, Tally
from llama_ray.data.shards import (
    SPLITS,
    CorpusStatistics,
    Shard,
    Split,
    SplitManifest,
    TokenManifest,
    folder,
    manifest_path,
    token_dtype,
    tokenizer_path,
)
from llama_ray.data.tokenize import (
    CHUNK_KEY,
    Tokenize,
    assign_shards,
    shard_column,
    write_chunks,
)
from llama_ray.data.tokenizer import Tokenizer, train_tokenizer
from llama_ray.errors import UserError, user_error_cause
from llama_ray.local import connect
from llama_ray.storage import Storage, read_file

STAGES = ["read", "shuffle", "tokenizer", "tokenize", "write"]
# Of one document the tokenizer sees this much: a few books are no sample.
SAMPLE_DOCUMENT_CHARS = 1 << 16
MAX_PARTITIONS = 1024

__all__ = ["describe_prepare", "prepare"]


def prepare(config: PrepareConfig) -> TokenManifest:
    """Run the job, or return at once what an earlier run of the same configuration made. Raises
    `UserError`, e.g. where one of another configuration stands in its place."""
    storage = Storage(config.storage)
    storage.check_writable()
    existing = TokenManifest.find(storage, config.name)
    if existing is not None:
        _check_same(existing, config, storage)
        print(f"{storage.url(folder(config.name))} is prepared already; nothing to do")
        print_summary(existing, storage)
        return existing
    given = _given_tokenizer(config)
    files = find_files(config)
    storage.delete(folder(config.name))  # what an interrupted run left
    connect()
    try:
        with data_context():
            manifest = _Pipeline(config, storage).run(files, given)
    except Exception as error:
        # Ray's wrapper is a UserError too, whose message is a traceback.
        cause = user_error_cause(error)
        if cause is None or cause is error:
            raise
        raise cause from None
    print_summary(manifest, storage)
    return manifest


class _Pipeline:
    """The stages of one run. Each method is one, and takes what the one before returned."""

    def __init__(self, config: PrepareConfig, storage: Storage) -> None:
        self.config, self.storage = config, storage
        self.tally = Tally.start()
        self.progress = Progress(STAGES)

    def totals(self, stage: str) -> Counter[str]:
        return ray.get(self.tally.totals.remote(stage))

    def stage(self, name: str, expected: int) -> AbstractContextManager[None]:
        return self.progress.stage(name, lambda: self.totals(name), expected)

    def run(self, files: list[CorpusFile], given: Tokenizer | None) -> TokenManifest:
        documents = self.documents(files)
        tokenizer = given or self.train(documents)
        self.storage.write(tokenizer_path(self.config.name), tokenizer.model_bytes)
        chunks, numbers = self.tokenize(documents)
        shards, counts = self.write(chunks, numbers, tokenizer)
        train_bytes = sum(row["n_bytes"] for row in numbers if row["split"] == "train")
        manifest = TokenManifest(
            name=self.config.name,
            vocab_size=tokenizer.vocab_size,
            dtype=token_dtype(tokenizer.vocab_size),
            tokenizer_sha256=tokenizer.sha256,
            sources=_sources(shards),
            bytes_per_token=train_bytes / int(counts.sum()),
            unigram_entropy_nats=_entropy_nats(counts),
            corpus=self.statistics(),
            config=_content_config(self.config),
            config_sha256=_digest(self.config),
        )
        self.storage.write_json(manifest_path(manifest.name), manifest.model_dump(mode="json"))
        return manifest

    def documents(self, files: list[CorpusFile]) -> Dataset:
        """The corpus's distinct documents, one block a bucket, in their shuffled order; in Ray's
        object store, which spills to disk."""
        config, size = self.config, sum(file.size for file in files)
        n_buckets = bucket_count(size)
        place = Place(config.seed, n_buckets, config.corpus.validation_fraction)
        with self.stage("read", size):
            placed = (
                read_corpus(config, files, self.tally)
                .map_batches(place, batch_size=None, batch_format="pyarrow")
                .materialize()
            )
        with self.stage("shuffle", n_buckets):
            documents = (
                placed.sort("bucket", boundaries=list(range(1, n_buckets)))
                .map_batches(Deduplicate(self.tally), batch_size=None, batch_format="pyarrow")
                .materialize()
            )
        if not self.totals("shuffle")["documents"]:
            raise UserError(
                f"corpus.path: {config.corpus.path}: no document is left of "
                f"{self.totals('read')['documents']:,} read; give more text, or lower "
                f"corpus.min_document_chars ({config.corpus.min_document_chars})"
            )
        return documents

    def train(self, documents: Dataset) -> Tokenizer:
        sample = list(_sample(documents, self.config.tokenizer.sample_bytes))
        if not sample:
            raise UserError(
                "corpus.validation_fraction: every document fell into the validation split; give "
                "more text, or lower it"
            )
        amount = Counter(documents=len(sample), bytes=sum(len(text.encode()) for text in sample))
        with self.progress.stage("tokenizer", lambda: amount):
            task = ray.remote(num_cpus=1, max_retries=0)(train_tokenizer)
            return Tokenizer(ray.get(task.remote(sample, self.config.tokenizer.vocab_size)))

    def tokenize(self, documents: Dataset) -> tuple[Dataset, list[dict[str, Any]]]:
        """The chunks, and the numbers of each."""
        n_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        with self.stage("tokenize", self.totals("shuffle")["bytes"]):
            chunks = documents.map_batches(
                Tokenize,
                fn_constructor_args=(
                    self.storage,
                    self.config.name,
                    self.config.seed,
                    self.config.shards,
                    self.tally,
                ),
                batch_size=None,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(min_size=1, max_size=n_cpus),
                num_cpus=1,
            ).materialize()
            columns = [*CHUNK_KEY, "n_documents", "n_tokens", "n_bytes"]
            numbers = chunks.select_columns(columns).take_all()
        _check_splits(numbers, self.config)
        return chunks, numbers

    def write(
        self, chunks: Dataset, numbers: list[dict[str, Any]], tokenizer: Tokenizer
    ) -> tuple[list[Shard], np.ndarray]:
        """The shards, and how often each token occurs in the training split."""
        sizes = [(tuple(row[name] for name in CHUNK_KEY), row["n_tokens"]) for row in numbers]
        shard_of, paths = assign_shards(sizes, self.config.shards.tokens_per_shard)
        assert len(shard_of) == len(numbers), "a bucket was cut in two"
        shards: dict[int, Shard] = {}
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        with self.stage("write", sum(row["n_tokens"] for row in numbers)):
            written = (
                chunks.map_batches(
                    shard_column,  # type: ignore[arg-type]  # Ray's hint knows no fn_args
                    fn_args=(shard_of,),
                    batch_size=None,
                    batch_format="pyarrow",
                )
                .groupby("shard", num_partitions=min(len(paths), MAX_PARTITIONS))
                .map_groups(
                    write_chunks,  # type: ignore[arg-type]
                    fn_args=(
                        self.storage,
                        self.config.name,
                        paths,
                        tokenizer.vocab_size,
                        self.tally,
                    ),
                    batch_format="pyarrow",
                )
            )
            for row in written.iter_rows():
                shards[row["index"]] = Shard.model_validate_json(row["shard"])
                if paths[row["index"]].startswith("train/"):
                    counts += np.frombuffer(row["counts"], np.int64)
        return [shards[index] for index in range(len(paths))], counts

    def statistics(self) -> CorpusStatistics:
        read, kept = self.totals("read"), self.totals("shuffle")
        return CorpusStatistics(
            documents_read=read["documents"],
            bytes_read=read["bytes"],
            documents_too_short=read["short"],
            documents_duplicate=kept["duplicates"],
            documents_kept=kept["documents"],
            bytes_kept=kept["bytes"],
        )


def _sample(documents: Dataset, sample_bytes: int) -> Iterator[str]:
    """The first training documents of the shuffled order: a random sample, the same each time."""
    left = sample_bytes
    for bucket in documents.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    ):
        for text, held_out in zip(bucket["text"], bucket["validation"], strict=True):
            if not held_out.as_py():
                part = text.as_py()[:SAMPLE_DOCUMENT_CHARS]
                yield part
                left -= len(part.encode())
                if left <= 0:
                    return


def _given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    path, wanted = config.tokenizer.model, config.tokenizer.vocab_size
    if path is None:
        return None
    data = read_file(path, config.storage, "tokenizer.model")
    tokenizer = Tokenizer(data, f"tokenizer.model: {path}")
    if "vocab_size" in config.tokenizer.model_fields_set and wanted != tokenizer.vocab_size:
        raise UserError(
            f"tokenizer.vocab_size: {wanted} is given, but tokenizer.model {path} has "
            f"{tokenizer.vocab_size} pieces; leave tokenizer.vocab_size out"
        )
    return tokenizer


def _check_splits(rows: list[dict[str, Any]], config: PrepareConfig) -> None:
    check_sources(len({row["source"] for row in rows}), config)
    for split in SPLITS:
        if not any(row["split"] == split for row in rows):
            raise UserError(
                f"corpus.validation_fraction: of {sum(row['n_documents'] for row in rows):,} "
                f"documents none fell into the {split} split at "
                f"{config.corpus.validation_fraction}; change it, or give more text"
            )


def _sources(shards: list[Shard]) -> dict[str, dict[Split, SplitManifest]]:
    grouped: dict[str, dict[Split, list[Shard]]] = {}
    for shard in shards:
        split, _, file = shard.path.partition("/")
        source = file.rpartition("-")[0]
        grouped.setdefault(source, {}).setdefault(split, []).append(shard)  # type: ignore[arg-type]
    return {
        source: {
            split: SplitManifest(
                tokens=sum(shard.tokens for shard in parts),
                documents=sum(shard.documents for shard in parts),
                shards=parts,
            )
            for split, parts in sorted(splits.items())
        }
        for source, splits in sorted(grouped.items())
    }


def _entropy_nats(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _content_config(config: PrepareConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include={"seed", "corpus", "tokenizer", "shards"})


def _digest(config: PrepareConfig) -> str:
    return hashlib.sha256(json.dumps(_content_config(config), sort_keys=True).encode()).hexdigest()


def _check_same(existing: TokenManifest, config: PrepareConfig, storage: Storage) -> None:
    if existing.config_sha256 == _digest(config):
        return
    differing = differences(existing.config, _content_config(config))
    raise UserError(
        f"name: {storage.url(folder(config.name))} was prepared with another configuration "
        f"(differs in {', '.join(differing)}); choose another name, or delete it"
    )
