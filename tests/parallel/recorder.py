"""What a rank does, in order: collectives as they are started and waited for, matrix products.

As a TorchDispatchMode it sees every collective, whoever calls it: torch.distributed, FSDP or a
DTensor. Waiting is no operation, hence the wrapped functions, whose `Work` reports it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of c10d → the kinds of collective that the tests speak of.
KINDS = {
    "_allgather_base_": "gather",
    "allgather_": "gather",
    "alltoall_base_": "exchange",  # on gloo with a sum after it: a reduce-scatter
    "_reduce_scatter_base_": "scatter",
    "allreduce_": "reduce",
}
FUNCTIONS = (
    "all_gather",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "reduce_scatter_single",
)
PRODUCTS = ("mm", "addmm", "addmm_")


class Recorder(TorchDispatchMode):
    """with Recorder() as recorder: …

    events: "gather 0" for the first collective's start, if that is what it is, "wait 0" for the
    first wait for it, "mm" for a product, and what is `note`d.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.started = 0
        self.stack = ExitStack()

    def __enter__(self) -> Recorder:
        for name in FUNCTIONS:
            wrapped = self._waits_reported(getattr(dist, name))
            self.stack.enter_context(mock.patch.object(dist, name, wrapped))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if "c10d" in func.namespace:  # "c10d", and "_c10d_functional" of DTensors
            self.events.append(f"{KINDS[name]} {self.started}")
            self.started += 1
        elif name in PRODUCTS:
            self.events.append("mm")
        return func(*args, **(kwargs or {}))

    def note(self, event: str) -> None:
        self.events.append(event)

    def counts(self) -> Counter[str]:
        """How many collectives of each kind."""
        kinds = (event.split()[0] for event in self.events)
        return Counter(kind for kind in kinds if kind in KINDS.values())

    def order(self) -> str:
        """The events, a run of products as one."""
        runs = [(event, len(list(run))) for event, run in groupby(self.events)]
        assert all(length == 1 or event == "mm" for event, length in runs)
        return ", ".join(event for event, _ in runs)

    def _waits_reported(self, function: Callable[..., dist.Work | None]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> dist.Work | None:
            number = self.started
            work = function(*args, **kwargs)
            assert self.started == number + 1, f"{function.__name__} is one collective"
            if work is None:  # it waited
                self.events.append(f"wait {number}")
                return None
            return _Reported(work, lambda: self.events.append(f"wait {number}"))

        return wrapped


class _Reported(dist.Work):
    def __init__(self, work: dist.Work, report: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.report, self.reported = work, report, False

    def wait(self, *args: Any) -> bool:
        if not self.reported:
            self.report()
        self.reported = True
        return self.work.wait(*args)
