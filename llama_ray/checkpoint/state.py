"""What is saved of a training run: tensors by section and name.

model       weights
exp_avg, exp_avg_sq, updates       AdamW's moments, and how often each parameter was updated
rng         per rank: states of torch's random number generators
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

State = dict[str, Any]
"""Nested dicts of tensors: {"model": {"norm.weight": …}, …}. Those that are no DTensors are taken
to be the same on all ranks, unless their names differ."""

PER_RANK = "rng"


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Weights, AdamW moments and random number generators: the tensors themselves, to save or load
    into. Moments that do not exist yet (no step was taken) are made, as zeros."""
    state: State = {"model": {}, "exp_avg": {}, "exp_avg_sq": {}, "updates": {}}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert id(parameter) in trained, f"{name} is gathered: FSDP shows a temporary copy of it"
        moments = optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter)
            moments["exp_avg_sq"] = torch.zeros_like(parameter)
        state["model"][name] = parameter
        state["exp_avg"][name] = moments["exp_avg"]
        state["exp_avg_sq"][name] = moments["exp_avg_sq"]
        state["updates"][name] = moments["step"]
    state[PER_RANK] = random_states()
    return state


def random_states() -> State:
    """uint8 tensors of this rank's generators, by rank."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {str(dist.get_rank() if dist.is_initialized() else 0): states}


def set_random_states(states: State) -> None:
    """What `random_states` gave."""
    (mine,) = states.values()
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"])


def flat(state: State, prefix: str = "") -> dict[str, Tensor]:
    """ "section.name" → tensor."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{key}.")
        else:
            assert isinstance(value, Tensor), f"{prefix}{key} is no tensor: it belongs in the info"
            tensors[f"{prefix}{key}"] = value
    return tensors
