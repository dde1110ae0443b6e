"""Every layout is the same computation as one process with the plain model, to rounding: loss,
every gradient, the clip norm, and three optimizer steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama_ray.checkpoint.checkpointer import Checkpointer
from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.sharded import load_sharded
from llama_ray.checkpoint.state import training_state
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.config import ModelConfig, StorageConfig
from llama_ray.config.pretrain import CheckpointConfig, OptimizerConfig
from llama_ray.formats.hf_layout import to_hf
from llama_ray.model import LLaMA, llama
from llama_ray.model.projection import Weight
from llama_ray.parallel import copy_shard, initialize, reshard
from llama_ray.storage import Storage
from llama_ray.train.optimizer import build_optimizer, clip_grad_norm
from tests.parallel.layouts import (
    BATCH,
    SEQ,
    Layout,
    backward,
    batch,
    grads,
    laid_out,
    relative_error,
    tiny,
)
from tests.parallel.ranks import Ranks

STEPS = 3
# A large eps: with the usual one Adam's first step is lr × sign(gradient), which makes a full step
# of any rounding error in a gradient that is all but nil.
OPTIMIZER = OptimizerConfig(lr=1e-2, clip_norm=0.5, eps=1e-3)
TOLERANCE = 1e-5


class Step(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]
    norm: Tensor
    weights: dict[str, Tensor]
    """After the update."""


@cache
def plain_steps(config_json: str) -> list[Step]:
    """In this process alone, each batch at once."""
    config = ModelConfig.model_validate_json(config_json)
    model = LLaMA(config)
    initialize(model, seed=1)
    optimizer = build_optimizer(model, OPTIMIZER)
    steps = []
    for step in range(STEPS):
        tokens = batch(config, step)
        loss = model(tokens[:, :-1], tokens[:, 1:]) / (BATCH * SEQ)
        loss.backward()
        found = {name: grad.clone() for name, grad in grads(model).items()}
        norm = torch.stack([grad.norm() for grad in found.values()]).norm()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps.append(Step(loss.detach(), found, norm, weights))
    return steps


def compare(rank: int, config: ModelConfig, layout: Layout) -> None:
    with laid_out(config, layout) as (model, _):
        compare_steps(model, config, layout)


def compare_steps(model: LLaMA, config: ModelConfig, layout: Layout) -> None:
    optimizer = build_optimizer(model, OPTIMIZER)
    for step, want in enumerate(plain_steps(config.model_dump_json())):
        loss = backward(model, batch(config, step), layout)
        dist.all_reduce(loss)  # tensor-parallel ranks have it alike
        assert relative_error(loss / layout.tensor, want.loss) < 1e-6, f"step {step}: loss"
        for name, grad in grads(model).items():
            assert relative_error(grad, want.grads[name]) < TOLERANCE, f"step {step}: {name}"
        assert want.norm > OPTIMIZER.clip_norm  # so that clipping is part of the test
        norm = clip_grad_norm(model, OPTIMIZER.clip_norm)
        assert relative_error(norm, want.norm) < TOLERANCE, f"step {step}: norm"
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            error = relative_error(parameter.detach(), want.weights[name])
            assert error < TOLERANCE, f"step {step}: {name} after the update"


# Each value of each choice for each number of ranks; `test_every_layout` has their product.
LAYOUTS = [
    Layout(),
    Layout(micro_batches=2, recompute="selective"),
    Layout(micro_batches=2, recompute="full"),
    Layout(2),
    Layout(2, micro_batches=2, overlap=False, chunks=2),
    Layout(2, micro_batches=2, recompute="selective", chunks=1),
    Layout(2, micro_batches=2, recompute="full"),
    Layout(2, micro_batches=2, sequence=False, recompute="selective"),
    Layout(2, micro_batches=2, sequence=False, overlap=False, recompute="full", chunks=2),
    Layout(1, 2),
    Layout(1, 2, micro_batches=2, recompute="selective"),
    Layout(1, 2, micro_batches=2, recompute="full", reshard_after_forward=False),
    Layout(1, 2, micro_batches=2, overlap=False),
    Layout(1, 2, micro_batches=2, overlap=False, recompute="full", reshard_after_forward=False),
    Layout(1, 2, micro_batches=2, reduce_every_micro_batch=True),
    Layout(1, 2, shard=1, micro_batches=2),
    Layout(4, micro_batches=2, recompute="selective"),
    Layout(4, overlap=False, recompute="full", chunks=2),
    Layout(4, sequence=False, chunks=1),
    Layout(2, 2, micro_batches=2, recompute="selective"),
    Layout(2, 2, micro_batches=2, recompute="full", reshard_after_forward=False),
    Layout(2, 2, sequence=False, overlap=False, chunks=2),
    Layout(2, 2, shard=1, micro_batches=2),
    Layout(2, 2, micro_batches=2, reduce_every_micro_batch=True),
    Layout(1, 4, recompute="full"),
    Layout(1, 4, shard=2, micro_batches=2),
    Layout(1, 4, shard=2, micro_batches=2, overlap=False, reshard_after_forward=False),
    Layout(4, 2, micro_batches=2, recompute="selective", chunks=2),
]
PLAIN, TIED = tiny(), tiny(n_heads=8, n_kv_heads=4, tie_embeddings=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_agrees_with_one_process(layout: Layout, ranks: Ranks) -> None:
    ranks(layout.world_size, compare, PLAIN, layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(micro_batches=2, recompute="selective"),
        Layout(1, 2, micro_batches=2),
        Layout(2, micro_batches=2, recompute="full"),
        Layout(4, sequence=False),
        Layout(2, 2, micro_batches=2, recompute="selective", reshard_after_forward=False),
    ],
    ids=str,
)
def test_tied_embeddings_and_grouped_queries(layout: Layout, ranks: Ranks) -> None:
    ranks(layout.world_size, compare, TIED, layout)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PLAIN, TIED], ids=["mha", "gqa and tied"])
@pytest.mark.parametrize(
    ("tensor", "data"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (4, 2)], ids=str
)
def test_every_layout(tensor: int, data: int, config: ModelConfig, ranks: Ranks) -> None:
    yes_or_no = (True, False)
    for sequence, overlap, recompute, reshard_after in product(
        yes_or_no if tensor > 1 else (True,),
        yes_or_no if tensor * data > 1 else (True,),
        ("none", "selective", "full"),
        yes_or_no if data > 1 else (True,),
    ):
        layout = Layout(
            tensor,
            data,
            sequence=sequence,
            overlap=overlap,
            recompute=recompute,
            reshard_after_forward=reshard_after,
            micro_batches=2,
        )
        try:
            ranks(layout.world_size, compare, config, layout)
        except AssertionError as error:
            raise AssertionError(f"{layout}: {error}") from error


def hf_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Wide enough that attention is far from uniform and norms far from one."""
    torch.manual_seed(0)
    return {
        name: torch.randn_like(p) * 0.2 + (1.0 if "norm" in name else 0.0)
        for name, p in LLaMA(config).named_parameters()
    }


def loss_and_gradients(
    rank: int, config: ModelConfig, layout: Layout
) -> tuple[Tensor, dict[str, Tensor]]:
    with laid_out(config, layout) as (model, _):
        weights = hf_weights(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                copy_shard(parameter, weights[name])
        loss = backward(model, batch(config, 0), layout)
        found = grads(model).items()
        return loss, {
            name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found
        }


@pytest.mark.parametrize("config", [PLAIN, TIED], ids=["mha", "gqa and tied"])
def test_agrees_with_hugging_face(config: ModelConfig, ranks: Ranks) -> None:
    from tests.model.test_against_hf import assert_close, hugging_face  # ranks do without

    layout = Layout(2, recompute="selective")
    theirs = hugging_face(config, hf_weights(config))
    tokens = batch(config, 0)
    logits = theirs(tokens[:, :-1]).logits
    want = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    want.backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for loss, found in ranks(2, loss_and_gradients, config, layout):
        assert_close("loss", loss, want)
        for name, grad in found.items():
            hf_name, converted = to_hf(name, grad, config)
            assert_close(name, converted, their_grads[hf_name])


def logits_agree(rank: int, layout: Layout) -> None:
    plain = LLaMA(PLAIN)
    initialize(plain, seed=1)
    tokens = batch(PLAIN, 0)
    with laid_out(PLAIN, layout) as (model, _):
        assert relative_error(model(tokens).detach(), plain(tokens).detach()) < TOLERANCE


@pytest.mark.parametrize("sequence", [False, True])
def test_logits_are_gathered_over_the_vocabulary(sequence: bool, ranks: Ranks) -> None:
    ranks(2, logits_agree, Layout(2, sequence=sequence, chunks=1))


def bytes_kept(rank: int, layout: Layout) -> int:
    """For the backward pass, by the forward pass, besides what checkpoint() keeps itself."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with laid_out(PLAIN, layout) as (model, _):
        tokens = batch(PLAIN, 0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        assert loss.requires_grad  # and with it all that was kept is alive: no address came twice
    return sum(kept.values())


@pytest.mark.parametrize("layout", [Layout(), Layout(2)], ids=str)
def test_recomputation_keeps_less(layout: Layout, ranks: Ranks) -> None:
    none, selective, full = (
        ranks(layout.world_size, bytes_kept, replace(layout, recompute=recompute))[0]
        for recompute in ("none", "selective", "full")
    )
    assert selective < 0.65 * none
    assert full < 0.2 * none


def copies(model: LLaMA) -> list[Weight]:
    """The layers that multiply by a copy of their weight in bfloat16."""
    return [m for m in model.modules() if isinstance(m, Weight) and m._copy is not None]


def bfloat16_losses(rank: int, config: ModelConfig, layout: Layout) -> list[float]:
    """Of steps on one batch, at a rate that makes it fall."""
    losses = []
    with laid_out(config, layout) as (model, _):
        optimizer = build_optimizer(model, OPTIMIZER)
        for _ in range(6):
            loss = backward(model, batch(config, 0), layout)
            dist.all_reduce(loss)
            losses.append(loss.item() / layout.tensor)
            optimizer.step()
            optimizer.zero_grad()
        assert bool(copies(model)) == (layout.data == 1)
    return losses


@torch.no_grad()
def loss_of(model: LLaMA, tokens: Tensor) -> Tensor:
    loss = model(tokens[:, :-1], tokens[:, 1:])
    reshard(model)
    return loss


def load_after_more_steps(rank: int, config: ModelConfig, layout: Layout, folder: Path) -> None:
    with laid_out(config, layout) as (model, _):
        optimizer, tokens = build_optimizer(model, OPTIMIZER), batch(config, 0)
        saved = loss_of(model, tokens)
        storage = Storage(StorageConfig(url=f"file://{folder}"))
        store = CheckpointStore(storage, "run")
        checkpointer = Checkpointer(store, b"", CheckpointConfig())
        info = CheckpointInfo(model=config, step=0, tokens_seen=0, tokenizer_sha256="")
        checkpointer.save(training_state(model, optimizer), info)
        checkpointer.close()
        backward(model, tokens, layout)
        optimizer.step()
        assert loss_of(model, tokens) < 0.99 * saved
        load_sharded(storage, store.path(0), training_state(model, optimizer))
        assert torch.equal(loss_of(model, tokens), saved)


def test_bfloat16_follows_every_update(ranks: Ranks) -> None:
    """On one data-parallel rank, products take copies of the weights; FSDP gathers them anew."""
    layouts = [Layout(t, d, dtype=torch.bfloat16) for t, d in ((1, 1), (1, 2), (2, 1), (2, 2))]
    runs = [ranks(x.world_size, bfloat16_losses, tiny(), x)[0] for x in layouts]
    for losses in runs:
        assert losses[-1] < 0.95 * losses[0]
        assert losses == pytest.approx(runs[0], rel=3e-3)


def rotated_in(rank: int, layout: Layout) -> set[torch.dtype]:
    """The types of the rotary table where it is used."""
    seen = set()
    rotate = llama._rotate

    def watched(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        seen.update((cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    config = tiny()
    with laid_out(config, layout) as (model, _), mock.patch.object(llama, "_rotate", watched):
        backward(model, batch(config, 0), layout)
    return seen


def test_the_rotary_table_stays_float32(ranks: Ranks) -> None:
    for layout in (Layout(dtype=torch.bfloat16), Layout(1, 2, dtype=torch.bfloat16)):
        assert ranks(layout.world_size, rotated_in, layout)[0] == {torch.float32}


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 1), (1, 2)])
def test_bfloat16_follows_a_load(tensor: int, data: int, tmp_path: Path, ranks: Ranks) -> None:
    layout = Layout(tensor, data, dtype=torch.bfloat16)
    ranks(layout.world_size, load_after_more_steps, tiny(), layout, tmp_path / "saved")
