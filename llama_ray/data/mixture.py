"""The weights of the sources: what the job file asks for, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llama_ray.config.pretrain import DataConfig, StageConfig
from llama_ray.errors import UserError

# "Up to 4 epochs of repeated data yield negligible changes to loss compared to unique data"
# (Muennighoff et al. 2023, Scaling Data-Constrained Language Models).
MANY_EPOCHS = 4


@dataclass(frozen=True)
class Stage:
    """The mixture from one sample on, until the next stage."""

    first: int
    """Sample n (= step × batch size) that it begins with."""
    weights: dict[str, Fraction | float]
    """Source → weight, more than 0."""

    def share(self, source: str) -> float:
        """Of 1, of the stage's samples."""
        return float(self.weights.get(source, 0) / sum(self.weights.values()))


def stages(data: DataConfig, tokens: Mapping[str, int], batch_size: int) -> list[Stage]:
    """The stages that `data` describes, the first from sample 0. tokens: source → training tokens.

    Raises `UserError` naming the key where sources are named that there are not.
    """
    first = Stage(0, _weights(data, tokens, data.temperature, "data"))
    later = [
        Stage(
            stage.from_step * batch_size,
            _weights(stage, tokens, data.temperature, f"data.stages.{i}"),
        )
        for i, stage in enumerate(data.stages)
    ]
    return [first, *later]


def _weights(
    asked: DataConfig | StageConfig, tokens: Mapping[str, int], temperature: float, key: str
) -> dict[str, Fraction | float]:
    """Exact, so that they are the same on every machine, unless a power is taken."""
    if asked.weights is not None:
        _check_sources(asked.weights, tokens, f"{key}.weights")
        exact = {source: Fraction(weight) for source, weight in asked.weights.items()}
    elif asked.epochs is not None:
        _check_sources(asked.epochs, tokens, f"{key}.epochs")
        exact = {source: Fraction(n) * tokens[source] for source, n in asked.epochs.items()}
    else:
        exact = {source: Fraction(n) for source, n in tokens.items()}
    exact = {source: weight for source, weight in exact.items() if weight}
    if temperature == 1:
        return {**exact}
    total = sum(exact.values())
    return {source: float(weight / total) ** (1 / temperature) for source, weight in exact.items()}


def _check_sources(asked: Mapping[str, float], tokens: Mapping[str, int], key: str) -> None:
    if missing := [source for source in asked if source not in tokens]:
        raise UserError(
            f"{key}: there is no source {', '.join(map(repr, missing))} in data.tokens; it has "
            f"{', '.join(sorted(tokens))}: name these only, or prepare the others too"
        )


def asked_samples(stages: Sequence[Stage], start: int, stop: int) -> dict[str, float]:
    """How many of samples [start, stop) each source would give, were they divisible at will."""
    asked: dict[str, float] = {}
    ends = [*(stage.first for stage in stages[1:]), stop]
    for stage, end in zip(stages, ends, strict=True):
        n = max(0, min(end, stop) - max(stage.first, start))
        for source in stage.weights:
            asked[source] = asked.get(source, 0.0) + n * stage.share(source)
    return asked
