"""What a path leads to: told by what lies there, and said where nothing does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.writer import write_weights
from llama_ray.config import ExportConfig, StorageConfig
from llama_ray.config.load import load_job
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.formats.hf_read import HuggingFaceSource
from llama_ray.formats.hf_write import write_hf
from llama_ray.formats.meta import MetaSource
from llama_ray.formats.meta_write import write_meta
from llama_ray.formats.open import Format, open_source
from llama_ray.formats.place import Place, locate
from llama_ray.storage import Storage
from tests.formats.models import assert_same, model_config, random_source, tokenizer


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(StorageConfig(url=f"file://{tmp_path}/storage", endpoint_url="http://host:1"))


@pytest.mark.parametrize(
    ("where", "url"),
    [
        ("runs/x", "{storage}/runs/x"),
        ("runs//x/", "{storage}/runs/x"),
        ("/data/llama", "file:///data/llama"),
        ("/llama", "file:///llama"),
        ("file:///data/llama/", "file:///data/llama"),
        ("~/llama", "file://{home}/llama"),
        ("./llama", "file://{here}/llama"),
        ("s3://bucket/llama", "s3://bucket/llama"),
        ("s3://bucket/a/b/llama/", "s3://bucket/a/b/llama"),
    ],
)
def test_names_paths_and_urls(where: str, url: str, storage: Storage) -> None:
    expected = url.format(storage=storage.url(), home=Path.home(), here=Path.cwd())
    found = locate(where, storage, "path")
    assert found.url.replace("////", "///") == expected
    assert found.storage.config.endpoint_url == "http://host:1"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("../elsewhere/x", "does not exist"),
        ("runs/../../x", "is no name below storage.url"),
        ("", "is no name below storage.url"),
        ("ftp://host/x", "this kind of URL is not known"),
        ("s3://bucket", "names a whole bucket"),
        ("s3://bucket/", "names a whole bucket"),
        ("models/x", r"models/x does not exist; .* lie below storage\.url"),
        ("models/x.bin", r"models/x\.bin does not exist; .* lie below storage\.url"),
        ("runs/x", "runs/x holds no committed checkpoint"),
    ],
)
def test_what_leads_nowhere(where: str, message: str, storage: Storage) -> None:
    with pytest.raises(UserError, match=f"checkpoint: .*{message}"):
        open_source(where, storage)


@pytest.mark.parametrize("name", ["model.gguf", "notes.txt"])
def test_what_is_no_model(name: str, storage: Storage, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"path: .* is no model of a known format") as error:
        open_source(str(tmp_path / name), storage, key="path")
    assert ("GGUF is written, not read" in str(error.value)) == (name == "model.gguf")


def test_a_folder_of_gguf_files_gets_the_hint_too(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tiny-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"no model of a known format.*GGUF is written, not read"):
        open_source(str(tmp_path / "model"), storage)


def test_the_key_that_names_a_run_is_the_jobs(storage: Storage) -> None:
    for path, reason in (
        ("runs/nothere", "runs/nothere holds no committed checkpoint; .* correct the name"),
        ("runs/nothere/checkpoints/step-00000001", "step-00000001 is no committed checkpoint"),
    ):
        with pytest.raises(UserError, match=f"^path: .*{reason}"):
            open_source(path, storage, key="path")


def test_a_folder_as_tokenizer(storage: Storage, tmp_path: Path) -> None:
    write_hf(random_source(model_config()), Place(storage, "hf"))
    with pytest.raises(UserError, match=r"tokenizer: .*/hf is a folder; name the"):
        open_source("hf", storage, tokenizer=storage.url("hf"))


def test_a_run_is_found_wherever_it_lies(storage: Storage, tmp_path: Path) -> None:
    """By path in another storage, and where it was copied to."""
    source, pieces = random_source(model_config()), tokenizer()
    info = CheckpointInfo(
        model=source.config,
        step=0,
        tokens_seen=0,
        tokenizer_sha256=Tokenizer(pieces).sha256,
    )
    write_weights(storage, "mine", info, pieces, source.weights.items())
    run = Path(storage.url("runs/mine").removeprefix("file://"))
    copy = shutil.copytree(run, tmp_path / "elsewhere/mine")
    elsewhere = Storage(StorageConfig(url=f"file://{tmp_path}/empty"))
    for folder in (run, copy):
        for path in (folder, folder / "checkpoints/step-00000000"):
            found = open_source(str(path), elsewhere)
            assert_same(found, source)
            assert f"file://{folder}/checkpoints/step-00000000" in found.description
    shutil.rmtree(copy / "checkpoints/step-00000000")
    (copy / "checkpoints/latest").write_text("{}")
    with pytest.raises(UserError, match=f"checkpoint: file://{copy} holds no committed checkpoint"):
        open_source(str(copy), elsewhere)


def test_the_format_is_found_or_given(storage: Storage) -> None:
    source = random_source(model_config())
    both = Place(storage, "both")
    write_meta(source, both, 1)
    assert isinstance(open_source("both", storage), MetaSource)
    write_hf(source, both)
    kinds: dict[Format, type] = {"auto": HuggingFaceSource, "meta": MetaSource}
    for format, kind in kinds.items():
        assert isinstance(open_source("both", storage, format), kind)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model_parallel=2", "model_parallel: is for format meta, not hf"),
        ("quantization=Q8_0", "quantization: is for format gguf, not hf"),
        ("format=pth", "format: Input should be 'hf', 'meta' or 'gguf'"),
        ("dtype=float16", "dtype: Input should be 'stored', 'float32' or 'bfloat16'"),
    ],
)
def test_mistakes_in_a_job_file(override: str, message: str) -> None:
    jobs = Path(__file__).parents[2] / "jobs"
    with pytest.raises(UserError, match=message):
        load_job(str(jobs / "export.yaml"), [override])
    job = load_job(str(jobs / "export.yaml"), ["format=gguf", "quantization=Q8_0"])
    assert isinstance(job, ExportConfig)
    with pytest.raises(UserError, match="dtype: float32 and quantization: Q8_0 are both given"):
        load_job(str(jobs / "export.yaml"), ["format=gguf", "quantization=Q8_0", "dtype=float32"])
