"""A run of ours, loaded onto one device with the tokenizer it was trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama_ray.checkpoint.load import load_model
from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.writer import write_weights
from llama_ray.config import StorageConfig
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.storage import Storage
from tests.data.test_tokenizer_json import LLAMA3, byte_level
from tests.formats.models import model_config, random_source, tokenizer


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(StorageConfig(url=f"file://{tmp_path}"))


def write(storage: Storage, step: int, pieces: Tokenizer) -> dict[str, torch.Tensor]:
    """A checkpoint whose weights are all `step`."""
    config = model_config(vocab_size=pieces.vocab_size)
    weights = {
        name: torch.full_like(weight, step)
        for name, weight in random_source(config).weights.items()
    }
    info = CheckpointInfo(model=config, step=step, tokens_seen=step, tokenizer_sha256=pieces.sha256)
    write_weights(storage, "run", info, pieces.model_bytes, iter(weights.items()))
    return weights


def test_the_newest_checkpoint_of_a_run_with_its_tokenizer(storage: Storage) -> None:
    pieces = Tokenizer(tokenizer())
    for step in (10, 20):
        write(storage, step, pieces)
    for name, step in (("runs/run", 20), ("runs/run/checkpoints/step-00000010", 10)):
        loaded = load_model(name, storage, dtype=torch.float32)
        assert f"(step {step})" in loaded.description
        assert loaded.tokenizer.sha256 == pieces.sha256
        assert not loaded.model.training
        for parameter in loaded.model.parameters():
            assert torch.equal(parameter, torch.full_like(parameter, step))


def test_a_tokenizer_json_goes_with_the_weights(storage: Storage) -> None:
    pieces = Tokenizer(byte_level(LLAMA3, "<|begin_of_text|> $A"))
    write(storage, 10, pieces)
    folder = "runs/run/checkpoints/step-00000010"
    assert storage.read(f"{folder}/tokenizer.json") == pieces.model_bytes
    loaded = load_model("runs/run", storage)
    assert loaded.tokenizer.encode("fox", bos=True) == pieces.encode("fox", bos=True)


def test_another_tokenizer_than_the_one_trained_with_is_refused(storage: Storage) -> None:
    write(storage, 10, Tokenizer(tokenizer()))
    storage.write("other.json", byte_level(LLAMA3))
    with pytest.raises(UserError, match=r"tokenizer: the one given .* is not what .* trained with"):
        load_model("runs/run", storage, tokenizer=storage.path("other.json"))


def test_no_checkpoint_yet(storage: Storage) -> None:
    with pytest.raises(UserError, match=r"runs/none holds no committed checkpoint; train it first"):
        load_model("runs/none", storage)
