"""Storage on disk and on a real S3 server: the same behaviour, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import s3fs

from llama_ray.config import StorageConfig
from llama_ray.errors import UserError
from llama_ray.storage import Storage, explained
from tests.s3 import BUCKET, S3Server


@pytest.fixture(autouse=True)
def _fresh_sessions() -> None:
    """fsspec keeps file systems, and with them credentials, for a process's lifetime."""
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["file", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    if request.param == "file":
        return Storage(StorageConfig(url=f"file://{tmp_path}"))
    server: S3Server = request.getfixturevalue("s3")
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return Storage(
        StorageConfig(url=f"s3://{BUCKET}/{tmp_path.name}", endpoint_url=server.endpoint_url)
    )


def test_write_read_list_delete(storage: Storage) -> None:
    storage.check_writable()
    assert storage.list("a") == {}
    storage.write("a/b.txt", b"hello")
    storage.write("a/b.txt", b"world!")
    storage.write_json("a/c/d.json", {"x": 1})
    assert storage.read("a/b.txt") == b"world!"
    assert storage.read_range("a/b.txt", 1, 4) == b"orl"
    assert storage.read_json("a/c/d.json") == {"x": 1}
    assert storage.list("a")["b.txt"] == 6
    assert set(storage.list("a")) == {"b.txt", "c/d.json"}
    assert storage.exists("a/b.txt")
    storage.delete("a")
    storage.delete("a")
    assert not storage.exists("a/b.txt")
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.txt")


def test_streams(storage: Storage) -> None:
    with storage.open("deep/er/file.bin", "wb") as file:
        file.write(b"x" * 100_000)
    with storage.open("deep/er/file.bin") as file:
        assert len(file.read()) == 100_000


def test_wrong_secret(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "llama")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guess")
    config = StorageConfig(url=f"s3://{BUCKET}/wrong", endpoint_url=s3.endpoint_url)
    with pytest.raises(UserError, match=r"storage\.url.*access refused.*AWS_ACCESS_KEY_ID"):
        Storage(config).check_writable()


def test_no_such_bucket() -> None:
    """s3fs's translation of NoSuchBucket (the test server makes buckets as they are named)."""
    config = StorageConfig(url="s3://nowhere/x")
    expected = r"storage\.url: s3://nowhere/x: there is no such bucket"
    with pytest.raises(UserError, match=expected), explained(config):
        raise FileNotFoundError("The specified bucket does not exist")


def test_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    config = StorageConfig(url="s3://bucket/x", endpoint_url="http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached.*storage\.endpoint_url"):
        Storage(config).check_writable()


def test_full_disk_leaves_the_old_file_whole(small_disk: Path) -> None:
    storage = Storage(StorageConfig(url=f"file://{small_disk}"))
    storage.write("file", b"old")
    with pytest.raises(UserError, match=r"storage\.url: .*no space left"):
        storage.write("file", b"x" * 10_000_000)
    assert storage.list("") == {"file": 3}
    assert storage.read("file") == b"old"
