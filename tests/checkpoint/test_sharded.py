"""Any layout loads what any other saved, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_ray.checkpoint.sharded import load_sharded, load_weights
from llama_ray.checkpoint.state import flat, training_state
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.checkpoint.writer import write_weights
from llama_ray.config import StorageConfig
from llama_ray.config.pretrain import OptimizerConfig
from llama_ray.errors import UserError
from llama_ray.model import LLaMA
from llama_ray.parallel import initialize
from llama_ray.storage import Storage
from llama_ray.train.optimizer import build_optimizer
from tests.checkpoint.saving import (
    MODEL,
    TOKENIZER,
    checkpointer,
    info,
    load,
    save,
    training,
    with_env,
)
from tests.parallel.layouts import Layout, tiny
from tests.parallel.ranks import Ranks
from tests.s3 import BUCKET, S3Server

LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(data=2),
    Layout(tensor=2, data=2),
    Layout(data=4),
    Layout(data=4, shard=2),
    Layout(tensor=2, data=2, shard=1),
]


@pytest.fixture(scope="module")
def saved(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[StorageConfig, dict[str, Tensor]]]:
    """By place in LAYOUTS: where that layout saved, and what."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for number, layout in enumerate(LAYOUTS):
        config = StorageConfig(url=f"file://{folder}/{number}")
        found[number] = config, ranks(layout.world_size, save, config, layout, 10)[0]
    return found


@pytest.mark.parametrize("to", LAYOUTS, ids=str)
def test_any_layout_loads_any_other(saved: dict[int, Any], ranks: Ranks, to: Layout) -> None:
    for config, expected in saved.values():
        ranks(to.world_size, load, config, to, 10, expected)


def test_one_process_loads_without_a_group(saved: dict[int, Any]) -> None:
    config, expected = saved[3]
    storage = Storage(config)
    folder = CheckpointStore(storage, "run").path(10)
    model = LLaMA(MODEL)
    load_weights(storage, folder, model)
    half = LLaMA(MODEL).to(torch.bfloat16)
    load_weights(storage, folder, half)
    for (name, weight), rounded in zip(model.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(weight, expected[f"model.{name}"])
        assert torch.equal(rounded, expected[f"model.{name}"].bfloat16())


def test_what_ranks_have_alike_is_written_once(saved: dict[int, Any]) -> None:
    sizes = []
    for number in (0, 2, 4, 5):
        storage = Storage(saved[number][0])
        files = storage.list(CheckpointStore(storage, "run").path(10))
        sizes.append(sum(size for name, size in files.items() if name.endswith(".safetensors")))
    # Headers, and random number generators of 5 KB a rank.
    assert max(sizes) < sizes[0] + 80_000 < 1.3 * sizes[0]


def uneven(rank: int, config: StorageConfig, save_ranks: int) -> None:
    """5 rows on 4 ranks: one has none."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.arange(15.0).view(5, 3)
    tensor = distribute_tensor(values.clone(), mesh, [Shard(0)])
    if save_ranks == dist.get_world_size():
        saver = checkpointer(config)
        saver.save({"odd": {"rows": tensor}}, info(1))
        saver.close()
    tensor.to_local().zero_()
    storage = Storage(config)
    assert load_sharded(storage, CheckpointStore(storage, "run").path(1), {"odd": {"rows": tensor}})
    assert torch.equal(tensor.full_tensor(), values)


def test_rows_that_do_not_divide_evenly(ranks: Ranks, tmp_path: Path) -> None:
    config = StorageConfig(url=f"file://{tmp_path}")
    for n in (4, 3, 2):
        ranks(n, uneven, config, 4)


def random_numbers(rank: int, config: StorageConfig, step: int, saving: bool) -> list[float]:
    layout = Layout(data=torch.distributed.get_world_size())
    torch.manual_seed(100 + rank if saving else rank)
    with training(layout) as (_, _, state):
        if saving:
            saver = checkpointer(config)
            saver.save(state, info(step))
            saver.close()
        else:
            storage = Storage(config)
            load_sharded(storage, CheckpointStore(storage, "run").path(step), state)
    return torch.rand(3).tolist()


def test_random_numbers_go_on_where_the_rank_was_there(ranks: Ranks, tmp_path: Path) -> None:
    config = StorageConfig(url=f"file://{tmp_path}")
    saved = ranks(2, random_numbers, config, 1, True)
    loaded = ranks(4, random_numbers, config, 1, False)
    assert loaded[:2] == saved
    fresh = [torch.rand(3, generator=torch.Generator().manual_seed(rank)) for rank in (2, 3)]
    # `laid_out` draws initial weights from generators of its own.
    assert loaded[2:] == [numbers.tolist() for numbers in fresh]


def test_weights_alone_start_a_training_state(tmp_path: Path) -> None:
    storage = Storage(StorageConfig(url=f"file://{tmp_path}"))
    source = LLaMA(MODEL)
    initialize(source, seed=3)
    weights = ((name, p.detach().bfloat16()) for name, p in source.named_parameters())
    folder = write_weights(storage, "imported", info(0), TOKENIZER, weights)
    assert CheckpointStore(storage, "imported").committed_steps() == [0]
    files = [n for n in storage.list(folder) if n.startswith("weights")]
    assert 2 < len(files) < 40  # about as large as the largest tensor
    model = LLaMA(MODEL)
    optimizer = build_optimizer(model, OptimizerConfig())
    state = training_state(model, optimizer)
    assert load_sharded(storage, folder, state) == {"model"}
    for name, p in source.named_parameters():
        assert torch.equal(state["model"][name], p.bfloat16().float())
    assert not any(tensor.any() for tensor in flat({"m": state["exp_avg"]}).values())


def test_another_model_is_refused(saved: dict[int, Any]) -> None:
    storage = Storage(saved[0][0])
    folder = CheckpointStore(storage, "run").path(10)
    for changes, reason in (
        ({"n_layers": 2}, r"layers\.2\.\S+ is no weight of this model"),
        ({"n_layers": 4}, r"has no model\.layers\.3"),
        ({"ffn_hidden_dim": 64}, r"has shape \[48, 32\] where \[64, 32\] is wanted"),
    ):
        with pytest.raises(UserError, match=reason):
            load_weights(storage, folder, LLaMA(tiny(n_kv_heads=2, **changes)))


def fails_on_one(rank: int, config: StorageConfig) -> str:
    storage = Storage(config)
    state = {"model": {"norm.weight": torch.zeros(32 if rank else 31)}}
    with pytest.raises(UserError) as raised:
        load_sharded(storage, CheckpointStore(storage, "run").path(10), state)
    return str(raised.value)


def test_where_one_rank_cannot_load_none_goes_on(ranks: Ranks, saved: dict[int, Any]) -> None:
    reasons = ranks(2, fails_on_one, saved[0][0])
    assert "has shape [32] where [31] is wanted" in reasons[0]
    assert "is no weight of this model" in reasons[1]


def test_from_and_to_s3(s3: S3Server, ranks: Ranks, tmp_path: Path) -> None:
    config = StorageConfig(url=f"s3://{BUCKET}/{tmp_path.name}", endpoint_url=s3.endpoint_url)
    expected = ranks(4, with_env, s3.env, save, config, LAYOUTS[3], 10)[0]
    for to in (LAYOUTS[0], LAYOUTS[5]):
        ranks(to.world_size, with_env, s3.env, load, config, to, 10, expected)
