"""Token shards and their manifest: the format is described in docs/token-shards.md.

A tokens folder is complete once its manifest exists, which is written last; nothing else in it is
ever read without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from llama_ray.config.base import StrictModel
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.storage import Storage

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
OFFSET_DTYPE = np.dtype("<u8")


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class Shard(StrictModel):
    path: str
    """Within the tokens folder, without its extension: `train/web-00000`."""
    tokens: int
    documents: int
    sha256: str
    """Of `<path>.tokens`."""
    offsets_sha256: str
    """Of `<path>.offsets`."""


class SplitManifest(StrictModel):
    """One source's part of one split."""

    tokens: int
    documents: int
    shards: list[Shard]


class CorpusStatistics(StrictModel):
    documents_read: int
    bytes_read: int
    """UTF-8 text, dropped documents included."""
    documents_too_short: int
    documents_duplicate: int
    documents_kept: int
    bytes_kept: int


class TokenManifest(StrictModel):
    """What `tokens/<name>` holds."""

    version: Literal[1] = 1
    name: str
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    """Of the tokens, little-endian."""
    tokenizer_sha256: str
    """Of `tokenizer.model`."""
    sources: dict[str, dict[Split, SplitManifest]]
    """Source → split → its shards. A split with no document is absent."""
    bytes_per_token: float
    """UTF-8 bytes of the training text over its tokens, BOS and EOS counted."""
    unigram_entropy_nats: float
    """Entropy of the training tokens' frequencies: the loss of a model that knows nothing else."""
    corpus: CorpusStatistics
    config: dict[str, Any]
    """The part of the job's configuration that the content follows from."""
    config_sha256: str

    @classmethod
    def find(cls, storage: Storage, name: str) -> TokenManifest | None:
        """The manifest of `tokens/<name>`; None where there is none. Raises `UserError` where it
        cannot be understood."""
        path = manifest_path(name)
        try:
            data = storage.read(path)
        except FileNotFoundError:
            return None
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"data.tokens: {storage.url(path)} is damaged or of another version ({key}: "
                f"{problem['msg']}); delete {storage.url(folder(name))} and prepare it again"
            ) from None

    @classmethod
    def load(cls, storage: Storage, name: str) -> TokenManifest:
        """As `find`, but raises `UserError` where there is none."""
        manifest = cls.find(storage, name)
        if manifest is None:
            raise UserError(
                f"data.tokens: {storage.url(folder(name))} holds no prepared tokens; run the "
                f"`prepare` job whose name is {name!r} first, or correct data.tokens"
            )
        return manifest

    def split(self, split: Split) -> dict[str, SplitManifest]:
        """Sources that have documents in `split`, sorted by name."""
        return {
            source: splits[split]
            for source, splits in sorted(self.sources.items())
            if split in splits
        }

    def tokens(self, split: Split) -> int:
        return sum(part.tokens for part in self.split(split).values())

    def tokenizer(self, storage: Storage) -> Tokenizer:
        """The tokenizer that made these tokens. Raises `UserError` where the file is another."""
        path = tokenizer_path(self.name)
        tokenizer = Tokenizer.load(storage, path)
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise UserError(
                f"data.tokens: {storage.url(path)} is not the tokenizer these shards were made "
                f"with (sha256 {tokenizer.sha256[:12]}…, the manifest says "
                f"{self.tokenizer_sha256[:12]}…); put the right one back, or prepare again"
            )
        return tokenizer

    def check(self, storage: Storage, checksums: bool = False) -> None:
        """Raises `UserError` naming the first file that is missing or has another size than the
        manifest says; with `checksums` (which reads everything) another content."""
        sizes = storage.list(folder(self.name))
        width = np.dtype(self.dtype).itemsize
        for shard in self._shards():
            expected = {
                f"{shard.path}.tokens": (shard.tokens * width, shard.sha256),
                f"{shard.path}.offsets": (
                    (shard.documents + 1) * OFFSET_DTYPE.itemsize,
                    shard.offsets_sha256,
                ),
            }
            for file, (size, sha256) in expected.items():
                path = f"{folder(self.name)}/{file}"
                if file not in sizes:
                    raise damaged(storage, path, "is missing")
                if sizes[file] != size:
                    raise damaged(storage, path, f"has {sizes[file]:,} bytes instead of {size:,}")
                if checksums and hashlib.sha256(storage.read(path)).hexdigest() != sha256:
                    raise damaged(storage, path, "has another checksum than the manifest says")

    def _shards(self) -> list[Shard]:
        return [
            shard
            for splits in self.sources.values()
            for part in splits.values()
            for shard in part.shards
        ]


def damaged(storage: Storage, path: str, what: str) -> UserError:
    return UserError(
        f"data.tokens: shard {storage.url(path)} {what}; restore it, or delete the folder "
        f"tokens/{path.split('/')[1]} and prepare it again"
    )


def write_shard(
    storage: Storage, name: str, path: str, tokens: np.ndarray, lengths: np.ndarray
) -> Shard:
    """Write one shard of `tokens/<name>`. tokens [T] of the manifest's dtype; lengths [D]: each
    document's tokens, BOS and EOS included."""
    offsets = np.zeros(len(lengths) + 1, OFFSET_DTYPE)
    np.cumsum(lengths, out=offsets[1:])
    assert offsets[-1] == len(tokens)
    token_bytes = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()
    offset_bytes = offsets.tobytes()
    storage.write(f"{folder(name)}/{path}.tokens", token_bytes)
    storage.write(f"{folder(name)}/{path}.offsets", offset_bytes)
    return Shard(
        path=path,
        tokens=len(tokens),
        documents=len(lengths),
        sha256=hashlib.sha256(token_bytes).hexdigest(),
        offsets_sha256=hashlib.sha256(offset_bytes).hexdigest(),
    )


def read_tokens(
    storage: Storage, manifest: TokenManifest, shard: Shard, start: int, stop: int
) -> np.ndarray:
    """Tokens [start, stop) of a shard, in the manifest's dtype."""
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    path = f"{folder(manifest.name)}/{shard.path}.tokens"
    try:
        data = storage.read_range(path, start * dtype.itemsize, stop * dtype.itemsize)
    except FileNotFoundError:
        raise damaged(storage, path, "is missing") from None
    if len(data) != (stop - start) * dtype.itemsize:
        raise damaged(storage, path, "is shorter than the manifest says")
    return np.frombuffer(data, dtype)


def read_documents(storage: Storage, manifest: TokenManifest, shard: Shard) -> list[np.ndarray]:
    """The shard's documents, each BOS … EOS. Raises `UserError` if its checksums disagree."""
    path = f"{folder(manifest.name)}/{shard.path}"
    tokens, offsets = storage.read(f"{path}.tokens"), storage.read(f"{path}.offsets")
    for data, sha256, file in (
        (tokens, shard.sha256, f"{path}.tokens"),
        (offsets, shard.offsets_sha256, f"{path}.offsets"),
    ):
        if hashlib.sha256(data).hexdigest() != sha256:
            raise damaged(storage, file, "has another checksum than the manifest says")
    cuts: Sequence[int] = np.frombuffer(offsets, OFFSET_DTYPE)[1:-1].tolist()
    return np.split(np.frombuffer(tokens, np.dtype(manifest.dtype).newbyteorder("<")), cuts)


def folder(name: str) -> str:
    return f"tokens/{name}"


def manifest_path(name: str) -> str:
    return f"{folder(name)}/manifest.json"


def tokenizer_path(name: str) -> str:
    return f"{folder(name)}/tokenizer.model"
