"""The loss curve."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

INK, MUTED, TRAIN, VALID = "#1f2933", "#7b8794", "#2f6fde", "#d9480f"


def loss_curve(records: list[dict[str, Any]], title: str, unigram_entropy: float) -> bytes:
    """PNG of training and validation loss over tokens, with the unigram entropy to compare with.

    records: the run's metrics (`metrics.jsonl`), each with "event", "step" and "tokens".
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    last: list[tuple[float, float, str]] = []  # tokens, loss and colour of each curve's end
    for event, key, color, label in (
        ("step", "loss", TRAIN, "training loss"),
        ("validation", "validation_loss", VALID, "validation loss"),
    ):
        points = [(r["tokens"] / 1e6, r[key]) for r in records if r["event"] == event]
        if not points:
            continue
        marker = "o" if event == "validation" else ""
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker=marker, ms=4, lw=1.6)
        last.append((*points[-1], color))
    # The lower end's label below its curve, the higher one's above.
    for (x, y, color), offset in zip(sorted(last, key=lambda end: end[1]), (-14, 8), strict=False):
        axes.annotate(
            f"{y:.3f}",
            (x, y),
            xytext=(0, offset),
            textcoords="offset points",
            ha="center",
            color=color,
            fontsize=9,
        )
    axes.axhline(unigram_entropy, color=MUTED, lw=1, ls="--")
    axes.annotate(
        f"unigram entropy {unigram_entropy:.3f}",
        (1, unigram_entropy),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=9,
    )
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("tokens (millions)", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.grid(axis="y", color="#e4e7eb", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
