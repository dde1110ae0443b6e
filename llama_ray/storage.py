"""One URL for everything a job keeps: local disk or object storage, through fsspec.

    store = Storage(config.storage)
    store.write("tokens/demo/manifest.json", b"…")      # appears whole or not at all

Paths are relative to `storage.url`. Every failure that a user can put right (wrong credentials,
no such bucket, nothing listening, disk full) is a `UserError` that names the key.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from llama_ray.config.storage import StorageConfig
from llama_ray.errors import UserError
from llama_ray.format import si


class Storage:
    """A filesystem and a root folder in it. Cheap to make, picklable through its config."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        scheme, _, root = config.url.partition("://")
        self.scheme, self.root = scheme, root
        with explained(config):
            self.fs: AbstractFileSystem = fsspec.filesystem(scheme, **self.options)

    def __reduce__(self) -> tuple[type[Storage], tuple[StorageConfig]]:
        return Storage, (self.config,)

    @property
    def options(self) -> dict[str, Any]:
        """fsspec's arguments for this storage, for libraries that open it themselves."""
        return filesystem_options(self.scheme, self.config)

    def path(self, relative: str) -> str:
        """The filesystem's own path (no scheme)."""
        return f"{self.root}/{relative}" if relative else self.root

    def url(self, relative: str = "") -> str:
        """What to print, or to give to a library that takes URLs."""
        return f"{self.scheme}://{self.path(relative)}"

    def exists(self, relative: str) -> bool:
        with explained(self.config):
            # s3fs remembers listings; another process may have written since.
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path(relative)))

    def read(self, relative: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""
        with explained(self.config):
            self.fs.invalidate_cache()
            return bytes(self.fs.cat_file(self.path(relative)))

    def read_range(self, relative: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        with explained(self.config):
            return bytes(self.fs.cat_file(self.path(relative), start=start, end=stop))

    def write(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`: whole or not at all, whatever happens meanwhile."""
        with explained(self.config):
            if self.scheme != "file":
                self.fs.pipe_file(self.path(relative), data)  # a put is atomic
                return
            target = Path(self.path(relative))
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    def read_json(self, relative: str) -> Any:
        return json.loads(self.read(relative))

    def write_json(self, relative: str, value: Any) -> None:
        self.write(relative, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def list(self, relative: str) -> dict[str, int]:
        """Every file below `relative`: path from there → size in bytes. Empty where none is."""
        with explained(self.config):
            self.fs.invalidate_cache()
            base = self.path(relative)
            found = self.fs.find(base, detail=True)
            return {name[len(base) :].lstrip("/"): info["size"] for name, info in found.items()}

    def delete(self, relative: str) -> None:
        """Remove a file or folder; no error where there is none."""
        with explained(self.config):
            self.fs.invalidate_cache()
            if self.fs.exists(self.path(relative)):
                self.fs.rm(self.path(relative), recursive=True)

    def require_space(self, n_bytes: int) -> None:
        """Raises `UserError` where a local disk has less free. Object stores do not tell."""
        if self.scheme != "file":
            return
        with explained(self.config):
            Path(self.root).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
        if free < n_bytes:
            raise UserError(
                f"storage.url: {self.config.url}: no space left: {si(n_bytes, 'B')} are wanted, "
                f"{si(free, 'B')} are free; free some, or choose another storage.url"
            )

    def check_writable(self) -> None:
        """Write, read and delete a small file, so that a job fails in its first second."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(probe, b"ok")
        try:
            if self.read(probe) != b"ok":
                raise UserError(f"storage.url: {self.config.url} does not return what was written")
        finally:
            self.delete(probe)


def filesystem_options(scheme: str, config: StorageConfig) -> dict[str, Any]:
    """fsspec's arguments for URLs of `scheme`, be they below `storage.url` or named elsewhere in
    the job file: the S3 server is the same."""
    if scheme != "s3":
        return {}
    options: dict[str, Any] = {"config_kwargs": {"retries": {"max_attempts": 2}}}
    if config.endpoint_url:
        options["endpoint_url"] = config.endpoint_url
        # Servers other than AWS seldom have a DNS name per bucket, and some know nothing of the
        # checksum trailers botocore adds unasked.
        options["config_kwargs"] |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "connect_timeout": 10,
        }
    return options


def read_file(url: str, config: StorageConfig, key: str) -> bytes:
    """The file that a job file names under `key`, by path or URL. Raises `UserError`."""
    scheme, separator, _ = url.partition("://")
    path = url if separator else str(Path(url).expanduser())
    try:
        with fsspec.open(path, "rb", **filesystem_options(scheme, config)) as file:
            return bytes(file.read())
    except FileNotFoundError:
        raise UserError(f"{key}: {url} does not exist; check the path") from None
    except Exception as error:
        if (reason := storage_problem(error, url)) is None:
            raise
        raise UserError(f"{key}: {url}: {reason}") from error


@contextmanager
def explained(config: StorageConfig) -> Iterator[None]:
    """Turn what filesystems raise into a `UserError` naming the key. A missing file stays
    FileNotFoundError: only the caller knows what it means."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error).lower():
            raise UserError(f"storage.url: {config.url}: there is no such bucket") from error
        raise
    except Exception as error:
        if (reason := storage_problem(error, config.url)) is None:
            raise
        raise UserError(f"storage.url: {config.url}: {reason}") from error


def storage_problem(error: Exception, url: str) -> str | None:
    """What is wrong and what to do, or None where this is no storage failure."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left; free some, or choose another storage.url"
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, PermissionError) or name == "ClientError":
        where = "; check AWS_ACCESS_KEY_ID and its rights" if url.startswith("s3") else ""
        return f"access refused ({text}){where}"
    if name in ("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError"):
        return f"cannot be reached ({text}); check storage.endpoint_url"
    if isinstance(error, ImportError):
        return f"{text}; install the package for this kind of URL"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or text
    return None
