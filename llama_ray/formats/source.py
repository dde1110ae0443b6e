"""What every reader of weights gives and every writer takes: one tensor at a time, by our names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llama_ray.config.model import ModelConfig
from llama_ray.errors import UserError
from llama_ray.model import LLaMA

_FINITE_PART = 1 << 22  # elements
_MAX_LAYERS = 1000  # 8 times the 126 of the deepest, Llama 3.1 405B


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: torch.dtype
    """As stored."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """The weights of one model, wherever they lie. Names and layout are ours (Meta's)."""

    description: str
    """Where from, for a person: starts messages about it."""
    config: ModelConfig
    tokenizer: bytes | None
    """The tokenizer's file (SentencePiece model or tokenizer.json), where it comes along."""
    tensors: dict[str, TensorInfo]
    """Every parameter of `LLaMA(config)`; a tied output projection is not among them."""

    def read(self, name: str) -> Tensor:
        """One whole tensor on the CPU, in the type it is stored in."""
        ...


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter, in the model's order."""
    with torch.device("meta"):
        model = LLaMA(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_tensors(source: WeightSource) -> None:
    """Raises `UserError` naming the first tensor that is missing, unknown or of another shape."""
    if source.config.n_layers > len(source.tensors):
        # Said before a model of so many layers is built, were it on no device.
        raise UserError(
            f"{source.description}: holds {len(source.tensors):,} weights, its config speaks of "
            f"{source.config.n_layers:,} layers; config and weights are of different models"
        )
    check_layers(source.config, source.description)
    expected = expected_shapes(source.config)
    for name, shape in expected.items():
        if name not in source.tensors:
            raise UserError(f"{source.description}: {name} is missing; the copy is incomplete")
        if (found := source.tensors[name].shape) != shape:
            raise UserError(
                f"{source.description}: {name} has shape {list(found)}, its config asks for "
                f"{list(shape)}; config and weights are of different models"
            )
    for name in source.tensors.keys() - expected.keys():
        raise UserError(f"{source.description}: {name} is no weight of a LLaMA of its config")


def check_layers(config: ModelConfig, where: str) -> None:
    """Raises `UserError` for more than can be meant: as objects, layers without weights take
    memory and time too."""
    if config.n_layers > _MAX_LAYERS:
        raise UserError(
            f"{where}: speaks of {config.n_layers:,} layers; up to {_MAX_LAYERS:,} are read"
        )


def read_checked(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the model's order. Raises `UserError` where one holds a NaN or infinity."""
    for name in expected_shapes(source.config):
        tensor = source.read(name)
        if not _is_finite(tensor):
            raise UserError(
                f"{source.description}: {name} holds values that are not finite; the file is "
                "damaged, or the model diverged before it was saved"
            )
        yield name, tensor
        del tensor  # or it would stay while the next one is read


def _is_finite(tensor: Tensor) -> bool:
    """In parts: `isfinite` makes copies."""
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(_FINITE_PART))


def as_dtype(source: WeightSource, dtype: torch.dtype | None) -> WeightSource:
    """`source` with every tensor converted to `dtype`; None: as it is stored."""
    if dtype is None or all(info.dtype == dtype for info in source.tensors.values()):
        return source
    return _Converted(source, dtype)


class _Converted:
    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        self.description = source.description
        self.config = source.config
        self.tokenizer = source.tokenizer
        self.tensors = {
            name: TensorInfo(info.shape, dtype) for name, info in source.tensors.items()
        }
        self._source, self._dtype = source, dtype

    def read(self, name: str) -> Tensor:
        return self._source.read(name).to(self._dtype)
