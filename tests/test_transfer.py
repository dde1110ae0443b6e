"""Large files against a real S3 server behind a proxy that goes wrong in every way and place."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3fs

import llama_ray.s3
import llama_ray.transfer
import llama_ray.upload
from llama_ray.config import StorageConfig
from llama_ray.errors import UserError
from llama_ray.storage import Storage
from llama_ray.transfer import (
    Range,
    abort_stale_uploads,
    download,
    open_upload,
    put_if_absent,
    upload,
)
from tests.s3 import BUCKET, S3Server
from tests.s3_proxy import (
    FORBIDDEN,
    INTERNAL_ERROR,
    LOST_ANSWER,
    RESET,
    SLOW_DOWN,
    Fault,
    Request,
    S3Proxy,
    once,
    s3_proxy,
)

PART = 5 << 20  # the least that S3 takes
DATA = random.Random(0).randbytes(3 * PART - 1)
"""Three parts."""

FAULTS = {
    "slow down": SLOW_DOWN,
    "too many": Fault(status=429),
    "internal error": INTERNAL_ERROR,
    "reset": RESET,
    "lost answer": LOST_ANSWER,
    "cut": Fault(cut=10),
    "stuck": Fault(stall=30),
}


def marked(faults: Iterable[str]) -> list[Any]:
    """Those that have to be waited for are slow tests."""
    slow = pytest.mark.slow
    return [
        pytest.param(name, marks=slow) if name in ("stuck", "trickle") else name for name in faults
    ]


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with s3_proxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def remote(
    proxy: S3Proxy, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    """An empty folder behind the proxy, with parts of `PART` bytes."""
    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    for module, name in (
        (llama_ray.upload, "PART_BYTES"),
        (llama_ray.upload, "STREAM_PART_BYTES"),
        (llama_ray.transfer, "REQUEST_BYTES"),
    ):
        monkeypatch.setattr(module, name, PART)
    proxy.rule = lambda request: None
    proxy.requests.clear()
    return Storage(
        StorageConfig(url=f"s3://{BUCKET}/{tmp_path.name}", endpoint_url=proxy.endpoint_url)
    )


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests count as stuck after 2 s, or 3 s where they send or fetch a part."""
    monkeypatch.setattr(llama_ray.s3, "GRACE_SECONDS", 2.0)
    monkeypatch.setattr(llama_ray.s3, "SLOWEST_BYTES_PER_SECOND", PART)


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "file":
        return Storage(StorageConfig(url=f"file://{tmp_path}"))
    remote: Storage = request.getfixturevalue("remote")
    return remote


def pending(storage: Storage) -> int:
    """Multipart uploads that were begun and neither completed nor aborted."""
    bucket, _, prefix = storage.root.partition("/")
    found = storage.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    return len(found.get("Uploads", []))


def upload_at_once(storage: Storage, relative: str) -> None:
    view = memoryview(DATA)
    upload(storage, relative, [view[:10], b"", view[10 : PART + 5], bytearray(view[PART + 5 :])])


def upload_by_and_by(storage: Storage, relative: str) -> None:
    with open_upload(storage, relative) as out:
        buffer = bytearray(7_777)
        for start in range(0, len(DATA), len(buffer)):
            piece = DATA[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            out.write(memoryview(buffer)[: len(piece)])


def download_again(storage: Storage, relative: str) -> bytes:
    into = bytearray(len(DATA))
    view = memoryview(into)
    cuts = [0, 5, 2 * PART + 9, len(DATA)]
    ranges = [Range(relative, a, b) for a, b in itertools.pairwise(cuts)]
    download(storage, ranges, [view[r.start : r.stop] for r in ranges])
    return bytes(into)


@pytest.mark.parametrize("send", [upload_at_once, upload_by_and_by])
def test_what_is_uploaded_comes_back(storage: Storage, send: Callable[..., None]) -> None:
    send(storage, "a/b")
    assert storage.list("") == {"a/b": len(DATA)}
    assert storage.read("a/b") == DATA == download_again(storage, "a/b")
    send(storage, "a/b")
    assert storage.read("a/b") == DATA


def test_files_without_bytes_and_of_one_part(storage: Storage) -> None:
    for size in (0, 1, PART, PART + 1, 2 * PART):
        upload(storage, f"u{size}", [DATA[:size]])
        with open_upload(storage, f"o{size}") as out:
            out.write(DATA[:size])
        assert storage.read(f"u{size}") == storage.read(f"o{size}") == DATA[:size]
    download(storage, [], [])
    download(storage, [Range("u1", 0, 0)], [bytearray()])


@pytest.mark.parametrize("send", [upload_at_once, upload_by_and_by])
def test_three_parts_are_five_requests(
    remote: Storage, proxy: S3Proxy, send: Callable[..., None]
) -> None:
    send(remote, "a")
    assert [r.method for r in proxy.requests] == ["POST", "PUT", "PUT", "PUT", "POST"]
    proxy.requests.clear()
    assert download_again(remote, "a") == DATA
    assert [r.method for r in proxy.requests] == ["GET"] * 5


@pytest.mark.parametrize("fault", marked(FAULTS))
@pytest.mark.usefixtures("impatient")
def test_an_upload_survives_a_fault_at_the_first_middle_and_last_request(
    remote: Storage, proxy: S3Proxy, fault: str
) -> None:
    for at in (0, 2, 4):
        proxy.rule = once(FAULTS[fault], at)
        upload_at_once(remote, f"at-{at}")
        proxy.rule = lambda request: None
        assert remote.read(f"at-{at}") == DATA
    assert pending(remote) == 0


def test_a_written_upload_survives_a_lost_answer_at_any_request(
    remote: Storage, proxy: S3Proxy
) -> None:
    for at in range(5):
        proxy.rule = once(LOST_ANSWER, at)
        upload_by_and_by(remote, f"at-{at}")
        proxy.rule = lambda request: None
        assert remote.read(f"at-{at}") == DATA
    assert pending(remote) == 0


@pytest.mark.parametrize("fault", marked([*FAULTS, "cut late", "trickle"]))
@pytest.mark.usefixtures("impatient")
def test_a_download_survives_a_fault_at_the_first_middle_and_last_request(
    remote: Storage, proxy: S3Proxy, fault: str
) -> None:
    faults = FAULTS | {
        "cut late": Fault(cut=PART - 20),
        "trickle": Fault(bytes_per_second=10_000),
    }
    upload_at_once(remote, "a")
    for at in range(3):
        proxy.requests.clear()
        proxy.rule = once(faults[fault], at, where=lambda request: n_wanted(request) > 10)
        assert download_again(remote, "a") == DATA
        assert len(proxy.requests) > 5


def is_transfer(request: Request) -> bool:
    """Whether it sends or fetches bytes."""
    return request.method == "PUT" or "range" in request.headers


def n_wanted(request: Request) -> int:
    """Bytes of the range that is asked for."""
    first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1


def test_many_threads_meet_many_faults(remote: Storage, proxy: S3Proxy) -> None:
    chance = random.Random(1)
    proxy.rule = lambda request: (
        chance.choice([SLOW_DOWN, RESET, LOST_ANSWER]) if chance.random() < 0.2 else None
    )

    def there_and_back(name: str) -> bool:
        upload_at_once(remote, name)
        return download_again(remote, name) == DATA

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(there_and_back, [f"t{i}" for i in range(12)]))
    proxy.rule = lambda request: None
    assert remote.list("") == {f"t{i}": len(DATA) for i in range(12)}
    assert pending(remote) == 0


def test_storage_may_be_away_for_a_while(
    remote: Storage, proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Also between the parts of an upload."""

    def away() -> None:
        with proxy.down():
            time.sleep(1.5)

    outage: list[threading.Thread] = []

    def rule(request: object) -> None:
        if len(proxy.requests) == 3:
            outage.append(threading.Thread(target=away))
            outage[0].start()

    proxy.rule = rule
    upload_by_and_by(remote, "a")
    outage[0].join()
    assert download_again(remote, "a") == DATA
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines
    assert "trying again for up to 300 s" in lines[0]
    assert lines[0].startswith(f"storage.url: {remote.config.url}: ")
    assert "works again" in lines[1]


@pytest.mark.parametrize("send", [upload_at_once, upload_by_and_by])
@pytest.mark.parametrize("at", ["create", "part", "complete"])
def test_an_upload_that_is_given_up_leaves_nothing(
    remote: Storage, proxy: S3Proxy, send: Callable[..., None], at: str
) -> None:
    remote = Storage(remote.config.model_copy(update={"retry_seconds": 1.0}))
    proxy.rule = lambda request: (
        SLOW_DOWN
        if (at == "part" and request.query.get("partNumber") == "2")
        or (at == "create" and "uploads" in request.query and request.method == "POST")
        or (at == "complete" and request.method == "POST" and "uploadId" in request.query)
        else None
    )
    began = time.monotonic()
    with pytest.raises(UserError, match=r"storage\.url: .*503 SlowDown.*\(tried for \d+ s\)"):
        send(remote, "a")
    assert time.monotonic() - began < 15
    assert remote.list("") == {}
    assert pending(remote) == 0


def test_an_upload_whose_block_fails_leaves_nothing(storage: Storage) -> None:
    def fail() -> None:
        with open_upload(storage, "a") as out:
            out.write(DATA)
            raise PermissionError("of the writer's own")

    with pytest.raises(PermissionError, match="of the writer's own"):
        fail()
    assert storage.list("") == {}
    if storage.scheme == "s3":
        assert pending(storage) == 0


@pytest.mark.parametrize("fault", [Fault(stall=30), SLOW_DOWN], ids=["stuck", "refused"])
def test_a_deadline_ends_it(remote: Storage, proxy: S3Proxy, fault: Fault) -> None:
    upload_at_once(remote, "there")
    view = memoryview(bytearray(len(DATA)))
    for transfer in (
        partial(upload, remote, "a", [DATA]),
        partial(upload, remote, "one-put", [DATA[:9]]),
        partial(download, remote, [Range("there", 0, len(DATA))], [view]),
    ):
        proxy.rule = lambda request: fault if is_transfer(request) else None
        began = time.monotonic()
        with pytest.raises(UserError, match=r"storage\.url: .*\(tried for \d+ s\)"):
            transfer(deadline=began + 1)
        assert time.monotonic() - began < 15
        proxy.rule = lambda request: None
    # The server may have got the put whose answer is held back.
    assert set(remote.list("")) - {"one-put"} == {"there"}
    assert pending(remote) == 0


def test_what_is_refused_for_good_fails_at_once(remote: Storage, proxy: S3Proxy) -> None:
    proxy.rule = lambda request: FORBIDDEN if request.is_part else None
    with pytest.raises(UserError, match=r"storage\.url: .*access refused"):
        upload_at_once(remote, "a")
    assert sum(request.is_part for request in proxy.requests) <= 3
    assert pending(remote) == 0
    proxy.requests.clear()
    proxy.rule = lambda request: FORBIDDEN
    with pytest.raises(UserError, match=r"storage\.url: .*access refused"):
        download_again(remote, "a")
    assert len(proxy.requests) <= 5


def test_a_full_disk_is_told_at_once_and_left_clean(small_disk: Path) -> None:
    storage = Storage(StorageConfig(url=f"file://{small_disk}"))

    def write() -> None:
        with open_upload(storage, "a") as out:
            for _ in range(100):
                out.write(bytes(100_000))

    began = time.monotonic()
    for transfer in (partial(upload, storage, "a", [bytes(10_000_000)]), write):
        with pytest.raises(UserError, match=r"storage\.url: .*no space left"):
            transfer()
        assert storage.list("") == {}
    assert time.monotonic() - began < 15


def test_missing_and_short_files_are_named(storage: Storage) -> None:
    upload(storage, "short", [DATA[:1000]])
    for start in (0, 999, 1000, 5000):
        into = bytearray(1001)
        with pytest.raises(UserError, match=r"short is damaged: it ends before byte"):
            download(storage, [Range("short", start, start + 1001)], [into])
    with pytest.raises(FileNotFoundError, match="none"):
        download(storage, [Range("none", 0, 10)], [bytearray(10)])


def test_a_killed_upload_is_cleaned_up(storage: Storage) -> None:
    """And none of another folder whose name begins alike. The writer is a fork, that uses its
    parent's storage."""
    for file in ("a/b/killed", "ab/other"):
        child = os.fork()
        if not child:
            with open_upload(storage, file) as out:
                out.write(DATA)
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    upload(storage, "a/whole", [DATA])
    assert {"a/b/killed", "ab/other"} & set(storage.list("")) == set()
    assert abort_stale_uploads(storage, "a") == 1
    assert abort_stale_uploads(storage, "a") == 0
    assert storage.list("a") == {"whole": len(DATA)}
    assert abort_stale_uploads(storage, "ab") == 1


def test_memory_is_bounded_by_a_few_parts(remote: Storage, s3: S3Server) -> None:
    direct = Storage(remote.config.model_copy(update={"endpoint_url": s3.endpoint_url}))
    buffer, n_buffers = bytes(PART // 3), 60
    upload(direct, "a", [b"warm"])  # botocore's models are some 10 MB
    tracemalloc.start()
    try:
        with open_upload(direct, "a") as out:
            for _ in range(n_buffers):
                out.write(buffer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert remote.list("") == {"a": n_buffers * len(buffer)}
    # Those on their way, the one being filled, and what signing and sending hold of each.
    assert peak < 1.5 * (llama_ray.upload.STREAM_IN_FLIGHT + 1) * PART


def test_one_of_many_puts_wins(storage: Storage) -> None:
    for round_ in range(4):
        names = [f"writer {i}".encode() for i in range(8)]
        start = threading.Barrier(8)

        def put(
            data: bytes, start: threading.Barrier = start, file: str = f"marker-{round_}"
        ) -> bool:
            start.wait()
            return put_if_absent(storage, file, data)

        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(put, names))
        assert sum(won) == 1
        assert storage.read(f"marker-{round_}") == names[won.index(True)]
        assert not put_if_absent(storage, f"marker-{round_}", b"late")
    assert set(storage.list("")) == {f"marker-{i}" for i in range(4)}


@pytest.mark.parametrize("fault", [SLOW_DOWN, RESET, LOST_ANSWER, Fault(status=501)])
def test_a_put_whose_answer_is_lost_has_won(remote: Storage, proxy: S3Proxy, fault: Fault) -> None:
    """501: the server knows no conditional puts."""
    proxy.rule = once(fault, where=lambda request: request.method == "PUT")
    assert put_if_absent(remote, "a", b"mine")
    assert not put_if_absent(remote, "a", b"other")
    assert remote.read("a") == b"mine"


def test_other_filesystems_of_fsspec() -> None:
    storage = Storage(
        StorageConfig.model_construct(
            url="memory:///transfer", retry_seconds=1.0, endpoint_url=None
        )
    )
    test_what_is_uploaded_comes_back(storage, upload_by_and_by)
