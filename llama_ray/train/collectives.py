"""What torch's flight recorder knows of this process's collectives.

It is a ring of the last 2,000 (`TORCH_FR_BUFFER_SIZE`), which gloo and NCCL fill unasked.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

# NCCL's groups have a recorder of their own, in builds of torch that have NCCL.
RECORDERS = [
    getattr(_distributed_c10d, name)
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    if hasattr(_distributed_c10d, name)
]


@dataclass(frozen=True)
class Collective:
    """One that this process has entered."""

    group_id: str
    """The same on all ranks of the group, and that of no other."""
    group: str
    """What a person calls it: "world", "tp", "dp", "checkpoint"; ranks in other places of the mesh
    have groups of the same name."""
    ranks: list[int]
    operation: str
    sequence: int
    """Counts the group's collectives: the same on all its ranks, unless their paths differ."""
    sizes: list[list[int]]
    """Of the input tensors."""
    seconds: float
    """Since it was entered."""
    done: bool
    background: bool
    """Entered by a Python thread that is not the training thread, as those of uploads are. (The
    threads of autograd, one for each GPU, are not Python's.)"""


def set_timeouts(seconds: float) -> None:
    """Collectives of all groups that this process has made by now fail after `seconds`: groups do
    not take over the default group's timeout. Groups made later keep their own."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def progress() -> list[bytes]:
    """Differs once another collective has begun or ended. Takes microseconds."""
    return [dump(includeCollectives=False) for dump in RECORDERS]


def recorded(trainer: threading.Thread) -> list[Collective]:
    """All that the recorder holds, oldest first. Takes tens of milliseconds."""
    groups = {group.group_name: group for group in list(distributed_c10d._world.pg_map)}
    others = {
        thread.ident
        for thread in threading.enumerate()
        if thread is not trainer and not isinstance(thread, threading._DummyThread)
    }
    now = time.time_ns()
    entries = [entry for dump in RECORDERS for entry in json.loads(dump())["entries"]]
    return [
        Collective(
            group_id=group.group_name,
            group=_name(group),
            ranks=dist.get_process_group_ranks(group),
            operation=entry["profiling_name"].rpartition(":")[2],
            sequence=entry["collective_seq_id"],
            sizes=entry["input_sizes"],
            seconds=(now - entry["time_created_ns"]) / 1e9,
            done=entry["retired"],
            background=int(entry["thread_id"]) in others,
        )
        for entry in sorted(entries, key=lambda entry: entry["time_created_ns"])
        # Its group may be gone; and messages between two ranks, of which we have none, count apart.
        if not entry["is_p2p"] and (group := groups.get(entry["process_group"][0])) is not None
    ]


def _name(group: dist.ProcessGroup) -> str:
    if group is dist.group.WORLD:
        return "world"
    if fairscale_groups.model_parallel_is_initialized():
        if group is fairscale_groups.get_model_parallel_group():
            return "tp"
        if group is fairscale_groups.get_data_parallel_group():
            return "dp"
    named = group.group_desc not in ("", "undefined")
    return group.group_desc if named else f"group {group.group_name}"
