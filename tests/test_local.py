"""The local head: on loopback alone, and `stop` ends what `start` started and nothing else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llama_ray import local
from llama_ray.errors import UserError
from tests.conftest import free_port


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is in use .* with RAY_PORT="):
            local.start(tmp_path, port=port, dashboard_port=free_port())
        with pytest.raises(UserError, match=rf"port {port} is in use .* with DASHBOARD_PORT="):
            local.start(tmp_path, port=free_port(), dashboard_port=port)
    assert local.Head.load(tmp_path) is None


@pytest.fixture
def second_head(tmp_path: Path) -> Iterator[local.Head]:
    yield local.start(tmp_path, free_port(), free_port(), 1, {"LLAMA_RAY_STORAGE": "file:///a"})
    local.stop(tmp_path)


def test_start_and_stop_of_a_second_head(
    ray_head: local.Head, second_head: local.Head, tmp_path: Path
) -> None:
    head = second_head
    ports = (int(head.address.split(":")[-1]), int(head.dashboard_url.split(":")[-1]))
    again = local.start(tmp_path, *ports, env={"LLAMA_RAY_STORAGE": "file:///a"})
    assert again == head  # it runs already
    with pytest.raises(UserError, match="runs here already, otherwise than asked for"):
        local.start(tmp_path, *ports, env={"LLAMA_RAY_STORAGE": "file:///b"})
    process = head.process()
    assert process is not None
    family = [process, *process.children(recursive=True)]
    listening = [
        connection.laddr.ip
        for member in family
        for connection in member.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert all(ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for ip in listening)

    assert local.stop(tmp_path)
    assert not any(member.is_running() and member.status() != "zombie" for member in family)
    assert not Path(head.temp_dir).exists()
    assert not local.stop(tmp_path)
    assert ray_head.process() is not None
