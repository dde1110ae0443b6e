"""From the name of a model to one ready to generate, on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama_ray.checkpoint.sharded import load_weights
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.formats.checkpoint import CheckpointSource
from llama_ray.formats.open import open_source
from llama_ray.formats.source import read_checked
from llama_ray.model.llama import LLaMA
from llama_ray.storage import Storage


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and the tokenizer it was trained with."""

    model: LLaMA
    tokenizer: Tokenizer
    description: str
    """Where it came from, for a person."""


def load_model(
    checkpoint: str,
    storage: Storage,
    tokenizer: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load whatever `formats.open.open_source` opens: a run of ours or one of its checkpoints, a
    folder in Hugging Face's or Meta's format, a llama2.c `.bin`, which needs `tokenizer` (path or
    URL) beside it.

    Raises `UserError` naming `checkpoint`, `tokenizer` or the file that is wrong.
    """
    source = open_source(checkpoint, storage, tokenizer=tokenizer)
    if source.tokenizer is None:
        raise UserError(
            f"tokenizer: {source.description} holds none; name its `tokenizer.model` or "
            "`tokenizer.json`"
        )
    with torch.device("meta"):
        model = LLaMA(source.config)
    model.to(dtype).materialize(device)
    if isinstance(source, CheckpointSource):
        load_weights(source.storage, source.folder, model)  # all files at a time
    else:
        parameters = dict(model.named_parameters())
        for name, tensor in read_checked(source):
            parameters[name].data.copy_(tensor)
            del tensor
    pieces = Tokenizer(source.tokenizer, f"{source.description}: its tokenizer")
    return LoadedModel(model.eval(), pieces, source.description)
