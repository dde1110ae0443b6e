"""Which checkpoints count, which are kept, and what is cleared away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama_ray.checkpoint.manifest import MARKER
from llama_ray.checkpoint.reader import Checkpoint
from llama_ray.checkpoint.store import CheckpointStore, kept, read_info, resolve
from llama_ray.checkpoint.writer import write_weights
from llama_ray.config import StorageConfig
from llama_ray.config.pretrain import CheckpointConfig
from llama_ray.errors import UserError
from llama_ray.model import LLaMA
from llama_ray.parallel import initialize
from llama_ray.storage import Storage
from tests.checkpoint.saving import MODEL, TOKENIZER, info


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Storage(StorageConfig(url=f"file://{tmp_path}")), "run")


def write(store: CheckpointStore, step: int, loss: float | None = None) -> str:
    model = LLaMA(MODEL)
    initialize(model, seed=step)
    weights = ((name, p.detach()) for name, p in model.named_parameters())
    return write_weights(
        store.storage, store.run, info(step, validation_loss=loss), TOKENIZER, weights
    )


LOSSES = {100: 3.0, 150: None, 200: 2.0, 250: 2.5, 300: 2.1, 350: None, 400: 2.4}


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"keep": 1}, {400}),
        ({"keep": 3}, {300, 350, 400}),
        ({"keep": 99}, set(LOSSES)),
        ({"keep": 1, "keep_every": 200}, {200, 400}),
        ({"keep": 1, "keep_every": 150}, {150, 300, 400}),
        ({"keep": 1, "keep_best": 2}, {200, 300, 400}),
        ({"keep": 2, "keep_every": 250, "keep_best": 1}, {200, 250, 350, 400}),
    ],
)
def test_what_is_kept(config: dict[str, int], steps: set[int]) -> None:
    assert kept(LOSSES, CheckpointConfig.model_validate(config)) == steps


def test_pruning_keeps_the_newest_regular_and_best(store: CheckpointStore) -> None:
    for step, loss in ((10, 2.0), (20, 1.0), (30, float("nan")), (40, 3.0), (50, None)):
        write(store, step, loss)
    assert read_info(store.storage, store.path(30)).validation_loss is None
    store.prune(CheckpointConfig(keep=1, keep_every=40, keep_best=1))
    assert store.committed_steps() == [20, 40, 50]
    left = {path.partition("/")[0] for path in store.storage.list(store.root)}
    assert left == {"latest", "step-00000020", "step-00000040", "step-00000050"}


def test_clean_up_takes_orphans_and_nothing_else(store: CheckpointStore) -> None:
    storage = store.storage
    for step in (10, 20):
        write(store, step)
    whole = storage.list(store.root)
    storage.write(f"{store.path(30)}/weights-00000.0123abcd.safetensors", b"half")
    storage.write(f"{store.path(20)}/weights-00000.0123abcd.safetensors", b"of another start")
    storage.write(f"{store.path(20)}/optimizer-00001.0123abcd.safetensors.00ff.tmp", b"a draft")
    # Where another start's clean-up and a commit met: a marker of nothing.
    storage.write(f"{store.path(40)}/{MARKER}", storage.read(f"{store.path(20)}/{MARKER}"))
    storage.write_json(f"{store.root}/latest", {"step": 40, "folder": "step-00000040"})
    assert store.committed_steps() == [10, 20]
    assert resolve(storage, "runs/run") == store.path(20)
    assert sorted(store.clean_up()) == [
        "step-00000020/optimizer-00001.0123abcd.safetensors.00ff.tmp",
        "step-00000020/weights-00000.0123abcd.safetensors",
        "step-00000030",
        "step-00000040",
    ]
    assert storage.list(store.root) == whole
    latest = storage.read_json(f"{store.root}/latest")
    assert latest == {"step": 20, "folder": "step-00000020"}
    assert store.clean_up() == []


def test_a_run_without_checkpoints_has_nothing_to_clear_away(store: CheckpointStore) -> None:
    assert store.clean_up() == []
    assert store.committed_steps() == []
    with pytest.raises(UserError, match="runs/run holds no committed checkpoint; train it first"):
        resolve(store.storage, "runs/run")


def test_without_its_marker_there_is_no_checkpoint(store: CheckpointStore) -> None:
    folder = write(store, 10)
    store.storage.delete(f"{folder}/{MARKER}")
    assert store.committed_steps() == []
    with pytest.raises(UserError, match=r"step-00000010 is no committed checkpoint"):
        Checkpoint(store.storage, folder)


def test_a_checkpoint_tells_what_it_is(store: CheckpointStore) -> None:
    folder = write(store, 10, loss=1.5)
    found = read_info(store.storage, folder)
    assert found == info(10, validation_loss=1.5)
    manifest = Checkpoint(store.storage, folder).manifest
    assert manifest.versions["torch"] == torch.__version__
    assert Checkpoint(store.storage, folder).read_tokenizer() == TOKENIZER


def test_a_checkpoint_of_an_earlier_version_is_told_from_a_damaged_one(
    store: CheckpointStore,
) -> None:
    folder = write(store, 10)
    store.storage.write(f"{folder}/{MARKER}", b"10\n")
    with pytest.raises(UserError, match="was written by a version of llama_ray that this one does"):
        read_info(store.storage, folder)


def test_another_manifest_than_the_committed_one_is_refused(store: CheckpointStore) -> None:
    folder = write(store, 10)
    (name,) = (n for n in store.storage.list(folder) if n.startswith("checkpoint."))
    manifest = json.loads(store.storage.read(f"{folder}/{name}"))
    manifest["info"]["tokens_seen"] += 1
    store.storage.write(f"{folder}/{name}", json.dumps(manifest).encode())
    with pytest.raises(UserError, match=rf"{name} is not what was committed \(another SHA-256\)"):
        read_info(store.storage, folder)
    store.storage.delete(f"{folder}/{name}")
    with pytest.raises(UserError, match=rf"{name} is missing; the checkpoint is damaged"):
        read_info(store.storage, folder)
