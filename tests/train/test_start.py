"""Where runs start from, what they leave out, and what Ray Train is told of them."""

from __future__ import annotations

import json

import pytest

from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.reader import Checkpoint
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.checkpoint.writer import write_weights
from llama_ray.errors import UserError
from llama_ray.storage import Storage
from llama_ray.train.run import pretrain
from tests.train.runs import learnable_tokens, losses, records, run_config

STEPS = {"steps": 16, "batch_size": 8, "validate_every": 16}
PAIR = {"tensor": 2, "data": 1, "cpus_per_worker": 0.5}


@pytest.fixture(scope="module")
def storage(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """With a run of 16 steps, of two tensor-parallel ranks, saved at 8 and 16."""
    storage = learnable_tokens(tmp_path_factory.mktemp("start"))
    pretrain(run_config(storage, "first", train=STEPS, parallel=PAIR))
    return storage


def test_checkpoints_are_registered_with_ray_train_where_they_lie(storage: Storage) -> None:
    told = json.loads(storage.read("runs/first/checkpoint_manager_snapshot.json"))
    names = [result["checkpoint_dir_name"] for result in told["checkpoint_results"]]
    assert names == ["checkpoints/step-00000008", "checkpoints/step-00000016"]
    assert [result["metrics"]["step"] for result in told["checkpoint_results"]] == [8, 16]
    assert told["latest_checkpoint_result"]["metrics"]["validation_loss"] > 1
    folders = {name.split("/")[1] for name in storage.list("runs/first") if "/" in name}
    assert folders == {"latest", "step-00000008", "step-00000016"}


def test_another_run_starts_from_a_checkpoint_and_leaves_batches_out(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"resume": "runs/first/checkpoints/step-00000008", "every": 4}
    skips = {"skip_steps": [[10, 11], [13, 13]]}
    config = run_config(storage, "second", train=STEPS, parallel=PAIR, checkpoint=start, data=skips)
    pretrain(config)
    assert "resuming from the checkpoint of step 8 on 2 ranks" in capsys.readouterr().out
    first, second = losses(storage, "first"), losses(storage, "second")
    assert sorted(second) == list(range(9, 17))
    # Batches 8 and 9, and then others.
    assert [second[step] for step in (9, 10)] == [first[step] for step in (9, 10)]
    assert all(second[step] != first[step] for step in range(11, 17))
    # Its own checkpoints are what it goes on from, and they only bear the batches they had.
    assert CheckpointStore(storage, "second").committed_steps() == [12, 16]
    pretrain(config)
    assert "nothing to do: second is trained" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.skip_steps: .* has trained on other batches"):
        pretrain(run_config(storage, "second", train=STEPS, parallel=PAIR, checkpoint=start))
    (mixture,) = records(storage, "second", "mixture")
    assert mixture["sources"]["web"]["samples"] == 16 * 8


@pytest.mark.slow
def test_a_run_starts_from_an_imported_model(storage: Storage) -> None:
    """That of the first run, without its optimizer: its first loss is the one training had then."""
    config = run_config(storage, "first", train=STEPS, parallel=PAIR)
    checkpoint = Checkpoint(storage, "runs/first/checkpoints/step-00000008")
    info = CheckpointInfo(
        model=config.model, step=0, tokens_seen=0, tokenizer_sha256=checkpoint.info.tokenizer_sha256
    )
    weights = ((name, checkpoint.read_weight(name)) for name in checkpoint.weights)
    write_weights(storage, "imported", info, checkpoint.read_tokenizer(), weights)
    # Batch 8 is what step 9 was trained on.
    pretrain(
        run_config(
            storage, "tuned", train=STEPS | {"steps": 4}, parallel=PAIR,
            checkpoint={"resume": "runs/imported"}, data={"skip_steps": [[0, 7]]},
        )
    )  # fmt: skip
    assert losses(storage, "tuned")[1] == losses(storage, "first")[9]
    assert CheckpointStore(storage, "tuned").committed_steps() == [4]


def test_starts_that_lead_nowhere(storage: Storage) -> None:
    whole = {"resume": "runs/first"}
    with pytest.raises(UserError, match=r"train\.steps: 16 leaves nothing to do: .*step 16"):
        pretrain(run_config(storage, "third", train=STEPS, parallel=PAIR, checkpoint=whole))
    with pytest.raises(UserError, match=r"checkpoint\.resume: .* is of another model"):
        pretrain(run_config(storage, "third", model={"n_layers": 1}, checkpoint=whole))
    with pytest.raises(UserError, match=r"runs/none holds no committed checkpoint"):
        pretrain(run_config(storage, "third", checkpoint={"resume": "runs/none"}))
    never = {"resume": "never"}
    with pytest.raises(UserError, match=r"has checkpoints and checkpoint\.resume is 'never'"):
        pretrain(run_config(storage, "first", train=STEPS, parallel=PAIR, checkpoint=never))
    assert storage.list("runs/third") == {}
