"""A real S3 server on loopback: SeaweedFS, from its PyPI package."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs

ACCESS_KEY, SECRET_KEY = "llama", "llama-secret"
BUCKET = "llama"


@dataclass(frozen=True)
class S3Server:
    endpoint_url: str
    env: dict[str, str]
    """Credentials, as a user's shell or a Ray job's runtime environment has them."""


@contextmanager
def s3_server(folder: Path, port: int) -> Iterator[S3Server]:
    """Runs from the given port up to port + 4, and their gRPC ports 10,000 above."""
    config = folder / "s3.json"
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": credentials, "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir()
    flags = {
        "dir": data, "ip": "127.0.0.1", "ip.bind": "127.0.0.1",
        "master.port": port, "volume.port": port + 1, "filer": "true", "filer.port": port + 2,
        "s3": "true", "s3.port": port + 3, "s3.config": config, "s3.iam": "false",
        "s3.port.iceberg": 0, "s3.port.lance": 0,
        "metricsPort": port + 4, "metricsIp": "127.0.0.1", "master.telemetry": "false",
        "master.electionTimeout": "1s", "master.heartbeatInterval": "300ms",
        "master.volumeSizeLimitMB": 512, "volume.max": 40, "volume.preStopSeconds": 0,
    }  # fmt: skip
    log = (folder / "weed.log").open("wb")
    command: list[str | Path] = [
        Path(sys.executable).with_name("weed"),
        "server",
        *(f"-{name}={value}" for name, value in flags.items()),
    ]
    server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    endpoint = f"http://127.0.0.1:{port + 3}"
    try:
        _make_bucket(endpoint, server)
        env = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        yield S3Server(endpoint, env)
    finally:
        server.kill()
        server.wait()
        log.close()


def _make_bucket(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert server.poll() is None, "weed server ended; see weed.log"
        try:
            fs = s3fs.S3FileSystem(
                key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=endpoint, skip_instance_cache=True
            )
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/.ready", b"1")  # the volume server is up too
            fs.rm(f"{BUCKET}/.ready")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)
