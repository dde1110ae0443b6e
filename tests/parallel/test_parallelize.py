"""Every layout is the same computation as one process with the plain model, to rounding: loss,
every gradient, the clip norm, and two optimizer steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama_ray.config import ModelConfig
from llama_ray.config.pretrain import OptimizerConfig
from llama_ray.model import LLaMA
from llama_ray.parallel import init_mesh, initialize, parallelize
from llama_ray.train.optimizer import build_optimizer, clip_grad_norm
from tests.distributed import run_distributed

BATCH, SEQ = 4, 32


def tiny(**changes: object) -> ModelConfig:
    fields = {"dim": 64, "n_layers": 2, "n_heads": 4, "ffn_hidden_dim": 96, "vocab_size": 128}
    return ModelConfig.model_validate(fields | {"max_seq_len": 64} | changes)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def compare(rank: int, config: ModelConfig, tensor: int, data: int) -> None:
    reference = LLaMA(config)
    initialize(reference, seed=1)
    mesh = init_mesh(tensor, data, "cpu")
    with torch.device("meta"):
        model = LLaMA(config)
    parallelize(model, mesh, torch.float32).materialize("cpu")
    initialize(model, seed=1)

    pairs = list(zip(reference.named_parameters(), model.named_parameters(), strict=True))
    for (name, want), (same_name, got) in pairs:
        assert name == same_name
        assert torch.equal(whole(got), want), f"{name}: other initial weights"

    # A large eps: with the usual one Adam's first step is lr × sign(gradient), which makes a full
    # step of any rounding error in a gradient that is all but nil.
    optimizer_config = OptimizerConfig(lr=1e-2, clip_norm=0.5, eps=1e-3)
    optimizers = [build_optimizer(m, optimizer_config) for m in (reference, model)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        tokens = torch.randint(config.vocab_size, (BATCH, SEQ + 1), generator=generator)
        mine = tokens.chunk(data)[mesh.get_local_rank("dp")]
        want_loss = reference(tokens[:, :-1], tokens[:, 1:]) / (BATCH * SEQ)
        want_loss.backward()
        loss = model(mine[:, :-1], mine[:, 1:]) / (BATCH * SEQ)
        loss.backward()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total, group=mesh.get_group("dp"))
        assert relative_error(total, want_loss.detach()) < 1e-6
        for (name, want), (_, got) in pairs:
            assert want.grad is not None
            assert got.grad is not None
            assert relative_error(whole(got.grad), want.grad) < 1e-5, f"{name}: gradient"
        want_norm, norm = (
            clip_grad_norm(m, optimizer_config.clip_norm) for m in (reference, model)
        )
        assert want_norm > optimizer_config.clip_norm  # so that clipping is part of the test
        assert relative_error(norm, want_norm) < 1e-5
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for (name, want), (_, got) in pairs:
        assert relative_error(whole(got.detach()), want.detach()) < 1e-5, f"{name}: after two steps"


@pytest.mark.parametrize(
    ("tensor", "data", "changes"),
    [
        (1, 1, {}),
        (2, 1, {}),
        (1, 2, {}),
        (2, 2, {"n_kv_heads": 2}),
        (2, 1, {"tie_embeddings": True}),
        (4, 1, {}),
    ],
)
def test_layout_agrees_with_one_process(tensor: int, data: int, changes: dict[str, object]) -> None:
    run_distributed(compare, tensor * data, tiny(**changes), tensor, data)


def logits_agree(rank: int, config: ModelConfig) -> None:
    reference = LLaMA(config)
    initialize(reference, seed=1)
    with torch.device("meta"):
        model = LLaMA(config)
    parallelize(model, init_mesh(2, 1, "cpu"), torch.float32).materialize("cpu")
    initialize(model, seed=1)
    tokens = torch.arange(SEQ).view(1, -1)
    assert relative_error(model(tokens), reference(tokens)) < 1e-5


def test_logits_are_gathered_over_the_vocabulary() -> None:
    run_distributed(logits_agree, 2, tiny())
