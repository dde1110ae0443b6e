"""Batches that are left out of a run: training goes on with the ones after."""

from __future__ import annotations

from collections.abc import Sequence


class SkippedBatches:
    """Which batches of the token order a run trains on, and at which step."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        """ranges: first and last batch of each, in any order; they may overlap."""
        self.gaps: list[range] = []
        for first, last in sorted(ranges):
            if self.gaps and first <= self.gaps[-1].stop:
                first, last = self.gaps[-1].start, max(last, self.gaps[-1].stop - 1)
                self.gaps.pop()
            self.gaps.append(range(first, last + 1))

    def runs(self, start_step: int, stop_step: int) -> list[range]:
        """The batches that steps [start_step, stop_step) train on, in order: maximal ranges."""
        found: list[range] = []
        step, batch = 0, 0
        for gap in [*self.gaps, None]:
            # Steps [step, step + n) train on batches [batch, batch + n), up to the gap.
            n = gap.start - batch if gap is not None else stop_step - step
            first, last = max(step, start_step), min(step + n, stop_step)
            if first < last:
                found.append(range(batch + first - step, batch + last - step))
            if gap is None or step + n >= stop_step:
                break
            step, batch = step + n, gap.stop
        return found

    def batch_of(self, step: int) -> int:
        """The batch that a step trains on."""
        return self.runs(step, step + 1)[0].start
