"""A run of two ranks on tokens one block of which is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ray.config import PretrainConfig
from llama_ray.data.blocks import BLOCK_TOKENS
from llama_ray.data.shards import HASH_BYTES, Split, SplitManifest, TokenManifest, write_shard
from llama_ray.data.tokenizer import Tokenizer, train_tokenizer
from llama_ray.errors import UserError, user_error_cause
from llama_ray.train.run import pretrain
from tests.data.world import numbered_tokens, text

SEQ_LEN, STEPS = 64, 12
BROKEN = "tokens/numbered/train/web-00000.tokens"


def config(root: Path, **data: str) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "name": "run",
            "storage": {"url": f"file://{root}"},
            "model": {"dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 400},
            # Datasets of one step, so that the run stops where the damage is, not before.
            "data": {
                "tokens": "numbered", "seq_len": SEQ_LEN, "window_steps": 1, "prefetch_windows": 1,
                **data,
            },
            "optimizer": {"warmup_steps": 2},
            "train": {
                "steps": STEPS, "batch_size": 8, "micro_batch_size": 4, "log_every": 4,
                "validation_sequences": 2,
            },
            "parallel": {"data": 2},
            "checkpoint": {"every": 4},
        }
    )  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Tokens that a model of 400 pieces can learn, the second block of which is damaged."""
    storage = numbered_tokens(tmp_path, {"web": [3 * BLOCK_TOKENS]})
    manifest = TokenManifest.load(storage, "numbered")
    sources: dict[str, dict[Split, SplitManifest]] = {"web": {}}
    sizes: dict[Split, int] = {"train": 3 * BLOCK_TOKENS, "validation": 1000}
    for split, size in sizes.items():
        tokens = (np.arange(size) % 400).astype(np.uint32)
        path = f"{split}/web-00000"
        shard = write_shard(storage, "numbered", path, tokens, np.array([size]), bytes(HASH_BYTES))
        sources["web"][split] = SplitManifest(tokens=size, documents=1, shards=[shard])
    model = train_tokenizer([text(seed) for seed in range(20)], 400)
    storage.write("tokens/numbered/tokenizer.model", model)
    update = {
        "sources": sources,
        "vocab_size": 400,
        "tokenizer_sha256": Tokenizer(model).sha256,
    }
    manifest = manifest.model_copy(update=update)
    storage.write_json("tokens/numbered/manifest.json", manifest.model_dump(mode="json"))
    data = bytearray(storage.read(BROKEN))
    data[BLOCK_TOKENS * 4 + 5] ^= 1
    storage.write(BROKEN, bytes(data))
    return tmp_path


def records_of(root: Path, event: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (root / "runs/run/metrics.jsonl").open()]
    return [record for record in records if record["event"] == event]


@pytest.mark.slow
def test_a_run_that_stopped_is_resumed_without_what_is_damaged(
    ray_cluster: object, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match="web-00000") as raised:
        pretrain(config(root))
    cause = user_error_cause(raised.value)
    assert isinstance(cause, UserError)
    assert "web-00000.tokens is not what was written at bytes 16,384 to 32,768" in str(cause)
    assert [r["step"] for r in records_of(root, "step")] == [4]
    capsys.readouterr()

    pretrain(config(root, on_corrupt="skip"))
    output = capsys.readouterr().out
    assert "resuming from the checkpoint of step 4" in output
    steps = records_of(root, "step")
    assert [r["step"] for r in steps] == [4, 8, 12]
    replaced = [sample for r in steps for sample in r.get("replaced", ())]
    # One source, so sample n is the n-th of its stream.
    first, last = (BLOCK_TOKENS - SEQ_LEN) // SEQ_LEN, 2 * BLOCK_TOKENS // SEQ_LEN
    expected = [divmod(n, 8) for n in range(first, min(last, STEPS * 8))]
    assert [(sample["step"], sample["index"]) for sample in replaced] == expected
    assert {sample["index"] // 4 for sample in replaced} == {0, 1}  # of both ranks
    (mixture,) = records_of(root, "mixture")
    assert mixture["replaced"] == len(expected)
    assert mixture["sources"]["web"]["samples"] == STEPS * 8
    assert f"{len(expected)} of these were trained on in the place of others" in output
    assert "replaced: batch 7, index 7: file://" in output
    assert "replaced: batch 8, index 0 and 31 more: file://" in output
