"""Numbers and tables as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable


def si(value: float, unit: str = "") -> str:
    """1234567 → "1.23 M"; three significant digits, decimal prefixes."""
    for factor, prefix in (
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= factor * 0.9995:
            scaled = value / factor
            return (
                f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {prefix}{unit}"
            )
    return f"{value:.4g} {unit}".rstrip()


def count(value: float) -> str:
    """Parameters and tokens: as `si`, but a billion is "B"."""
    return si(value).replace("G", "B")


def duration(seconds: float) -> str:
    """75 → "1:15"; 4000 → "1:06:40"."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def bar(fraction: float, width: int = 16) -> str:
    """A bar of eighth blocks, `width` characters wide."""
    eighths = round(max(0.0, min(1.0, fraction)) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(width, "·")


def print_table(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """A title and aligned name–value lines."""
    print(f"\n{title}")
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print()
