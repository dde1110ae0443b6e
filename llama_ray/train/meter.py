"""How fast a run is."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llama_ray.config.pretrain import PretrainConfig


@dataclass
class Meter:
    """Rates since the last report; validation and checkpoints are not counted as training."""

    config: PretrainConfig
    peak_flops: float

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps, self.waited = 0, 0.0
        self.started = self.last_step_end = time.perf_counter()

    def data_arrived(self) -> None:
        self.waited += time.perf_counter() - self.last_step_end

    def step_done(self) -> None:
        self.steps += 1
        self.last_step_end = time.perf_counter()

    def rates(self) -> dict[str, float]:
        """tokens per second, MFU and the share of time spent waiting for data; then start anew."""
        elapsed = time.perf_counter() - self.started
        tokens_per_second = self.steps * self.config.tokens_per_step / elapsed
        flops = self.config.model.flops_per_token(self.config.data.seq_len)
        rates = {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * flops / self.peak_flops,
            "data_wait": self.waited / elapsed,
            "seconds": elapsed,
            "steps": self.steps,
        }
        self.restart()
        return rates
