"""Storage on disk and on a real S3 server: the same behaviour, and errors that name the key."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs

from llama_ray.config import StorageConfig
from llama_ray.errors import UserError
from llama_ray.storage import Storage, read_file
from tests.s3 import BUCKET, S3Server
from tests.s3_proxy import (
    FORBIDDEN,
    INTERNAL_ERROR,
    LOST_ANSWER,
    RESET,
    SLOW_DOWN,
    S3Proxy,
    once,
    s3_proxy,
)


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


def test_wrong_secret(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "llama")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guess")
    config = StorageConfig(url=f"s3://{BUCKET}/wrong", endpoint_url=s3.endpoint_url)
    with pytest.raises(UserError, match=r"storage\.url.*access refused.*AWS_ACCESS_KEY_ID"):
        Storage(config).check_writable()


def test_no_such_bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from, for this server makes buckets as they are written to."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    config = StorageConfig(url="s3://nowhere/x", endpoint_url=s3.endpoint_url)
    with pytest.raises(UserError, match=r"storage\.url: s3://nowhere/x: there is no such bucket"):
        Storage(config).read("file")


def test_a_named_file_is_read_from_the_same_server(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `storage.url` itself is local."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    remote = StorageConfig(url=f"s3://{BUCKET}/named", endpoint_url=s3.endpoint_url)
    Storage(remote).write("model", b"pieces")
    local = StorageConfig(url=f"file://{tmp_path}", endpoint_url=s3.endpoint_url)
    assert read_file(f"s3://{BUCKET}/named/model", local, "tokenizer") == b"pieces"
    with pytest.raises(UserError, match=r"tokenizer: s3://.*/none does not exist"):
        read_file(f"s3://{BUCKET}/named/none", local, "tokenizer")
    (tmp_path / "here").write_bytes(b"local")
    assert read_file(str(tmp_path / "here"), local, "tokenizer") == b"local"


def test_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job says so in its first seconds, and does not wait as it would later."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    storage = Storage(StorageConfig(url="s3://bucket/x", endpoint_url="http://127.0.0.1:9"))
    for check in (storage.check_writable, storage.check_reachable):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"cannot be reached.*storage\.endpoint_url"):
            check()
        assert time.monotonic() - began < 20


@pytest.fixture
def proxied(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Storage, S3Proxy]]:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    with s3_proxy(s3.endpoint_url) as proxy:
        url = f"s3://{BUCKET}/{tmp_path.name}"
        yield Storage(StorageConfig(url=url, endpoint_url=proxy.endpoint_url)), proxy


REQUESTS: dict[str, Callable[[Storage], object]] = {
    "write": lambda storage: storage.write("b", b"new"),
    "read": lambda storage: storage.read("a"),
    "read_range": lambda storage: storage.read_range("a", 1, 3),
    "exists": lambda storage: storage.exists("a"),
    "list": lambda storage: storage.list(""),
    "delete": lambda storage: storage.delete("c"),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_each_request_is_repeated_once_for_each_failure(
    proxied: tuple[Storage, S3Proxy], request_: str
) -> None:
    """And not by s3fs and botocore as well."""
    storage, proxy = proxied
    storage.write("a", b"there")
    proxy.requests.clear()
    expected = REQUESTS[request_](storage)
    plain = len(proxy.requests)
    for fault in (SLOW_DOWN, INTERNAL_ERROR, RESET, LOST_ANSWER):
        proxy.requests.clear()
        proxy.rule = once(fault)
        assert REQUESTS[request_](storage) == expected
        assert len(proxy.requests) == plain + 1


def test_storage_is_away_for_a_while(proxied: tuple[Storage, S3Proxy]) -> None:
    storage, proxy = proxied
    storage.write("a", b"there")
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        with proxy.down():
            waiting = [threads.submit(request, storage) for request in REQUESTS.values()]
            time.sleep(1)
            assert not any(request.done() for request in waiting)
        for request in waiting:
            request.result()
    assert storage.read("b") == b"new"


def test_storage_is_away_for_too_long(proxied: tuple[Storage, S3Proxy]) -> None:
    storage, proxy = proxied
    storage = Storage(storage.config.model_copy(update={"retry_seconds": 1.5}))
    began = time.monotonic()
    with (
        proxy.down(),
        pytest.raises(UserError, match=r"storage\.url: .*cannot be reached.*\(tried for \d+ s\)"),
    ):
        storage.read("a")
    assert time.monotonic() - began < 15
    proxy.rule = lambda request: SLOW_DOWN
    with pytest.raises(UserError, match=r"overloaded \(503 SlowDown: told to\) \(tried for"):
        storage.write("a", b"x")


def test_what_is_refused_is_not_repeated(proxied: tuple[Storage, S3Proxy]) -> None:
    storage, proxy = proxied
    proxy.rule = lambda request: FORBIDDEN
    with pytest.raises(UserError, match="access refused"):
        storage.write("a", b"x")
    proxy.rule = lambda request: None
    with pytest.raises(FileNotFoundError):
        storage.read("a")
    assert [request.method for request in proxy.requests] == ["PUT", "HEAD", "GET"]


def test_full_disk_leaves_the_old_file_whole(small_disk: Path) -> None:
    storage = Storage(StorageConfig(url=f"file://{small_disk}"))
    storage.write("file", b"old")
    with pytest.raises(UserError, match=r"storage\.url: .*no space left"):
        storage.write("file", b"x" * 10_000_000)
    assert storage.list("") == {"file": 3}
    assert storage.read("file") == b"old"
