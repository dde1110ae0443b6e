"""Saving while training goes on.

    save ──▶ copy to host memory ──▶ upload ──▶ all ranks have ──▶ commit ──▶ remove old ones
             until before_update      in the background, for steps on end

Only the optimizer changes what is saved. So not even the copy stops training: it is made while the
next forward and backward passes run, and `before_update` waits for what is left of it.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.staging import HostCopy, now_on
from llama_ray.checkpoint.state import State, flat
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.checkpoint.writer import Attempt, CheckpointWriter, CopyPlanner, new_attempt
from llama_ray.config.pretrain import CheckpointConfig
from llama_ray.errors import UserError
from llama_ray.storage import Storage

SLACK_SECONDS = 60.0  # for ranks to wait for each other, beyond the longest upload and commit

logger = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint was not saved for a reason that is none of the user's: a rank is gone."""


class Checkpointer:
    """Every rank has one and calls it alike. Errors of what runs in the background are raised by
    the next call; after that it is of no use."""

    def __init__(
        self,
        store: CheckpointStore,
        tokenizer: bytes,
        config: CheckpointConfig,
        timeout_seconds: float | None = None,
    ) -> None:
        """timeout_seconds: after which a rank gives up waiting for the others' uploads. Default:
        longer than these and the commit may take."""
        seconds = config.deadline_seconds
        # Its own requests are repeated for as long as an upload may take.
        patient = store.storage.config.model_copy(update={"retry_seconds": seconds})
        self.store = CheckpointStore(Storage(patient), store.run)
        self.tokenizer, self.config = tokenizer, config
        # Uploads talk to each other while training does: on a group of their own.
        timeout = timedelta(seconds=timeout_seconds or 2 * seconds + SLACK_SECONDS)
        self.group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint")
        attempt = [new_attempt()]
        dist.broadcast_object_list(attempt, 0, self.group)
        self.attempt = Attempt(attempt[0], dist.get_rank(), seconds)
        self.blocked_seconds = 0.0
        """For how long `save` and `before_update` have kept training waiting."""
        self.committed = 0
        """Saves of this object that this rank knows to be committed."""
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-copy")
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-upload")
        self._copies = [HostCopy() for _ in range(config.max_in_flight)]
        self._begun = 0
        self._copying: tuple[HostCopy, Future[None]] | None = None
        self._in_flight: deque[Future[None]] = deque()
        self._pruning: Future[None] | None = None

    def save(self, state: State, info: CheckpointInfo) -> None:
        """Begin to save `state` as it is now, and return. Waits where `max_in_flight` saves are
        not committed yet."""
        self.before_update()  # where nothing was changed since the save before
        with self._blocking():
            self._settle(self.config.max_in_flight - 1)
            tensors = flat(state)
            copy = self._copies[self._begun % self.config.max_in_flight]
            copying = self._copier.submit(copy.fill, tensors, now_on(tensors))
            self._begun += 1
            self._copying = copy, copying
            self._in_flight.append(
                self._uploader.submit(self._upload, tensors, copy, copying, info)
            )

    def before_update(self) -> None:
        """To be called before anything in the state is changed: waits until it is copied."""
        self._settle(len(self._in_flight))
        if self._copying is None:
            return
        with self._blocking():
            copy, copying = self._copying
            copying.result()
            copy.hold_updates()
            self._copying = None

    def wait(self) -> None:
        """Until everything is committed."""
        self._settle(0)

    def close(self) -> None:
        """Wait and end. What was saved and could not be committed is raised."""
        try:
            self.wait()
            if self._pruning is not None:
                self._pruning.result()
        finally:
            self._copier.shutdown(cancel_futures=True)
            self._uploader.shutdown(cancel_futures=True)

    def _settle(self, n_left: int) -> None:
        """Wait until no more than `n_left` are in flight. Raises what has failed."""
        while self._in_flight and (self._in_flight[0].done() or len(self._in_flight) > n_left):
            self._in_flight.popleft().result()

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_seconds += time.perf_counter() - start

    def _upload(
        self,
        tensors: Mapping[str, Tensor],
        copy: HostCopy,
        copying: Future[None],
        info: CheckpointInfo,
    ) -> None:
        copying.result()
        copy.wait()
        with self._explained(info.step), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own use of deprecated torch functions
            dcp.save(
                dict(tensors),
                storage_writer=CheckpointWriter(self.store, info, self.tokenizer, self.attempt),
                planner=CopyPlanner(copy.buffers, self.attempt.id),
                process_group=self.group,
            )
        self.committed += 1
        if self.attempt.rank == 0:
            # Not part of the save: no rank need wait for it, and what it leaves goes next time.
            self._pruning = self._uploader.submit(self._prune)

    def _prune(self) -> None:
        try:
            self.store.prune(self.config)
        except Exception as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:  # it holds those of all ranks
            causes = [failure[0] for failure in error.failures.values()]
            for cause in causes:
                if isinstance(cause, UserError):
                    raise cause from None
            raise SaveError(f"checkpoint of step {step:,} failed: {causes[0]}") from error
        except RuntimeError as error:
            raise SaveError(
                f"checkpoint of step {step:,} failed: a rank is gone, or keeps the others waiting: "
                f"{error}"
            ) from error
