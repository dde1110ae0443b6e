"""Meta's original checkpoints: `consolidated.00.pth`, …, `params.json`, one file per rank of the
tensor parallelism they were trained with.

A weight is split over the files as fairscale's layers split it: column-parallel ones by rows (the
outputs), row-parallel ones by columns (the inputs), norms not at all. The embedding is split by
columns (fairscale's `ParallelEmbedding`: LLaMA 1 and 2) or by rows (`VocabParallelEmbedding`:
Llama 3); its shape tells. Names and order of rows are ours.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from llama_ray.config.model import ModelConfig
from llama_ray.data.tokenizer import TOKENIZER_FILES
from llama_ray.errors import UserError
from llama_ray.formats.hf_tokenizer import read_tokenizer
from llama_ray.formats.meta_archive import Entry, read_archive
from llama_ray.formats.meta_params import (
    PARAMS_FILE,
    Params,
    model_config,
    read_params,
)
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo, check_tensors

_FILE = re.compile(r"consolidated\.(\d{2})\.pth")
_IGNORED = "rope.freqs"  # of the model, or of each layer (LLaMA 1): computed instead
_ROW_PARALLEL = ("attention.wo.weight", "feed_forward.w2.weight")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\n")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"


def split_dim(name: str) -> int | None:
    """The dimension along which Meta's code splits a weight; None: each file has all of it."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name == _EMBEDDING or name.endswith(_ROW_PARALLEL) else 0


def open_meta(folder: Place, tokenizer: bytes | None = None) -> MetaSource:
    """The model in `folder`, joined from all its files. tokenizer: instead of the one found there.

    Raises `UserError` for files that are missing, damaged, not of one model, or more than weights.
    """
    sizes = folder.files()
    names = sorted(name for name in sizes if _FILE.fullmatch(name))
    if not names:
        raise UserError(f"{folder.url}: holds no consolidated.00.pth; give a folder that does")
    for i, name in enumerate(names):
        if name != (wanted := f"consolidated.{i:02}.pth"):
            raise UserError(f"{folder.url}: {wanted} is missing, {name} is there; copy all of them")
    params = read_params(folder.child(PARAMS_FILE))
    places = [folder.child(name) for name in names]
    with ThreadPoolExecutor(len(places)) as pool:
        shards = list(pool.map(read_archive, places, [sizes[name] for name in names]))
    return MetaSource(folder, places, shards, params, tokenizer)


class MetaSource:
    """A `WeightSource`."""

    def __init__(
        self,
        folder: Place,
        places: list[Place],
        shards: list[dict[str, Entry]],
        params: Params,
        tokenizer: bytes | None,
    ) -> None:
        self.description = folder.url
        self._places = places
        self._shards = [
            {name: entry for name, entry in shard.items() if not name.endswith(_IGNORED)}
            for shard in shards
        ]
        self._check_agreement()
        self._check_params(params)
        self._splits = {name: split_dim(name) for name in self._shards[0]}
        if self._shards[0][_EMBEDDING].info.shape[1] == params.dim:
            self._splits[_EMBEDDING] = 0
        self.tensors = {name: self._joined(name) for name in self._shards[0]}
        if tied := self._is_tied():
            self.tensors.pop(_OUTPUT, None)
        self.config: ModelConfig = model_config(
            params,
            self.tensors["layers.0.feed_forward.w1.weight"].shape[0],
            self._vocab_size(params, folder.url),
            tied,
            folder.child(PARAMS_FILE).url,
        )
        check_tensors(self)
        self.tokenizer = tokenizer or _find_tokenizer(folder)

    def read(self, name: str) -> Tensor:
        """One whole tensor; beside it, memory for one file's share of it at most."""
        info, split = self.tensors[name], self._splits[name]
        joined = torch.empty(info.shape, dtype=info.dtype)
        if split is None:
            # Each rank's copy got the same gradients; Meta's own tools take the first file's too.
            self._places[0].read_into(self._shards[0][name].start, joined)
            return joined
        parts = joined.chunk(len(self._shards), dim=split)
        for place, shard, part in zip(self._places, self._shards, parts, strict=True):
            if part.is_contiguous():
                place.read_into(shard[name].start, part)
            else:
                columns = torch.empty(part.shape, dtype=part.dtype)
                place.read_into(shard[name].start, columns)
                part.copy_(columns)
        return joined

    def _check_agreement(self) -> None:
        """All files have the same tensors of the same shapes and types."""
        first = self._shards[0]
        for place, shard in zip(self._places[1:], self._shards[1:], strict=True):
            if differing := sorted(first.keys() ^ shard.keys()):
                raise UserError(
                    f"{place.url}: {differing[0]} is in this file or in {self._places[0].name}, "
                    "not in both; they are of different models"
                )
            for name, entry in shard.items():
                if entry.info != first[name].info:
                    raise UserError(
                        f"{place.url}: {name} is {_text(entry.info)}, in {self._places[0].name} "
                        f"{_text(first[name].info)}; the files are of different models or splits"
                    )

    def _check_params(self, params: Params) -> None:
        """`params.json` is of these weights, and all the files are here: before anything is made of
        the sizes that it states."""
        first, n_files = self._shards[0], len(self._shards)
        where = self._places[0].url
        for name, ndim in (("norm.weight", 1), (_EMBEDDING, 2), *_FIRST_LAYER.items()):
            if name not in first:
                raise UserError(f"{where}: {name} is missing; the file is of another model")
            if len(first[name].info.shape) != ndim:
                raise UserError(f"{where}: {name} is {_text(first[name].info)}: not a LLaMA's")
        n_layers = len({name.split(".")[1] for name in first if name.startswith("layers.")})
        dim = first["norm.weight"].info.shape[0]
        if (params.dim, params.n_layers) != (dim, n_layers):
            raise UserError(
                f"{self.description}/{PARAMS_FILE}: is of a model of dim {params.dim} and "
                f"{params.n_layers} layers, the weights are of dim {dim} and {n_layers} layers"
            )
        rows, columns = first["layers.0.attention.wq.weight"].info.shape
        if columns == dim and rows and dim % rows == 0 and dim // rows != n_files:
            raise UserError(
                f"{self.description}: the weights are split over {dim // rows} files, "
                f"{n_files} {'is' if n_files == 1 else 'are'} here; copy consolidated.00.pth to "
                f"consolidated.{dim // rows - 1:02}.pth and no others"
            )

    def _joined(self, name: str) -> TensorInfo:
        info, split = self._shards[0][name].info, self._splits[name]
        shape = list(info.shape)
        if split is not None and split < len(shape):
            shape[split] *= len(self._shards)
        return TensorInfo(tuple(shape), info.dtype)

    def _vocab_size(self, params: Params, where: str) -> int:
        rows = self.tensors[_EMBEDDING].shape[0]
        if params.vocab_size not in (-1, rows):
            raise UserError(
                f"{where}/{PARAMS_FILE}: vocab_size is {params.vocab_size:,}, the embedding has "
                f"{rows:,} rows"
            )
        return rows

    def _is_tied(self) -> bool:
        """Meta's code has an output projection always; of a model that shares it, it is a copy of
        the embedding, bit for bit. One row tells nearly always."""
        if _OUTPUT not in self.tensors:
            return True
        if self.tensors[_OUTPUT] != self.tensors[_EMBEDDING]:
            return False
        starts = []
        for name in (_OUTPUT, _EMBEDDING):
            entry = self._shards[0][name]
            row = torch.empty(self._shards[0][_EMBEDDING].info.shape[1], dtype=entry.info.dtype)
            self._places[0].read_into(entry.start, row)
            starts.append(row)
        if not torch.equal(*starts):
            return False
        return torch.equal(self.read(_OUTPUT), self.read(_EMBEDDING))


_FIRST_LAYER = {"layers.0.attention.wq.weight": 2, "layers.0.feed_forward.w1.weight": 2}


def _text(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def _find_tokenizer(folder: Place) -> bytes | None:
    """Beside the weights or, as Meta ships them, one level up. None where there is none that we can
    read: Llama 3's `tokenizer.model` is tiktoken's list of base64 lines."""
    above = Place(folder.storage, folder.path.rpartition("/")[0])
    for where in (folder, above):
        files = [file for name in TOKENIZER_FILES if (file := where.child(name)).exists()]
        if files:
            found = map(read_tokenizer, files)
            return next((data for data in found if not _TIKTOKEN.match(data)), None)
    return None
