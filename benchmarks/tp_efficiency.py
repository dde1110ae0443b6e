"""Tensor parallelism over two ranks of one thread each, against one rank of two threads.

The whole optimizer step of the 134 M model of `benchmarks.train_step`, on the same two cores, steps
taken in turn. What is lost is what tensor parallelism costs: communication (through loopback, by
the same cores), narrower products, waiting for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import Ratio, interleaved, medians, parse_args, print_table, report
from benchmarks.stepper import Stepper
from benchmarks.train_step import CONFIG, TOKENS, our_step, step_of
from llama_ray.model import LLaMA
from llama_ray.parallel import init_mesh, initialize, parallelize


def parallel_step(sequence: bool, overlap: bool) -> Callable[[], None]:
    mesh = init_mesh(2, 1, "cpu")
    with torch.device("meta"):
        model = LLaMA(CONFIG)
    parallelize(model, mesh, torch.bfloat16, sequence=sequence, overlap=overlap)
    initialize(model.materialize("cpu"), seed=0)
    return step_of(model)


def main() -> None:
    args = parse_args(__doc__)
    alone, default = "TP=1, two threads", "TP=2, sequence, overlap"
    builds = {
        default: partial(parallel_step, True, True),
        "TP=2, sequence": partial(parallel_step, True, False),
        "TP=2": partial(parallel_step, False, False),
    }
    steppers = {alone: Stepper(our_step, threads=2)}
    steppers |= {name: Stepper(build, threads=1, ranks=2) for name, build in builds.items()}
    seconds = interleaved(steppers, 2 if args.quick else 9, warmup=2 if args.quick else 3)
    for stepper in steppers.values():
        stepper.close()
    step = medians(seconds)
    rows = [
        (name, f"{t:.2f}", f"{TOKENS / t:.0f}", f"{step[alone] / t:.2f}")
        for name, t in step.items()
    ]
    print_table(("", "s/step", "tokens/s", "of TP=1"), rows)
    baseline = "tokens/s of one rank with two threads"
    efficiency = Ratio(step[alone] / step[default], 0.9, "higher", baseline)
    report("tp_efficiency", {"tp2_vs_tp1": efficiency}, {"seconds": seconds})


if __name__ == "__main__":
    main()
