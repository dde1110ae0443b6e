"""Whatever is wrong with a checkpoint is named: who loads it hears of one thing, `kind: inspect`
tells all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_ray.checkpoint.inspect import inspect_checkpoint
from llama_ray.checkpoint.manifest import MARKER, FileInfo
from llama_ray.checkpoint.sharded import load_weights
from llama_ray.checkpoint.store import CheckpointStore
from llama_ray.config import StorageConfig
from llama_ray.errors import UserError
from llama_ray.job import main
from llama_ray.model import LLaMA
from llama_ray.storage import Storage
from tests.checkpoint.saving import MODEL, TOKENIZER, checkpointer, info, training
from tests.parallel.layouts import Layout
from tests.parallel.ranks import Ranks

REPOSITORY = Path(__file__).parents[2]
STEP = "runs/run/checkpoints/step-00000010"


def save(rank: int, config: StorageConfig, not_finite: bool) -> None:
    with training(Layout(tensor=2)) as (_, _, state):
        if not_finite:
            state["exp_avg"]["norm.weight"].to_local()[rank] = float("inf")
        saver = checkpointer(config)
        sha256 = hashlib.sha256(TOKENIZER).hexdigest()
        described = info(10, layout={"tensor": 2, "data": 1}, validation_loss=2.25)
        saver.save(state, described.model_copy(update={"tokenizer_sha256": sha256}))
        saver.close()


@pytest.fixture(scope="module")
def whole(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ranks(2, save, StorageConfig(url=f"file://{folder}"), False)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path / STEP


def file(folder: Path, start: str) -> Path:
    (found,) = folder.glob(f"{start}*")
    return found


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = file(folder, "weights-00001")
    path.write_bytes(path.read_bytes()[:-10])


def swap(folder: Path) -> None:
    """Of equal size, and both whole."""
    one, other = file(folder, "weights-00000"), file(folder, "weights-00001")
    for path in (one, other):  # of equal size: the small ones are on rank 0 alone
        path.rename(path.with_suffix(".moved"))
    one.with_suffix(".moved").rename(other)
    other.with_suffix(".moved").rename(one)


def remove(folder: Path) -> None:
    file(folder, "weights-00001").unlink()


def rewrite(folder: Path, change: Callable[[dict, dict], None]) -> None:
    """Manifest and index changed by somebody who sees to it that all checksums are right."""
    index_path, manifest_path = file(folder, "index"), file(folder, "checkpoint.")
    index, manifest = json.loads(index_path.read_text()), json.loads(manifest_path.read_text())
    change(index, manifest)
    text = json.dumps(index).encode()
    index_path.write_bytes(text)
    if index_path.name in manifest["files"]:
        manifest["files"][index_path.name] = FileInfo.of([text]).model_dump()
    text = json.dumps(manifest).encode()
    manifest_path.write_bytes(text)
    marker = json.loads((folder / MARKER).read_text())
    marker["sha256"] = hashlib.sha256(text).hexdigest()
    (folder / MARKER).write_text(json.dumps(marker))


def outside(folder: Path) -> None:
    def change(index: dict, manifest: dict) -> None:
        name = "../../../../secret"
        manifest["files"][name] = manifest["files"].pop(index["files"][0])
        index["files"][0] = name

    rewrite(folder, change)


def absolute_index(folder: Path) -> None:
    rewrite(folder, lambda index, manifest: manifest.update(index="/etc/passwd"))


def wrong_shape(folder: Path) -> None:
    def change(index: dict, manifest: dict) -> None:
        tensor = index["tensors"]["model.layers.0.attention_norm.weight"]
        tensor["shape"], tensor["cuts"][0][-1] = [31], 31

    rewrite(folder, change)


def missing_chunk(folder: Path) -> None:
    rewrite(folder, lambda index, manifest: index["tensors"].pop("model.output.weight"))


DAMAGE = [
    (truncate, "weights-00001", r"has [\d,]+ bytes where [\d,]+ were written"),
    (remove, "weights-00001", "is missing"),
    (lambda f: flip(file(f, "weights-00000"), -5), "weights-00000", r"at bytes 0 to [\d,]+ "),
    (lambda f: flip(file(f, "weights-00000"), 20), "weights-00000", r"at bytes 0 to [\d,]+ "),
    (lambda f: flip(file(f, "index"), 50), "index", "is not what was written"),
    (lambda f: flip(file(f, "checkpoint."), 50), "checkpoint.", "is not what was committed"),
    (outside, "checkpoint.", r"files\.\S+: String should match pattern"),
    (absolute_index, "checkpoint.", "index: String should match pattern"),
    (wrong_shape, "", r"attention_norm\.weight .*(shape|overlap)"),
    (missing_chunk, "", "output.weight"),
]
NAMES = ["truncated", "removed", "flipped", "header", "index", "manifest", "outside", "absolute",
         "shape", "missing"]  # fmt: skip


@pytest.mark.parametrize(("spoil", "name", "reason"), DAMAGE, ids=NAMES)
def test_who_loads_is_told(
    folder: Path, spoil: Callable[[Path], None], name: str, reason: str
) -> None:
    storage = Storage(StorageConfig(url=f"file://{folder.parents[3]}"))
    load_weights(storage, STEP, LLaMA(MODEL))
    spoil(folder)
    with pytest.raises(UserError, match=rf"checkpoint: .*{name}.*{reason}"):
        load_weights(storage, STEP, LLaMA(MODEL))


def test_swapped_files_are_told_apart(ray_cluster: object, folder: Path) -> None:
    storage = Storage(StorageConfig(url=f"file://{folder.parents[3]}"))
    swap(folder)
    with pytest.raises(UserError, match=r"weights-0000\d\S+ (has|is not what was written)"):
        load_weights(storage, STEP, LLaMA(MODEL))
    with pytest.raises(UserError, match=r"(?s)2 damaged files.*weights-00000.*weights-00001"):
        inspect_checkpoint(STEP, storage)


def test_a_whole_checkpoint_is_shown(
    ray_cluster: object, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{folder.parents[3]}"
    job = [str(REPOSITORY / "jobs/verify.yaml"), f"storage.url={url}"]
    assert main([*job, "checkpoint=runs/run"]) == 0
    out = capsys.readouterr().out
    rows = dict(line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    assert rows["step"].strip() == "10"
    assert rows["saved by"].strip() == "tensor 2, data 1"
    assert rows["validation loss"].strip() == "2.2500"
    assert "[1/1] verify  ✔" in out
    assert f"every file of {url}/{STEP} is as it was written" in out
    elsewhere = [job[0], "storage.url=file:///nowhere", f"checkpoint={folder.parents[1]}"]
    assert main(elsewhere) == 0
    assert f"every file of {url}/{STEP} is as it was written" in capsys.readouterr().out
    assert main([*job, "checkpoint=runs/other"]) == 1
    assert "runs/other holds no committed checkpoint" in capsys.readouterr().err
    assert main([*job, "tokens=world"]) == 2
    assert "tokens, checkpoint: give one of them" in capsys.readouterr().err


def test_all_damage_is_named_at_once(ray_cluster: object, folder: Path) -> None:
    storage = Storage(StorageConfig(url=f"file://{folder.parents[3]}"))
    flip(file(folder, "optimizer-00000"), 3000)
    flip(file(folder, "weights-00000"), 4)
    truncate(folder)
    flip(folder / "tokenizer.model", 0)
    with pytest.raises(UserError) as raised:
        inspect_checkpoint("runs/run", storage)
    message = str(raised.value)
    assert message.startswith("checkpoint: 4 damaged files; use another checkpoint:\n")
    for name, what in (
        ("optimizer-00000", "is not what was written at bytes 0 to"),
        ("weights-00000", "is truncated or no safetensors file"),
        ("weights-00001", "bytes where"),
        ("tokenizer.model", "is not what was written"),
    ):
        assert any(f"{STEP}/{name}" in line and what in line for line in message.splitlines())


def test_an_index_of_another_model_is_damage(ray_cluster: object, folder: Path) -> None:
    storage = Storage(StorageConfig(url=f"file://{folder.parents[3]}"))
    missing_chunk(folder)
    wrong_shape(folder)
    with pytest.raises(UserError) as raised:
        inspect_checkpoint("runs/run", storage)
    message = str(raised.value)
    assert re.search(r"index\.\w+\.json lacks output\.weight", message)
    assert re.search(r"index\S+ has layers\.0\.attention_norm\.weight of shape \[31\]", message)
    assert re.search(r"weights-0000[01]\S+ has another output\.weight\S* in its header", message)


def test_values_that_are_not_finite_are_damage(
    ray_cluster: object, ranks: Ranks, tmp_path: Path
) -> None:
    config = StorageConfig(url=f"file://{tmp_path}")
    ranks(2, save, config, True)
    with pytest.raises(UserError, match=r"holds values of exp_avg\.norm\.weight that are not fin"):
        inspect_checkpoint("runs/run", Storage(config))


def test_nothing_in_a_checkpoint_is_a_pickle(whole: Path) -> None:
    store = CheckpointStore(Storage(StorageConfig(url=f"file://{whole}")), "run")
    names = {path.name.rpartition(".")[2] for path in (whole / store.path(10)).iterdir()}
    assert names == {"safetensors", "json", "model", MARKER}
    from safetensors.torch import load_file

    held: dict[str, torch.Tensor] = {}
    for path in (whole / STEP).glob("weights-*.safetensors"):
        held |= load_file(path)
    wq = torch.cat([held[f"layers.1.attention.wq.weight@{row},0"] for row in (0, 16)])
    model = LLaMA(MODEL)
    load_weights(store.storage, STEP, model)
    assert torch.equal(wq, model.get_parameter("layers.1.attention.wq.weight"))
