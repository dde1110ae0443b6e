"""What the benchmarks share: ranks, interleaved timing, tables and the report."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.netns import LOOPBACK, Network, enter
from llama_ray.parallel import destroy_mesh


@dataclass(frozen=True)
class Ratio:
    """What a benchmark claims: a number without a unit, relative to a baseline of the same run."""

    value: float
    target: float | None
    """None: reported, not promised."""
    better: Literal["higher", "lower"]
    baseline: str
    """In words."""

    @property
    def met(self) -> bool:
        assert self.target is not None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def parse_args(description: str | None) -> argparse.Namespace:
    """The options of every benchmark. description: the module's docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute, less exact")
    return parser.parse_args()


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of each function: all are called in turn, and in the reverse
    order every other round, so that what disturbs the machine disturbs all alike.

    before: called before each, not timed (a barrier).
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(-warmup, repeats):
        for name in list(functions)[:: -1 if round_ % 2 else 1]:
            before()
            start = time.perf_counter()
            functions[name]()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def slowest(ranks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Of each round, the time of the rank that took longest."""
    return {
        name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ranks[0]
    }


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    threads: int,
    *args: Any,
    network: Network = LOOPBACK,
) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` processes of a gloo group, with `threads`
    threads each; returns what each returned. The first error of any rank is raised."""
    with tempfile.TemporaryDirectory() as results, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"tcp://{network.address}:{probe.getsockname()[1]}"
        probe.close()
        # c10d warns of addresses that have no name, before the ranks could say that they know.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        mp.start_processes(
            _rank,
            (function, world_size, threads, args, network, master, results),
            nprocs=world_size,
            start_method="spawn",
            daemon=True,  # do not outlive us
        )
        return [pickle.loads(Path(results, str(i)).read_bytes()) for i in range(world_size)]


def _rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    threads: int,
    args: tuple[Any, ...],
    network: Network,
    master: str,
    results: str,
) -> None:
    if network.namespaces:
        enter(network.namespaces[rank])
    os.environ["GLOO_SOCKET_IFNAME"] = network.interface
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=master, rank=rank, world_size=world_size)
    try:
        Path(results, str(rank)).write_bytes(pickle.dumps(function(rank, *args)))
        dist.barrier()  # so that no rank is gone while another still sends
    finally:
        destroy_mesh()
        dist.destroy_process_group()


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The first column to the left, the others, numbers, to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join((first.ljust(widths[0]), *cells)).rstrip())
    print()


def report(name: str, ratios: Mapping[str, Ratio], details: Mapping[str, Any]) -> None:
    """Print the ratios, and last the line of JSON that tells them to programs.

    details: what the ratios were made of, to be read by people.
    """
    for key, ratio in ratios.items():
        sign = "≥" if ratio.better == "higher" else "≤"
        verdict = ""
        if ratio.target is not None:
            verdict = f" (target {sign} {ratio.target:g}: {'met' if ratio.met else 'MISSED'})"
        print(f"{key} = {ratio.value:.2f}{verdict}, {ratio.baseline}")
    values = {key: asdict(ratio) for key, ratio in ratios.items()}
    line = {"name": name, "ratios": values, "details": details}
    print(json.dumps(line, allow_nan=False), flush=True)
