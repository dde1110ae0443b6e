"""What the tests of checkpoints share: a training state of some layout, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llama_ray.checkpoint.checkpointer import Checkpointer
from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.sharded import load_sharded
from llama_ray.checkpoint.state import State, flat, training_state
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.config import ModelConfig, StorageConfig
from llama_ray.config.pretrain import CheckpointConfig, OptimizerConfig
from llama_ray.model import LLaMA
from llama_ray.storage import Storage
from llama_ray.train.optimizer import build_optimizer
from tests.parallel.layouts import Layout, backward, batch, laid_out, tiny

MODEL = tiny(n_kv_heads=2)
TOKENIZER = b"no model, but kept byte for byte"


def info(step: int, model: ModelConfig = MODEL, **others: Any) -> CheckpointInfo:
    return CheckpointInfo(
        model=model, step=step, tokens_seen=100 * step, tokenizer_sha256="0" * 64, **others
    )


@contextmanager
def training(
    layout: Layout, model_config: ModelConfig = MODEL
) -> Iterator[tuple[LLaMA, torch.optim.Optimizer, State]]:
    """A model, its optimizer and their state."""
    with laid_out(model_config, layout) as (model, _):
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
        guard = {"mean_norm": torch.full((), 2.5), "taken": torch.full((), 7.0)}
        state = training_state(model, optimizer) | {"guard": guard}
        yield model, optimizer, state


def step_once(model: LLaMA, optimizer: torch.optim.Optimizer, layout: Layout, step: int) -> None:
    backward(model, batch(MODEL, step), layout)
    optimizer.step()
    optimizer.zero_grad()


def checkpointer(
    config: StorageConfig, keep: int = 3, timeout_seconds: float | None = None, **others: Any
) -> Checkpointer:
    store = CheckpointStore(Storage(config), "run")
    return Checkpointer(
        store, TOKENIZER, CheckpointConfig(keep=keep, **others), timeout_seconds=timeout_seconds
    )


def save(rank: int, config: StorageConfig, layout: Layout, step: int) -> dict[str, Tensor]:
    """Save after one step of training; returns all that is not a rank's own, whole."""
    with training(layout) as (model, optimizer, state):
        step_once(model, optimizer, layout, step)
        saver = checkpointer(config)
        saver.save(state, info(step))
        saver.close()
        return {name: whole(tensor) for name, tensor in shared(state).items()}


def load(
    rank: int, config: StorageConfig, layout: Layout, step: int, expected: dict[str, Tensor]
) -> None:
    """Check that this rank's part of everything is bit for bit that of `expected`."""
    store = CheckpointStore(Storage(config), "run")
    with training(layout) as (model, optimizer, state):
        for tensor in flat(state).values():
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
        assert load_sharded(store.storage, store.path(step), state) >= {"model", "exp_avg", "guard"}
        assert shared(state).keys() == expected.keys()
        for name, tensor in shared(state).items():
            assert torch.equal(*parts(tensor, expected[name])), name
        step_once(model, optimizer, layout, step + 1)  # and it can go on


def with_env(rank: int, env: dict[str, str], function: Callable[..., Any], *args: Any) -> Any:
    """`function` as a rank whose process was started with `env`."""
    os.environ.update(env)
    return function(rank, *args)


def shared(state: State) -> dict[str, Tensor]:
    return flat({section: tensors for section, tensors in state.items() if section != "rng"})


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parts(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank has of a tensor, and what it should have of the whole `want`."""
    if not isinstance(got, DTensor):
        return got, want
    shape, offset = compute_local_shape_and_global_offset(
        want.shape, got.device_mesh, got.placements
    )
    box = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    return got.to_local(), want[box]
