"""Job files: what is refused, and whether the message says file, key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.config import PRESETS, ModelConfig, PretrainConfig, load_job
from llama_ray.config.document import document
from llama_ray.config.storage import StorageConfig
from llama_ray.errors import UserError

JOBS = Path(__file__).parents[2] / "jobs"
PRETRAIN = str(JOBS / "pretrain.yaml")


@pytest.mark.parametrize("path", sorted(JOBS.rglob("*.yaml")), ids=lambda p: p.name)
def test_every_job_file_is_valid_and_executable(path: Path) -> None:
    load_job(str(path))
    assert path.stat().st_mode & 0o100
    assert path.read_text().startswith("#!/usr/bin/env -S python3 -m llama_ray.job\n")


def test_overrides_reach_nested_keys_and_are_typed() -> None:
    job = load_job(
        PRETRAIN, ["train.steps=7", "optimizer.warmup_steps=0", "model.dim=256", "seed=3"]
    )
    assert isinstance(job, PretrainConfig)
    assert (job.train.steps, job.model.dim, job.seed) == (7, 256, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=7", "pretrain.yaml: train.step: unknown key, did you mean 'steps'?"),
        ("trian.steps=7", "trian: unknown key, did you mean 'train'?"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps", "write it as section.key=value"),
        ("train=", "train: "),
        ("name.x=1", "'name' is a value, not a section"),
        ("model.preset=8B", "preset '8B' is not one of debug, 5M, 134M, 7B, 13B, 33B, 65B"),
        ("parallel.tensor=3", "choose from 1, 2, 4"),
        ("parallel.shard=2", "parallel.shard: 2 does not divide parallel.data 1; choose from 1"),
        ("parallel.shard=0", "parallel.shard: Input should be greater than 0"),
        ("train.recompute=all", "train.recompute: Input should be 'none', 'selective' or 'full'"),
        ("train.batch_size=31", "train.micro_batch_size × parallel.data = 16"),
        ("data.seq_len=4096", "exceeds model.max_seq_len"),
        ("storage.url=ftp://x", "scheme 'ftp' is not one of file, s3, gs"),
        ("storage.url=s3://", "names no bucket"),
        ("storage.url=file://relative", "is not absolute"),
        ("kind=pretain", "did you mean 'pretrain'?"),
        ("name=a/b", "name: "),
        ("data.tokens=../x", "data.tokens: "),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number"),
    ],
)
def test_mistakes_are_explained(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_job(PRETRAIN, [override])
    assert message in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_job(str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("kind: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_job(str(bad))
    bad.write_text("- a")
    with pytest.raises(UserError, match="no `key: value` pairs"):
        load_job(str(bad))


def test_tensor_parallel_33b_at_8_is_refused() -> None:
    """52 heads do not split into 8 (DESIGN.md, decision 1)."""
    with pytest.raises(UserError, match=r"8 does not divide .* choose from 1, 2, 4"):
        load_job(str(JOBS / "pretrain_7b.yaml"), ["model.preset=33B", "parallel.tensor=8"])


def test_shard_must_divide_data() -> None:
    overrides = ["parallel.data=8", "train.micro_batch_size=2"]
    with pytest.raises(UserError, match=r"parallel\.shard: 3 does not .* choose from 1, 2, 4, 8"):
        load_job(PRETRAIN, [*overrides, "parallel.shard=3"])
    job = load_job(PRETRAIN, [*overrides, "parallel.shard=4"])
    assert isinstance(job, PretrainConfig)
    assert job.parallel.shard_size == 4


def test_sequence_parallelism_splits_tokens() -> None:
    overrides = ["train.micro_batch_size=1", "data.seq_len=127"]
    with pytest.raises(UserError, match=r"127 does not split over parallel\.tensor 2 ranks"):
        load_job(PRETRAIN, overrides)
    load_job(PRETRAIN, [*overrides, "parallel.sequence=false"])
    load_job(PRETRAIN, [*overrides, "parallel.tensor=1"])


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("33B", 32_528_943_616),
        ("65B", 65_285_660_672),
    ],
)
def test_parameter_formula(size: str, parameters: int) -> None:
    assert ModelConfig.model_validate({"preset": size}).n_params == parameters


def test_default_ffn_width_is_metas_rule() -> None:
    """2/3 of 4 × dim, up to a multiple of 256: the released widths of 7B, 13B and 65B."""
    for size in ("7B", "13B", "65B"):
        dim, layers, heads, ffn = PRESETS[size]
        model = ModelConfig.model_validate({"dim": dim, "n_layers": layers, "n_heads": heads})
        assert model.ffn_hidden_dim == ffn


def test_storage_url_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_RAY_STORAGE", "s3://bucket/prefix/")
    assert StorageConfig().url == "s3://bucket/prefix"
    monkeypatch.delenv("LLAMA_RAY_STORAGE")
    assert StorageConfig().url == f"file://{Path.home()}/llama_ray"


def test_the_reference_page_is_current() -> None:
    page = JOBS.parent / "docs" / "configuration.md"
    assert page.read_text() == document(), "run `make docs`"
