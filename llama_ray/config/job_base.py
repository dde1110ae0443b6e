"""What every job kind has."""

from __future__ import annotations

from pydantic import Field

from llama_ray.config.base import StrictModel
from llama_ray.config.storage import StorageConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class JobConfig(StrictModel):
    kind: str
    """What the job does: `clean`, `prepare`, `inspect`, `pretrain`, `import`, `export`."""
    name: str = Field(pattern=NAME)
    """Names what the job writes: `corpora/<name>`, `tokens/<name>`, `runs/<name>` or
    `exports/<name>` under `storage.url`."""
    seed: int = Field(0, ge=0)
    """Fixes initial weights, document order and token order."""
    storage: StorageConfig = StorageConfig()
    """Where the job reads and writes."""
