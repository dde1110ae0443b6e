"""Whatever a model is stored as, it generates from the same weights."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from llama_ray.checkpoint.load import load_model
from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.writer import write_weights
from llama_ray.config import StorageConfig
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.formats.hf_write import write_hf
from llama_ray.formats.meta_write import write_meta
from llama_ray.formats.place import Place
from llama_ray.storage import Storage
from tests.data.test_tokenizer_json import LLAMA3, byte_level
from tests.formats.models import Memory, model_config, random_source, tokenizer


@functools.cache
def source() -> Memory:
    return random_source(model_config(n_kv_heads=2, tie_embeddings=True), tokenizer())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Holds one model three times."""
    storage = Storage(StorageConfig(url=f"file://{tmp_path}"))
    write_hf(source(), Place(storage, "hf"))
    write_meta(source(), Place(storage, "meta"), 2)
    assert source().tokenizer is not None
    info = CheckpointInfo(
        model=source().config,
        step=0,
        tokens_seen=0,
        tokenizer_sha256=Tokenizer(source().tokenizer).sha256,
    )
    write_weights(storage, "ours", info, source().tokenizer, source().weights.items())
    return storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["runs/ours", "hf", "meta"])
def test_every_format_loads_the_same_weights(
    name: str, dtype: torch.dtype, storage: Storage
) -> None:
    for path in (name, storage.url(name).removeprefix("file://")):
        loaded = load_model(path, storage, dtype=dtype)
        assert loaded.tokenizer.model_bytes == source().tokenizer
        assert not loaded.model.training
        assert loaded.model.output.weight is loaded.model.tok_embeddings.weight
        for key, parameter in loaded.model.named_parameters():
            assert torch.equal(parameter, source().weights[key].to(dtype)), key


def test_a_tokenizer_that_is_not_the_models(storage: Storage, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_bytes(byte_level(LLAMA3))
    for name in ("hf", "meta"):
        with pytest.raises(UserError, match=r"tokenizer: .* has 400 pieces, the model 384"):
            load_model(name, storage, tokenizer=str(other))
    with pytest.raises(UserError, match=r"tokenizer: .*/none\.model does not exist"):
        load_model("hf", storage, tokenizer=str(tmp_path / "none.model"))
    for file in ("tokenizer.model", "tokenizer.json"):
        storage.delete(f"hf/{file}")
    other.unlink()
    with pytest.raises(UserError, match=r"tokenizer: .*/hf holds none; name its"):
        load_model("hf", storage)
