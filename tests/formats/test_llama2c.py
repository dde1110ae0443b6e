"""llama2.c's files: read by ranges, and refused unless whole."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.config import ModelConfig, StorageConfig
from llama_ray.errors import UserError
from llama_ray.formats.llama2c import open_llama2c
from llama_ray.formats.place import Place
from llama_ray.storage import Storage
from llama_ray.transfer import Range, download
from tests.formats.models import Memory, assert_same, model_config, place, random_source
from tests.s3 import BUCKET, S3Server


def llama2c_file(source: Memory) -> bytes:
    """As `export.py` of llama2.c writes it (`legacy_export`): array by array over all layers."""
    c, weights = source.config, source.weights
    vocab_size = c.vocab_size if c.tie_embeddings else -c.vocab_size
    heads = c.n_heads, c.n_kv_heads
    header = struct.pack(
        "7i", c.dim, c.ffn_hidden_dim, c.n_layers, *heads, vocab_size, c.max_seq_len
    )
    in_layer = [
        "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
        "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ]  # fmt: skip
    arrays = [weights["tok_embeddings.weight"]]
    for name in in_layer:
        arrays += [weights[f"layers.{i}.{name}.weight"] for i in range(c.n_layers)]
    arrays.append(weights["norm.weight"])
    arrays.append(torch.ones(c.max_seq_len, c.head_dim))  # rotary cos and sin
    if not c.tie_embeddings:
        arrays.append(weights["output.weight"])
    return header + b"".join(array.numpy().tobytes() for array in arrays)


# What the format has no room for.
FIXED = {"norm_eps": 1e-5, "rope_theta": 10_000.0}


@pytest.mark.parametrize("tied", [False, True])
def test_each_tensor_is_read_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    source = random_source(model_config(tie_embeddings=tied, **FIXED))
    (tmp_path / "model.bin").write_bytes(llama2c_file(source))
    read = open_llama2c(place(tmp_path / "model.bin"), b"named")
    assert_same(read, source)
    assert read.tokenizer == b"named"


def test_from_object_storage_only_what_is_asked_for_is_read(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    source = random_source(model_config(**FIXED))
    storage = Storage(StorageConfig(url=f"s3://{BUCKET}/llama2c", endpoint_url=s3.endpoint_url))
    storage.write("model.bin", llama2c_file(source))
    asked: list[Range] = []

    def spy(storage: Storage, ranges: list[Range], into: Any) -> None:
        asked.extend(ranges)
        download(storage, ranges, into)

    monkeypatch.setattr("llama_ray.formats.place.download", spy)
    read = open_llama2c(Place(storage, "model.bin"))
    name = "layers.1.attention.wk.weight"
    assert torch.equal(read.read(name), source.weights[name])
    assert sum(part.stop - part.start for part in asked) == 28 + source.tensors[name].nbytes
    assert_same(read, source)


def header(**changes: int) -> bytes:
    fields = {
        "dim": 64, "hidden_dim": 160, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4,
        "vocab_size": 384, "max_seq_len": 128,
    } | changes  # fmt: skip
    return struct.pack("7i", *fields.values())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:10], "only 10 bytes"),
        (lambda data: b"", "only 0 bytes"),
        (lambda data: data[:-1000], "truncated"),
        (lambda data: data + b"\0\0\0\0", "longer than it should be"),
        (lambda data: b"\x07" * len(data), "no llama2.c checkpoint"),
        (lambda data: b"24ka" + data[4:], r"export\.py --version 0"),
        (lambda data: header(dim=-64) + data[28:], "header reads dim -64"),
        (lambda data: header(n_heads=7) + data[28:], "header reads dim 64, 3 layers, 7 heads"),
        (lambda data: header(n_layers=2**31 - 1) + data[28:], "truncated.* 2147483647 layers"),
        (lambda data: header(vocab_size=2**31 - 1) + data[28:], "truncated.*vocabulary 2147483647"),
        (lambda data: header(vocab_size=-(2**31)) + data[28:], "truncated.*vocabulary 2147483648"),
        (lambda data: header(max_seq_len=2**30) + data[28:], "truncated"),
    ],
)
def test_what_is_not_a_whole_file_is_refused(
    damage: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    source = random_source(model_config(tie_embeddings=True, **FIXED))
    (tmp_path / "model.bin").write_bytes(damage(llama2c_file(source)))
    with pytest.raises(UserError, match=rf"model\.bin: .*{reason}"):
        open_llama2c(place(tmp_path / "model.bin"))


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.bin: there is no such file"):
        open_llama2c(place(tmp_path / "model.bin"))


def test_stories260k_is_read(shared: Path) -> None:
    source = open_llama2c(place(shared / "models/stories260K/stories260K.bin"))
    assert source.config == ModelConfig(
        dim=64, n_layers=5, n_heads=8, n_kv_heads=4, ffn_hidden_dim=172, vocab_size=512,
        max_seq_len=512, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    assert sum(info.nbytes for info in source.tensors.values()) == 4 * source.config.n_params
