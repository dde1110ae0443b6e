"""How much of the communication hides under computation, on links slow enough to matter.

Two ranks of one thread each, in two network namespaces joined by a limited link. The tensor axis
(sequence parallelism, bfloat16) and the data axis (FSDP2), each on a model whose computation and
communication are comparable: there the most can be hidden. Of a step's forward and backward passes,
measured in turn in the same processes:

    off            each collective is waited for at once
    on             parallelize(overlap=True)
    compute        "off" where collectives do nothing
    communication  the collectives of "on" without the computation, in its order
    bound          max(compute, communication): no overlap can be faster

    hidden = (off − on) / (off − bound)

On the data axis "off" also sends more, since FSDP2's reduce-scatter on gloo is an all-reduce; the
ratio there is of times, and owes to both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.common import (
    Ratio,
    interleaved,
    medians,
    parse_args,
    print_table,
    report,
    run_ranks,
    slowest,
)
from benchmarks.netns import bytes_sent, limited_link, measured_mbit
from benchmarks.traffic import Recording, free
from llama_ray.config.model import ModelConfig
from llama_ray.config.pretrain import OptimizerConfig
from llama_ray.model import LLaMA
from llama_ray.parallel import begin_backward, finish_gradients, init_mesh, initialize, parallelize
from llama_ray.train.optimizer import build_optimizer, clip_grad_norm

TARGET = 0.7


@dataclass(frozen=True)
class Case:
    axis: str
    mbit: int
    dim: int
    n_layers: int
    sequences: int
    """Of each data-parallel rank."""
    seq_len: int = 512
    vocab_size: int = 2048
    rounds: int = 6

    @property
    def config(self) -> ModelConfig:
        fields = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.dim // 64,
            "vocab_size": self.vocab_size,
            "max_seq_len": self.seq_len,
        }
        return ModelConfig.model_validate(fields)


# Per token and layer, the tensor axis sends O(dim) and computes O(dim²); the data axis sends the
# parameters once for any number of tokens. So a slower link wants wider layers, or more tokens. On
# the tensor axis, 4,096 tokens are four chunks.
CASES = {
    "tensor_200mbit": Case("tensor", 200, dim=3072, n_layers=1, sequences=8, rounds=3),
    "tensor_1gbit": Case("tensor", 1000, dim=1024, n_layers=4, sequences=8),
    "data_200mbit": Case("data", 200, dim=192, n_layers=4, sequences=16),
    "data_1gbit": Case("data", 1000, dim=384, n_layers=4, sequences=4),
}


class Step:
    """A training step of one model. Called, it does the whole step and notes how long its forward
    and backward passes took."""

    def __init__(self, case: Case, mesh: DeviceMesh, overlap: bool) -> None:
        with torch.device("meta"):
            model = LLaMA(case.config)
        self.model = parallelize(model, mesh, torch.bfloat16, overlap=overlap).materialize("cpu")
        initialize(self.model, seed=0)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.tokens = torch.randint(case.vocab_size, (case.sequences, case.seq_len + 1))
        self.pass_seconds: list[float] = []

    def passes(self) -> None:
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        loss = self.model(inputs, targets) / targets.numel()
        begin_backward(self.model, last=True)
        loss.backward()
        finish_gradients(self.model)

    def __call__(self) -> None:
        start = time.perf_counter()
        self.passes()
        self.pass_seconds.append(time.perf_counter() - start)
        clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(rank: int, case: Case, repeats: int, interface: str) -> dict[str, Any]:
    """Seconds of each round, of the passes under "off" and "on", of whole steps under "step off"
    and "step on"; and the bytes that each sent."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # of which memory may be full where collectives do nothing
    tensor, data = (2, 1) if case.axis == "tensor" else (1, 2)
    mesh = init_mesh(tensor, data, "cpu")
    steps = {"off": Step(case, mesh, overlap=False), "on": Step(case, mesh, overlap=True)}
    communication = Recording()
    with communication.taken():
        steps["on"].passes()
    steps["on"].optimizer.zero_grad()

    def compute() -> None:
        with free():
            steps["off"].passes()
        steps["off"].optimizer.zero_grad()  # they are not to be used

    functions: dict[str, Callable[[], object]] = {
        **steps,
        "compute": compute,
        "communication": communication,
    }
    sent = {name: _bytes_sent_by(function, interface) for name, function in functions.items()}
    seconds = interleaved(functions, repeats, warmup=0, before=dist.barrier)
    whole = {f"step {name}": seconds[name] for name in steps}
    passes = {name: step.pass_seconds[-repeats:] for name, step in steps.items()}
    return {"seconds": seconds | passes | whole, "sent": sent}


def _bytes_sent_by(function: Callable[[], object], interface: str) -> int:
    dist.barrier()
    before = bytes_sent(interface)
    function()
    dist.barrier()  # by then all of it has arrived
    return bytes_sent(interface) - before


def run_case(case: Case, repeats: int) -> dict[str, Any]:
    """Medians over rounds, in seconds, of the slower rank; the hidden fraction; what was sent."""
    with limited_link(case.mbit) as network:
        mbit = measured_mbit(network, expected_mbit=case.mbit)
        ranks = run_ranks(measure, 2, 1, case, repeats, network.interface, network=network)
    rounds = slowest([rank["seconds"] for rank in ranks])
    row: dict[str, Any] = medians(rounds)
    row["bound"] = max(row["compute"], row["communication"])
    row["hidden"] = (row["off"] - row["on"]) / (row["off"] - row["bound"])
    row["link_mbit"] = mbit
    row["sent_mb"] = {name: round(sent / 1e6, 2) for name, sent in ranks[0]["sent"].items()}
    row["rounds"] = {n: [round(t, 4) for t in times] for n, times in rounds.items()}
    return row


def print_rows(rows: Mapping[str, Mapping[str, Any]]) -> None:
    passes = ("off", "on", "compute", "communication", "bound")
    whole = ("step off", "step on")
    header = ("milliseconds", "measured Mbit/s", *passes, "hidden", *whole)
    table = [
        (
            name.replace("_", " "),
            f"{row['link_mbit']:.0f}",
            *(f"{row[column] * 1e3:.0f}" for column in passes),
            f"{row['hidden']:.2f}" if CASES[name].axis == "tensor" else "",
            *(f"{row[column] * 1e3:.0f}" for column in whole),
        )
        for name, row in rows.items()
    ]
    print_table(header, table)


def ratio(case: Case, row: Mapping[str, Any]) -> Ratio:
    link = f"at {case.mbit} Mbit/s"
    if case.axis == "tensor":
        baseline = f"of the time that overlap could save, against the same step without, {link}"
        return Ratio(row["hidden"], TARGET, "higher", baseline)
    baseline = f"of the time of the step without overlap, which is FSDP2 as it comes, {link}"
    return Ratio(row["step on"] / row["step off"], None, "lower", baseline)


def main() -> None:
    quick = parse_args(__doc__).quick
    cases = {"tensor_1gbit": CASES["tensor_1gbit"]} if quick else CASES
    rows = {name: run_case(case, 2 if quick else case.rounds) for name, case in cases.items()}
    print_rows(rows)
    ratios = {
        name.replace("tensor", "hidden"): ratio(case, rows[name]) for name, case in cases.items()
    }
    report("overlap", ratios, rows)


if __name__ == "__main__":
    main()
