"""Ray Train as these runs need it: whole tensor-parallel groups, and failures told apart.

The hooks used here are Ray Train's own (Ray 2.60), but not all of them are documented.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from llama_ray.config.pretrain import PretrainConfig
from llama_ray.errors import find_cause, user_error_cause
from llama_ray.train.board import Order
from llama_ray.train.control import Leaving, catch_sigterm


class RunTrainer(TorchTrainer):
    """A `TorchTrainer` with the policies below."""

    def __init__(self, *args: Any, config: PretrainConfig, board: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config, self.board = config, board

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        failures = FailureConfig(max_failures=self.config.failures.max_restarts)
        arguments["failure_policy"] = RunFailurePolicy(failures)
        scaling = self.scaling_config
        assert isinstance(scaling, ScalingConfig)
        if scaling.elasticity_enabled:
            arguments["scaling_policy"] = WholeGroups(scaling, self.config, self.board)
        return super()._initialize_and_run_controller(**arguments)


class RunFailurePolicy(DefaultFailurePolicy):
    """What a user has to put right is not tried again; leaving is no failure."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if user_error_cause(training_failed_error) is not None:
            return FailureDecision.RAISE
        if find_cause(training_failed_error, Leaving) is not None:
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)


class WholeGroups(ElasticScalingPolicy):
    """As many data-parallel ranks as the cluster has room for, and the batch divides into. To grow,
    workers are asked to save and leave first: no step is lost."""

    def __init__(self, scaling_config: ScalingConfig, config: PretrainConfig, board: Any) -> None:
        super().__init__(scaling_config)
        self.config, self.board = config, board

    def _count_possible_workers(self, reserved_resources: Mapping[str, Any]) -> int:
        """reserved_resources: node → its resources. A group never spans nodes."""
        tensor = self.config.parallel.tensor
        # They are reserved for a while longer than a node lives, or is to live.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        alive -= ray._private.state.state.get_draining_nodes().keys()
        groups = sum(
            super(WholeGroups, self)._count_possible_workers({node: resources}) // tensor
            for node, resources in reserved_resources.items()
            if node in alive
        )
        usable = [n for n in self.config.usable_data() if n <= groups]
        return max(usable, default=0) * tensor

    def make_decision_for_running_worker_group(self, *args: Any, **kwargs: Any) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(*args, **kwargs)
        if isinstance(decision, ResizeDecision):
            # Workers that have left are replaced by as many as there is room for.
            self.board.ask.remote(Order.RESTART)
            return NoopDecision()
        return decision


class WorkerEvents(WorkerGroupCallback):
    """Runs in the controller, which alone reaches workers' main threads, and knows of failures
    first."""

    def __init__(self, board: Any) -> None:
        self.board = board
        self.told = ""

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.told = ""
        worker_group.execute(catch_sigterm)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        errors = worker_group_status.errors
        ranks = {rank: _reason(error) for rank, error in sorted(errors.items())}
        left = any(find_cause(error, Leaving) for error in errors.values())
        if errors and not left and repr(ranks) != self.told:  # the same are told again and again
            self.told = repr(ranks)
            self.board.put.remote([{"event": "failed", "ranks": ranks}])


def _reason(error: Exception) -> str:
    """One line."""
    if (cause := user_error_cause(error)) is not None:
        return str(cause)
    if isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError):
        return "its process or its node is gone, or does not answer"
    # Ray Train wraps what was raised, and says its traceback in its stead.
    raised = getattr(error, "_base_exc", error)
    lines = str(raised).strip().splitlines()
    return f"{type(raised).__name__}: {lines[0]}" if lines else repr(raised)
