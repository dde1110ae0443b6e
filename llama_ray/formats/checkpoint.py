"""Our own checkpoints as a source of weights."""

from __future__ import annotations

import hashlib

from torch import Tensor

from llama_ray.checkpoint.reader import Checkpoint
from llama_ray.checkpoint.store import resolve
from llama_ray.errors import UserError
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo, check_tensors


class CheckpointSource:
    """A `WeightSource`: the weights of a committed checkpoint, without its optimizer."""

    def __init__(self, place: Place, tokenizer: bytes | None) -> None:
        """place: `runs/<name>` (its newest) or a checkpoint's folder. tokenizer: must be its own.
        Raises `UserError` where it is not committed, damaged, or was trained with another."""
        self.storage = place.storage
        self.folder = resolve(place.storage, place.path)
        self._checkpoint = Checkpoint(self.storage, self.folder)
        info = self._checkpoint.info
        url = self.storage.url(self.folder)
        self.description = f"{url} (step {info.step:,})"
        self.config = info.model
        self.tensors: dict[str, TensorInfo] = self._checkpoint.weights
        check_tensors(self)
        self.tokenizer: bytes | None = tokenizer or self._checkpoint.read_tokenizer()
        if (sha256 := hashlib.sha256(self.tokenizer).hexdigest()) != info.tokenizer_sha256:
            raise UserError(
                f"tokenizer: the one given (sha256 {sha256[:12]}…) is not what {url} was trained "
                f"with ({info.tokenizer_sha256[:12]}…); leave it out"
            )

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read_weight(name)
