"""A run small enough to be interrupted many times in one test session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from llama_ray.config import PretrainConfig
from llama_ray.data.shards import SplitManifest, TokenManifest, write_shard
from llama_ray.data.tokenizer import Tokenizer, train_tokenizer
from llama_ray.storage import Storage
from tests.data.world import numbered_tokens, text

VOCAB = 400


def learnable_tokens(root: Path | Storage) -> Storage:
    """`tokens/numbered`: tokens that follow a rule, of a vocabulary with a tokenizer."""
    storage = numbered_tokens(root, {"web": [60_000]})
    manifest = TokenManifest.load(storage, "numbered")
    model = train_tokenizer([text(seed) for seed in range(20)], VOCAB)
    storage.write("tokens/numbered/tokenizer.model", model)
    splits: dict[Any, SplitManifest] = {}
    for split, size in (("train", 60_000), ("validation", 2_000)):
        tokens = (np.arange(size) ** 2 // 7 % VOCAB).astype(np.uint32)
        shard = write_shard(
            storage, "numbered", f"{split}/web-00000", tokens, np.array([size]), bytes(16)
        )
        splits[split] = SplitManifest(tokens=size, documents=1, shards=[shard])
    update = {
        "sources": {"web": splits},
        "vocab_size": VOCAB,
        "tokenizer_sha256": Tokenizer(model).sha256,
    }
    manifest = manifest.model_copy(update=update)
    storage.write_json("tokens/numbered/manifest.json", manifest.model_dump(mode="json"))
    return storage


def run_config(storage: Storage, name: str, **sections: dict[str, Any]) -> PretrainConfig:
    """40 steps of a fraction of a second each, a checkpoint every 8. sections: keys to change."""
    base: dict[str, dict[str, Any]] = {
        "model": {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB},
        "data": {"tokens": "numbered", "seq_len": 32, "window_steps": 20, "prefetch_windows": 4},
        "optimizer": {"warmup_steps": 2, "lr": 1e-3},
        "train": {
            "steps": 40, "batch_size": 32, "micro_batch_size": 2, "log_every": 1,
            "validate_every": 16, "validation_sequences": 4, "dtype": "float32",
        },
        "parallel": {"data": 2, "cpus_per_worker": 0.5},
        "checkpoint": {"every": 8},
        "failures": {"hang_seconds": 60},
    }  # fmt: skip
    for section, keys in sections.items():
        base.setdefault(section, {}).update(keys)
    return PretrainConfig.model_validate({"name": name, "storage": storage.config, **base})


def records(storage: Storage, name: str, event: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that tell of an event."""
    lines = storage.read(f"runs/{name}/metrics.jsonl").decode().splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


def losses(storage: Storage, name: str) -> dict[int, tuple[float, float]]:
    """Step → loss and gradient norm."""
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records(storage, name, "step")}
