"""The chunked projection and cross-entropy against `F.cross_entropy` on full logits.

Forward and backward pass of the output projection and the loss, bfloat16 hidden states of 768, a
vocabulary of 32,000. Each in a process of its own, whose peak memory is read from the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.common import Ratio, interleaved, medians, parse_args, print_table, report
from benchmarks.stepper import Stepper
from llama_ray.model.loss import linear_cross_entropy
from llama_ray.model.projection import Linear

DIM, VOCAB = 768, 32_000
OURS, FULL, NOTHING = "chunked", "F.cross_entropy", "nothing"


def loss_step(name: str, n_tokens: int) -> Callable[[], None]:
    output = Linear(DIM, VOCAB).bfloat16()
    hidden = torch.randn(n_tokens, DIM).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (n_tokens,))

    def step() -> None:
        if name == OURS:
            loss = linear_cross_entropy(hidden, output, targets)
        elif name == FULL:
            loss = F.cross_entropy((hidden @ output.weight.T).float(), targets, reduction="sum")
        else:
            return
        loss.backward()
        hidden.grad = output.weight.grad = None

    return step


def measure(n_tokens: int, repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds, and peak bytes beyond those of a process that has the inputs only."""
    names = (OURS, FULL, NOTHING)
    threads = torch.get_num_threads()
    steppers = {name: Stepper(partial(loss_step, name, n_tokens), threads) for name in names}
    seconds = medians(interleaved(steppers, repeats, warmup=2))
    peaks = {name: stepper.close() for name, stepper in steppers.items()}
    return seconds, {name: peaks[name] - peaks[NOTHING] for name in (OURS, FULL)}


def main() -> None:
    args = parse_args(__doc__)
    rows, ratios, details = [], {}, {}
    for n_tokens in (2048,) if args.quick else (2048, 8192):
        seconds, memory = measure(n_tokens, 3 if args.quick else 9)
        rows += [
            (
                f"{n_tokens} tokens, {name}",
                f"{seconds[name] * 1e3:.0f}",
                f"{memory[name] / 1e6:.0f}",
            )
            for name in (OURS, FULL)
        ]
        ratios[f"memory_{n_tokens}"] = Ratio(
            memory[OURS] / memory[FULL], 0.5, "lower", "peak memory of F.cross_entropy, full logits"
        )
        ratios[f"time_{n_tokens}"] = Ratio(
            seconds[OURS] / seconds[FULL], None, "lower", "time of F.cross_entropy on full logits"
        )
        details[str(n_tokens)] = {"seconds": seconds, "peak_bytes": memory}
    print_table(("", "ms", "peak MB"), rows)
    report("loss", ratios, details)


if __name__ == "__main__":
    main()
