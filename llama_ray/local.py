"""A Ray head of your own on this machine, on loopback only, and its exact end.

    python -m llama_ray.local start     # idempotent
    python -m llama_ray.local status
    python -m llama_ray.local stop      # ends what `start` started, and nothing else

`ray stop` would end every Ray on the machine; this remembers the process it started (in
`.local/head.json`) and ends that process and its descendants.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import ray
from ray._private import ray_constants

from llama_ray.errors import UserError

START_TIMEOUT_SECONDS = 90
STOP_TIMEOUT_SECONDS = 30
BIN_DIR = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A head that was started: what to connect to, and which process it is."""

    pid: int
    created: float
    """The process's start time: a pid alone may be another process by now."""
    address: str
    """`RAY_ADDRESS` for Ray itself."""
    dashboard_url: str
    """Dashboard, and where `ray job submit --address` goes."""
    temp_dir: str
    storage: str | None
    """`$LLAMA_RAY_STORAGE` as its jobs see it."""

    @classmethod
    def load(cls, state_dir: Path) -> Head | None:
        """The head recorded in `state_dir`, if it still runs."""
        try:
            head = cls(**json.loads((state_dir / "head.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return head if head.process() else None

    def process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            alive = process.create_time() == self.created and process.status() != "zombie"
            return process if alive else None
        except psutil.NoSuchProcess:
            return None


def start(
    state_dir: Path,
    port: int = 6379,
    dashboard_port: int = 8265,
    num_cpus: int | None = None,
    env: dict[str, str] | None = None,
) -> Head:
    """Start a head, or return the one already running. Raises `UserError` if that one was started
    otherwise, a port is taken, or it does not come up."""
    environment = os.environ | (env or {})
    storage = environment.get("LLAMA_RAY_STORAGE")
    wanted = (f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", storage)
    if head := Head.load(state_dir):
        running = (head.address, head.dashboard_url, head.storage)
        if running != wanted:
            raise UserError(
                f"Ray runs here already, otherwise than asked for: {running} instead of {wanted} "
                "(address, dashboard, LLAMA_RAY_STORAGE); end it first (make stop)"
            )
        return head
    check_port_free(port, "RAY_PORT")
    check_port_free(dashboard_port, "DASHBOARD_PORT")
    state_dir.mkdir(parents=True, exist_ok=True)
    # Ray's sockets lie below it, and the path of a socket may not exceed 107 bytes.
    temp_dir = tempfile.mkdtemp(prefix="llama_ray_", dir="/tmp")
    command = [
        str(BIN_DIR / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
        # Any free port: without one of its own the agent runs on, but takes no jobs.
        "--dashboard-agent-listen-port=0",
        f"--temp-dir={temp_dir}",
    ]  # fmt: skip
    if num_cpus is not None:
        command.append(f"--num-cpus={num_cpus}")
    with (state_dir / "head.log").open("wb") as log:
        started = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=_head_environment(environment), start_new_session=True,
        )  # fmt: skip
    head = Head(
        pid=started.pid,
        created=psutil.Process(started.pid).create_time(),
        address=f"127.0.0.1:{port}",
        dashboard_url=f"http://127.0.0.1:{dashboard_port}",
        temp_dir=temp_dir,
        storage=storage,
    )
    (state_dir / "head.json").write_text(json.dumps(asdict(head), indent=2) + "\n")
    _wait_until_ready(head, started, state_dir)
    return head


def _head_environment(environment: dict[str, str]) -> dict[str, str]:
    # A job's `#!/usr/bin/env -S python3 …` must find this environment's python3.
    path = f"{BIN_DIR}{os.pathsep}{environment.get('PATH', '')}"
    return {
        # Explicit, since Ray would decide by whether ~/.ray/auth_token exists, and `ray job submit`
        # sends no token unless RAY_AUTH_MODE=token is set in its shell too.
        "RAY_AUTH_MODE": "disabled",
        # How long `ray job stop` lets a job save a checkpoint; Ray's own 3 s are too short.
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        **{name: value for name, value in environment.items() if name != "RAY_ADDRESS"},
        "PATH": path,
        # Despite its name, what keeps a head on loopback: Ray would otherwise replace 127.0.0.1 by
        # the machine's address and listen on every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _wait_until_ready(head: Head, started: subprocess.Popen[bytes], state_dir: Path) -> None:
    log_path = state_dir / "head.log"
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    # The job server answers before the node can run anything; `ray start` says when it can.
    while not (
        b"Ray runtime started" in log_path.read_bytes()
        and _answers(f"{head.dashboard_url}/api/jobs/")
    ):
        if started.poll() is not None or time.monotonic() > deadline:
            stop(state_dir)
            tail = log_path.read_text(errors="replace").strip().splitlines()[-15:]
            raise UserError("Ray did not start; its last words:\n" + "\n".join(tail))
        time.sleep(0.2)


def stop(state_dir: Path) -> bool:
    """End the recorded head and all it started. False where nothing was running."""
    head = Head.load(state_dir)
    if head is None:
        return False
    process = head.process()
    # Listed while the tree is whole: orphans would no longer be found.
    family = [process, *process.children(recursive=True)] if process else []
    if process:
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_SECONDS / 3)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_SECONDS)
    (state_dir / "head.json").unlink(missing_ok=True)
    shutil.rmtree(head.temp_dir, ignore_errors=True)
    return True


def connect(namespace: str | None = None) -> None:
    """Make this process a driver: of `$RAY_ADDRESS` (which `ray job submit` sets), else of the head
    that `start` started in this folder, else of the Ray that Ray itself finds. Raises `UserError`
    where there is none: a second Ray is not started behind the user's back."""
    if ray.is_initialized():
        return
    head = Head.load(Path(".local"))
    address = os.environ.get("RAY_ADDRESS") or (head.address if head else "auto")
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "://" not in address:
            # Ray itself would try for five minutes.
            socket.create_connection((host, int(port)), timeout=5).close()
        if host in ("127.0.0.1", "localhost"):
            # Else Ray puts the machine's address for loopback, where our head does not listen; the
            # documented switch, an environment variable, is read when Ray is imported.
            ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except OSError:
        raise UserError(
            f"RAY_ADDRESS: no Ray answers at {address!r}; submit the job (ray job submit), or "
            "start a Ray (python -m llama_ray.local start)"
        ) from None


def check_port_free(port: int, setting: str) -> None:
    """Raises `UserError` naming `setting` where something listens on 127.0.0.1:`port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(
                f"port {port} is in use on 127.0.0.1; end what listens there, or choose another "
                f"with {setting}="
            ) from None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401  # it is up, and wants a token
    except OSError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="llama_ray.local", description=__doc__)
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("--state-dir", type=Path, default=Path(".local"))
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--dashboard-port", type=int, default=8265)
    parser.add_argument("--num-cpus", type=int)
    options = parser.parse_args()
    if options.action == "stop":
        print("Ray stopped" if stop(options.state_dir) else "no Ray of ours is running")
        return 0
    try:
        if options.action == "start":
            start(options.state_dir, options.port, options.dashboard_port, options.num_cpus)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    head = Head.load(options.state_dir)
    print(f"Ray runs at {head.address}, dashboard {head.dashboard_url}" if head else "not running")
    return 0 if head else 1


if __name__ == "__main__":
    sys.exit(main())
