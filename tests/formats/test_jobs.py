"""`kind: import` and `kind: export`: from folder to folder, bit for bit, and cut in the middle."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.config import ExportConfig, ImportConfig, StorageConfig
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.formats.export import describe_export, export
from llama_ray.formats.hf_read import HuggingFaceSource
from llama_ray.formats.hf_write import write_hf
from llama_ray.formats.import_ import describe_import, import_model
from llama_ray.formats.open import open_source
from llama_ray.formats.place import Place
from llama_ray.local import Head
from llama_ray.storage import Storage
from tests.formats.models import (
    Memory,
    assert_same,
    model_config,
    place,
    random_source,
    tokenizer,
)
from tests.formats.test_gguf import sentencepiece_model
from tests.s3 import BUCKET, S3Server
from tests.s3_proxy import Fault, once, s3_proxy
from tests.test_jobs import submit

HF_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return tokenizer()


@pytest.fixture
def storage(tmp_path: Path) -> StorageConfig:
    return StorageConfig(url=f"file://{tmp_path}/storage")


@pytest.fixture
def foreign(pieces: bytes, tmp_path: Path) -> Path:
    """A folder in Hugging Face's format, outside of `storage`."""
    write_hf(random_source(model_config(), pieces), place(tmp_path / "foreign"))
    return tmp_path / "foreign"


def import_(path: object, storage: StorageConfig, name: str = "x", **changes: Any) -> ImportConfig:
    config = ImportConfig(name=name, path=str(path), storage=storage, **changes)
    import_model(config)
    return config


def export_(checkpoint: str, storage: StorageConfig, name: str = "x", **changes: Any) -> Path:
    export(ExportConfig(name=name, checkpoint=checkpoint, storage=storage, **changes))
    return Path(storage.url.removeprefix("file://"), "exports", name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bitwise(
    dtype: torch.dtype, tied: bool, pieces: bytes, storage: StorageConfig, tmp_path: Path
) -> None:
    """Hugging Face → ours → Meta (two files) → ours → Hugging Face: the same files."""
    source = random_source(model_config(tie_embeddings=tied), pieces, dtype)
    write_hf(source, place(tmp_path / "hf"))
    import_(tmp_path / "hf", storage, "one")
    assert_same(open_source("runs/one", Storage(storage)), source)
    meta = export_("runs/one", storage, "meta", format="meta", model_parallel=2)
    assert len(list(meta.glob("consolidated.*.pth"))) == 2
    import_(meta, storage, "two", max_seq_len=128)  # of which Meta's files say nothing
    assert_same(open_source("runs/two", Storage(storage)), source)
    back = export_("runs/two", storage, "back")
    for file in HF_FILES:
        assert (back / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file


def test_conversion_of_types(foreign: Path, storage: StorageConfig) -> None:
    import_(foreign, storage, "x", dtype="bfloat16")
    folder = export_("runs/x", storage, "wide", dtype="float32")
    source, found = HuggingFaceSource(place(foreign), None), HuggingFaceSource(place(folder), None)
    for name in source.tensors:
        assert torch.equal(found.read(name), source.read(name).bfloat16().float())


def test_a_finished_job_does_nothing_again(
    foreign: Path, storage: StorageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    import_(foreign, storage)
    folder = export_("runs/x", storage)
    before = {file: file.stat().st_mtime_ns for file in folder.parents[1].rglob("*")}
    capsys.readouterr()
    import_(foreign, storage)
    export_("runs/x", storage)
    assert capsys.readouterr().out.count("already; nothing to do") == 2
    assert before == {file: file.stat().st_mtime_ns for file in folder.parents[1].rglob("*")}

    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not as it was exported; delete"):
        export_("runs/x", storage)


def test_nothing_else_is_overwritten(foreign: Path, storage: StorageConfig) -> None:
    import_(foreign, storage)
    other = shutil.copytree(foreign, foreign.with_name("other"))
    with pytest.raises(UserError, match=r"name: .*runs/x holds checkpoints .* another name"):
        import_(other, storage)
    with pytest.raises(UserError, match=r"dtype: .* with dtype 'stored', not 'bfloat16'; choose"):
        import_(foreign, storage, dtype="bfloat16")
    export_("runs/x", storage)
    with pytest.raises(UserError, match=r"name: .*exports/x holds another export .* another name"):
        export_("runs/x", storage, dtype="bfloat16")
    with pytest.raises(UserError, match=r"to: .*/other holds files that no export wrote"):
        export_("runs/x", storage, to=str(other))


def test_a_dry_run_shows_the_model_and_writes_nothing(
    foreign: Path, storage: StorageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    describe_import(ImportConfig(name="x", path=str(foreign), storage=storage), dry_run=True)
    described = ExportConfig(name="x", checkpoint=str(foreign), storage=storage)
    describe_export(described, dry_run=True)
    assert capsys.readouterr().out.count("3 layers, dim 64, 8 heads (4 of keys and values)") == 2
    assert not Path(storage.url.removeprefix("file://")).exists()
    missing = ExportConfig(name="x", checkpoint="runs/none", storage=storage)
    with pytest.raises(UserError, match=r"checkpoint: .*runs/none holds no committed checkpoint"):
        describe_export(missing, dry_run=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "gguf"}, "tokenizer: .*/bare brings none, without which llama.cpp loads no"),
        ({"format": "meta", "model_parallel": 3}, "model_parallel: 3 does not divide"),
        ({"format": "hf", "tokenizer": "other"}, "no tokenizer.json with the same ids can be made"),
        ({"format": "gguf", "tokenizer": "other"}, "no tokenizer that gives the same ids"),
        ({"to": "occupied"}, "to: .*/occupied holds files that no export wrote"),
    ],
)
def test_a_refused_export_leaves_no_folder_and_a_dry_run_says_so(
    changes: dict[str, Any], reason: str, storage: StorageConfig, tmp_path: Path
) -> None:
    unigram = sentencepiece_model(model_type="unigram")
    config = model_config(vocab_size=Tokenizer(unigram).vocab_size)
    write_hf(random_source(config), place(tmp_path / "bare"))
    (tmp_path / "other").write_bytes(unigram)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/notes.txt").write_text("mine")
    for key in ("tokenizer", "to"):
        if key in changes:
            changes = changes | {key: str(tmp_path / changes[key])}
    job = ExportConfig(name="x", checkpoint=str(tmp_path / "bare"), storage=storage, **changes)
    before = sorted(tmp_path.rglob("*"))
    for do in (export, lambda job: describe_export(job, dry_run=True)):
        with pytest.raises(UserError, match=reason):
            do(job)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_import_is_refused_by_a_dry_run(
    foreign: Path, storage: StorageConfig, tmp_path: Path
) -> None:
    write_hf(random_source(model_config()), place(tmp_path / "bare"))
    import_(foreign, storage)
    for name, reason in (("y", "tokenizer: .*/bare brings none"), ("x", "name: .*runs/x holds")):
        config = ImportConfig(name=name, path=str(tmp_path / "bare"), storage=storage)
        for do in (import_model, lambda config: describe_import(config, dry_run=True)):
            with pytest.raises(UserError, match=reason):
                do(config)


@pytest.mark.parametrize("to", ["/proc/none/x", "{file}/x"])
def test_a_folder_that_cannot_be_written_is_named(
    to: str, foreign: Path, storage: StorageConfig
) -> None:
    to = to.format(file=foreign / "config.json")
    with pytest.raises(UserError, match=f"to: file://{to} cannot be written: "):
        export_(str(foreign), storage, to=to)


def test_what_a_cut_import_left_is_removed_by_the_next(
    foreign: Path, storage: StorageConfig
) -> None:
    run = Path(storage.url.removeprefix("file://"), "runs/x/checkpoints/step-00000000")
    run.mkdir(parents=True)
    for name in ("weights-00000.deadbeef.safetensors", f"weights-00001.{'0' * 32}.tmp"):
        (run / name).write_bytes(b"half")
    import_(foreign, storage)
    attempt = json.loads((run / "COMMITTED").read_text())["attempt"]
    names = [file.name for file in run.iterdir()]
    assert all(attempt in name for name in names if name not in ("COMMITTED", "tokenizer.model"))


def test_ctrl_c_ends_with_one_line(foreign: Path, tmp_path: Path) -> None:
    """While the job waits for a tokenizer that comes through a pipe."""
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe/tokenizer.model")
    job = subprocess.Popen(
        [sys.executable, "-m", "llama_ray.job", "jobs/export.yaml", f"checkpoint={foreign}",
         f"tokenizer={tmp_path}/pipe/tokenizer.model", f"storage.url=file://{tmp_path}/storage"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Python asks for no interrupts where its parent ignores them, as in a background job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with (tmp_path / "pipe/tokenizer.model").open("wb"):  # from here on it reads
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert errors == "error: interrupted; run the same job again\n"


def test_a_model_with_a_nan_is_never_whole(
    foreign: Path, storage: StorageConfig, pieces: bytes, tmp_path: Path
) -> None:
    """It is found with the last tensor, when nearly all is written."""
    good = random_source(model_config(), pieces)
    bad = {n: w.clone() for n, w in good.weights.items()}
    bad["output.weight"][-1, -1] = torch.nan
    write_bad = Memory(good.config, pieces, {n: torch.nan_to_num(w) for n, w in bad.items()})
    write_hf(write_bad, place(tmp_path / "bad"))
    file = tmp_path / "bad/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = torch.tensor([torch.nan]).numpy().tobytes()
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"output\.weight holds values that are not finite"):
        import_(tmp_path / "bad", storage)
    with pytest.raises(UserError, match=r"runs/x holds no committed checkpoint"):
        open_source("runs/x", Storage(storage))
    for format in ("hf", "meta", "gguf"):
        with pytest.raises(UserError, match=r"output\.weight holds values that are not finite"):
            export_(str(tmp_path / "bad"), storage, format=format)
        folder = Path(storage.url.removeprefix("file://"), "exports/x")
        assert [file.name for file in folder.iterdir()] == ["export.json"]

    # The same names again, with a whole model.
    import_(foreign, storage)
    found = HuggingFaceSource(place(export_("runs/x", storage)), None)
    assert_same(found, HuggingFaceSource(place(foreign), None))


def s3_storage(endpoint_url: str, folder: str) -> StorageConfig:
    return StorageConfig(url=f"s3://{BUCKET}/{folder}", endpoint_url=endpoint_url)


def forked(function: Callable[[], object]) -> int:
    """Pid of a child that runs it. Everything is imported already."""
    if pid := os.fork():
        return pid
    try:
        function()
        os._exit(0)
    except BaseException:
        os._exit(1)


def export_and_die(checkpoint: Path, s3: S3Server, folder: str, at: int) -> int:
    """Export to `folder` in a process that is killed when the request number `at` arrives; its
    status."""
    pid = 0
    fault = Fault(before=lambda: os.kill(pid, signal.SIGKILL))
    with s3_proxy(s3.endpoint_url, once(fault, at)) as proxy:
        pid = forked(lambda: export_(str(checkpoint), s3_storage(proxy.endpoint_url, folder)))
        return os.waitpid(pid, 0)[1]


def test_an_export_killed_at_any_request_leaves_nothing_half(
    s3: S3Server, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To object storage. Whatever request it dies at, a loader finds no model or the whole, and
    the same job then does it all."""
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    source = HuggingFaceSource(place(foreign), None)
    for at in itertools.count():
        status = export_and_die(foreign, s3, f"killed/{at}", at)
        direct = s3_storage(s3.endpoint_url, f"killed/{at}")
        folder = Place(Storage(direct), "exports/x")
        if "config.json" in folder.files():
            assert_same(HuggingFaceSource(folder, None), source)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        export_(str(foreign), direct)
        assert sorted(folder.files()) == sorted([*HF_FILES, "export.json"])
        assert json.loads(folder.child("export.json").read_small(10_000))["complete"]
        assert_same(HuggingFaceSource(folder, None), source)
    assert at > 10


def test_from_object_storage_by_url(
    s3: S3Server, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    config = s3_storage(s3.endpoint_url, "mine")
    source = HuggingFaceSource(place(foreign), None)
    write_hf(
        source, Place(Storage(s3_storage(s3.endpoint_url, "theirs")), "hf"), shard_bytes=100_000
    )
    import_(f"s3://{BUCKET}/theirs/hf", config)
    assert_same(open_source("runs/x", Storage(config)), source)
    export_("runs/x", config, to=f"s3://{BUCKET}/others/meta", format="meta")
    import_(f"s3://{BUCKET}/others/meta", config, "y", max_seq_len=128)
    assert_same(open_source("runs/y", Storage(config)), source)


@pytest.mark.slow
def test_as_a_user_submits_them(ray_head: Head, foreign: Path, storage_root: Path) -> None:
    imported = submit(ray_head, "--", "jobs/import.yaml", "name=given", f"path={foreign}")
    assert re.search(r"written to +file://.*/runs/given/checkpoints/step-00000000", imported)
    exported = submit(ray_head, "--", "jobs/export.yaml", "name=given", "checkpoint=runs/given")
    assert "Hugging Face, types as stored" in exported
    found = HuggingFaceSource(place(storage_root / "exports/given"), None)
    assert_same(found, HuggingFaceSource(place(foreign), None))
