"""Write Meta's original checkpoints, for any number of ranks, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from llama_ray.config.model import ModelConfig
from llama_ray.data.tokenizer import tokenizer_file
from llama_ray.errors import UserError
from llama_ray.formats.meta import split_dim
from llama_ray.formats.meta_archive_write import ArchiveWriter
from llama_ray.formats.meta_params import PARAMS_FILE, write_params
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo, WeightSource, read_checked

_PART_BYTES = 16 << 20
_IN_LAYER = (
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "attention.wo.weight",
    "feed_forward.w1.weight",
    "feed_forward.w2.weight",
    "feed_forward.w3.weight",
    "attention_norm.weight",
    "ffn_norm.weight",
)


def write_meta(source: WeightSource, folder: Place, model_parallel: int = 1) -> None:
    """`model_parallel` files `consolidated.…pth`, the tokenizer, and last `params.json`, without
    which the others count for nothing.

    All files are written side by side, so each tensor is read once; one is held, and the parts of
    it under way. The embedding is split as in LLaMA 1 and 2. Raises `UserError` for a degree that
    does not divide the model, and where a value is not finite.
    """
    config = source.config
    check_model_parallel(config, model_parallel)
    with ExitStack() as stack:
        share_of_each = _tensors(source, model_parallel)
        archives = [
            stack.enter_context(_open(folder.child(f"consolidated.{rank:02}.pth"), share_of_each))
            for rank in range(model_parallel)
        ]
        for name, tensor in read_checked(source):
            _write_shares(archives, name, tensor)
            if config.tie_embeddings and name == "tok_embeddings.weight":
                _write_shares(archives, "output.weight", tensor)  # Meta's code shares nothing
            del tensor  # before the next is read
    if source.tokenizer is not None:
        folder.child(tokenizer_file(source.tokenizer)).write(source.tokenizer)
    folder.child(PARAMS_FILE).write(write_params(config))


def check_model_parallel(config: ModelConfig, degree: int) -> None:
    if degree not in (choices := config.tensor_parallel_choices()):
        raise UserError(
            f"model_parallel: {degree} does not divide this model's heads, key/value heads, "
            f"feed-forward width and vocabulary; choose from {', '.join(map(str, choices))}"
        )


def _tensors(source: WeightSource, degree: int) -> dict[str, TensorInfo]:
    """What each file holds, in the order of Meta's own."""
    names = ["tok_embeddings.weight", "norm.weight", "output.weight"]
    for layer in range(source.config.n_layers):
        names += [f"layers.{layer}.{name}" for name in _IN_LAYER]
    tensors = {}
    for name in names:
        stored = source.tensors.get(name, source.tensors["tok_embeddings.weight"])
        shape = list(stored.shape)
        if (split := split_dim(name)) is not None:
            shape[split] //= degree
        tensors[name] = TensorInfo(tuple(shape), stored.dtype)
    return tensors


def _write_shares(archives: list[ArchiveWriter], name: str, tensor: Tensor) -> None:
    split = split_dim(name)
    for rank, archive in enumerate(archives):
        share = tensor if split is None else tensor.chunk(len(archives), split)[rank]
        archive.write(name, _parts(share))


def _parts(share: Tensor) -> Iterator[Tensor]:
    """The rows of `share`, a few megabytes at a time, each without gaps."""
    rows = max(1, _PART_BYTES // share[:1].nbytes)
    for part in share.split(rows):
        yield part.contiguous()


@contextmanager
def _open(place: Place, tensors: dict[str, TensorInfo]) -> Iterator[ArchiveWriter]:
    with place.open_upload() as out:
        archive = ArchiveWriter(out, tensors)
        try:
            yield archive
        except BaseException:
            archive.abandon()
            raise
        archive.close()
