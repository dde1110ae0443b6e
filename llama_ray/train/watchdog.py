"""A rank that makes no progress says where it is, before its process groups' timeout ends the run.

A collective that one rank does not enter holds up all others, and their timeouts name none. So each
rank that stands still reports which collectives it is in and where its training thread is;
`verdict.py` finds out from the reports who holds up whom.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import ray.util
import torch.distributed as dist

from llama_ray.train.collectives import progress, recorded

PACKAGE = str(Path(__file__).parents[1]) + os.sep

UPLOAD = "upload"
"""The phase of a training thread that waits for storage, which has a deadline of its own: however
long it takes, it is no stall."""

REPORT_AFTER = 0.8
"""Share of the timeout without progress after which a rank reports: late, so as not to accuse what
is only slow, and with `POLL` still well before the timeout."""
POLL = 0.05
"""Share of the timeout between looks: by how much a report may be late."""


def place() -> str:
    """Where this process runs, for a person who wants to look at it."""
    return f"node {ray.util.get_node_ip_address()}, pid {os.getpid()}"


class Watchdog:
    """Watches the thread that makes it, and calls `report` (on a thread of its own) once per stall:
    `REPORT_AFTER` of `seconds`, the process groups' timeout, without a beat, in which no collective
    began or ended, or throughout which one has been in progress. The report:

        event          "stall", or "failure" from `describe_failure`
        rank, step, phase
        seconds        since the last beat
        at             where the training thread is in this package: "function (file:line)"
        stack          all its frames, likewise, innermost first
        waiting        collectives in progress, oldest first
        last           the last collective of each group, in progress or not

    with collectives as in `collectives.Collective`.
    """

    def __init__(self, rank: int, seconds: float, report: Callable[[dict[str, Any]], None]) -> None:
        self.rank, self.seconds, self.report = rank, seconds, report
        self._trainer = threading.current_thread()
        self._closed = threading.Event()
        self.beat(0, "start")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int, phase: str) -> None:
        """The training thread has come to `phase` of `step`."""
        self._last = step, phase, time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def describe_failure(self, error: BaseException) -> dict[str, Any] | None:
        """The report of a collective that raised `error`; None if none did.

        The recorder may hold it as done: the last that was entered counts as being waited for."""
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            return None
        frames = [*traceback.walk_tb(error.__traceback__)][::-1]
        return self._describe("failure", frames) | {"error": str(error)}

    def _watch(self) -> None:
        limit = REPORT_AFTER * self.seconds
        seen, moved, reported = progress(), time.monotonic(), 0.0
        while not self._closed.wait(POLL * self.seconds):
            now, beat = time.monotonic(), self._last[2]
            if (current := progress()) != seen:
                seen, moved = current, now
            if now - beat < limit or reported == beat or self._last[1] == UPLOAD:
                continue
            assert self._trainer.ident is not None
            frame = sys._current_frames().get(self._trainer.ident)
            event = self._describe("stall", traceback.walk_stack(frame))
            waited = (c["seconds"] for c in event["waiting"] if not c["background"])
            if now - moved >= limit or max(waited, default=0.0) >= limit:
                reported = beat
                self.report(event)

    def _describe(self, event: str, frames: Iterable[tuple[FrameType, int]]) -> dict[str, Any]:
        step, phase, beat = self._last
        collectives = recorded(self._trainer)
        last = {collective.group_id: collective for collective in collectives}
        waiting = [collective for collective in collectives if not collective.done]
        if event == "failure":
            entered = [c for c in collectives if not c.background][-1:]
            waiting += [collective for collective in entered if collective.done]
        frames = list(frames)
        ours = [frame for frame in frames if frame[0].f_code.co_filename.startswith(PACKAGE)]
        return {
            "event": event,
            "rank": self.rank,
            "step": step,
            "phase": phase,
            "seconds": time.monotonic() - beat,
            "at": _line(*(ours or frames)[0]) if frames else "nowhere: its thread has ended",
            "stack": [_line(*frame) for frame in frames],
            "waiting": [asdict(collective) for collective in waiting],
            "last": [asdict(collective) for collective in last.values()],
        }


def _line(frame: FrameType, number: int) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({Path(code.co_filename).name}:{number})"
