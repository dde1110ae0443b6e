"""The device mesh: data and tensor axes over fairscale's process groups.

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


def init_mesh(tensor: int, data: int, device_type: str, shard: int | None = None) -> DeviceMesh:
    """Mesh of shape (data, tensor) with axes "dp" and "tp", over fairscale's groups.

    shard: data-parallel ranks that share one copy of the weights; fewer than `data` gives a mesh
    of shape (data / shard, shard, tensor) with axes "replicate", "dp", "tp".

    torch.distributed must be initialised with tensor × data ranks.
    """
    assert dist.get_world_size() == tensor * data, (dist.get_world_size(), tensor, data)
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces each group it makes
        fairscale_groups.initialize_model_parallel(tensor)
    tp = fairscale_groups.get_model_parallel_group()
    if shard is None or shard == data:
        names: tuple[str, ...] = ("dp", "tp")
        groups = [fairscale_groups.get_data_parallel_group(), tp]
        ranks = torch.arange(tensor * data).view(data, tensor)
    else:
        ranks = torch.arange(tensor * data).view(data // shard, shard, tensor)
        names = ("replicate", "dp", "tp")
        groups = [_own_group(ranks.movedim(axis, -1), names[axis]) for axis in (0, 1)] + [tp]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=names)


def _own_group(ranks: torch.Tensor, name: str) -> dist.ProcessGroup:
    """Make a group of each row; returns the one that this rank is in."""
    rows = ranks.reshape(-1, ranks.shape[-1]).tolist()
    group, _ = dist.new_subgroups_by_enumeration(rows, group_desc=name)
    assert group is not None
    return group


def destroy_mesh() -> None:
    """Forget fairscale's groups, which it keeps in globals, so that another mesh can follow."""
    fairscale_groups.destroy_model_parallel()
