"""Tokens that extend others: what is in them, and that nothing which happens meanwhile shows."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llama_ray.config import PrepareConfig
from llama_ray.config.pretrain import DataConfig
from llama_ray.data.clean.manifest import CorpusManifest, DocumentsFile, SourceDocuments
from llama_ray.data.extend import unigrams
from llama_ray.data.prepare import prepare
from llama_ray.data.shards import TokenManifest, read_documents
from llama_ray.data.stream import TokenStream
from llama_ray.errors import UserError
from llama_ray.local import Head
from llama_ray.storage import Storage
from tests.data.test_tokenizer_json import LLAMA3, byte_level
from tests.data.world import prepare_config, text, write_jsonl

BASE, ADDED = range(80), range(60, 160)  # of which 20 are in the base
NEW = range(80, 160)


def write_clean_corpus(storage: Storage, name: str, numbers: range) -> None:
    """As a `clean` job leaves it."""
    sources = {}
    for source, chosen in (("web", numbers[::2]), ("books", numbers[1::2])):
        texts = [text(i) for i in chosen]
        path = Path(storage.path(f"corpora/{name}/documents/{source}-00000.parquet"))
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "id": [f"{source}/{i}" for i in chosen],
            "source": [source] * len(texts),
            "text": texts,
            "metadata": ["{}"] * len(texts),
        }
        pq.write_table(pa.table(columns), path)
        size = sum(len(document.encode()) for document in texts)
        file = DocumentsFile(
            path=f"documents/{path.name}",
            documents=len(texts),
            text_bytes=size,
            stored_bytes=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        sources[source] = SourceDocuments(documents=len(texts), text_bytes=size, files=[file])
    manifest = CorpusManifest(name=name, sources=sources, config={}, inputs_sha256="")
    storage.write_json(f"corpora/{name}/manifest.json", manifest.model_dump(mode="json"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extend")


def base_config(root: Path) -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "name": "base",
            "storage": {"url": f"file://{root}"},
            "corpus": {"clean": "pages", "min_document_chars": 20, "validation_fraction": 0.1},
            "tokenizer": {"model": f"{root}/tokenizer.json"},
            "shards": {"tokens_per_shard": 5_000},
        }
    )


def extension_config(root: Path, corpus: Path, name: str = "more") -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "name": name,
            "seed": 3,
            "extends": "base",
            "storage": {"url": f"file://{root}"},
            "corpus": {"path": str(corpus), "min_document_chars": 20, "validation_fraction": 0.1},
            "shards": {"tokens_per_shard": 5_000},
        }
    )


@pytest.fixture(scope="module")
def base(ray_cluster: object, root: Path) -> TokenManifest:
    """Tokens of a clean corpus of 80 documents, by a `tokenizer.json`."""
    config = base_config(root)
    storage = Storage(config.storage)
    (root / "tokenizer.json").write_bytes(byte_level(LLAMA3, "<|begin_of_text|> $A"))
    with pytest.raises(UserError, match=r"^corpus\.clean: .* run the `clean` job whose name is 'p"):
        prepare(config)
    write_clean_corpus(storage, "pages", BASE)
    return prepare(config)


@pytest.fixture(scope="module")
def corpus(root: Path) -> Path:
    """100 documents, of which 20 are in the base, and five twice."""
    rows = [{"text": text(i), "source": "web" if i % 3 else "forum"} for i in ADDED]
    write_jsonl(root / "added.jsonl", [*rows, *rows[30:35]])
    return root / "added.jsonl"


@pytest.fixture(scope="module")
def more(base: TokenManifest, root: Path, corpus: Path) -> TokenManifest:
    before = contents(root / "tokens/base")
    manifest = prepare(extension_config(root, corpus))
    assert contents(root / "tokens/base") == before
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def decoded(storage: Storage, manifest: TokenManifest) -> dict[str, list[str]]:
    """Text → the sources that have it."""
    tokenizer, found = manifest.tokenizer(storage), {}
    for splits in manifest.sources.values():
        for part in splits.values():
            for shard in part.shards:
                source = shard.path.partition("/")[2].rpartition("-")[0]
                for ids in read_documents(storage, manifest, shard):
                    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
                    found.setdefault(tokenizer.decode(ids.tolist()), []).append(source)
    return found


def test_tokens_of_a_clean_corpus(base: TokenManifest, root: Path) -> None:
    storage = Storage(base_config(root).storage)
    assert decoded(storage, base) == {text(i): ["books" if i % 2 else "web"] for i in BASE}
    assert base.tokenizer_file == "tokenizer.json"
    assert storage.read("tokens/base/tokenizer.json") == (root / "tokenizer.json").read_bytes()
    for source, first in (("web", 0), ("books", 1)):
        size = sum(len(text(i).encode()) for i in BASE[first::2])
        assert sum(part.text_bytes for part in base.sources[source].values()) == size


def test_an_extension_has_both(base: TokenManifest, more: TokenManifest, root: Path) -> None:
    storage = Storage(base_config(root).storage)
    more.check(storage, checksums=True)
    assert decoded(storage, more) == decoded(storage, base) | {
        text(i): ["web" if i % 3 else "forum"] for i in NEW
    }
    assert (more.extends, more.tokenizer_sha256) == ("base", base.tokenizer_sha256)
    statistics = more.corpus
    assert statistics.documents_read == 105
    assert (statistics.documents_known, statistics.documents_duplicate) == (20, 5)
    assert statistics.documents_kept == 80
    # The base's shards are named, not copied.
    held = {shard.path for shard in more.shards() if shard.folder == "base"}
    assert held == {shard.path for shard in base.shards()}
    assert not set(contents(root / "tokens/more")) & {"train/books-00000.tokens"}
    web = more.split("train")["web"]
    assert [shard.folder for shard in web.shards] == sorted(
        (shard.folder for shard in web.shards), key=lambda folder: folder is None
    )


def test_the_numbers_are_of_both(more: TokenManifest, root: Path) -> None:
    storage = Storage(base_config(root).storage)
    tokenizer = more.tokenizer(storage)
    documents = [
        ids
        for part in more.split("train").values()
        for shard in part.shards
        for ids in read_documents(storage, more, shard)
    ]
    tokens = np.concatenate(documents)
    assert len(tokens) == more.tokens("train")
    p = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    assert more.unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum())
    size = sum(len(tokenizer.decode(ids.tolist()).encode()) for ids in documents)
    assert more.bytes_per_token == pytest.approx(size / len(tokens))
    for splits in more.sources.values():
        for part in splits.values():
            assert part.tokens == sum(shard.tokens for shard in part.shards)
            assert part.documents == sum(shard.documents for shard in part.shards)


def test_hashes_stand_beside_each_shard(more: TokenManifest, root: Path) -> None:
    storage = Storage(base_config(root).storage)
    tokenizer = more.tokenizer(storage)
    for shard in more.shards():
        hashes = storage.read(f"{more.folder_of(shard)}/{shard.path}.hashes")
        assert hashes == b"".join(
            hashlib.blake2b(tokenizer.decode(ids.tolist()).encode(), digest_size=16).digest()
            for ids in read_documents(storage, more, shard)
        )


def test_it_is_trained_on_like_any_other(more: TokenManifest, root: Path) -> None:
    storage = Storage(base_config(root).storage)
    data = DataConfig(tokens="more", seq_len=64)
    stream = TokenStream(storage, more, data, batch_size=4, seed=0)
    steps = more.tokens("train") // (4 * 64)
    tokens, replaced = stream.reader.read(0, steps, slice(0, 4))
    assert not replaced
    # What both have, once.
    held = Counter(tokens[:, :, :-1].flatten().tolist())
    counts = unigrams(storage, more)
    assert held.total() > 0.99 * counts.sum() - 4 * 64
    assert sum((Counter(dict(enumerate(counts.tolist()))) - held).values()) < 4 * 64 + 300


def test_an_extension_can_be_extended(
    more: TokenManifest, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What either has is dropped; and once nothing is left that is said."""
    write_jsonl(tmp_path / "c.jsonl", [{"text": text(i)} for i in range(70, 170)])
    config = extension_config(root, tmp_path / "c.jsonl", "third")
    config = config.model_copy(update={"extends": "more"})
    third = prepare(config)
    assert third.corpus.documents_known == 90
    assert "90 that more has" in capsys.readouterr().out
    assert {shard.folder for shard in third.shards()} == {"base", "more", None}
    found = decoded(Storage(config.storage), third)
    assert sorted(found) == sorted(text(i) for i in range(170))
    assert all(len(sources) == 1 for sources in found.values())
    again = config.model_copy(update={"extends": "third", "name": "fourth"})
    with pytest.raises(UserError, match=r"^extends: third has every document of corpus\.path"):
        prepare(again)


def test_refused_before_anything_runs(more: TokenManifest, root: Path, corpus: Path) -> None:
    def refused(match: str, **keys: object) -> None:
        with pytest.raises((UserError, ValueError), match=match):
            prepare(prepare_config(root, corpus, name="other", extends="base", **keys))

    refused("tokenizer: is that of 'base', which is extended; leave the section out")
    config = extension_config(root, corpus, "other")
    with pytest.raises(ValueError, match="extends: 'other' cannot extend itself"):
        PrepareConfig.model_validate(
            config.model_dump(exclude={"tokenizer"}) | {"extends": "other"}
        )
    with pytest.raises(UserError, match=r"^extends: .*tokens/none holds no prepared tokens"):
        prepare(config.model_copy(update={"extends": "none"}))
    assert not (root / "tokens/other").exists()


def test_a_damaged_base_is_named(more: TokenManifest, root: Path, corpus: Path) -> None:
    path = root / "tokens/base/train/web-00000.hashes"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    try:
        with pytest.raises(UserError, match=r"^extends: .*web-00000\.hashes has another checksum"):
            prepare(extension_config(root, corpus, "other"))
        path.write_bytes(whole[:-1])
        with pytest.raises(UserError, match=r"web-00000\.hashes has 1?\d\d\d? bytes instead of"):
            prepare(extension_config(root, corpus, "other"))
    finally:
        path.write_bytes(whole)


@pytest.mark.slow
def test_a_job_killed_midway_runs_again_to_the_same_end(
    ray_head: Head, more: TokenManifest, root: Path, corpus: Path, tmp_path: Path
) -> None:
    config = extension_config(root, corpus, "killed")
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"tokenizer"})))
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_ray.job", str(job)],
        env=os.environ | {"RAY_ADDRESS": ray_head.address},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = root / "tokens/killed"
    try:
        # The first shard is there, others are being written.
        while not list(folder.glob("train/*.tokens")):
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    again = prepare(config)
    assert again.model_dump(exclude={"name"}) == more.model_dump(exclude={"name"})
    names = {name for name in contents(folder) if not name.endswith(".tmp")}
    assert names == set(contents(root / "tokens/more"))


@pytest.mark.slow
def test_a_full_disk_is_told_and_with_space_it_goes_on(
    more: TokenManifest, root: Path, corpus: Path, small_disk: Path
) -> None:
    shutil.copytree(root / "tokens/base", small_disk / "tokens/base")
    config = extension_config(small_disk, corpus)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 50_000))
    with pytest.raises(UserError, match=r"^storage\.url: .* no space left; free some"):
        prepare(config)
    assert not (small_disk / "tokens/more/manifest.json").exists()
    ballast.unlink()
    again = prepare(config)
    assert again == more
    assert contents(small_disk / "tokens/more") == contents(root / "tokens/more")
