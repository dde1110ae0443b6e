"""Parts of files: every byte where it belongs, no block twice, none unchecked."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

from llama_ray.checkpoint import manifest, parts
from llama_ray.checkpoint.manifest import FileInfo
from llama_ray.checkpoint.parts import Part, plan, read_parts
from llama_ray.config import StorageConfig
from llama_ray.errors import UserError
from llama_ray.storage import Storage

BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks() -> object:
    with (
        mock.patch.object(manifest, "BLOCK_BYTES", BLOCK),
        mock.patch.object(parts, "BLOCK_BYTES", BLOCK),
        mock.patch.object(parts, "BATCH_BYTES", 8 * BLOCK),
    ):
        yield


@pytest.fixture
def files(tmp_path: Path) -> tuple[Storage, dict[str, bytes], dict[str, FileInfo]]:
    storage = Storage(StorageConfig(url=f"file://{tmp_path}"))
    source = random.Random(5)
    data = {name: source.randbytes(size) for name, size in (("a", 5000), ("b", 64), ("c", 63))}
    for name, content in data.items():
        storage.write(f"folder/{name}", content)
    return storage, data, {name: FileInfo.of([content]) for name, content in data.items()}


def bytes_part(file: str, begin: int, end: int) -> Part:
    into = torch.zeros(end - begin, dtype=torch.uint8)
    return Part(file, begin, torch.uint8, (end - begin,), (slice(None),), into)


Files = tuple[Storage, dict[str, bytes], dict[str, FileInfo]]


@pytest.mark.parametrize("seed", range(30))
def test_any_parts_are_read(files: Files, seed: int) -> None:
    storage, data, infos = files
    source, wanted = random.Random(seed), []
    for name, content in data.items():
        cuts = sorted(source.sample(range(len(content) + 1), source.choice([2, 4, 20])))
        for begin, end in pairwise(cuts):
            if source.random() < 0.7:
                wanted.append(bytes_part(name, begin, end))
    source.shuffle(wanted)
    read_parts(storage, "folder", infos, wanted)
    for part in wanted:
        assert part.into.numpy().tobytes() == data[part.file][part.begin : part.end]
    blocks = Counter(
        (request.file, block)
        for request in plan(infos, wanted)
        for block in range(request.begin // BLOCK, -(-request.end // BLOCK))
    )
    touched = {
        (part.file, block)
        for part in wanted
        for block in range(part.begin // BLOCK, -(-part.end // BLOCK))
    }
    assert set(blocks) == touched
    assert set(blocks.values()) <= {1}


def test_what_one_tensor_wants_of_many_blocks_goes_straight_to_its_memory(files: Files) -> None:
    _, _, infos = files
    requests = list(plan(infos, [bytes_part("a", 10, 30), bytes_part("a", 30, 4000)]))
    straight = [request for request in requests if request.straight]
    assert [r.begin for r in requests if not r.straight] == [0, 62 * BLOCK]
    assert sum(r.end - r.begin for r in straight) == 61 * BLOCK
    assert max(r.end - r.begin for r in requests) == parts.REQUEST_BLOCKS * BLOCK


def test_rows_columns_and_types(files: Files) -> None:
    storage, data, infos = files
    stored = torch.frombuffer(bytearray(data["a"][96 : 96 + 12 * 8 * 2]), dtype=torch.int16)
    stored = stored.view(12, 8)
    columns = torch.zeros(12, 3, dtype=torch.float64)
    wide = torch.zeros(12, 20, dtype=torch.int16)
    region = (slice(None), slice(2, 5))
    wanted = [
        Part("a", 96, torch.int16, (12, 8), region, columns),
        Part("a", 96 + 4 * 16, torch.int16, (3, 8), (slice(None), slice(0, 8)), wide[5:8, 7:15]),
    ]
    versions = columns._version, wide._version
    read_parts(storage, "folder", infos, wanted)
    assert torch.equal(columns, stored[:, 2:5].double())
    assert torch.equal(wide[5:8, 7:15], stored[4:7])
    assert wide.count_nonzero() == stored[4:7].count_nonzero()
    assert (columns._version, wide._version) > versions


def test_memory_written_behind_torchs_back_counts_as_changed(files: Files) -> None:
    """Layers that multiply by copies of weights go by that."""
    storage, _, infos = files
    part = bytes_part("a", 0, 5000)
    before = part.into._version
    read_parts(storage, "folder", infos, [part])
    assert part.direct
    assert part.into._version > before


@pytest.mark.parametrize(("at", "first", "last"), [(0, 0, 64), (63, 0, 64), (4999, 4992, 5000)])
def test_a_flipped_bit_is_named(files: Files, at: int, first: int, last: int) -> None:
    storage, data, infos = files
    damaged = bytearray(data["a"])
    damaged[at] ^= 4
    storage.write("folder/a", bytes(damaged))
    with pytest.raises(UserError, match=rf"folder/a is not .* at bytes {first:,} to {last:,} "):
        read_parts(storage, "folder", infos, [bytes_part("a", 0, 5000)])
    other = bytes_part("a", 2000, 3000)  # what it does not touch
    read_parts(storage, "folder", infos, [other])
    assert other.into.numpy().tobytes() == data["a"][2000:3000]
