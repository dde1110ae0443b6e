"""Small models that differ in all that formats must carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llama_ray.config import ModelConfig, StorageConfig
from llama_ray.data.tokenizer import train_tokenizer
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo, expected_shapes
from llama_ray.storage import Storage

VOCAB = 384
TEXT = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs: 1234567890."


def model_config(**changes: Any) -> ModelConfig:
    fields = {
        "dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "ffn_hidden_dim": 160,
        "vocab_size": VOCAB, "max_seq_len": 128, "norm_eps": 2e-5, "rope_theta": 5000.0,
    }  # fmt: skip
    return ModelConfig.model_validate(fields | changes)


def tokenizer() -> bytes:
    return train_tokenizer(iter([TEXT] * 50), vocab_size=VOCAB)


class Memory:
    """A `WeightSource` that is nowhere else."""

    description = "memory"

    def __init__(self, config: ModelConfig, tokenizer: bytes | None, weights: dict[str, Tensor]):
        self.config, self.tokenizer, self.weights = config, tokenizer, weights
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()
        }

    def read(self, name: str) -> Tensor:
        return self.weights[name]


def random_source(
    config: ModelConfig, tokenizer: bytes | None = None, dtype: torch.dtype = torch.float32
) -> Memory:
    """Weights wide enough that attention is far from uniform and norms far from one."""
    torch.manual_seed(0)
    weights = {
        name: torch.normal(1.0 if "norm" in name else 0.0, 0.2, shape).to(dtype)
        for name, shape in expected_shapes(config).items()
    }
    return Memory(config, tokenizer, weights)


def place(folder: Any) -> Place:
    """A local folder."""
    return Place(Storage(StorageConfig(url=f"file://{folder.parent}")), folder.name)


def assert_same(found: Any, expected: Any) -> None:
    """Two sources hold the same model, bit for bit."""
    assert found.tensors == expected.tensors
    assert found.config == expected.config
    for name in expected.tensors:
        assert torch.equal(found.read(name), expected.read(name)), name
