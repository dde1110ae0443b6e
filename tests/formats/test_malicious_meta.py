"""Meta's files that are damaged, lie, or would run something: refused with the reason."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.errors import UserError
from llama_ray.formats.meta import open_meta
from llama_ray.formats.meta_archive_write import ArchiveWriter
from llama_ray.formats.meta_write import write_meta
from llama_ray.formats.source import TensorInfo, read_checked
from tests.formats.models import Memory, model_config, place, random_source

FILE = "consolidated.00.pth"


@pytest.fixture(scope="module")
def source() -> Memory:
    return random_source(model_config(n_layers=1))


@pytest.fixture
def folder(source: Memory, tmp_path: Path) -> Path:
    """A good model, as torch saves it."""
    folder = tmp_path / "model"
    write_meta(source, place(folder))
    saved(folder, source.weights)
    open_meta(place(folder))
    return folder


def saved(folder: Path, state: Any) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)  # its records are then in a folder named "archive"
    (folder / FILE).write_bytes(buffer.getvalue())


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as info:
        open_meta(place(folder))
    assert str(folder) in str(info.value)


def rewrite(
    file: Path, change: Callable[[dict[str, bytes]], object], compression: int = zipfile.ZIP_STORED
) -> None:
    """The same zip with other records."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_a_command_is_not_run(
    protocol: int, folder: Path, tmp_path: Path
) -> None:
    payload = pickle.dumps({"tok_embeddings.weight": Payload(tmp_path / "ran")}, protocol)
    rewrite(folder / FILE, lambda records: records.update({"archive/data.pkl": payload}))
    refused(folder, rf"{FILE}: its pickle asks for .*and was not run")
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)  # it would have
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("pickled", "asks_for"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", r"builtins\.eval"),
        (b"(ibuiltins\neval\n.", r"builtins\.eval"),
        (b"\x80\x02\x82\x01.", "a function by EXT1"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "a function by STACK_GLOBAL"),
        # Allowed by torch's own list, and 10^12 bytes.
        (
            b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\x10\xa5\xd4\xe8\0\x85R.",
            r"builtins\.bytearray",
        ),
        (b"ctorch.hub\nload\n.", r"torch\.hub\.load"),
    ],
)
def test_nothing_but_tensors_may_be_named(pickled: bytes, asks_for: str, folder: Path) -> None:
    rewrite(folder / FILE, lambda records: records.update({"archive/data.pkl": pickled}))
    refused(folder, f"its pickle asks for {asks_for}")


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"", "data.pkl is no pickle"),
        (b"\xff\xff", "data.pkl is no pickle"),
        (b"\x80\x02K\x01.", "no dictionary of tensors"),
        (b"\x80\x02}.", "no dictionary of tensors"),
        (b"\x80\x02}K\x01K\x02s.", "1 is int, not a tensor"),
        (b"\x80\x02}U\x01aK\x02s.", "'a' is int, not a tensor"),
        (b"\x80\x02h\x07.", "cannot be read"),
    ],
)
def test_a_pickle_of_something_else_is_refused(pickled: bytes, reason: str, folder: Path) -> None:
    rewrite(folder / FILE, lambda records: records.update({"archive/data.pkl": pickled}))
    refused(folder, rf"{FILE}: .*{reason}")


@pytest.mark.parametrize(
    "name", ["/etc/cron.d/x", "../x", "archive/../../x", "archive/data/..", "archive\\..\\x"]
)
def test_paths_that_lead_out_of_the_file_are_refused(name: str, folder: Path) -> None:
    rewrite(folder / FILE, lambda records: records.update({name: b"x"}))
    refused(folder, f"{FILE}: holds a record named .*points out of the file")


def test_more_than_one_folder_and_twice_the_same_name_are_refused(folder: Path) -> None:
    rewrite(folder / FILE, lambda records: records.update({"other/data.pkl": b"x"}))
    refused(folder, "holds 'other/data.pkl'; PyTorch writes one folder")
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", b"y")
    refused(folder, "two of its records have the same name")


def test_a_compressed_record_is_not_unpacked(folder: Path) -> None:
    def bomb(records: dict[str, bytes]) -> None:
        records["archive/data/0"] = bytes(1 << 24)

    rewrite(folder / FILE, bomb, zipfile.ZIP_DEFLATED)
    refused(folder, r"is compressed \([\d,]+ bytes for [\d,]+\), which PyTorch never does")


def directory_entry(data: bytearray, name: bytes) -> int:
    """Where the zip's directory speaks of a record."""
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(name)] != name:
        at = data.index(b"PK\x01\x02", at + 1)
    return at


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ((20, "<II"), (1 << 30, 1 << 30)),  # both sizes
        ((42, "<I"), (0,)),  # where it is: with another one
    ],
)
def test_a_directory_that_lies_is_refused(
    field: tuple[int, str], value: tuple[int, ...], folder: Path
) -> None:
    data = bytearray((folder / FILE).read_bytes())
    entry = directory_entry(data, b"archive/data/0")
    struct.pack_into(field[1], data, entry + field[0], *value)
    (folder / FILE).write_bytes(data)
    refused(folder, "there is room for .*: the zip's directory lies")


def test_a_zip_with_something_before_it_is_refused(folder: Path) -> None:
    """To PyTorch it is a bare pickle, followed by a zip."""
    (folder / FILE).write_bytes(
        pickle.dumps(119547037146038801333356) + (folder / FILE).read_bytes()
    )
    refused(folder, "does not begin with its first record")


def test_a_huge_directory_is_not_read(folder: Path) -> None:
    """1 GiB, of which the disk has nothing."""
    size = 1 << 30
    with (folder / FILE).open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, size, 0, 0))
    refused(folder, r"its directory or pickle would be 1,073,741,824 bytes")


def test_a_huge_pickle_is_not_read(folder: Path) -> None:
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(65 << 20))
    refused(folder, r"record archive/data\.pkl has 68,157,440 bytes")


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    for part in range(0, 100):
        (folder / FILE).write_bytes(whole[: len(whole) * part // 100])
        refused(folder, f"{FILE}: is truncated or no PyTorch file")


def test_a_bare_pickle_is_refused_unread(folder: Path, tmp_path: Path) -> None:
    (folder / FILE).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    refused(folder, "before PyTorch 1.6 are bare pickles and are not read")
    assert not (tmp_path / "ran").exists()


def test_tensors_that_are_no_weights_are_refused(folder: Path, source: Memory) -> None:
    name = "layers.0.attention.wq.weight"
    wq = source.weights[name]
    saved(folder, source.weights | {name: wq.to(torch.int8)})
    refused(folder, r"its pickle asks for torch\.CharStorage")
    saved(folder, source.weights | {name: wq.t()})
    refused(folder, f"{name} is not stored row by row")
    saved(folder, {"model": source.weights})
    refused(folder, "'model' is dict, not a tensor")
    saved(folder, source.weights | {name: wq[:, :32].contiguous()})
    refused(folder, rf"{name} has shape \[64, 32\], its config asks for \[64, 64\]")
    saved(folder, source.weights | {"extra.weight": wq})
    refused(folder, r"extra\.weight is no weight")
    saved(folder, {key: value for key, value in source.weights.items() if key != name})
    refused(folder, f"{name} is missing")


def test_a_shape_larger_than_its_data_is_refused_before_it_is_allocated(
    folder: Path, source: Memory
) -> None:
    """The pickle speaks of 4 TB, the record has 4 bytes."""
    infos = dict(source.tensors) | {"norm.weight": TensorInfo((1 << 40,), torch.float32)}
    with (folder / FILE).open("wb") as out:
        archive = ArchiveWriter(out, infos)
        for name in infos:
            archive.write(name, [torch.zeros(1)])
        archive.close()
    refused(folder, "is said to be where no data of its size are")


def test_a_nan_is_found_when_the_tensor_is_read(folder: Path, source: Memory) -> None:
    name = "layers.0.feed_forward.w2.weight"
    broken = source.weights[name].clone()
    broken[5, 5] = torch.nan
    saved(folder, source.weights | {name: broken})
    with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
        list(read_checked(open_meta(place(folder))))


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_meta(random_source(model_config()), place(folder), 4)
    (folder / "consolidated.01.pth").rename(tmp_path / "01")
    refused(folder, r"consolidated\.01\.pth is missing, consolidated\.02\.pth is there")
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.03.pth").unlink()
    refused(folder, r"split over 4 files, 1 is here; copy .* to consolidated\.03\.pth")
    (tmp_path / "01").rename(folder / "consolidated.01.pth")
    refused(folder, "split over 4 files, 2 are here")
    (folder / FILE).unlink()
    (folder / "consolidated.01.pth").unlink()
    refused(folder, r"holds no consolidated\.00\.pth")


def test_files_of_different_splits_or_models_are_refused(tmp_path: Path) -> None:
    source = random_source(model_config())
    for degree in (2, 4):
        write_meta(source, place(tmp_path / str(degree)), degree)
    shutil.copy(tmp_path / "4" / "consolidated.01.pth", tmp_path / "2")
    refused(tmp_path / "2", r"consolidated\.01\.pth: .* is float32 .*the files are of different")
    write_meta(random_source(model_config(n_layers=2)), place(tmp_path / "other"), 4)
    shutil.copy(tmp_path / "other" / "consolidated.01.pth", tmp_path / "4")
    refused(
        tmp_path / "4", r"layers\.2\..* is in this file or in consolidated\.00\.pth, not in both"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda params: b"not JSON", r"params\.json: is no JSON"),
        (lambda params: b"[" * 100_000, r"params\.json: is no JSON"),
        (lambda params: b"\xff\xfe", r"params\.json: is no JSON"),
        (lambda params: b"[1]", r"params\.json: \(all\): Input should be"),
        (lambda params: b" " * (2 << 20), r"params\.json: is 2.* long"),
        (lambda params: {"dim": -1}, r"params\.json: dim: .*greater than 0"),
        (lambda params: {"dim": "64"}, r"params\.json: dim: .*valid integer"),
        (lambda params: {"dim": 10**30}, r"params\.json: is of a model of dim 10{30}"),
        (lambda params: {"dim": 128}, r"of dim 128 and 1 layers, the weights are of dim 64"),
        (lambda params: {"n_layers": 10**9}, r"of dim 64 and 1000000000 layers, .* and 1 layers"),
        (lambda params: {"n_heads": 10**9}, r"params\.json: .*not divisible by n_heads"),
        (lambda params: {"n_heads": 7}, r"params\.json: .*not divisible by n_heads"),
        (lambda params: {"n_kv_heads": 2}, r"wk\.weight has shape \[32, 64\], .* \[16, 64\]"),
        (lambda params: {"vocab_size": 99}, r"vocab_size is 99, the embedding has 384 rows"),
        (lambda params: {"norm_eps": 0.0}, r"params\.json: norm_eps: "),
        (lambda params: {"use_scaled_rope": True}, "use_scaled_rope: rotary frequencies rescaled"),
        (lambda params: {"moe_args": {}}, "moe_args is no parameter of a LLaMA of this family"),
    ],
)
def test_nonsense_in_params_is_refused(
    change: Callable[[Any], bytes | dict[str, Any]], reason: str, folder: Path
) -> None:
    file = folder / "params.json"
    params = json.loads(file.read_bytes())
    changed = change(params)
    file.write_bytes(
        changed if isinstance(changed, bytes) else json.dumps(params | changed).encode()
    )
    refused(folder, reason)


def test_without_params_the_copy_is_incomplete(folder: Path) -> None:
    (folder / "params.json").unlink()
    refused(folder, r"params\.json: there is no such file; the copy is incomplete")


def test_what_is_no_zip_is_refused_whatever_it_is(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer, _use_new_zipfile_serialization=False)
    for data in (b"", b"PK", b"<html>404</html>", buffer.getvalue(), bytes(1000)):
        (folder / FILE).write_bytes(data)
        refused(folder, f"{FILE}: is truncated or no PyTorch file")
