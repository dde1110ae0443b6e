"""What became of the steps since the last report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_data_parallel_group
from torch import Tensor

from llama_ray.config.pretrain import PretrainConfig
from llama_ray.data.stream import TokenStream
from llama_ray.data.windows import Replaced
from llama_ray.errors import UserError
from llama_ray.train.optimizer import learning_rate


@dataclass(frozen=True)
class StepResult:
    step: int
    loss: float
    """Mean over the batch, in nats per token."""
    grad_norm: float
    """Before clipping."""
    skipped: bool
    """The step changed nothing."""


class StepReport:
    """Kept on the device until asked for, so that no step waits for the one before. All ranks ask
    alike."""

    def __init__(self, config: PretrainConfig, stream: TokenStream, skipped_in_a_row: int) -> None:
        """skipped_in_a_row: the last steps before the first that is added."""
        self.config, self.stream = config, stream
        self.skipped_in_a_row = skipped_in_a_row
        self.diverged: UserError | None = None
        """Why the run has to end."""
        self.rows: list[Tensor] = []
        self.first = 0

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """loss: this rank's share of the batch's mean."""
        if not self.rows:
            self.first = step
        self.rows.append(torch.stack((loss, grad_norm, skipped)))

    def take(self, replaced: list[Replaced]) -> dict[str, Any]:
        """Figures of all steps since the last call; after too many skipped steps in a row, also
        sets `diverged`. replaced: what this rank has read in the place of damaged samples; emptied.
        """
        results = self._results()
        taken = [result.loss for result in results if not result.skipped]
        last = results[-1]
        report: dict[str, Any] = {
            "loss": sum(taken) / len(taken) if taken else math.nan,
            "grad_norm": last.grad_norm,
            "lr": learning_rate(last.step, self.config.train.steps, self.config.optimizer),
        }
        if skipped := [self._skipped(result) for result in results if result.skipped]:
            report["skipped"] = skipped
        for result in results:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
            if self.skipped_in_a_row >= self.config.optimizer.max_skipped:
                self.diverged = self._diverged(result.step)
        if samples := self._all_replaced(replaced):
            report["replaced"] = samples
        replaced.clear()
        return report

    def _results(self) -> list[StepResult]:
        rows = torch.stack(self.rows)
        self.rows.clear()
        losses = rows[:, 0].contiguous()
        dist.all_reduce(losses, group=get_data_parallel_group())
        figures = zip(losses.tolist(), rows[:, 1].tolist(), rows[:, 2].tolist(), strict=True)
        return [
            StepResult(step, loss, norm, bool(skipped))
            for step, (loss, norm, skipped) in enumerate(figures, self.first)
        ]

    def _skipped(self, result: StepResult) -> dict[str, Any]:
        """With the numbers of its samples in the token order."""
        batch, size = self.stream.skipped.batch_of(result.step), self.config.train.batch_size
        return {
            "step": result.step,
            "batch": batch,
            "samples": [batch * size, (batch + 1) * size - 1],
            "loss": result.loss,
            "grad_norm": result.grad_norm,
        }

    def _diverged(self, step: int) -> UserError:
        n, batch_of = self.skipped_in_a_row, self.stream.skipped.batch_of
        first, last = batch_of(max(0, step - n + 1)), batch_of(step)
        size = self.config.train.batch_size
        skips = [*map(list, self.config.data.skip_steps), [first, last]]
        return UserError(
            f"optimizer.max_skipped: {n} steps in a row, the last of them {step:,}, had gradients "
            f"that are not finite or spike; they trained on batches {first:,} to {last:,} (samples "
            f"{first * size:,} to {(last + 1) * size - 1:,}); leave these out with "
            f"data.skip_steps={skips}, or go on from an earlier checkpoint with "
            "another optimizer.lr (checkpoint.resume, and another name)"
        )

    def _all_replaced(self, mine: list[Replaced]) -> list[dict[str, Any]]:
        """Those of all data-parallel ranks, by step and index."""
        group = get_data_parallel_group()
        every: list[list[Replaced]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
        return sorted(
            (asdict(sample) for samples in every for sample in samples),
            key=itemgetter("step", "index"),
        )
