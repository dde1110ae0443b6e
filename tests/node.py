"""A node of a cluster on this machine, until it is ended: `node.py ADDRESS NAME CPUS FOLDER`.

`ray start --address` does not do: it refuses where Ray is kept on loopback, and elsewhere takes
127.0.0.1 for the machine's own address. This is what it would start.
"""

from __future__ import annotations

import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams


def main(address: str, name: str, num_cpus: int, folder: str) -> None:
    parameters = RayParams(
        gcs_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=num_cpus,
        num_gpus=0,
        resources={name: 1000},
        object_store_memory=100 << 20,
        include_log_monitor=False,  # type: ignore[arg-type]  # the head's is enough
        min_worker_port=0,  # any: by default all nodes would choose from the same
        max_worker_port=0,
        node_manager_port=0,
        # Of nodes started at the same time, Ray gives two the same.
        raylet_socket_name=f"{folder}/{name}.raylet",
        plasma_store_socket_name=f"{folder}/{name}.plasma",
    )
    parameters.dashboard_agent_listen_port = None  # likewise
    node = Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    node.kill_all_processes(check_alive=False, allow_graceful=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
