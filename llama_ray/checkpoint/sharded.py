"""Training state from storage, into whatever layout: each rank reads what its part takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from llama_ray.checkpoint.files import WEIGHTS
from llama_ray.checkpoint.parts import Part
from llama_ray.checkpoint.reader import Checkpoint
from llama_ray.checkpoint.state import PER_RANK, State, flat, set_random_states
from llama_ray.errors import UserError
from llama_ray.storage import Storage


def load_sharded(storage: Storage, folder: str, state: State) -> set[str]:
    """Fill the tensors of `state`, whatever layout the checkpoint was written in, and set random
    number generators. Returns which sections it has: those that it lacks stay as they are (that of
    weights alone lacks the optimizer's), as do generators of ranks that were not there.

    To be called on all ranks, if there are any; where one fails, all raise `UserError`.
    """
    failure: Exception | None = None
    sections: set[str] = set()
    try:
        sections = _load(Checkpoint(storage, folder), state)
    except Exception as error:
        failure = error
    if dist.is_initialized():
        _agree(failure)
    if failure is not None:
        raise failure
    return sections


def load_weights(storage: Storage, folder: str, model: nn.Module) -> None:
    """Fill the weights alone, for inference; they are converted to the model's dtype."""
    load_sharded(storage, folder, {"model": {name: p.data for name, p in model.named_parameters()}})


def _load(checkpoint: Checkpoint, state: State) -> set[str]:
    found = {name.partition(".")[0] for name in checkpoint.index.tensors}
    saved = {section: tensors for section, tensors in state.items() if section in found}
    if PER_RANK in saved and not flat(saved[PER_RANK], f"{PER_RANK}.").keys() <= (
        checkpoint.index.tensors.keys()
    ):
        del saved[PER_RANK]
    tensors = flat(saved)
    _check_tensors(checkpoint, tensors)
    # The planner alone: `dcp.load` sends all plans to rank 0, which has nothing to decide.
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = Metadata({name: checkpoint.index.metadata(name) for name in tensors})
    planner.set_up_planner(dict(tensors), metadata)
    plan = planner.finish_plan(planner.create_local_plan())
    checkpoint.read(_part(checkpoint, item, planner.resolve_tensor(item)) for item in plan.items)
    if PER_RANK in saved:
        set_random_states(saved[PER_RANK])
    return set(saved)


def _part(checkpoint: Checkpoint, item: ReadItem, into: Tensor) -> Part:
    chunk = item.storage_index
    assert chunk.offset is not None
    return checkpoint.part(chunk.fqn, chunk.offset, item.storage_offsets, item.lengths, into)


def _check_tensors(checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> None:
    where = f"checkpoint: {checkpoint.storage.url(checkpoint.folder)}"
    have = checkpoint.index.tensors
    for name, tensor in wanted.items():
        if name not in have:
            raise UserError(f"{where} has no {name}; it is of another model or version")
        if (shape := have[name].info.shape) != tuple(tensor.shape):
            raise UserError(
                f"{where}: {name} has shape {list(shape)} where {list(tensor.shape)} is wanted; "
                "it is of another model"
            )
    unknown = {name for name in have if name.startswith(WEIGHTS)} - wanted.keys()
    if unknown:
        raise UserError(f"{where}: {min(unknown)} is no weight of this model")


def _agree(failure: Exception | None) -> None:
    """Ranks that have loaded do not go on to wait for one that has not."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if failure is None else str(failure))
    for rank, reason in enumerate(reasons):
        if failure is None and reason is not None:
            raise UserError(f"{reason} (rank {rank})")
