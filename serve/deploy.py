"""Deploy `serve/config.yaml` to the running Ray and wait until it answers.

    python -m serve.deploy serve/config.yaml args.checkpoint=runs/mine http_options.port=8001

`args.` are the application's; a run (`runs/<name>`) is pinned to its newest committed checkpoint,
so deploying again serves a newer one. Exit status 0: running; 1: failed, 2: the config is wrong;
the reason is the last line.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, HTTPOptionsSchema, ServeDeploySchema

from llama_ray.checkpoint.store import read_info, resolve
from llama_ray.config import ServeConfig, validate
from llama_ray.config.load import apply_overrides, nearest, read_yaml
from llama_ray.errors import UserError, user_error_cause
from llama_ray.formats.place import locate
from llama_ray.local import check_port_free, connect
from llama_ray.storage import Storage

TIMEOUT_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serve.deploy", description=__doc__)
    parser.add_argument("file", help="the Serve config (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="args.key=value")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = 2
    try:
        config = load_config(options.file, options.overrides)
        status = 1
        deploy(config)
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return status
    return 0


def load_config(path: str, overrides: Sequence[str] = ()) -> ServeDeploySchema:
    """Read the Serve config, apply overrides, validate it and its first application's args.

    Raises `UserError` naming file and key.
    """
    data = read_yaml(path)
    applications = data.get("applications")
    if not (isinstance(applications, list) and applications and isinstance(applications[0], dict)):
        raise UserError(f"{path}: applications: holds no application")
    for override in overrides:
        section = override.partition(".")[0]
        if section not in ("args", "http_options"):
            raise UserError(
                f"override {override!r}: write args.key=value or http_options.key=value"
            )
        apply_overrides(applications[0] if section == "args" else data, [override])
    _check_keys(path, "", data, ServeDeploySchema)
    http = data.setdefault("http_options", {})
    _check_keys(path, "http_options.", http, HTTPOptionsSchema)
    http.setdefault("host", "127.0.0.1")  # Serve's own default is every interface
    validate(ServeConfig, applications[0].get("args") or {}, f"{path}: applications.0.args")
    try:
        return ServeDeploySchema.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {key}: {problem['msg']}") from None


def _check_keys(path: str, section: str, data: dict[str, Any], schema: type[BaseModel]) -> None:
    """Serve's own schemas ignore keys that they do not know."""
    for key in data:
        if key not in schema.model_fields:
            valid = list(schema.model_fields)
            raise UserError(
                f"{path}: {section}{key}: unknown key{nearest(key, valid)}; valid keys: "
                f"{', '.join(valid)}"
            )


def deploy(config: ServeDeploySchema) -> str:
    """Start or update the application and wait until it runs; → its URL.

    Raises `UserError` with the deployment's own reason.
    """
    started = time.monotonic()
    connect(SERVE_NAMESPACE)
    host, port = config.http_options.host, config.http_options.port
    _check_port(port)
    app = config.applications[0]
    try:
        app.args = ray.get(_pinned.remote(app.args))
    except ray.exceptions.RayTaskError as error:
        raise user_error_cause(error) or error from None
    print(f"deploying {app.args['checkpoint']} as {app.args['model_name']!r}")
    serve.start(proxy_location=config.proxy_location, http_options=config.http_options.model_dump())
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(config)
    _wait(app.name, started)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}{app.route_prefix or ''}"
    print(f"serving at {url.rstrip('/')}, ready after {time.monotonic() - started:.0f} s")
    return url.rstrip("/")


def _check_port(port: int) -> None:
    """A proxy that cannot bind would only say so in its log."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        check_port_free(port, "http_options.port")
    elif client.http_config.port != port:
        raise UserError(
            f"http_options.port: Ray Serve already listens on {client.http_config.port} in this "
            f"Ray and cannot move to {port}; use that, or end it first (serve shutdown)"
        )


@ray.remote(num_cpus=0, max_retries=0)
def _pinned(args: dict[str, Any]) -> dict[str, Any]:
    """`args` with the newest committed checkpoint for a run. On the cluster, because storage is
    what the cluster's own environment says it is."""
    config = validate(ServeConfig, args, "args")
    place = locate(config.checkpoint, Storage(config.storage), "checkpoint")
    if not re.fullmatch("runs/[^/]+", place.path):
        return args
    folder = resolve(place.storage, place.path)
    read_info(place.storage, folder)
    return args | {"checkpoint": folder}


def _wait(name: str, started: float) -> None:
    shown = ""
    while True:
        app = serve.status().applications.get(name)
        status = app.status if app else ApplicationStatus.NOT_STARTED
        if status == ApplicationStatus.RUNNING:
            return
        if app and status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            messages = [d.message for d in app.deployments.values()] + [app.message]
            raise UserError(next((reason(m) for m in messages if m), "the deployment failed"))
        seconds = time.monotonic() - started
        if seconds > TIMEOUT_SECONDS:
            raise UserError(f"still {status.value} after {seconds:.0f} s; see `serve status`")
        replicas = [
            f"{count} replica{'s' * (count > 1)} {state}"
            for deployment in (app.deployments.values() if app else ())
            for state, count in deployment.replica_states.items()
        ]
        line = ", ".join(replicas) or status.value
        if line != shown:
            print(f"  {seconds:5.1f} s  {line.lower()}")
            shown = line
        time.sleep(0.25)


def reason(message: str) -> str:
    """What a user can mend, out of a status message that holds a traceback."""
    prefix = f"{UserError.__module__}.{UserError.__qualname__}: "
    _, found, text = message.rpartition(prefix)
    if found:
        return text.strip()
    return message.strip()


if __name__ == "__main__":
    sys.exit(main())
