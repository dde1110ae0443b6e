"""The main job as a user runs it: `ray job submit`, on a real head, to the served completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from llama_ray.local import Head
from tests.conftest import free_port
from tests.s3 import BUCKET, S3Server

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def ray_job_submit(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit ARGUMENTS` in the repository's root, output and errors together."""
    environment = os.environ | {"RAY_API_SERVER_ADDRESS": head.dashboard_url}
    return subprocess.run(
        [BIN / "ray", "job", "submit", *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


def submit(head: Head, *arguments: str) -> str:
    """The output of a job that must succeed."""
    job = ray_job_submit(head, *arguments)
    assert job.returncode == 0, job.stdout
    return job.stdout


def run_job(storage_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m llama_ray.job ARGUMENTS`: for what fails before it needs a cluster."""
    return subprocess.run(
        [BIN / "python", "-m", "llama_ray.job", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"LLAMA_RAY_STORAGE": f"file://{storage_root}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


def last_error(job: subprocess.CompletedProcess[str]) -> str:
    """The last line of a job that must fail, which must be the reason."""
    assert job.returncode != 0, job.stdout
    own = job.stdout.partition("Status message:")[0]
    lines = [line for line in own.splitlines() if line.strip() and "cli.py" not in line]
    return [line for line in lines if "sdk.py" not in line][-1]


@pytest.fixture(scope="module")
def corpus(ray_head: Head) -> str:
    """Tokens of the default job file, as it stands."""
    return submit(ray_head, "jobs/prepare.yaml")


def test_prepare_reports_and_is_not_repeated(ray_head: Head, corpus: str) -> None:
    assert re.search(r"unigram entropy +[5-9]\.\d{3} nats", corpus)
    assert re.search(r"documents +[\d,]+ read, [\d,]+ kept", corpus)
    assert "Traceback" not in corpus
    assert "is prepared already; nothing to do" in submit(ray_head, "jobs/prepare.yaml")


def test_the_literal_pretrain_job(ray_head: Head, corpus: str, storage_root: Path) -> None:
    output = submit(ray_head, "jobs/pretrain.yaml")
    loss = float(re.search(r"validation loss +([\d.]+) nats", output)[1])  # type: ignore[index]
    entropy = float(re.search(r"unigram entropy +([\d.]+) nats", output)[1])  # type: ignore[index]
    assert loss < entropy - 0.1
    run = storage_root / "runs" / "pretrain"
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-00000050", "step-00000100", "step-00000150"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(10, 151, 10))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert all(0 < r["mfu"] < 1 and r["tokens_per_second"] > 0 for r in steps)

    assert "nothing to do" in submit(ray_head, "jobs/pretrain.yaml")
    refused = run_job(storage_root, "jobs/pretrain.yaml", "optimizer.lr=1e-4")
    assert "optimizer.lr was 0.004, is 0.0001" in last_error(refused)


@pytest.mark.slow
def test_with_a_working_directory_it_resumes(
    ray_head: Head, corpus: str, storage_root: Path
) -> None:
    """The literal `ray job submit --working-dir . -- jobs/pretrain.yaml`, and from a checkpoint:
    the result is bitwise that of the run which was never interrupted."""
    run = storage_root / "runs" / "pretrain"
    if not run.exists():
        submit(ray_head, "jobs/pretrain.yaml")
    metrics = measured(run)
    # As if the run had died before the last checkpoint was whole.
    (run / "checkpoints" / "step-00000150" / "COMMITTED").unlink()
    output = submit(ray_head, "--working-dir", ".", "--", "jobs/pretrain.yaml")
    assert "resuming from the checkpoint of step 100" in output
    assert measured(run) == metrics


def measured(run: Path) -> list[dict[str, Any]]:
    """What a run's steps and validations came to, without what varies."""
    keys = ("event", "step", "tokens", "loss", "grad_norm", "validation_loss")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: record.get(key) for key in keys}
        for record in map(json.loads, lines)
        if record["event"] in ("step", "validation")
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["jobs/pretrain.yaml", "data.tokens=none"], 1, "holds no prepared tokens; run the `prepa"),
        (
            ["jobs/pretrain.yaml", "name=v", "model.vocab_size=8192"],
            1,
            "model.vocab_size: 8,192 is",
        ),
        (["jobs/prepare.yaml", "name=n", "corpus.path=/nowhere"], 1, "corpus.path: /nowhere"),
        (["jobs/none.yaml"], 2, "jobs/none.yaml: cannot be read"),
    ],
)
def test_failure_has_a_status_and_a_reason_last(
    corpus: str, storage_root: Path, arguments: list[str], status: int, reason: str
) -> None:
    job = run_job(storage_root, *arguments)
    assert job.returncode == status
    assert last_error(job).startswith("error: ")
    assert reason in last_error(job)
    assert "Traceback" not in job.stdout


def test_ray_job_submit_passes_the_failure_on(ray_head: Head) -> None:
    job = ray_job_submit(ray_head, "--", "jobs/pretrain.yaml", "train.step=1")
    assert "train.step: unknown key, did you mean 'steps'?" in last_error(job)


def test_dry_run_touches_nothing(storage_root: Path) -> None:
    before = sorted(storage_root.rglob("*"))
    job = run_job(storage_root, "jobs/pretrain_7b.yaml", "--dry-run", "model.preset=65B")
    assert job.returncode == 0
    assert "65,285,660,672" in job.stdout
    assert sorted(storage_root.rglob("*")) == before


def test_a_damaged_tokenizer_stops_the_run(ray_head: Head, corpus: str, storage_root: Path) -> None:
    path = storage_root / "tokens" / "corpus" / "tokenizer.model"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    try:
        job = ray_job_submit(ray_head, "--", "jobs/pretrain.yaml", "name=damaged")
    finally:
        path.write_bytes(whole)
    assert re.search(r"error: data\.tokens: .*tokenizer\.model", last_error(job))
    assert not (storage_root / "runs" / "damaged" / "checkpoints").exists()


def assert_served(
    head: Head, s3: S3Server, storage: list[str], environment: list[str], folder: Path
) -> None:
    """Deployed by a job, the checkpoint on S3 answers over HTTP."""
    config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    config["applications"][0]["runtime_env"] = {"env_vars": s3.env}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    overrides = [f"args.{override}" for override in storage]
    overrides += ["args.checkpoint=runs/road", "args.model_name=road", f"http_options.port={port}"]
    try:
        submit(head, *environment, "--", "python3", "-m", "serve.deploy", str(path), *overrides)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions",
            json={"model": "road", "prompt": "The quick", "max_tokens": 8},
            timeout=60,
        )
    finally:
        submit(head, "--", "python3", "-c", "from ray import serve; serve.shutdown()")
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 8


TINY = [
    "data.tokens=tiny", "model.vocab_size=320", "data.seq_len=64", "train.steps=20",
    "optimizer.warmup_steps=2", "checkpoint.every=10", "train.validate_every=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def foxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small stories."""
    folder = tmp_path_factory.mktemp("foxes")
    for i in range(40):
        lines = (f"Line {i * j} of story {i}: the fox said {j} words." for j in range(40))
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


def prepare_foxes(foxes: Path) -> list[str]:
    return [
        "jobs/prepare.yaml", "name=tiny", f"corpus.path={foxes}", "tokenizer.vocab_size=320",
        "corpus.validation_fraction=0.2",
    ]  # fmt: skip


def test_the_whole_road_on_s3(ray_head: Head, s3: S3Server, foxes: Path, tmp_path: Path) -> None:
    """Text → tokens on S3 → two workers → checkpoint → endpoint, with credentials in the job's
    environment; and what wrong ones say."""
    storage = [f"storage.url=s3://{BUCKET}/road", f"storage.endpoint_url={s3.endpoint_url}"]
    environment = ["--runtime-env-json", json.dumps({"env_vars": s3.env})]
    prepare = [*prepare_foxes(foxes), *storage]
    submit(ray_head, *environment, "--", *prepare)
    output = submit(
        ray_head, *environment, "--", "jobs/pretrain.yaml", "name=road", *TINY, *storage
    )
    assert "committed" in output
    assert_served(ray_head, s3, storage, environment, tmp_path)

    wrong = json.dumps({"env_vars": s3.env | {"AWS_SECRET_ACCESS_KEY": "guess"}})
    job = ray_job_submit(ray_head, "--runtime-env-json", wrong, "--", *prepare)
    assert re.search(r"error: storage\.url: .*access refused.*AWS_ACCESS_KEY_ID", last_error(job))


@pytest.mark.slow
def test_a_full_disk(ray_head: Head, foxes: Path, small_disk: Path) -> None:
    """Tokens fit, the first checkpoint does not: the run fails, and none counts."""
    storage = f"storage.url=file://{small_disk}"
    submit(ray_head, "--", *prepare_foxes(foxes), storage)
    job = ray_job_submit(ray_head, "--", "jobs/pretrain.yaml", "name=full", *TINY, storage)
    assert re.search(r"error: storage\.url: .*no space left", last_error(job))
    assert not list(small_disk.rglob("COMMITTED"))

    # And where even the tokens do not fit, no manifest pretends that they do.
    (small_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 20_000))
    job = ray_job_submit(ray_head, "--", *prepare_foxes(foxes), storage, "name=more", "seed=1")
    assert re.search(r"error: storage\.url: .*no space left", last_error(job))
    assert not (small_disk / "tokens" / "more" / "manifest.json").exists()
