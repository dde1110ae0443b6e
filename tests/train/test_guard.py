"""Steps that would do harm change nothing, on every rank alike, and nobody waits to be told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ray.config import ModelConfig
from llama_ray.config.pretrain import OptimizerConfig
from llama_ray.model import LLaMA
from llama_ray.parallel import (
    begin_backward,
    finish_gradients,
    init_mesh,
    initialize,
    local_part,
    parallelize,
)
from llama_ray.train.guard import WINDOW, GradientGuard
from llama_ray.train.optimizer import build_optimizer, clip_grad_norm
from tests.parallel.ranks import Ranks

MODEL = ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_hidden_dim=64, vocab_size=64)
CONFIG = OptimizerConfig(lr=1e-2, spike_factor=5.0)
CPU = torch.device("cpu")


class NoHostReads(TorchDispatchMode):
    """Fails where a value is fetched from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was asked for"
        return func(*args, **(kwargs or {}))


def judged(guard: GradientGuard, norms: list[float]) -> list[bool]:
    return [bool(guard.judge(torch.tensor(norm)).item()) for norm in norms]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad: float) -> None:
    guard = GradientGuard(CONFIG, CPU)
    assert judged(guard, [bad, 1.0, bad, bad, 2.0]) == [True, False, True, True, False]
    assert guard.state["taken"] == 2
    assert guard.state["mean_norm"] == 1.5
    assert judged(guard, [bad, bad]) == [True, True]
    assert guard.state["skipped_in_a_row"] == 2


def test_a_spike_is_told_by_the_running_mean() -> None:
    guard = GradientGuard(CONFIG, CPU)
    # At a run's beginning norms may do what they like.
    assert not any(judged(guard, [100.0, *[1.0] * (WINDOW - 1)]))
    mean = guard.state["mean_norm"].item()
    assert mean == pytest.approx((100 + WINDOW - 1) / WINDOW, rel=1e-5)
    # What is skipped does not raise the bar.
    assert judged(guard, [5.1 * mean, 100 * mean, 5.1 * mean, 4.9 * mean]) == [True] * 3 + [False]
    # Norms that grow slowly are followed.
    assert not any(judged(guard, [mean * 1.02**n for n in range(200)]))


def train_step(
    model: LLaMA, optimizer: torch.optim.Optimizer, guard: GradientGuard, step: int, poison: bool
) -> Tensor:
    """poison: this rank's gradients alone."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(64, (4, 17), generator=generator)
    begin_backward(model, last=True)
    model(tokens[:, :-1], tokens[:, 1:]).div(64).backward()
    finish_gradients(model)
    if poison:
        grad = model.layers[0].attention.wq.weight.grad
        local_part(grad)[0, 0] = math.nan
    with NoHostReads():
        skipped = guard.judge(clip_grad_norm(model, 1.0))
        optimizer.found_inf = skipped
        optimizer.step()
    optimizer.zero_grad()
    return skipped


def final_weights(rank: int, tensor: int, data: int, poisoned: list[int], steps: list[int]) -> Any:
    """Skipped flags and this rank's weights and moments after `steps`, of which rank 0 has NaN in
    its gradients of those `poisoned`."""
    with torch.device("meta"):
        model = LLaMA(MODEL)
    if tensor * data > 1:
        parallelize(model, init_mesh(tensor, data, "cpu"), torch.float32)
    model.materialize("cpu")
    initialize(model, seed=3)
    optimizer = build_optimizer(model, CONFIG)
    guard = GradientGuard(CONFIG, CPU)
    flags = [
        train_step(model, optimizer, guard, step, rank == 0 and step in poisoned).item()
        for step in steps
    ]
    state = [local_part(p).clone() for p in model.parameters()]
    for moments in optimizer.state.values():
        state += [local_part(value).clone() for value in moments.values()]
    return flags, state


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (2, 1), (1, 2)])
def test_a_skipped_step_is_as_if_it_had_not_been(ranks: Ranks, tensor: int, data: int) -> None:
    n = tensor * data

    def run(poisoned: list[int], steps: list[int]) -> list[Any]:
        if n == 1:
            return [final_weights(0, 1, 1, poisoned, steps)]
        return ranks(n, final_weights, tensor, data, poisoned, steps)

    poisoned = run([1, 2], [0, 1, 2, 3, 4])
    clean = run([], [0, 3, 4])
    for (flags, got), (_, expected) in zip(poisoned, clean, strict=True):
        assert flags == [0, 1, 1, 0, 0]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
