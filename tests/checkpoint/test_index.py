"""An index is believed in nothing, and is small."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch

from llama_ray.checkpoint.files import Chunk, WrittenFile
from llama_ray.checkpoint.index import Index, parse_index
from llama_ray.checkpoint.manifest import BLOCK_BYTES, FileInfo
from llama_ray.errors import UserError

SIZES = {"a.safetensors": 1000, "b.safetensors": 800}
FILES = {name: FileInfo(size=size, crc32="0" * 8) for name, size in SIZES.items()}
GOOD: dict[str, Any] = {
    "version": 1,
    "files": list(SIZES),
    "tensors": {
        # float32 [4, 6] in 2 × 2 chunks of 2 × 4 and 2 × 2, 96 bytes in all
        "model.w": {
            "dtype": "F32",
            "shape": [4, 6],
            "cuts": [[0, 2, 4], [0, 4, 6]],
            "places": [0, 100, 0, 132, 1, 100, 1, 132],
        },
        "updates.w": {"dtype": "F32", "shape": [], "cuts": [], "places": [0, 148]},
        "rng.0.cpu": {"dtype": "U8", "shape": [648], "cuts": [[0, 648]], "places": [1, 148]},
    },
}


def parse(value: Any) -> Index:
    return parse_index(json.dumps(value).encode(), FILES, "checkpoint: index")


def changed(path: str, value: Any) -> Any:
    index = copy.deepcopy(GOOD)
    *folders, last = path.split("/")
    at = index
    for name in folders:
        at = at[name]
    at[last] = value
    return index


def test_a_chunk_is_found_where_it_is() -> None:
    index = parse(GOOD)
    place = index.place("model.w", (2, 4))
    assert (place.file, place.begin, place.sizes) == ("b.safetensors", 132, (2, 2))
    assert index.place("updates.w", ()).begin == 148
    assert index.metadata("model.w").size == torch.Size([4, 6])
    assert len(index.metadata("model.w").chunks) == 4
    again = parse_index(index.to_json(), FILES, "again")
    assert again.to_json() == index.to_json()
    assert json.loads(again.to_json()) == GOOD


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("files", ["../secret", "b.safetensors"], r"files\.0: String should match pattern"),
        ("files", ["/etc/passwd", "b.safetensors"], r"files\.0: String should match pattern"),
        ("files", ["sub/a.safetensors", "b.safetensors"], r"files\.0: String should match pattern"),
        ("files", ["other.safetensors", "b.safetensors"], "which the manifest does not"),
        ("files", ["a.safetensors"], "model.w: is in a file without a name"),
        ("version", 2, "is of version 2"),
        ("tensors", {}, "holds no tensor"),
        ("tensors", [], "should be an object"),
        ("tensors/model.w/dtype", "F8", "dtype 'F8' is not one of F32"),
        ("tensors/model.w/dtype", "F64", "model.w and .* overlap"),
        ("tensors/model.w/shape", [4, 7], r"do not cover dimension 1 of 7 once"),
        ("tensors/model.w/shape", [24], r"has 1 dimensions, 2 of cuts"),
        ("tensors/model.w/shape", [-4, -6], "greater than or equal to 0"),
        ("tensors/model.w/cuts", [[0, 2, 4], [0, 6]], "2 chunks, but places of 4"),
        ("tensors/model.w/cuts", [[0, 2, 2, 4], [0, 4, 6]], "do not cover dimension 0"),
        ("tensors/model.w/cuts", [[2, 4], [0, 4, 6]], "do not cover dimension 0"),
        ("tensors/model.w/cuts", [[0, 4, 2], [0, 4, 6]], "do not cover dimension 0"),
        ("tensors/model.w/cuts", [[], [0, 4, 6]], "do not cover dimension 0"),
        ("tensors/model.w/places", [0, 100, 0, 132, 1, 100], "4 chunks, but places of 3"),
        ("tensors/model.w/places", [0, 100, 0, 131, 1, 100, 1, 132], "model.w and model.w overlap"),
        ("tensors/model.w/places", [0, 100, 0, 132, 1, 100, 2, 132], "a file without a name"),
        ("tensors/model.w/places", [0, -1, 0, 132, 1, 100, 1, 132], "greater than or equal to 0"),
        ("tensors/model.w/places", [0, 990, 0, 132, 1, 100, 1, 132], "beyond the end of a.safe"),
        ("tensors/model.w/places", [0, 2**63 - 1, 0, 1, 1, 1, 1, 1], "beyond the end of a.safe"),
        ("tensors/model.w/places", [0, 2**70, 0, 132, 1, 1, 1, 1], "beyond the end of any file"),
        ("tensors/updates.w/places", [0, 135], "model.w and updates.w overlap in a.safetensors"),
        ("tensors/rng.0.cpu/shape", [2**40], "do not cover dimension 0"),
        ("tensors/rng.0.cpu/cuts", [[0, 648.5]], "valid integer"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(path: str, value: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        parse(changed(path, value))
    assert str(raised.value).startswith("checkpoint: index: ")


def test_a_tensor_larger_than_all_files_is_refused_before_memory_is_taken_for_it() -> None:
    size = 2**50
    huge = {"dtype": "F32", "shape": [size, size], "cuts": [[0, size]] * 2, "places": [0, 8]}
    with pytest.raises(UserError, match="exceeds all files"):
        parse(changed("tensors/model.w", huge))


def test_no_json_is_refused() -> None:
    with pytest.raises(UserError, match="checkpoint: index"):
        parse_index(b"\x80\x04K\x01.", FILES, "checkpoint: index")


def chunks_of(name: str, shape: tuple[int, int], grid: tuple[int, int]) -> list[Chunk]:
    rows, columns = (size // n for size, n in zip(shape, grid, strict=True))
    return [
        Chunk(name, shape, torch.float32, (row, column), (rows, columns))
        for row in range(0, shape[0], rows)
        for column in range(0, shape[1], columns)
    ]


def test_the_index_of_65b_on_512_ranks_is_small() -> None:
    """A tenth of its layers: 8 of 80, weights and two moments."""
    written: list[list[tuple[Chunk, int]]] = [[] for _ in range(512)]
    begins = [3000] * 512
    for layer in range(8):
        for i, shape in enumerate([(8192, 8192)] * 4 + [(22016, 8192)] * 3):
            for section in ("model", "exp_avg", "exp_avg_sq"):
                name = f"{section}.layers.{layer}.feed_forward.w{i}.weight"
                for rank, chunk in enumerate(chunks_of(name, shape, (64, 8))):
                    written[rank].append((chunk, begins[rank]))
                    begins[rank] += math.prod(chunk.sizes) * 4
    files = [
        WrittenFile(f"f-{rank}", FileInfo(size=size, crc32="0" * 8 * -(-size // BLOCK_BYTES)), held)
        for rank, (held, size) in enumerate(zip(written, begins, strict=True))
    ]
    index = Index.of(files)
    data = index.to_json()
    n_chunks = sum(map(len, written))
    assert n_chunks == 86_016
    assert len(data) / n_chunks < 17  # 1.1 million: 18 MB
    parsed = parse_index(data, {file.name: file.info for file in files}, "here")
    assert parsed.place("exp_avg.layers.7.feed_forward.w6.weight", (344 * 63, 1024 * 7)) == (
        index.place("exp_avg.layers.7.feed_forward.w6.weight", (344 * 63, 1024 * 7))
    )
