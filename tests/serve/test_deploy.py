"""What goes wrong while deploying is told with its key, before a replica starts if it can be."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from llama_ray.errors import UserError
from llama_ray.local import Head
from serve.app import build_app
from serve.deploy import deploy, load_config
from tests.conftest import free_port

CONFIG = str(Path(__file__).parents[2] / "serve/config.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("args.chekpoint=x", r"config.yaml: applications.0.args: chekpoint: .*'checkpoint'"),
        ("args.engine.block_size=0", r"config.yaml: applications.0.args: engine.block_size: "),
        ("args.engine.max_batch_tokens=8", "less than max_batch_size 16"),
        ("http_options.port=many", r"config.yaml: http_options.port: "),
        ("http_options.prt=3", r"http_options.prt: unknown key, did you mean 'port'"),
        ("port=8001", "write args.key=value or http_options.key=value"),
    ],
)
def test_a_wrong_config_is_told_by_file_and_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(CONFIG, [override])


def test_the_builder_names_the_key() -> None:
    with pytest.raises(UserError, match=r"args: model_name: is missing"):
        build_app({"checkpoint": "runs/x"})


@pytest.fixture
def port(ray_cluster: Head) -> Iterator[int]:
    yield free_port()
    serve.shutdown()


def test_a_deployment_that_cannot_be_says_why(port: int, tmp_path: Path) -> None:
    at_port = f"http_options.port={port}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UserError, match=rf"port {port} is in use .* http_options.port="):
            deploy(load_config(CONFIG, [at_port]))

    with pytest.raises(UserError, match="runs/never holds no committed checkpoint"):
        deploy(load_config(CONFIG, [at_port, "args.checkpoint=runs/never"]))

    # This one is found by the replica, and comes back as the deployment's status.
    (tmp_path / "broken.bin").write_bytes(b"short")
    broken = [f"args.checkpoint={tmp_path}/broken.bin", f"args.tokenizer={tmp_path}/broken.bin"]
    with pytest.raises(UserError, match=r"broken.bin: is no llama2.c checkpoint: only 5 bytes"):
        deploy(load_config(CONFIG, [at_port, *broken]))
    messages = [d.message for d in serve.status().applications["llama"].deployments.values()]
    assert "is no llama2.c checkpoint: only 5 bytes" in messages[0]

    with pytest.raises(UserError, match=rf"http_options.port: .* already listens on {port}"):
        deploy(load_config(CONFIG, ["http_options.port=1"]))
