"""One URL for everything a job keeps: local disk or object storage, through fsspec.

    store = Storage(config.storage)
    store.write("tokens/demo/manifest.json", b"…")      # appears whole or not at all

Paths are relative to `storage.url`. Requests are repeated while storage is away
(`llama_ray.retry`). Every failure that a user can put right (wrong credentials, no such bucket,
nothing listening, disk full) is a `UserError` that names the key. `llama_ray.transfer` is for what
is large or must not overwrite.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractFileSystem

from llama_ray.config.storage import StorageConfig
from llama_ray.errors import UserError
from llama_ray.format import si
from llama_ray.retry import GaveUpError, Retries, described, http_answer, is_transient

T = TypeVar("T")

CHECK_SECONDS = 3.0
"""How long a job that starts waits for storage: a wrong endpoint should not look like work."""


class Storage:
    """A filesystem and a root folder in it. Cheap to make, picklable through its config; a child
    process may use the one it was forked with."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        scheme, _, root = config.url.partition("://")
        self.scheme, self.root = scheme, root
        self.retries = Retries(f"storage.url: {config.url}", config.retry_seconds)
        self._pid = 0
        with explained(config):
            self._fs = self._open()

    def __reduce__(self) -> tuple[type[Storage], tuple[StorageConfig]]:
        return Storage, (self.config,)

    @property
    def fs(self) -> AbstractFileSystem:
        """fsspec's filesystem. It repeats nothing by itself where `retries` does."""
        if self._pid != os.getpid():  # forked: its event loop and connections are the parent's
            self._fs = self._open()
        return self._fs

    def _open(self) -> AbstractFileSystem:
        self._pid = os.getpid()
        options = self.options
        if self.scheme == "s3":
            options["config_kwargs"]["retries"] = {"total_max_attempts": 1}
        fs = fsspec.filesystem(self.scheme, **options)
        if self.scheme == "s3":
            fs.retries = 1
        return fs

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
        def exists() -> bool:
            # s3fs remembers listings; another process may have written since.
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path(relative)))

        return self._repeated(exists)

    def read(self, relative: str) -> bytes:
        """The whole file. Raises FileNotFoundError where there is none."""

        def read() -> bytes:
            self.fs.invalidate_cache()
            return bytes(self.fs.cat_file(self.path(relative)))

        return self._repeated(read)

    def read_range(self, relative: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        return self._repeated(
            lambda: bytes(self.fs.cat_file(self.path(relative), start=start, end=stop))
        )

    def write(self, relative: str, data: bytes) -> None:
        """Put `data` at `relative`: whole or not at all, whatever happens meanwhile."""

        def write() -> None:
            if self.scheme != "file":
                self.fs.pipe_file(self.path(relative), data)  # a put is atomic
                return
            file = WholeFile(Path(self.path(relative)))
            try:
                file.write(data)
                file.finish()
            except BaseException:
                file.abort()
                raise

        self._repeated(write)

    def read_json(self, relative: str) -> Any:
        return json.loads(self.read(relative))

    def write_json(self, relative: str, value: Any) -> None:
        self.write(relative, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def list(self, relative: str) -> dict[str, int]:
        """Every file below `relative`: path from there → size in bytes. Empty where none is."""
        base = self.path(relative)

        def find() -> dict[str, Any]:
            self.fs.invalidate_cache()
            return dict(self.fs.find(base, detail=True))

        found = self._repeated(find)
        return {name[len(base) :].lstrip("/"): info["size"] for name, info in found.items()}

    def delete(self, relative: str) -> None:
        """Remove a file or folder; no error where there is none."""

        def delete() -> None:
            self.fs.invalidate_cache()
            if self.fs.exists(self.path(relative)):
                self.fs.rm(self.path(relative), recursive=True)

        self._repeated(delete)

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
        """Write, read and delete a small file, so that a job fails in its first seconds."""
        storage = self._impatient()
        probe = f".probe-{uuid.uuid4().hex}"
        storage.write(probe, b"ok")
        try:
            if storage.read(probe) != b"ok":
                raise UserError(f"storage.url: {self.config.url} does not return what was written")
        finally:
            storage.delete(probe)

    def check_reachable(self) -> None:
        """The same for a job that only reads."""
        self._impatient().exists(".probe")

    def _impatient(self) -> Storage:
        seconds = min(CHECK_SECONDS, self.config.retry_seconds)
        return Storage(self.config.model_copy(update={"retry_seconds": seconds}))

    def _repeated(self, request: Callable[[], T]) -> T:
        with explained(self.config):
            return self.retries.call(request)


class WholeFile:
    """A local file that appears, on disk too, when it is finished."""

    def __init__(self, target: Path) -> None:
        self.target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        self.file = self.temporary.open("wb")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.file.write(data)

    def finish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.target)

    def abort(self) -> None:
        with suppress(OSError):  # what is buffered finds no room
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def filesystem_options(scheme: str, config: StorageConfig) -> dict[str, Any]:
    """fsspec's arguments for URLs of `scheme`, be they below `storage.url` or named elsewhere in
    the job file: the S3 server is the same."""
    if scheme != "s3":
        return {}
    options: dict[str, Any] = {
        "config_kwargs": {"retries": {"max_attempts": 2}, "connect_timeout": 10, "read_timeout": 30}
    }
    if config.endpoint_url:
        options["endpoint_url"] = config.endpoint_url
        # Servers other than AWS seldom have a DNS name per bucket, and some know nothing of the
        # checksum trailers botocore adds unasked.
        options["config_kwargs"] |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
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
    if isinstance(error, GaveUpError):
        assert isinstance(error.__cause__, Exception)
        return f"{storage_problem(error.__cause__, url) or error.__cause__} ({error})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left; free some, or choose another storage.url"
    if name in ("NoCredentialsError", "PartialCredentialsError"):
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if is_transient(error) and http_answer(error)[0]:
        return f"the server fails or is overloaded ({described(error)})"
    if isinstance(error, PermissionError) or name == "ClientError":
        where = "; check AWS_ACCESS_KEY_ID and its rights" if url.startswith("s3") else ""
        return f"access refused ({text}){where}"
    if is_transient(error):
        return f"cannot be reached ({described(error)}); check storage.endpoint_url"
    if isinstance(error, ImportError):
        return f"{text}; install the package for this kind of URL"
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or text
    return None
