"""The device mesh: (data, tensor) axes over fairscale's process groups.

Ranks of one tensor-parallel group are neighbours (0…T-1, T…2T-1, …), which Ray packs onto one
node; that is also Meta's and fairscale's order.
"""

from __future__ import annotations

import contextlib
import io

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def init_mesh(tensor: int, data: int, device_type: str) -> DeviceMesh:
    """Mesh of shape (data, tensor) with axes "dp" and "tp", over fairscale's groups.

    torch.distributed must be initialised with tensor × data ranks.
    """
    assert dist.get_world_size() == tensor * data, (dist.get_world_size(), tensor, data)
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces each group it makes
        fairscale_groups.initialize_model_parallel(tensor)
    groups = [
        fairscale_groups.get_data_parallel_group(),
        fairscale_groups.get_model_parallel_group(),
    ]
    ranks = torch.arange(tensor * data).view(data, tensor)
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("dp", "tp"))


def destroy_mesh() -> None:
    """Forget fairscale's groups, which it keeps in globals, so that another mesh can follow."""
    fairscale_groups.destroy_model_parallel()
