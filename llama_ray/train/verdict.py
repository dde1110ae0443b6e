"""Who holds up a run that stands still: the driver's reading of the ranks' reports (`watchdog.py`).

A rank waits for those ranks of its collective that have not entered it. Whoever is waited for and
waits for nobody holds up the rest. Where there is no such rank, ranks wait in a circle, each in a
collective that the next has not come to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Report = dict[str, Any]
Waits = dict[int, tuple[dict[str, Any], list[int]]]
"""By rank: the collective it waits in, and the ranks that are missing there."""

ONE_SIZE = {"all_reduce", "all_gather", "broadcast", "reduce_scatter"}
"""Operations whose input must be of one size on all ranks."""


def verdict(reports: Sequence[Report], places: Sequence[str]) -> str:
    """A line for each rank that holds up others, with what it does and where it runs.

    reports: one or more, of stalls and failures, in any order; those of one stall come within a
    tenth of the timeout of each other. places: where each rank runs (`watchdog.place`).
    """
    latest = _latest(reports)
    if different := _different_collectives(latest, places):
        return different
    # Uploads wait for each other while training goes on: they count where training waits for none.
    waits = _waits(latest, background=False) or _waits(latest, background=True)
    if not waits:
        return _no_one_missing(latest, places)
    blamed = {rank for _, missing in waits.values() for rank in missing} - waits.keys()
    if not blamed:
        return _circle(waits, latest, places)
    lines = [_held_up(rank, waits, latest, places) for rank in sorted(blamed & latest.keys())]
    if silent := sorted(blamed - latest.keys()):
        verb = "holds up" if len(silent) == 1 else "hold up"
        lines.append(
            f"{_who(silent, places)} {verb} {_held(silent[0], waits)}: no report from there: "
            "stopped, dead, or the node cannot be reached"
        )
    return "\n".join(lines)


def _latest(reports: Sequence[Report]) -> dict[int, Report]:
    """Of each rank the newest, without what was left over from an earlier stall: ranks are at most
    a step apart. A stall tells more than the failure that follows."""
    newest = max(report["step"] for report in reports)
    current = [report for report in reports if report["step"] >= newest - 1]
    current.sort(key=lambda report: (report["step"], report["event"] == "stall"))
    return {report["rank"]: report for report in current}


def _waits(latest: dict[int, Report], background: bool) -> Waits:
    last = {
        (rank, collective["group_id"]): collective["sequence"]
        for rank, report in latest.items()
        for collective in report["last"]
    }
    waits: Waits = {}
    for rank, report in latest.items():
        for collective in report["waiting"]:
            missing = [
                other
                for other in collective["ranks"]
                if other != rank
                and last.get((other, collective["group_id"]), -1) < collective["sequence"]
            ]
            if missing and collective["background"] == background:
                waits.setdefault(rank, (collective, missing))
    return waits


def _different_collectives(latest: dict[int, Report], places: Sequence[str]) -> str:
    """Of ranks that are at the same place in a group's order with different operations or sizes."""
    found: defaultdict[tuple[str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    waited_for = set()
    for rank, report in latest.items():
        for collective in report["last"] + report["waiting"]:
            found[collective["group_id"], collective["sequence"]][rank] = collective
        waited_for |= {(c["group_id"], c["sequence"]) for c in report["waiting"]}
    for key in sorted(waited_for):
        kinds: defaultdict[str, list[int]] = defaultdict(list)
        for rank, collective in sorted(found[key].items()):
            kinds[_kind(collective)].append(rank)
        if len(kinds) > 1:
            sides = "; ".join(
                f"{kind} on {_who(ranks, places)}, now in {latest[ranks[0]]['at']}"
                for kind, ranks in sorted(kinds.items(), key=lambda item: len(item[1]))
            )
            one = next(iter(found[key].values()))
            return f"ranks differ in collective #{one['sequence']} of {_group(one)}: {sides}"
    return ""


def _held_up(rank: int, waits: Waits, latest: dict[int, Report], places: Sequence[str]) -> str:
    report = latest[rank]
    doing = f"{report['at']} for {report['seconds']:.0f} s"
    if waiting := [c for c in report["waiting"] if not c["background"]]:
        doing += f", in {_collective(waiting[0])}, which all its ranks have entered"
    return (
        f"{_who([rank], places)} holds up {_held(rank, waits)}: it has been in {doing} "
        f"(step {report['step']:,}, {report['phase']})"
    )


def _circle(waits: Waits, latest: dict[int, Report], places: Sequence[str]) -> str:
    path = [min(waits)]
    while (following := waits[path[-1]][1][0]) not in path:
        path.append(following)
    circle = path[path.index(following) :]
    return "ranks wait for each other: " + "; ".join(
        f"{_who([rank], places)} for {waits[rank][1][0]} in {_collective(waits[rank][0])} at "
        f"{latest[rank]['at']}"
        for rank in circle
    )


def _no_one_missing(latest: dict[int, Report], places: Sequence[str]) -> str:
    for report in latest.values():
        for collective in report["waiting"]:
            return (
                f"{_collective(collective)} does not end, though all its ranks have entered it: "
                f"look at the network of {_who(collective['ranks'], places)}"
            )
    by_place: defaultdict[str, list[int]] = defaultdict(list)
    for rank, report in sorted(latest.items()):
        by_place[report["at"]].append(rank)
    return "no rank waits in a collective: " + "; ".join(
        f"{_who(ranks, places)} in {at} for {latest[ranks[0]]['seconds']:.0f} s"
        for at, ranks in by_place.items()
    )


def _held(rank: int, waits: Waits) -> str:
    """The collective that has waited longest for `rank`."""
    held = [collective for collective, missing in waits.values() if rank in missing]
    return _collective(max(held, key=lambda collective: collective["seconds"]))


def _who(ranks: Sequence[int], places: Sequence[str]) -> str:
    named = [f"{rank} ({places[rank]})" for rank in ranks[:4]]
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(named)}{more}"


def _collective(collective: dict[str, Any]) -> str:
    return f"{collective['operation']} #{collective['sequence']} of {_group(collective)}"


def _group(collective: dict[str, Any]) -> str:
    ranks = collective["ranks"]
    listed = ", ".join(map(str, ranks[:8])) + (f", … {ranks[-1]}" if len(ranks) > 8 else "")
    return f"{collective['group']} [{listed}]"


def _kind(collective: dict[str, Any]) -> str:
    if collective["operation"] not in ONE_SIZE:
        return str(collective["operation"])
    sizes = ", ".join(" × ".join(map(str, size)) for size in collective["sizes"])
    return f"{collective['operation']} of {sizes}"
