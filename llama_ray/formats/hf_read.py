"""A folder in Hugging Face's format as a source of weights: `config.json`, `model.safetensors` or
shards with their index, tokenizer files. Read by byte range, so as well from object storage.

Nothing in it is executed: no pickle, no code that comes with a model.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from llama_ray.config.model import ModelConfig
from llama_ray.errors import UserError
from llama_ray.formats.hf_config import parse_hf_config
from llama_ray.formats.hf_layout import from_hf, hf_name, our_name
from llama_ray.formats.hf_tokenizer import find_tokenizer
from llama_ray.formats.place import Place
from llama_ray.formats.safetensors import PREFIX_BYTES, Entry, header_length, parse_header
from llama_ray.formats.source import TensorInfo, check_tensors

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CONFIG_BYTES, _INDEX_BYTES = 1 << 20, 32 << 20
# Buffers that early conversions of LLaMA saved; they follow from config.json.
_BUFFER = ".rotary_emb.inv_freq"
_OUTPUT, _EMBEDDING = "output.weight", "tok_embeddings.weight"
_PART_BYTES = 32 << 20


class HuggingFaceSource:
    """A `WeightSource`. Headers are read at once, weights when asked for."""

    def __init__(self, folder: Place, tokenizer: bytes | None) -> None:
        """tokenizer: instead of the folder's own. Raises `UserError` where the folder is not
        whole, not a Llama, or not to be believed."""
        self.description = folder.url
        sizes = folder.files()
        config_file = folder.child(CONFIG)
        self.config: ModelConfig = parse_hf_config(
            config_file.read_small(_CONFIG_BYTES), config_file.url
        )
        self._entries: dict[str, tuple[Place, Entry]] = {}
        for name, (file, entry) in _all_entries(folder, sizes).items():
            if name.endswith(_BUFFER):
                continue
            self._entries[_our_name(name, file)] = file, entry
        if self.config.tie_embeddings and _OUTPUT in self._entries:
            self._check_tied(_OUTPUT, _EMBEDDING)
            del self._entries[_OUTPUT]
        self.tensors: dict[str, TensorInfo] = {
            name: entry.info for name, (_, entry) in self._entries.items()
        }
        check_tensors(self)
        self.tokenizer = tokenizer or find_tokenizer(folder, sizes, self.config.vocab_size)

    def read(self, name: str) -> Tensor:
        file, entry = self._entries[name]
        tensor = torch.empty(entry.info.shape, dtype=entry.info.dtype)
        file.read_into(entry.start, tensor)
        return from_hf(hf_name(name), tensor, self.config)[1]

    def _check_tied(self, name: str, other: str) -> None:
        """transformers ties or not, by its version, where both are stored and differ."""
        (file, entry), (other_file, other_entry) = self._entries[name], self._entries[other]
        same = entry.info == other_entry.info
        for offset in range(0, entry.info.nbytes if same else 0, _PART_BYTES):
            size = min(_PART_BYTES, entry.info.nbytes - offset)
            mine = file.read_range(entry.start + offset, size)
            same = same and mine == other_file.read_range(other_entry.start + offset, size)
        if not same:
            raise UserError(
                f"{self.description}: {CONFIG} ties the output projection to the embedding, but "
                "both are stored and differ; set tie_word_embeddings to false, or remove lm_head"
            )


def _our_name(name: str, file: Place) -> str:
    try:
        return our_name(name)
    except KeyError:
        raise UserError(
            f"{file.url}: {name} is no weight of a `LlamaForCausalLM`; only those can be read"
        ) from None


def _all_entries(folder: Place, sizes: dict[str, int]) -> dict[str, tuple[Place, Entry]]:
    """Name → its file and what that file's header says of it."""
    placed = _index(folder, sizes)
    names = set(placed.values()) if placed is not None else {SINGLE}
    found: dict[str, tuple[Place, Entry]] = {}
    for file_name in sorted(names):
        file = folder.child(file_name)
        if file_name not in sizes:
            raise UserError(f"{file.url}: is missing, though {INDEX} names it; copy it too")
        for name, entry in _entries(file, sizes[file_name]).items():
            if placed is not None and placed.get(name) != file_name:
                other = placed.get(name)
                says = f"places it in {other}" if other else "does not know it"
                raise UserError(f"{file.url}: holds {name}, but {INDEX} {says}")
            found[name] = file, entry
    for name in (placed or {}).keys() - found.keys():
        assert placed is not None
        raise UserError(f"{folder.child(placed[name]).url}: {name} is missing, which {INDEX} "
                        "places there")  # fmt: skip
    return found


def _entries(file: Place, size: int) -> dict[str, Entry]:
    length = header_length(file.read_range(0, min(PREFIX_BYTES, size)), size, file.url)
    return parse_header(file.read_range(PREFIX_BYTES, length), size, file.url)


def _index(folder: Place, sizes: dict[str, int]) -> dict[str, str] | None:
    """Weight → file name, where the model is in shards; None where it is one file."""
    if INDEX not in sizes:
        if SINGLE in sizes:
            return None
        pickles = [name for name in sizes if name.endswith((".bin", ".pt", ".pth"))]
        why = (
            f"only pickles ({pickles[0]}), which can run any code and are not read; convert them "
            "with transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
            if pickles
            else f"neither {SINGLE} nor {INDEX}; the copy is incomplete"
        )
        raise UserError(f"{folder.url}: holds {why}")
    file = folder.child(INDEX)
    try:
        placed = json.loads(file.read_small(_INDEX_BYTES))["weight_map"]
        pairs = dict(placed.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file.url}: is no index of shards ({error!r})") from None
    for name, file_name in pairs.items():
        plain = isinstance(file_name, str) and file_name.endswith(".safetensors")
        if not plain or "/" in file_name or "\\" in file_name or file_name.startswith("."):
            raise UserError(
                f"{file.url}: places {name} in {file_name!r}, which is no safetensors file of this "
                "folder; nothing else is read"
            )
    return pairs
