"""What each Ray Train worker runs: build, resume, and then step after step.

tokens of a step ─▶ micro-batches ─▶ loss ─▶ gradients ─▶ skip or clip ─▶ AdamW ─▶ metrics
                                                                                └▶ checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    get_data_parallel_group,
    get_data_parallel_rank,
)
from torch import Tensor

from llama_ray.checkpoint.checkpointer import Checkpointer
from llama_ray.checkpoint.sharded import load_sharded
from llama_ray.checkpoint.state import training_state
from llama_ray.checkpoint.store import CheckpointInfo, CheckpointStore, read_info
from llama_ray.config.pretrain import PretrainConfig
from llama_ray.data.shards import TokenManifest
from llama_ray.data.stream import TokenStream
from llama_ray.data.windows import Replaced
from llama_ray.errors import UserError
from llama_ray.model.attention import DocumentAttention, training_attention
from llama_ray.model.llama import AttentionCore
from llama_ray.parallel import (
    begin_backward,
    finish_gradients,
    initialize,
    reshard,
)
from llama_ray.storage import Storage
from llama_ray.train.board import Event, Order, Reporter
from llama_ray.train.build import build_on_meta
from llama_ray.train.collectives import set_timeouts
from llama_ray.train.control import Control, Leaving, wished_here
from llama_ray.train.flops import peak_flops
from llama_ray.train.guard import GradientGuard
from llama_ray.train.meter import Meter
from llama_ray.train.optimizer import (
    build_optimizer,
    clip_grad_norm,
    learning_rate,
    set_learning_rate,
)
from llama_ray.train.register import Registrar
from llama_ray.train.report import StepReport
from llama_ray.train.start import find_start
from llama_ray.train.watchdog import UPLOAD, Watchdog, place


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point. settings: {"config": PretrainConfig, "board": handle}."""
    entered = time.time()
    config: PretrainConfig = settings["config"]
    # Fewer ranks than asked for may have been found: whole tensor-parallel groups.
    config = config.with_data(dist.get_world_size() // config.parallel.tensor)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        cpus = config.parallel.cpus_per_worker
        torch.set_num_threads(config.parallel.threads_per_worker or math.ceil(cpus))
    reporter = Reporter(settings["board"])
    worker = Worker(config, device, reporter)
    try:
        for event in worker.run():
            if dist.get_rank() == 0:  # it alone tells the driver, which prints and plots
                reporter.put({"entered": entered, **event} if event["event"] == "start" else event)
        worker.close()
    except Exception as error:
        # An upload under way is left to end with the process: it may wait for a rank that is gone.
        if report := worker.watchdog.describe_failure(error):
            reporter.put(report)
        raise
    finally:
        reporter.close()


def open_stream(config: PretrainConfig, storage: Storage, manifest: TokenManifest) -> TokenStream:
    """The token stream that the job file describes."""
    return TokenStream(
        storage, manifest, config.data, batch_size=config.train.batch_size, seed=config.seed
    )


class Worker:
    """One rank: its share of the model, of the optimizer and of every batch."""

    def __init__(self, config: PretrainConfig, device: torch.device, reporter: Reporter) -> None:
        self.config, self.device = config, device
        compile = config.train.compile
        model, self.mesh = build_on_meta(
            config, device.type, compile=device.type == "cuda" if compile is None else compile
        )
        self._check_one_node()
        self.model = model.materialize(device)
        self.dtype = getattr(torch, config.train.dtype)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.guard = GradientGuard(config.optimizer, device)
        self.control = Control(lambda: max(wished_here(), reporter.order))
        set_timeouts(config.failures.hang_seconds)  # not of uploads, whose group is made below

        storage = Storage(config.storage)
        manifest = TokenManifest.load(storage, config.data.tokens)
        self.stream = open_stream(config, storage, manifest)
        self.validation = self.stream.validation_sequences(config.train.validation_sequences)
        self.tokenizer_sha256 = manifest.tokenizer_sha256
        self.store = CheckpointStore(storage, config.name)
        tokenizer = manifest.tokenizer(storage)
        self.marks = tokenizer.bos_id, tokenizer.eos_id
        self.checkpointer = Checkpointer(self.store, tokenizer.model_bytes, config.checkpoint)
        self.registrar = Registrar(self.store)
        self.start_step = self._resume_or_initialize()
        self.loaded = time.time()
        self.blocked_seconds = 0.0
        # Not before, for loading may take long.
        self.watchdog = Watchdog(dist.get_rank(), config.failures.hang_seconds, reporter.put)
        skipped_in_a_row = int(self.guard.state["skipped_in_a_row"].item())
        self.report = StepReport(config, self.stream, skipped_in_a_row)

    def close(self) -> None:
        self.watchdog.close()
        self.checkpointer.close()

    def _check_one_node(self) -> None:
        """Ray fills a node before the next, but a node may hold a broken number of groups."""
        group, node = self.mesh.get_group("tp"), ray.get_runtime_context().get_node_id()
        nodes: list[str] = [""] * dist.get_world_size(group)
        dist.all_gather_object(nodes, node, group)
        if len(set(nodes)) > 1:
            elastic = self.config.parallel.min_data is not None
            # Where nodes come and go, the next placement may be another.
            raise (RuntimeError if elastic else UserError)(
                f"parallel.tensor: a group of {len(nodes)} ranks was placed on "
                f"{len(set(nodes))} nodes, whose links are too slow for it; choose a number of "
                "ranks that divides those of a node"
            )

    def _resume_or_initialize(self) -> int:
        found: list[str | None] = [None]
        if dist.get_rank() == 0:  # for all, for what is newest may change meanwhile
            self.store.clean_up()
            found = [find_start(self.config, self.store.storage)]
        dist.broadcast_object_list(found)
        if (folder := found[0]) is None:
            initialize(self.model, self.config.seed)
            return 0
        load_sharded(self.store.storage, folder, self._state())
        return read_info(self.store.storage, folder).step

    def _state(self) -> dict[str, Any]:
        return training_state(self.model, self.optimizer) | {"guard": self.guard.state}

    def run(self) -> Iterator[Event]:
        """Train to the last step, or until asked to stop. Yields what happens: {"event": "start" |
        "step" | "validation" | "checkpoint" | "stopped" | "end", …}, figures global. Raises
        `Leaving` once a checkpoint is saved where the run is to go on with other workers."""
        train = self.config.train
        peak, peak_source = peak_flops(self.device, self.dtype)
        places: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(places, place())
        yield {
            "event": "start",
            "step": self.start_step,
            "loaded": self.loaded,
            "places": places,
            "peak_flops": peak,
            "peak_source": peak_source,
        }
        meter = Meter(self.config, peak)
        replaced: list[Replaced] = []  # of the batches that this rank has read
        for step, batch in self._batches(replaced):
            meter.data_arrived()
            self.watchdog.beat(step, "step")
            self.control.begin(self.checkpointer.committed)
            self.train_step(step, batch)
            meter.step_done()
            done, last = step + 1, step + 1 == train.steps
            order, committed = self.control.agree()
            saving = done % self.config.checkpoint.every == 0 or last or order is not Order.GO_ON
            # Also before a save: what is not reported by then, a restart would forget.
            if done % train.log_every == 0 or saving:
                yield {"event": "step", "step": done, **self.report.take(replaced), **meter.rates()}
                if self.report.diverged is not None:
                    raise self.report.diverged
            loss = None
            self.watchdog.beat(step, "validation")
            if done % train.validate_every == 0 or last:
                loss = self.validate()
                yield {"event": "validation", "step": done, "validation_loss": loss}
                meter.restart()
            if saving:
                self.watchdog.beat(step, UPLOAD)
                yield self.save(done, loss)
                meter.restart()
            self.watchdog.beat(step, "checkpoint")
            self.registrar.register(committed)
            if order is not Order.GO_ON and not last:
                yield from self._leave(done, order)
                return
            self.watchdog.beat(done, "data")
        self._finish_saving(train.steps)
        yield {"event": "end", "step": train.steps}

    def _leave(self, done: int, order: Order) -> Iterator[Event]:
        self._finish_saving(done)
        if order is Order.RESTART:
            yield {"event": "left", "step": done}
            raise Leaving(f"saved at step {done}")
        yield {"event": "stopped", "step": done}

    def _finish_saving(self, step: int) -> None:
        self.watchdog.beat(step, UPLOAD)
        self.checkpointer.wait()
        self.registrar.register(self.checkpointer.committed)
        dist.barrier(self.control.group)  # none is gone while another still saves

    def train_step(self, step: int, batch: Tensor) -> None:
        """One optimizer step on batch [B/dp, S+1], skipped on the device where the gradients would
        do harm. `self.report` takes this rank's share of the global batch's mean loss in nats per
        token, the gradient norm before clipping, and whether it was skipped."""
        config = self.config
        rate = learning_rate(step, config.train.steps, config.optimizer)
        set_learning_rate(self.optimizer, rate)
        total = torch.zeros((), device=self.device)
        micro_batches = batch.split(config.train.micro_batch_size)
        for i, micro in enumerate(micro_batches, start=1):
            loss = self._nats(micro) / config.tokens_per_step
            begin_backward(self.model, last=i == len(micro_batches))
            loss.backward()
            total += loss.detach()
        finish_gradients(self.model)
        grad_norm = clip_grad_norm(self.model, config.optimizer.clip_norm)
        self.checkpointer.before_update()
        skipped = self.guard.judge(grad_norm)
        # What mixed-precision scalers tell the fused AdamW in the same way.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.report.add(step, total, grad_norm, skipped)

    def _nats(self, batch: Tensor) -> Tensor:
        """The summed loss of tokens [B,S+1]."""
        inputs = batch[:, :-1]
        attend: AttentionCore = training_attention
        if self.config.data.mask_documents:
            attend = DocumentAttention(inputs, *self.marks)
        return self.model(inputs, batch[:, 1:], attend=attend)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats per token over the held-out sequences, the same ones every time."""
        dp_rank, dp_size = get_data_parallel_rank(), self.config.parallel.data
        size, sequences = self.config.train.micro_batch_size, self.validation
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # nats, tokens
        # Every rank makes the same number of passes, for each gathers weights from the others; one
        # that has run out of sequences repeats the last without counting it.
        for start in range(0, len(sequences), size * dp_size):
            mine = sequences[start + dp_rank * size : start + (dp_rank + 1) * size]
            batch = self._to_device(mine if len(mine) else sequences[-1:])
            nats = self._nats(batch)
            if len(mine):
                sums += torch.stack((nats.double(), sums.new_tensor(batch[:, 1:].numel())))
        reshard(self.model)
        dist.all_reduce(sums, group=get_data_parallel_group())
        return (sums[0] / sums[1]).item()

    def save(self, step: int, validation_loss: float | None) -> Event:
        """Checkpoint after `step` steps, in the background. Returns what to report."""
        parallel, before = self.config.parallel, self.blocked_seconds
        info = CheckpointInfo(
            model=self.config.model,
            step=step,
            tokens_seen=step * self.config.tokens_per_step,
            tokenizer_sha256=self.tokenizer_sha256,
            seed=self.config.seed,
            validation_loss=validation_loss,
            layout={"tensor": parallel.tensor, "data": parallel.data, "shard": parallel.shard_size},
            config=self.config.model_dump(mode="json"),
        )
        self.checkpointer.save(self._state(), info)
        self.registrar.saved.append(info)
        self.blocked_seconds = self.checkpointer.blocked_seconds
        blocked = self.blocked_seconds - before  # of this save, and of the last one's end
        return {"event": "checkpoint", "step": step, "blocked_seconds": blocked}

    def _batches(self, replaced: list[Replaced]) -> Iterator[tuple[int, Tensor]]:
        """(step, tokens [B/dp, S+1] int64) from the first step to do to the last. The first rank of
        a tensor-parallel group reads, the others receive the same from it; what it read in the
        place of damaged samples is appended to `replaced`."""
        group, data = self.mesh.get_group("tp"), self.config.data
        shape = (self.config.train.batch_size // self.config.parallel.data, data.seq_len + 1)
        source = dist.get_global_rank(group, 0)
        if dist.get_rank() != source:
            for step in range(self.start_step, self.config.train.steps):
                received = torch.empty(shape, dtype=torch.int64, device=self.device)
                dist.broadcast(received, source, group)
                yield step, received
            return
        rank = get_data_parallel_rank(), self.config.parallel.data
        for read in self.stream.rank_batches(*rank, self.start_step, self.config.train.steps):
            replaced += read.replaced
            batch = self._to_device(read.tokens)
            dist.broadcast(batch, source, group)
            yield read.step, batch

    def _to_device(self, tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(tokens).to(self.device)
