"""Two exports to one folder at a time: one of them writes it, and the other is told."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from llama_ray.errors import UserError
from llama_ray.formats.export_folder import MANIFEST, ClaimedPlace, Request, begin, state
from llama_ray.formats.place import Place
from tests.formats.models import place


def request(dtype: str = "stored") -> Request:
    return Request(
        source="runs/x", tokenizer_sha256=None, format="hf", dtype=dtype, model_parallel=1,
        quantization=None,
    )  # fmt: skip


def write(folder: ClaimedPlace, name: str, data: bytes) -> None:
    with folder.child(name).open_upload() as out:
        out.write(data)


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return place(tmp_path / "export")


def test_of_two_exports_at_a_time_the_later_has_the_folder(folder: Place) -> None:
    first = begin(folder, request())
    write(first, "early", b"first")
    lost = r"name: another export to .*/export has begun meanwhile, this one stopped"
    with ExitStack() as under_way:
        under_way.enter_context(first.child("model").open_upload()).write(b"first")
        assert state(folder, request("bfloat16")) == "cut"
        second = begin(folder, request("bfloat16"))
        write(second, "model", b"second")
        with pytest.raises(UserError, match=lost):
            under_way.close()
    with pytest.raises(UserError, match=lost):
        write(first, "late", b"first")
    with pytest.raises(UserError, match=lost):
        first.child("config.json").write(b"first")
    with pytest.raises(UserError, match=lost):
        first.claim.complete()
    second.child("config.json").write(b"{}")
    second.claim.complete()
    with pytest.raises(UserError, match=lost):
        first.claim.complete()

    assert folder.files().keys() == {"model", "config.json", MANIFEST}
    assert folder.child("model").read_small(100) == b"second"
    manifest = json.loads(folder.child(MANIFEST).read_small(10_000))
    assert manifest["complete"]
    assert manifest["files"] == {"model": 6, "config.json": 2}
    assert state(folder, request("bfloat16")) == "complete"


def test_a_folder_removed_meanwhile_is_not_written_any_more(folder: Place) -> None:
    claimed = begin(folder, request())
    folder.storage.delete(folder.path)
    with pytest.raises(UserError, match="another export"):
        claimed.child("model").write(b"x")
    assert folder.files() == {}


def test_another_tokenizer_makes_another_export(folder: Place) -> None:
    begin(folder, request()).claim.complete()
    other = request().model_copy(update={"tokenizer_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"name: .* holds another export .* choose another name"):
        state(folder, other)
