"""Ray clusters of several nodes on this machine, whose nodes can be lost, drained and added."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions  # type: ignore[attr-defined]
from ray.core.generated import autoscaler_pb2

from llama_ray import local
from tests.conftest import free_port

# Ray gives a node up after 5 failed checks, 3 s apart. A check may still take its 10 s.
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_failure_threshold": "3",
}
TIMEOUT_SECONDS = 60
PREEMPTION = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]


class Nodes:
    """A head and its further nodes, numbered from 0 as they were added. Node i has, besides CPUs,
    1,000 of a resource "node_i", by which tasks can be placed there."""

    def __init__(self, head: local.Head, folder: Path, env: dict[str, str]) -> None:
        self.head, self.folder, self.env = head, folder, env
        self.processes: list[subprocess.Popen[bytes]] = []
        # Without making this process a driver: it can be one of a single cluster only.
        self._state = GlobalState()
        self._state._initialize_global_state(
            GcsClientOptions.create(
                head.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
        )

    def add_node(self, num_cpus: int, wait: bool = True) -> int:
        """Start another node. Returns its number."""
        number = len(self.processes)
        script = Path(__file__).with_name("node.py")
        command = [
            sys.executable, str(script),
            self.head.address, f"node_{number}", str(num_cpus), self.head.temp_dir,
        ]  # fmt: skip
        with (self.folder / f"node_{number}.log").open("wb") as log:
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.env, start_new_session=True,
            )  # fmt: skip
        self.processes.append(started)
        if wait:
            self.wait_for_node(number)
        return number

    def wait_for_node(self, number: int) -> None:
        self.wait_until(lambda: self.is_alive(number), f"node {number} is up")

    def kill_node(self, number: int) -> None:
        """End all its processes at once, as when the machine is lost. Ray notices by itself."""
        _kill_family(self.processes[number].pid)
        self.processes[number].wait()

    def drain_node(self, number: int, deadline_seconds: float) -> None:
        """Announce that it will be gone in so many seconds, as the notice of a spot instance does.
        Ray gives it no new tasks, and lets it go as soon as it is idle (as it is, too, while the
        worker process of its only task still starts); `kill_node` ends it otherwise, as a cloud
        would."""
        deadline = int((time.time() + deadline_seconds) * 1000)
        accepted, reason = GcsClient(address=self.head.address).drain_node(
            self.node_id(number), PREEMPTION, "preempted by the test", deadline
        )
        assert accepted, reason

    def is_alive(self, number: int) -> bool:
        """Whether Ray takes it to be."""
        return any(node["Alive"] for node in self._table(number))

    def is_draining(self, number: int) -> bool:
        return self.node_id(number) in self._state.get_draining_nodes()

    def node_id(self, number: int) -> str:
        (node,) = self._table(number)
        return str(node["NodeID"])

    def wait_until(self, condition: Callable[[], bool], what: str) -> float:
        """Returns the seconds it took."""
        start = time.monotonic()
        while not condition():
            assert time.monotonic() < start + TIMEOUT_SECONDS, (
                f"{TIMEOUT_SECONDS} s without: {what}"
            )
            time.sleep(0.05)
        return time.monotonic() - start

    def _table(self, number: int) -> list[dict[str, Any]]:
        """Its entry; none before it is up, and none once Ray knows that it is gone."""
        return [n for n in self._state.node_table() if f"node_{number}" in n["Resources"]]


@contextmanager
def cluster(
    head_cpus: int, nodes: Sequence[int] = (), env: dict[str, str] | None = None
) -> Iterator[Nodes]:
    """A head with `head_cpus` and a node with each of `nodes` CPUs, on ports and in a folder of
    their own. env: for all of their processes, besides this one's."""
    with tempfile.TemporaryDirectory(prefix="llama_ray_nodes_") as name:
        folder = Path(name)
        added = QUICK_TO_NOTICE | (env or {})
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        head = local.start(folder, free_port(), free_port(), head_cpus, added)
        started = Nodes(head, folder, inherited | added)
        try:
            for num_cpus in nodes:
                started.add_node(num_cpus, wait=False)
            for number in range(len(nodes)):
                started.wait_for_node(number)
            yield started
        finally:
            for process in started.processes:
                _kill_family(process.pid)
                process.wait()
            _kill_family(head.pid)  # not `local.stop`, which waits for a proper end
            shutil.rmtree(head.temp_dir, ignore_errors=True)


def _kill_family(pid: int) -> None:
    try:
        ancestor = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    family = [ancestor, *ancestor.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family[1:], timeout=10)
