"""Host memory that a training state is copied to, so that it can be uploaded while training changes
the original."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llama_ray.parallel import local_part


class HostCopy:
    """This rank's part of a state. The memory is kept and used again: page-locked where it comes
    from a GPU, which can copy to no other without stopping."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], ready: torch.cuda.Event | None) -> None:
        """Copy `tensors` as they are after `ready`, on a stream of its own where they are on a GPU:
        then this returns when the copies are queued."""
        parts = {name: local_part(tensor).detach() for name, tensor in tensors.items()}
        self.buffers = {name: self._buffer(name, part) for name, part in parts.items()}
        if ready is None:
            for name, part in parts.items():
                self.buffers[name].copy_(part)
            return
        device = next(part.device for part in parts.values() if part.is_cuda)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for name, part in parts.items():
                self.buffers[name].copy_(part, non_blocking=True)
            self._copied = stream.record_event()

    def hold_updates(self) -> None:
        """Nothing the GPU is told to do from now on is done before the copies are."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def wait(self) -> None:
        """Until the copies are there to be read."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, name: str, part: Tensor) -> Tensor:
        kept = self.buffers.get(name)
        if kept is not None and kept.shape == part.shape and kept.dtype == part.dtype:
            return kept
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)


def now_on(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """The moment up to which the GPU has been told what to do; None where no tensor is on one."""
    if any(local_part(tensor).is_cuda for tensor in tensors.values()):
        return torch.cuda.current_stream().record_event()
    return None
