"""Training state to and from storage: each rank writes and reads its own shards.

Training stops only while weights and optimizer state are copied aside; a background thread
uploads them and then commits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from llama_ray.checkpoint.store import CheckpointInfo, CheckpointStore
from llama_ray.storage import Storage, explained

State = dict[str, Any]


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Weights and AdamW moments by parameter name: the tensors themselves, to save or load into.

    Moments that do not exist yet (no step was taken) are made, as zeros.
    """
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
    return state


class Checkpointer:
    """Saves in the background, one checkpoint at a time. Every rank has one."""

    def __init__(self, store: CheckpointStore, tokenizer: bytes, keep: int) -> None:
        self.store = store
        self.tokenizer = tokenizer
        self.keep = keep
        # Uploads talk to each other while training does: on a group of their own.
        self.group = dist.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def save(self, state: State, info: CheckpointInfo) -> None:
        """Copy `state` aside and return; upload and commit go on. Waits for the save before."""
        self.wait()
        if dist.get_rank() == 0:
            self.store.begin(info.step)
            # Weights and both moments in float32. Asked beforehand, because torch passes an error
            # of its own on to other ranks, and not the one the disk gave.
            self.store.storage.require_space(12 * info.model.n_params)
        dist.barrier(self.group)
        url = self.store.storage.url(self.store.path(info.step))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own use of deprecated torch functions
            upload = dcp.async_save(
                state,
                storage_writer=FsspecWriter(url, **self.store.storage.options),
                process_group=self.group,
            )
        assert isinstance(upload, Future)
        self.pending = self.thread.submit(self._finish, upload, info)

    def wait(self) -> None:
        """Until the save under way is committed. Raises what it raised."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        self.wait()
        self.thread.shutdown()

    def _finish(self, upload: Future[Any], info: CheckpointInfo) -> None:
        with _explained(self.store.storage):
            upload.result()
        if dist.get_rank() == 0:
            self.store.commit(info, self.tokenizer)
            self.store.prune(self.keep)


def load_sharded(storage: Storage, folder: str, state: State) -> None:
    """Fill the tensors of `state`, whatever layout the checkpoint was written in. With no process
    group, in this process alone."""
    reader = FsspecReader(storage.url(folder), **storage.options)
    with _explained(storage), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def load_weights(storage: Storage, folder: str, model: nn.Module) -> None:
    """Fill the weights alone, for inference; they are converted to the model's dtype."""
    weights: dict[str, Tensor] = {name: p.data for name, p in model.named_parameters()}
    load_sharded(storage, folder, {"model": weights})


@contextmanager
def _explained(storage: Storage) -> Iterator[None]:
    """As `storage.explained`, from below torch's own exception: it holds those of all ranks, and
    these come of the one that storage raised."""
    try:
        yield
    except CheckpointException as error:
        cause: BaseException = next(iter(error.failures.values()))[0]
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        with explained(storage.config):
            raise cause from error
