"""Writes a model so that `AutoModelForCausalLM.from_pretrained(folder)` loads it.

A tensor at a time goes into safetensors files whose headers, known beforehand, stand first.
`config.json`, without which nothing takes the folder for a model, comes last.
"""

from __future__ import annotations

from functools import reduce
from itertools import islice
from typing import Any

import torch

from llama_ray.checkpoint.files import as_bytes
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.formats.hf_config import hf_config
from llama_ray.formats.hf_layout import hf_name, to_hf
from llama_ray.formats.hf_read import CONFIG, INDEX, SINGLE
from llama_ray.formats.hf_tokenizer import json_bytes, tokenizer_files
from llama_ray.formats.place import Place
from llama_ray.formats.safetensors import make_header
from llama_ray.formats.source import WeightSource, expected_shapes, read_checked

SHARD_BYTES = 5_000_000_000
"""transformers' own default: a process of a few GB can load one."""


def write_hf(source: WeightSource, folder: Place, shard_bytes: int = SHARD_BYTES) -> None:
    """Raises `UserError` where a weight is not finite, or the tokenizer cannot be expressed."""
    others = other_files(source)
    tensors = read_checked(source)
    shards = _shards(source, shard_bytes)
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        infos = {hf_name(name): source.tensors[name] for name in names}
        with folder.child(file).open_upload() as out:
            out.write(make_header(infos, {"format": "pt"}))
            for name, tensor in islice(tensors, len(names)):
                _, tensor = to_hf(name, tensor, source.config)
                out.write(as_bytes(tensor.contiguous()))
                del tensor
        placed |= dict.fromkeys(infos, file)
    if len(shards) > 1:
        total = sum(info.nbytes for info in source.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        others = {INDEX: json_bytes(index)} | others
    for name, data in others.items():
        folder.child(name).write(data)


def _shards(source: WeightSource, shard_bytes: int) -> list[list[str]]:
    """Names in the model's order, cut where a file would grow beyond `shard_bytes`."""
    shards: list[list[str]] = []
    size = 0
    for name in expected_shapes(source.config):
        nbytes = source.tensors[name].nbytes
        if not shards or size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def other_files(source: WeightSource) -> dict[str, bytes]:
    """All but the weights, `config.json` last. Raises `UserError` where the tokenizer cannot be
    expressed."""
    # What transformers loads all of them in: no narrower than any.
    dtype = reduce(torch.promote_types, (info.dtype for info in source.tensors.values()))
    config: dict[str, Any] = hf_config(source.config)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    files: dict[str, bytes] = {}
    if source.tokenizer is not None:
        tokenizer = Tokenizer(source.tokenizer)
        marks = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        config |= marks
        where = f"{source.description}: its tokenizer"
        files = tokenizer_files(source.tokenizer, source.config.max_seq_len, where)
        files["generation_config.json"] = json_bytes(marks)
    return files | {CONFIG: json_bytes(config)}
