"""What a run draws from each source, told before it and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_ray.data.mixture import MANY_EPOCHS, asked_samples
from llama_ray.data.stream import TokenStream
from llama_ray.format import count, print_table


def print_plan(stream: TokenStream, steps: int) -> None:
    """What will be drawn in `steps` steps, and a warning of too much repetition."""
    weights = [f"from step {stage.first // stream.batch_size:,}" for stage in stream.stages]
    if len(weights) == 1:
        weights = ["weight"]
    rows = [("source", "tokens", *weights, "epochs")]
    repeated = []
    tokens = {source.name: source.tokens for source in stream.order.streams}
    for name, source in drawn(stream, steps).items():
        shares = [f"{stage.share(name):.2%}" for stage in stream.stages]
        rows.append((name, count(tokens[name]), *shares, f"{source['epochs']:.2f}"))
        if source["epochs"] > MANY_EPOCHS:
            repeated.append(f"{name} ({source['epochs']:.1f})")
    _print_columns(f"mixture of {_amount(stream, steps)}", rows)
    if repeated:
        print(
            f"warning: epochs beyond {MANY_EPOCHS} teach ever less (Muennighoff et al. 2023): "
            f"{', '.join(repeated)}; give these sources less weight, or prepare more text\n"
        )


def drawn(stream: TokenStream, steps: int) -> dict[str, dict[str, Any]]:
    """Source → `asked`: its share of the samples of `steps` steps as the weights would have it,
    `drawn`: what it is, `samples`, `epochs`. Samples are drawn by their number alone, so a run that
    was interrupted has drawn what one that was not has."""
    size = stream.batch_size
    asked: dict[str, float] = {}
    for run in stream.skipped.runs(0, steps):
        for source, n in asked_samples(stream.stages, run.start * size, run.stop * size).items():
            asked[source] = asked.get(source, 0.0) + n
    samples = stream.samples(steps)
    tokens = {source.name: source.tokens for source in stream.order.streams}
    return {
        source: {
            "asked": asked[source] / (steps * size),
            "drawn": n / (steps * size),
            "samples": n,
            "epochs": n * stream.seq_len / tokens[source],
        }
        for source, n in samples.items()
    }


def print_drawn(stream: TokenStream, steps: int, sources: Mapping[str, Mapping[str, Any]]) -> None:
    """sources: what `drawn` returns."""
    rows = [("source", "sequences", "asked", "drawn", "epochs")]
    for name, source in sources.items():
        shares = f"{source['asked']:.2%}", f"{source['drawn']:.2%}"
        rows.append((name, f"{source['samples']:,}", *shares, f"{source['epochs']:.2f}"))
    _print_columns(f"mixture of the {_amount(stream, steps)} trained on", rows)


def _amount(stream: TokenStream, steps: int) -> str:
    return f"{steps * stream.batch_size:,} sequences of {stream.seq_len:,} tokens"


def _print_columns(title: str, rows: Sequence[tuple[str, ...]]) -> None:
    """Names to the left, numbers to the right."""
    widths = [max(8, *map(len, column)) for column in zip(*rows, strict=True)][1:]
    print_table(
        title,
        [
            (name, "  ".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True)))
            for name, *cells in rows
        ],
    )
