"""From `kill -9` of a worker to the first new step.

A run of two data-parallel workers, checkpointing to a real S3 server (SeaweedFS on this machine),
of which one is killed between two checkpoints. The time until the next step is done, as the run's
own records and the workers tell it, split into

    detection   until the controller of the run knows
    restart     new processes, torch imported, process groups made
    load        the model built, weights and optimizer read from the checkpoint
    data        waiting for the first batch
    step        computing it

Baseline: 30 seconds; and the same run's own start from nothing, `ray.init` to the first step.
A step that is done again although a checkpoint had it would be a lost one: there are none.

The 134M preset with a vocabulary of 400: 86 M parameters, 1.0 GB with the optimizer. --quick: 5M.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Ratio, parse_args, print_table, report
from llama_ray import local
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.config.model import PRESETS
from llama_ray.config.storage import StorageConfig
from llama_ray.storage import Storage
from tests.conftest import free_port
from tests.s3 import BUCKET, s3_server
from tests.train.driver import Driver
from tests.train.runs import learnable_tokens, run_config

BUDGET_SECONDS = 30.0
PHASES = ("detection", "restart", "load", "data", "step")
SHAPE = ("dim", "n_layers", "n_heads", "ffn_hidden_dim")
S3_PORT = 18_530


def measure(preset: str, every: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Phase → seconds of each round; "total", "cold" and "lost_steps" likewise."""
    with s3_server(folder, S3_PORT) as server:
        os.environ.update(server.env)
        storage = Storage(
            StorageConfig(url=f"s3://{BUCKET}/recovery", endpoint_url=server.endpoint_url)
        )
        learnable_tokens(storage)
        head = local.start(folder / "head", free_port(), free_port(), num_cpus=2)
        try:
            found = [one_round(storage, preset, every, folder, head, i) for i in range(rounds)]
        finally:
            local.stop(folder / "head")
    return {key: [one[key] for one in found] for key in found[0]}


def one_round(
    storage: Storage, preset: str, every: int, folder: Path, head: local.Head, number: int
) -> dict[str, float]:
    config = run_config(
        storage,
        f"round-{number}",
        model=dict(zip(SHAPE, PRESETS[preset], strict=True)),
        data={"seq_len": 64},
        train={"steps": 1000, "batch_size": 4, "validate_every": 1000, "dtype": "bfloat16"},
        parallel={"data": 2, "cpus_per_worker": 1},
        checkpoint={"every": every},
    )
    config = config.model_copy(update={"storage": storage.config})
    began = time.time()
    driver = Driver(config, folder, head.address)
    try:
        driver.wait_for_step(1)
        cold = time.time() - began
        store = CheckpointStore(storage, config.name)
        while not store.committed_steps():
            time.sleep(0.1)
        driver.wait_for_step(every + 2)
        start = [line for line in lines(storage, config.name) if line["event"] == "start"][-1]
        pid = int(re.search(r"pid (\d+)", start["places"][1])[1])  # type: ignore[index]
        committed = store.committed_steps()[-1]
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        resumed = int(driver.wait_for(r"resuming from the checkpoint of step (\d+)")[1])
        at = next(i for i, line in enumerate(driver.lines) if "resuming from" in line)
        driver.wait_for_step(resumed + 1, after=at)
        total = time.time() - killed
        driver.send(signal.SIGTERM)  # saves, and writes its records
        driver.end()
    finally:
        driver.process.kill()
    after = lines(storage, config.name)
    failed = next(line for line in after if line["event"] == "failed")
    start = [line for line in after if line["event"] == "start"][-1]
    first = next(line for line in after if line["event"] == "step" and line["time"] > start["time"])
    waited = first["data_wait"] * first["seconds"]
    return {
        "detection": failed["time"] - killed,
        "restart": start["entered"] - failed["time"],
        "load": start["loaded"] - start["entered"],
        "data": waited,
        "step": first["time"] - start["loaded"] - waited,
        "total": total,
        "cold": cold,
        "lost_steps": max(0, committed - resumed),
    }


def lines(storage: Storage, run: str) -> list[dict[str, Any]]:
    text = storage.read(f"runs/{run}/metrics.jsonl").decode()
    return [json.loads(line) for line in text.splitlines()]


def main() -> None:
    options = parse_args(__doc__)
    preset, every, rounds = ("5M", 20, 1) if options.quick else ("134M", 6, 3)
    with tempfile.TemporaryDirectory() as name:
        found = measure(preset, every, rounds, Path(name))
    median = {key: sorted(values)[len(values) // 2] for key, values in found.items()}
    rows = [(phase, *(f"{seconds:.2f} s" for seconds in found[phase])) for phase in PHASES]
    rows += [(key, *(f"{seconds:.2f} s" for seconds in found[key])) for key in ("total", "cold")]
    print_table(("", *(f"round {i + 1}" for i in range(rounds))), rows)
    report(
        "recovery",
        {
            "of_budget": Ratio(
                max(found["total"]) / BUDGET_SECONDS, 1.0, "lower", "30 s (the slowest round)"
            ),
            "vs_cold_start": Ratio(
                median["total"] / median["cold"], None, "lower", "the job's start to its first step"
            ),
            "lost_steps": Ratio(
                sum(found["lost_steps"]), 0.0, "lower", "steps that a committed checkpoint had"
            ),
        },
        {"preset": preset, "seconds": found},
    )


if __name__ == "__main__":
    main()
