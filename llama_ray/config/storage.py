"""Where a job keeps things: one URL."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, field_validator

from llama_ray.config.base import StrictModel

SCHEMES = ("file", "s3", "gs")


def default_storage_url() -> str:
    """`$LLAMA_RAY_STORAGE` (jobs inherit it from where the head was started), else a folder."""
    return os.environ.get("LLAMA_RAY_STORAGE", "file://~/llama_ray")


class StorageConfig(StrictModel):
    """Object storage shared by every node. Credentials never stand here: the usual places
    (`AWS_ACCESS_KEY_ID`, an instance role, `~/.aws`) are read by s3fs itself."""

    url: str = Field(default_factory=default_storage_url, validate_default=True)
    """Root of everything the jobs write: `file:///dir`, `s3://bucket/prefix`, `gs://bucket/prefix`.
    Default: `$LLAMA_RAY_STORAGE`, else `file://~/llama_ray`."""
    endpoint_url: str | None = None
    """The S3 server's address where it is not AWS, e.g. `http://127.0.0.1:8333`."""
    retry_seconds: float = Field(default=300.0, ge=0)
    """For how long a request is repeated while storage is overloaded or cannot be reached. A job
    tries for a few seconds only when it starts."""

    @field_validator("url")
    @classmethod
    def _absolute(cls, url: str) -> str:
        scheme, separator, path = url.partition("://")
        if not separator:
            scheme, path = "file", url
        if scheme not in SCHEMES:
            raise ValueError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
        if scheme != "file":
            if not path.strip("/"):
                raise ValueError(f"{url!r} names no bucket; write {scheme}://bucket/prefix")
            return f"{scheme}://{path.rstrip('/')}"
        local = Path(path).expanduser()
        if not local.is_absolute():
            # A job runs in the folder `ray start` ran in, or in an unpacked copy that Ray deletes.
            raise ValueError(f"{url!r} is not absolute; write file:///dir or file://~/dir")
        return f"file://{local}"
