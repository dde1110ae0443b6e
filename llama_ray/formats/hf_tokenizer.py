"""The tokenizer's files in a Hugging Face folder: found, and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_ray.data.tokenizer import TOKENIZER_FILES, Tokenizer, tokenizer_file
from llama_ray.data.tokenizer_json import find_marks, marks_of_config, with_marks
from llama_ray.errors import UserError
from llama_ray.formats.place import Place
from llama_ray.formats.spm_to_json import tokenizer_json

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_BYTES = 64 << 20
"""Gemma's, with 256,000 pieces, has 34 MB."""
_CONFIG_BYTES = 16 << 20  # holds chat templates and lists of added tokens


def find_tokenizer(folder: Place, files: Mapping[str, int], vocab_size: int) -> bytes | None:
    """Of `tokenizer.model` and `tokenizer.json` the first that has `vocab_size` pieces (else the
    first: the caller says what is wrong); None where there is neither.

    A model that got new tokens after the first training has them in `tokenizer.json` alone.
    """
    found = []
    for name in TOKENIZER_FILES:
        if name in files:
            data = read_tokenizer(folder.child(name))
            found.append(data)
            if Tokenizer(data, folder.child(name).url).vocab_size == vocab_size:
                return data
    return found[0] if found else None


def read_tokenizer(file: Place) -> bytes:
    """A tokenizer of either kind; into a `tokenizer.json` are written the marks that a
    `tokenizer_config.json` beside it names."""
    data = file.read_small(TOKENIZER_BYTES)
    if tokenizer_file(data) == "tokenizer.model":
        return data
    beside = Place(file.storage, "/".join([*file.path.split("/")[:-1], TOKENIZER_CONFIG]))
    if not beside.exists():
        return data
    named = marks_of_config(beside.read_small(_CONFIG_BYTES), beside.url)
    own = find_marks(data, file.url)
    bos, eos = named[0] or own[0], named[1] or own[1]
    return data if bos is None or eos is None else with_marks(data, bos, eos, file.url)


def tokenizer_files(tokenizer: bytes, max_seq_len: int, where: str) -> dict[str, bytes]:
    """File name → content, from which `AutoTokenizer` makes one that gives our ids, BOS first."""
    if tokenizer_file(tokenizer) == "tokenizer.model":
        content = tokenizer_json(tokenizer, where)
        files = {"tokenizer.model": tokenizer, "tokenizer.json": content}
    else:
        content = _without_eos(tokenizer)
        files = {"tokenizer.json": content}
    bos, eos = find_marks(tokenizer if len(files) == 1 else content, where)
    config = {
        # Not LlamaTokenizer, which of transformers 5 puts steps of its own in place of the file's.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    return files | {TOKENIZER_CONFIG: json_bytes(config)}


def _without_eos(data: bytes) -> bytes:
    """Who trains ends each document with EOS, and the template may say so (see `with_marks`); who
    asks a model to go on does not end its text."""
    content = json.loads(data)
    template = content.get("post_processor") or {}
    if template.get("type") != "TemplateProcessing":
        return data
    last = template["single"][-1] if template["single"] else {}
    if "SpecialToken" not in last:
        return data
    template["single"].pop()
    template["pair"] = [
        item
        for number, item in enumerate(template["pair"])
        if number == 0 or item.get("SpecialToken", {}).get("id") != last["SpecialToken"]["id"]
    ]
    return json.dumps(content, ensure_ascii=False).encode()


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def check_vocabulary(tokenizer: bytes | None, vocab_size: int, where: str) -> None:
    """Raises `UserError` where the tokenizer is not the model's."""
    if tokenizer is None:
        return
    found = Tokenizer(tokenizer, f"tokenizer: {where}").vocab_size
    if found != vocab_size:
        raise UserError(
            f"tokenizer: the {tokenizer_file(tokenizer)} of {where} has {found:,} pieces, the "
            f"model {vocab_size:,}; name the right one with tokenizer"
        )
