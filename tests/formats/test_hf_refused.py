"""Folders that are broken, lie, or hold another model: refused with the reason, and nothing run."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ray.errors import UserError
from llama_ray.formats.hf_read import HuggingFaceSource
from llama_ray.formats.hf_write import write_hf
from llama_ray.formats.source import TensorInfo, check_tensors, read_checked
from tests.formats.models import model_config, place, random_source

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FIRST = "model-00001-of-00008.safetensors"
EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_hf(random_source(model_config()), place(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_hf(random_source(model_config()), place(tmp_path / "hf"), shard_bytes=100_000)
    assert (tmp_path / "hf" / FIRST).exists()
    return tmp_path / "hf"


def refuse(folder: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        HuggingFaceSource(place(folder), None)


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, and leave the data."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": None}, "model_type is None"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rope_parameters is 'llama3'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is no JSON object"),
        ({"attention_bias": True}, "attention_bias is True; there are no biases"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": 16}, "head_dim is 16, not hidden_size / num_attention_heads"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantized"),
        ({"hidden_size": "64", "head_dim": None}, "hidden_size: Input should be a valid integer"),
        ({"hidden_size": -64, "head_dim": None}, "hidden_size: Input should be greater than 0"),
        (
            {"num_attention_heads": 7, "head_dim": None},
            "hidden_size 64 is not divisible by num_attention_heads 7",
        ),
        ({"num_hidden_layers": 10**12}, "1,000,000,000,000 layers"),
        ({"num_hidden_layers": 4}, "layers.3.* is missing"),
        ({"num_hidden_layers": 2}, "layers.2.* is no weight of a LLaMA of its config"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings is 1,000,000,000,000,000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: Input should be a finite number"),
        ({"vocab_size": 500}, r"tok_embeddings.weight has shape \[384, 64\], .* \[500, 64\]"),
        ({"num_key_value_heads": 8}, r"layers.0.attention.wk.weight has shape \[32, 64\]"),
        ({"tie_word_embeddings": True}, "ties the output projection .* both are stored and differ"),
    ],
)
def test_another_config(single: Path, change: dict[str, Any], reason: str) -> None:
    edit_json(single / CONFIG, lambda content: content.update(change))
    refuse(single, reason)


def test_a_rope_type_of_null_is_the_default(single: Path) -> None:
    for rope in ({"rope_type": None, "rope_theta": 5000.0}, {"type": None}):
        edit_json(single / CONFIG, lambda content, rope=rope: content.update(rope_scaling=rope))
        HuggingFaceSource(place(single), None)


def test_too_many_layers_are_refused_before_a_model_of_them_is_made(tmp_path: Path) -> None:
    source = random_source(model_config(n_layers=1))
    source.config = model_config(n_layers=1001)
    source.tensors |= dict.fromkeys(map(str, range(2000)), TensorInfo((1,), torch.float32))
    with pytest.raises(UserError, match="memory: speaks of 1,001 layers; up to 1,000 are read"):
        check_tensors(source)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000, '{"model_type": "llama"}'])
def test_no_config(single: Path, text: str) -> None:
    (single / CONFIG).write_text(text, encoding="latin-1")
    refuse(single, "config.json: (is no JSON|hidden_size is missing)")
    (single / CONFIG).unlink()
    refuse(single, "config.json: there is no such file")


def test_a_config_of_megabytes_is_not_read(single: Path) -> None:
    (single / CONFIG).write_text(" " * (2 << 20))
    refuse(single, "config.json: is 2.10 MB long")


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../hf/" + FIRST, "/tmp/x.safetensors", "..", ".x.safetensors", 7,
     "sub/x.safetensors", "pytorch_model.bin", "a\\b.safetensors"],
)  # fmt: skip
def test_an_index_that_leads_elsewhere(sharded: Path, path: Any) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({EMBEDDING: path}))
    refuse(sharded, f"index.json: places {EMBEDDING} in .* no safetensors file of this folder")


def test_an_index_that_is_none(sharded: Path) -> None:
    for text in ("", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {}}'):
        (sharded / INDEX).write_text(text)
        refuse(sharded, "is no index of shards|holds 0 weights")


def test_an_index_that_disagrees_with_its_files(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(EMBEDDING))
    refuse(sharded, f"holds {EMBEDDING}, but .*index.json does not know it")
    other = FIRST.replace("00001", "00002")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({EMBEDDING: other}))
    refuse(sharded, f"{FIRST}: holds {EMBEDDING}, but .*index.json places it in {other}")
    edit_json(
        sharded / INDEX,
        lambda index: index.update(
            weight_map={n: file for n, file in index["weight_map"].items() if file != FIRST}
        ),
    )
    refuse(sharded, f"{other}: {EMBEDDING} is missing, which .*index.json places there")
    (sharded / other).unlink()
    refuse(sharded, f"{other}: is missing, though .*index.json names it")


def test_files_that_are_cut_or_longer(single: Path) -> None:
    data = (single / SINGLE).read_bytes()
    for content, reason in (
        (data[:-4], "is truncated: its header asks for"),
        (data + b"\0", "is longer than it should be"),
        (data[:100], "is truncated or no safetensors file"),
        (data[:5], "only 5 bytes long"),
        (b"", "only 0 bytes long"),
        (b"PK\x03\x04" + data[4:], "is truncated or no safetensors file"),
    ):
        (single / SINGLE).write_bytes(content)
        refuse(single, reason)


def test_a_huge_header_is_not_read(single: Path) -> None:
    with (single / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)  # sparse
    refuse(single, "its header is 1,099,511,627,776 bytes long")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("data_offsets", [0, 10**18], "takes 98,304 bytes, its header gives it"),
        ("data_offsets", [-98_304, 0], "is no description of a tensor"),
        ("data_offsets", [4, 98_308], "overlaps the tensor before it|follows a gap"),
        ("data_offsets", [10**15, 10**15 + 98_304], "follows a gap"),
        ("data_offsets", [0.0, 98_304.0], "is no description of a tensor"),
        ("shape", [10**9, 10**9], "takes 4,000,000,000,000,000,000 bytes"),
        ("shape", [True, 384, 64], "is no description of a tensor"),
        ("shape", "384", "is no description of a tensor"),
        ("shape", [64, 384], r"tok_embeddings.weight has shape \[64, 384\]"),
        ("shape", [384 * 64], r"tok_embeddings.weight has shape \[24576\]"),
        ("dtype", "I32", "is stored as I32"),
        ("dtype", "F8_E4M3", "is stored as F8_E4M3"),
        ("dtype", ["F32"], "is no description of a tensor"),
    ],
)
def test_a_header_that_lies(single: Path, name: str, value: Any, reason: str) -> None:
    edit_header(single / SINGLE, lambda header: header[EMBEDDING].update({name: value}))
    refuse(single, reason)


def test_two_tensors_in_one_place(single: Path) -> None:
    key = QUERY.replace("layers.0", "layers.1")
    edit_header(
        single / SINGLE,
        lambda header: header[key].update(data_offsets=header[QUERY]["data_offsets"]),
    )
    refuse(single, "overlaps the tensor before it: the header lies")


def test_a_name_given_twice(single: Path) -> None:
    data = (single / SINGLE).read_bytes()
    name = b'"model.layers.1.self_attn.k_proj.weight"'
    twin = b'"model.layers.0.self_attn.k_proj.weight"'
    (single / SINGLE).write_bytes(data.replace(name, twin))
    refuse(single, "its header has 'model.layers.0.self_attn.k_proj.weight' twice")


def test_headers_that_are_no_json_object(single: Path) -> None:
    for text in (b"[]", b"{", b"[" * 50_000, b"\xff\xfe"):
        (single / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
        refuse(single, "its header is no JSON")


def test_weights_that_are_no_llamas(single: Path) -> None:
    weights = load_file(single / SINGLE)
    for extra in ("model.layers.0.self_attn.q_proj.bias", "__import__", "model.layers.0"):
        save_file(weights | {extra: torch.zeros(2)}, single / SINGLE)
        refuse(single, f"{extra} is no weight of a `LlamaForCausalLM`")
    # What early conversions hold besides, and follows from the config.
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(weights | inv_freq, single / SINGLE)
    HuggingFaceSource(place(single), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(single: Path, value: float, dtype: torch.dtype) -> None:
    weights = {name: weight.to(dtype) for name, weight in load_file(single / SINGLE).items()}
    weights[QUERY][-1, -1] = value
    save_file(weights, single / SINGLE)
    with pytest.raises(UserError, match=r"layers\.0\.attention\.wq\.weight holds values .* finite"):
        list(read_checked(HuggingFaceSource(place(single), None)))


def test_pickles_are_not_opened(single: Path) -> None:
    (single / SINGLE).rename(single / "pytorch_model.bin")
    refuse(single, r"holds only pickles \(pytorch_model.bin\).* convert them with transformers")
    (single / "pytorch_model.bin").unlink()
    refuse(single, "holds neither model.safetensors nor")


def test_a_copy_that_loses_its_file_meanwhile(single: Path) -> None:
    source = HuggingFaceSource(place(single), None)
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        list(read_checked(source))


def test_a_tied_model_may_store_both(tmp_path: Path) -> None:
    source = random_source(model_config(tie_embeddings=True))
    write_hf(source, place(tmp_path / "hf"))
    weights = load_file(tmp_path / "hf" / SINGLE)
    save_file(weights | {"lm_head.weight": weights[EMBEDDING].clone()}, tmp_path / "hf" / SINGLE)
    assert HuggingFaceSource(place(tmp_path / "hf"), None).tensors == source.tensors
