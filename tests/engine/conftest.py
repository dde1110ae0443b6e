"""A real trained model, small enough to check every token against Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.checkpoint.load import LoadedModel, load_model
from llama_ray.config import EngineConfig, StorageConfig
from llama_ray.engine import Engine
from llama_ray.storage import Storage

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def stories(shared: Path) -> LoadedModel:
    folder = shared / "models/stories260K"
    return load_model(
        str(folder / "stories260K.bin"),
        Storage(StorageConfig(url="file:///nowhere")),
        tokenizer=str(folder / "tok512.model"),
        dtype=torch.float32,
    )


@pytest.fixture
def make_engine(stories: LoadedModel) -> MakeEngine:
    def make(**limits: Any) -> Engine:
        return Engine(
            stories, EngineConfig(**{"kv_cache_tokens": 8192, "dtype": "float32"} | limits)
        )

    return make
