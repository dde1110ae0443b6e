"""The one thing that programs rely on: the last line of a benchmark."""

from __future__ import annotations

import json

import pytest

from benchmarks.common import Ratio, interleaved, report


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    ratios = {
        "speed": Ratio(1.5, 1.2, "higher", "times the baseline"),
        "memory": Ratio(0.9, None, "lower", "of the baseline's"),
    }
    report("example", ratios, {"off": {"seconds": [0.2, 0.1]}})
    *readable, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "name": "example",
        "ratios": {
            "speed": {
                "value": 1.5,
                "target": 1.2,
                "better": "higher",
                "baseline": "times the baseline",
            },
            "memory": {
                "value": 0.9,
                "target": None,
                "better": "lower",
                "baseline": "of the baseline's",
            },
        },
        "details": {"off": {"seconds": [0.2, 0.1]}},
    }
    assert readable == [
        "speed = 1.50 (target ≥ 1.2: met), times the baseline",
        "memory = 0.90, of the baseline's",
    ]


@pytest.mark.parametrize(("value", "better", "met"), [(2, "higher", True), (2, "lower", False)])
def test_whether_a_target_is_met_depends_on_what_is_better(
    value: float, better: str, met: bool
) -> None:
    assert Ratio(value, 1.0, better, "").met == met


def test_calls_alternate_and_warm_up_untimed() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    seconds = interleaved(functions, 2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
