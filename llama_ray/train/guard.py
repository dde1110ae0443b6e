"""Steps whose gradients would do harm are skipped on the device: nobody waits to be told."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ray.config.pretrain import OptimizerConfig

# The running mean is of about so many steps, and judges none before it has seen as many: norms fall
# steeply at a run's beginning.
WINDOW = 50


class GradientGuard:
    """What it knows is in scalars on the device, the same on every rank, for they follow from the
    global gradient norm alone. They are part of a checkpoint."""

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.config = config
        self.state = {
            name: torch.zeros((), dtype=torch.float32, device=device)
            for name in ("mean_norm", "taken", "skipped_in_a_row")
        }

    def judge(self, norm: Tensor) -> Tensor:
        """norm: of the gradients, before clipping. 1.0 where the step is to be skipped, else 0.0;
        what the fused AdamW takes as its `found_inf`."""
        mean, taken = self.state["mean_norm"], self.state["taken"]
        spike = (taken >= WINDOW) & (norm > self.config.spike_factor * mean)
        skip = spike | ~norm.isfinite()
        # Not `+= 0 × …`, which a norm that is NaN would survive.
        change = torch.where(skip, 0.0, (norm - mean) / (taken + 1).clamp(max=WINDOW))
        mean += change
        skipped = skip.float()
        taken += 1 - skipped
        self.state["skipped_in_a_row"].add_(1).mul_(skipped)
        return skipped
