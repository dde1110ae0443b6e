"""The driver of a pretraining job: check, start Ray Train, watch."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
)
from ray.train.v2.api.config import RunConfig, ScalingConfig

from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.config.load import differences
from llama_ray.config.pretrain import PretrainConfig
from llama_ray.data.shards import TokenManifest
from llama_ray.errors import UserError
from llama_ray.format import duration
from llama_ray.local import connect
from llama_ray.storage import Storage
from llama_ray.train.allocator import KEEP_FREED_MEMORY
from llama_ray.train.board import Order, open_board
from llama_ray.train.loop import open_stream, train_worker
from llama_ray.train.mixture import print_plan
from llama_ray.train.monitor import Monitor
from llama_ray.train.register import patient_filesystem
from llama_ray.train.start import check_start, find_start
from llama_ray.train.trainer import RunTrainer, WorkerEvents

# Keys that may differ between a run and its continuation: they change neither the model nor the
# order of its tokens.
FREE_KEYS = {
    "storage",
    "parallel",
    "checkpoint",
    "data.window_steps",
    "data.prefetch_windows",
    "data.on_corrupt",
    "data.skip_steps",
    "failures",
    "optimizer.spike_factor",
    "optimizer.max_skipped",
    "train.micro_batch_size",
    "train.recompute",
    "train.compile",
    "train.log_every",
    "train.validate_every",
    "train.validation_sequences",
}


# Workers that were lost are replaced within this time where there is room.
QUIET_SECONDS = 10.0


def pretrain(config: PretrainConfig) -> None:
    """Train to the last step, resuming where a committed checkpoint is. Raises `UserError`; and
    SystemExit(143) after SIGTERM, once a checkpoint is saved."""
    storage = Storage(config.storage)
    storage.check_writable()
    manifest = TokenManifest.load(storage, config.data.tokens)
    check_against_tokens(config, storage, manifest)
    store = CheckpointStore(storage, config.name)
    if is_trained(config, storage, manifest):
        return
    connect()
    board = open_board(config)
    # Once more: until now another job may have been at work on it.
    if is_trained(config, storage, manifest):
        return
    store.clean_up()
    config = config.with_start(find_start(config, storage))
    fewest = config.usable_data()[0] * config.parallel.tensor
    use_gpu = ray.cluster_resources().get("GPU", 0) >= fewest
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    check_group_fits_a_node(config, nodes, use_gpu)
    storage.write_json(f"runs/{config.name}/job.json", config.model_dump(mode="json"))
    check_resources(config)
    stream = open_stream(config, storage, manifest)
    print_plan(stream, config.train.steps)
    monitor = Monitor(config, storage, manifest, stream)
    watch(make_trainer(config, storage, board, use_gpu), board, monitor)


def is_trained(config: PretrainConfig, storage: Storage, manifest: TokenManifest) -> bool:
    """Whether nothing is left to do, and say so. Raises `UserError` where the run cannot go on from
    what there is."""
    store = CheckpointStore(storage, config.name)
    committed = store.committed_steps()
    check_against_earlier_run(config, storage, committed)
    if (start := find_start(config, storage)) is None:
        return False
    info = check_start(config, storage, start, manifest.tokenizer_sha256)
    if info.step < config.train.steps:
        return False
    if not committed:
        raise UserError(
            f"train.steps: {config.train.steps:,} leaves nothing to do: {storage.url(start)}, from "
            f"which {config.name!r} is to start, is of step {info.step:,}; ask for more"
        )
    print(f"nothing to do: {config.name} is trained: {storage.url(start)}")
    return True


def watch(trainer: RunTrainer, board: Any, monitor: Monitor) -> None:
    """Until the run ends, or is stopped by SIGTERM or Ctrl-C."""
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    stop = StopSignal(trainer.config.failures.grace_seconds)
    thread = threading.Thread(target=fit, daemon=True)
    with stop:
        thread.start()
        try:
            while thread.is_alive():
                if stop.is_new():
                    board.ask.remote(Order.STOP)
                for event in ray.get(board.take.remote(timeout=0.5)):
                    monitor.handle(event)
                monitor.tick()
                if time.monotonic() > monitor.restarting_since + QUIET_SECONDS:
                    check_resources(trainer.config)
                    monitor.restarting_since = math.inf
                if stop.overdue():
                    break
            for event in ray.get(board.take.remote(timeout=0)):
                monitor.handle(event)
        finally:
            ray.kill(board)
            monitor.finish()
    if failure:
        raise failure[0]
    if stop.received and not monitor.ended:
        raise SystemExit(128 + signal.SIGTERM)


class StopSignal:
    """SIGTERM (`ray job stop`, a node going down) or Ctrl-C, as a flag. The second ends at once."""

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.received = self.told = 0.0

    def __enter__(self) -> None:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._handle)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = time.monotonic()

    def is_new(self) -> bool:
        """True once."""
        if self.received and not self.told:
            self.told = self.received
            print(f"saving a checkpoint: {duration(self.grace_seconds)} (failures.grace_seconds)")
            return True
        return False

    def overdue(self) -> bool:
        if self.received and time.monotonic() - self.received > self.grace_seconds:
            print("not saved in time; the run is left at its last committed checkpoint")
            return True
        return False


def make_trainer(config: PretrainConfig, storage: Storage, board: Any, use_gpu: bool) -> RunTrainer:
    parallel, failures = config.parallel, config.failures
    if not use_gpu and (n_gpus := ray.cluster_resources().get("GPU", 0)):
        print(f"training on CPUs: {parallel.world_size} ranks, but {n_gpus:g} GPUs in the cluster")
    # Ray Train looks at its workers every 2 s unless told otherwise. Only then does it learn of a
    # failure, of the end, and of one checkpoint, for the next of which workers wait.
    interval = min(2.0, 0.25 + parallel.world_size / 256)
    os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, f"{interval:.2f}")
    fewest, most = (n * parallel.tensor for n in (config.usable_data()[0], parallel.data))
    scaling = ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),
        use_gpu=use_gpu,
        resources_per_worker={"CPU": parallel.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        placement_strategy="PACK",  # fills a node before the next: neighbours in rank share one
        elastic_resize_monitor_interval_s=parallel.resize_seconds,
    )
    patience = {"retry_seconds": config.checkpoint.deadline_seconds}
    patient = storage.config.model_copy(update=patience)
    # Ray Train's own record of an earlier job of this run: it may name checkpoints since removed.
    storage.delete(f"runs/{config.name}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}")
    callbacks: list[Any] = [WorkerEvents(board)]
    run = RunConfig(
        name=config.name,
        storage_path=storage.path("runs"),
        storage_filesystem=patient_filesystem(Storage(patient)),
        callbacks=callbacks,
        worker_runtime_env=None if use_gpu else {"env_vars": KEEP_FREED_MEMORY},
    )
    return RunTrainer(
        train_worker,
        train_loop_config={"config": config, "board": board},
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=math.ceil(failures.hang_seconds)
        ),
        scaling_config=scaling,
        run_config=run,
        config=config,
        board=board,
    )


def check_against_tokens(config: PretrainConfig, storage: Storage, manifest: TokenManifest) -> None:
    """Whatever the workers would stumble over, before they are started."""
    if manifest.vocab_size != config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size:,} is not the vocabulary of "
            f"data.tokens {config.data.tokens!r}, {manifest.vocab_size:,}; make them equal"
        )
    damage = list(manifest.damage(storage))
    for error in damage:
        if config.data.on_corrupt == "stop" or "/validation/" in error.path:
            raise error.explained(storage)
    if damage:
        print(
            f"warning: data.on_corrupt=skip does without {len(damage):,} damaged files, the first: "
            f"{damage[0].explained(storage)}"
        )
    manifest.tokenizer(storage)
    open_stream(config, storage, manifest).validation_sequences(1)


def check_against_earlier_run(
    config: PretrainConfig, storage: Storage, committed: Sequence[int]
) -> None:
    """A run of this name with checkpoints may only be continued as what it was. committed: their
    steps."""
    if not committed:
        return
    if config.checkpoint.resume == "never":
        raise UserError(
            f"name: {config.name!r} has checkpoints and checkpoint.resume is 'never'; choose "
            f"another name, or delete {storage.url(f'runs/{config.name}')}"
        )
    try:
        earlier = storage.read_json(f"runs/{config.name}/job.json")
    except FileNotFoundError:
        raise UserError(
            f"name: {config.name!r} has checkpoints, but no job.json that says of which job; "
            f"choose another name, or delete {storage.url(f'runs/{config.name}')}"
        ) from None
    changed = [
        f"{key} was {before!r}, is {now!r}"
        for key, (before, now) in differences(earlier, config.model_dump(mode="json")).items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if changed:
        raise UserError(
            f"name: {config.name!r} has checkpoints of another job ({'; '.join(changed)}); choose "
            f"another name, or delete {storage.url(f'runs/{config.name}')}"
        )


def check_group_fits_a_node(
    config: PretrainConfig, nodes: Sequence[Mapping[str, float]], use_gpu: bool
) -> None:
    """A tensor-parallel group exchanges every layer's activations, too much for any link between
    nodes. nodes: each one's resources."""
    parallel = config.parallel
    kind, per_rank = ("GPU", 1.0) if use_gpu else ("CPU", parallel.cpus_per_worker)
    largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
    # A rank that alone fits no node, or a cluster that has yet to grow, is not ours to judge.
    if parallel.tensor == 1 or largest == 0 or parallel.tensor * per_rank <= largest:
        return
    fitting = [n for n in config.model.tensor_parallel_choices() if n * per_rank <= largest]
    remedies = [f"choose from {', '.join(map(str, fitting))}"] if fitting else []
    remedies += [] if use_gpu else ["lower parallel.cpus_per_worker"]
    wanted = "" if use_gpu else f" × parallel.cpus_per_worker {per_rank:g}"
    raise UserError(
        f"parallel.tensor: a group of {parallel.tensor} ranks{wanted} must fit on one node, and "
        f"the largest has {largest:g} {kind}s; {', or '.join(remedies)}"
    )


def check_resources(config: PretrainConfig) -> None:
    """Say what Ray Train waits for: it does so silently, and without an autoscaler for ever."""
    fewest = config.usable_data()[0] * config.parallel.tensor
    wanted = fewest * config.parallel.cpus_per_worker
    free = ray.available_resources().get("CPU", 0)
    if wanted > free:
        print(
            f"waiting for CPUs: parallel wants {wanted:g}, {free:g} of "
            f"{ray.cluster_resources().get('CPU', 0):g} are free (Ray Serve and other jobs hold "
            "the rest); end one of these, or lower parallel.cpus_per_worker"
        )
