"""Schedule, weight-decay groups, FLOP count."""

from __future__ import annotations

import pytest
import torch

from llama_ray.config import ModelConfig
from llama_ray.config.pretrain import OptimizerConfig
from llama_ray.model import LLaMA
from llama_ray.train.optimizer import build_optimizer, learning_rate

CONFIG = OptimizerConfig(lr=3e-4, warmup_steps=100, final_lr_fraction=0.1)


def test_schedule_agrees_with_pytorchs() -> None:
    """Linear warm-up and cosine, composed of torch's own schedulers."""
    steps = 1000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=CONFIG.lr)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 100, 1.0, total_iters=99)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 101, eta_min=3e-5)
    reference = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [100])
    for step in range(steps):
        assert learning_rate(step, steps, CONFIG) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-6
        )
        optimizer.step()
        reference.step()


def test_ends_of_the_schedule() -> None:
    assert learning_rate(0, 1000, CONFIG) == pytest.approx(3e-6)
    assert learning_rate(99, 1000, CONFIG) == pytest.approx(3e-4)
    assert learning_rate(999, 1000, CONFIG) == pytest.approx(3e-5)


def test_norm_weights_do_not_decay() -> None:
    model = LLaMA(ModelConfig.model_validate({"preset": "debug", "vocab_size": 256}))
    decayed, kept = build_optimizer(model, CONFIG).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(kept["params"]) == 2 * 4 + 1  # two norms a layer and the last one
    assert all(p.ndim == 1 for p in kept["params"])


def test_flops_per_token_of_7b() -> None:
    """6 × (6.738 G parameters - 131 M embeddings) + 12 × 32 × 4096 × 2048."""
    config = ModelConfig.model_validate({"preset": "7B"})
    assert config.flops_per_token(2048) == 6 * (6_738_415_616 - 131_072_000) + 12 * 32 * 4096 * 2048
