"""One Ray head for the whole session, started and stopped as a user would."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports torch or Ray.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# This process is a driver on a head that is bound to loopback (see llama_ray.local).
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"

import ray
import torch

from llama_ray import local
from tests.parallel.ranks import Ranks
from tests.s3 import S3Server, s3_server

SHARED = Path(__file__).parents[2] / "shared"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("requires_gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def storage_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `$LLAMA_RAY_STORAGE` points to on the shared cluster."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory, storage_root: Path) -> Iterator[local.Head]:
    """A head with job server on loopback, started in the repository's root; no driver connected."""
    state = tmp_path_factory.mktemp("head")
    head = local.start(
        state,
        port=free_port(),
        dashboard_port=free_port(),
        num_cpus=2,
        env={"LLAMA_RAY_STORAGE": f"file://{storage_root}"},
    )
    yield head
    local.stop(state)


@pytest.fixture(scope="session")
def ray_cluster(ray_head: local.Head) -> Iterator[local.Head]:
    """The same head, with this process connected to it as a driver."""
    ray.init(address=ray_head.address, log_to_driver=False)
    yield ray_head
    ray.shutdown()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for tests of what several ranks do together."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with an empty bucket."""
    # A range that the kernel does not hand out by itself, gRPC ports (+10,000) included.
    with s3_server(tmp_path_factory.mktemp("s3"), port=18_330) as server:
        yield server


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root and its rights")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """`../shared`; tests that use it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED
