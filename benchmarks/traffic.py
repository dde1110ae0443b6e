"""Take a training step's collectives out of it, or write them down and issue them alone.

Every function of torch.distributed, and so FSDP2 and ours, ends in a method of ProcessGroup; these
replace the methods for a while. (DTensor's functional collectives take another way; a training
step has none of them.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

METHODS = (
    "all_gather_single",
    "all_to_all_single",
    "allgather",
    "allreduce",
    "broadcast",
    "recv",
    "reduce_scatter",
    "reduce_scatter_single",
    "send",
)


@contextlib.contextmanager
def free() -> Iterator[None]:
    """Collectives cost nothing and do nothing: their results are what happened to be in memory."""
    with _replaced(lambda name, method: lambda group, *args: _Done()):
        yield


class Recording:
    """The collectives of what runs inside `with recording.taken():`, and when each was waited for.
    Calling it issues and awaits the same, in that order, with nothing between."""

    def __init__(self) -> None:
        self.events: list[Callable[[dict[int, Any]], None]] = []

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        with _replaced(self._recorder):
            yield

    def __call__(self) -> None:
        works: dict[int, Any] = {}
        for event in self.events:
            event(works)
        for work in works.values():
            work.wait()

    def _recorder(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def record(group: dist.ProcessGroup, *args: Any) -> _Noted:
            key, own_args = len(self.events), _with_own_memory(args)

            def issue(works: dict[int, Any]) -> None:
                works[key] = method(group, *own_args)

            def wait(works: dict[int, Any]) -> None:
                works.pop(key).wait()

            self.events.append(issue)
            return _Noted(method(group, *args), lambda: self.events.append(wait))

        return record


class _Done(dist._Work):
    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Noted(dist._Work):
    """The work, which calls back when it is first waited for."""

    def __init__(self, work: Any, on_wait: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.on_wait = work, on_wait
        self.noted = False

    def wait(self, *args: Any) -> bool:
        if not self.noted:
            self.noted = True
            self.on_wait()
        return self.work.wait(*args)

    def is_completed(self) -> bool:
        return self.work.is_completed()


@contextlib.contextmanager
def _replaced(
    replacement: Callable[[str, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    originals = {name: vars(dist.ProcessGroup)[name] for name in METHODS}
    try:
        for name in METHODS:
            method = getattr(dist.ProcessGroup, name)  # a plain function, unlike the original
            setattr(dist.ProcessGroup, name, replacement(name, method))
        yield
    finally:
        for name, method in originals.items():
            setattr(dist.ProcessGroup, name, method)


def _with_own_memory(args: Any) -> Any:
    """The same arguments with tensors of their own: what a step sends is freed when it ends."""
    if isinstance(args, Tensor):
        return torch.zeros_like(args)
    if isinstance(args, list | tuple):
        return type(args)(_with_own_memory(arg) for arg in args)
    return args
