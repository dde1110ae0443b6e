"""Checkpoints of a 134 M LLaMA with its optimizer (1.6 GB), to an S3 server on this machine.

blocked    how long training waits for a save in the background, over how long a synchronous save
           takes (copy, upload, commit)
upload     rate of a synchronous save, over that of the same bytes in a plain multipart upload
download   rate of loading it into the training state, over that of plain ranged reads

One rank. Plain: aiobotocore alone, requests of 16 MiB, 8 at a time, from and to memory. All on the
same server, SeaweedFS, which shares the machine's cores; ours and plain in turn.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from benchmarks.common import (
    Ratio,
    interleaved,
    medians,
    parse_args,
    print_table,
    report,
    run_ranks,
)
from llama_ray.checkpoint.checkpointer import Checkpointer
from llama_ray.checkpoint.manifest import CheckpointInfo
from llama_ray.checkpoint.sharded import load_sharded
from llama_ray.checkpoint.state import State, training_state
from llama_ray.checkpoint.store import CheckpointStore, resolve
from llama_ray.config import ModelConfig, StorageConfig
from llama_ray.config.pretrain import CheckpointConfig, OptimizerConfig
from llama_ray.model import LLaMA
from llama_ray.parallel import initialize
from llama_ray.storage import Storage
from llama_ray.train.allocator import KEEP_FREED_MEMORY
from llama_ray.train.optimizer import build_optimizer
from tests.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, s3_server

FULL = ModelConfig.model_validate({"preset": "134M", "max_seq_len": 512})
SMALL = ModelConfig.model_validate(
    {"dim": 512, "n_layers": 4, "n_heads": 8, "vocab_size": 32_000, "max_seq_len": 512}
)
SEQUENCES, SEQ_LEN = 4, 512
REQUEST_BYTES, IN_FLIGHT = 16 << 20, 8
OBJECT = "plain"


class Plain:
    """Multipart uploads and ranged reads with nothing around them."""

    def __init__(self, endpoint_url: str, size: int) -> None:
        self.endpoint_url = endpoint_url
        self.data = memoryview(torch.randint(256, (size,), dtype=torch.uint8).numpy().data)
        self.pieces = [
            (start, min(start + REQUEST_BYTES, size)) for start in range(0, size, REQUEST_BYTES)
        ]

    def upload(self) -> None:
        asyncio.run(self._with_client(self._upload))

    def download(self) -> None:
        asyncio.run(self._with_client(self._download))

    async def _with_client(self, transfer: Callable[[Any], Any]) -> None:
        config = AioConfig(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            max_pool_connections=IN_FLIGHT,
        )
        async with get_session().create_client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=config,
        ) as client:
            await transfer(client)

    async def _upload(self, client: Any) -> None:
        where = {"Bucket": BUCKET, "Key": OBJECT}
        upload = {**where, "UploadId": (await client.create_multipart_upload(**where))["UploadId"]}
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def send(number: int, start: int, stop: int) -> dict[str, Any]:
            async with slots:
                body = bytes(self.data[start:stop])
                answer = await client.upload_part(**upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        parts = await asyncio.gather(*(send(i, *p) for i, p in enumerate(self.pieces, 1)))
        await client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})

    async def _download(self, client: Any) -> None:
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def read(start: int, stop: int) -> None:
            async with slots:
                part = f"bytes={start}-{stop - 1}"
                answer = await client.get_object(Bucket=BUCKET, Key=OBJECT, Range=part)
                assert len(await answer["Body"].read()) == stop - start

        await asyncio.gather(*(read(*piece) for piece in self.pieces))


class Training:
    """Steps of a model, and its checkpointer."""

    def __init__(self, config: ModelConfig, storage: Storage) -> None:
        self.config, self.storage = config, storage
        self.model = LLaMA(config)
        initialize(self.model, seed=0)
        self.model.dtype = torch.bfloat16
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.state: State = training_state(self.model, self.optimizer)
        store = CheckpointStore(storage, "benchmark")
        self.saver = Checkpointer(store, b"", CheckpointConfig(keep=1))
        self.optimizer.register_step_pre_hook(lambda *_: self.saver.before_update())
        self.tokens = torch.randint(config.vocab_size, (SEQUENCES, SEQ_LEN + 1))
        self.saves = 0

    def step(self) -> None:
        loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:]) / (SEQUENCES * SEQ_LEN)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def begin_save(self) -> None:
        self.saves += 1
        info = CheckpointInfo(
            model=self.config, step=self.saves, tokens_seen=0, tokenizer_sha256=""
        )
        self.saver.save(self.state, info)

    def save(self) -> None:
        self.begin_save()
        self.saver.wait()

    def load(self) -> None:
        load_sharded(self.storage, resolve(self.storage, "runs/benchmark"), self.state)

    def save_while_training(self) -> dict[str, Any]:
        """Blocked seconds, and those of steps before and during a save in the background."""
        before = list(self._steps(lambda n: n < 3))
        blocked, began = self.saver.blocked_seconds, time.perf_counter()
        target = self.saver.committed + 1
        self.begin_save()
        during = list(self._steps(lambda n: self.saver.committed < target))
        return {
            "blocked": self.saver.blocked_seconds - blocked,
            "save": time.perf_counter() - began,
            "before": before,
            "during": during[:-1] or during,  # the last one's end may be undisturbed
        }

    def _steps(self, go_on: Callable[[int], bool]) -> Iterator[float]:
        times = [time.perf_counter()]
        while go_on(len(times) - 1):
            self.step()
            times.append(time.perf_counter())
        yield from (after - before for before, after in pairwise(times))


def measure(rank: int, endpoint_url: str, quick: bool) -> dict[str, Any]:
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    storage = Storage(StorageConfig(url=f"s3://{BUCKET}/checkpoint", endpoint_url=endpoint_url))
    training = Training(SMALL if quick else FULL, storage)
    training.save()
    folder = resolve(storage, "runs/benchmark")
    size = sum(storage.list(folder).values())
    plain = Plain(endpoint_url, size)
    repeats = 2 if quick else 3
    uploads = interleaved({"ours": training.save, "plain": plain.upload}, repeats)
    downloads = interleaved({"ours": training.load, "plain": plain.download}, repeats)
    training.step()  # gradients, and copies of weights in bfloat16, are made
    rounds = [training.save_while_training() for _ in range(repeats)]
    training.saver.close()
    return {"bytes": size, "uploads": uploads, "downloads": downloads, "rounds": rounds}


def main() -> None:
    args = parse_args(__doc__)
    with (
        tempfile.TemporaryDirectory() as folder,
        s3_server(Path(folder), free_ports()) as server,
        mock.patch.dict(os.environ, KEEP_FREED_MEMORY),
    ):
        (found,) = run_ranks(measure, 1, os.cpu_count() or 1, server.endpoint_url, args.quick)
    size, up, down = found["bytes"], medians(found["uploads"]), medians(found["downloads"])
    rounds = found["rounds"]
    blocked = statistics.median(entry["blocked"] for entry in rounds)
    before = statistics.median(t for entry in rounds for t in entry["before"])
    during = statistics.median(t for entry in rounds for t in entry["during"])
    rows = [
        (
            name,
            f"{ours:.2f}",
            f"{size / ours / 1e6:.0f}",
            f"{plain:.2f}",
            f"{size / plain / 1e6:.0f}",
        )
        for name, ours, plain in (
            ("save, synchronous", up["ours"], up["plain"]),
            ("load", down["ours"], down["plain"]),
        )
    ]
    print(f"{size / 1e9:.2f} GB\n")
    print_table(("", "s", "MB/s", "plain s", "plain MB/s"), rows)
    print(
        f"a save while training: blocks it for {blocked * 1e3:.0f} ms; a step takes {before:.2f} s "
        f"before and {during:.2f} s during the upload\n"
    )
    report(
        "checkpoint",
        {
            "blocked": Ratio(blocked / up["ours"], 0.05, "lower", "of a synchronous save's time"),
            "upload": Ratio(
                up["plain"] / up["ours"], 0.8, "higher", "plain multipart upload's rate"
            ),
            "download": Ratio(
                down["plain"] / down["ours"], 0.8, "higher", "plain ranged reads' rate"
            ),
        },
        found | {"step_during_over_before": during / before, "cores": os.cpu_count()},
    )


def free_ports() -> int:
    """The first of the ports that the server takes (five, and five 10,000 above)."""
    for port in range(18_500, 19_500, 10):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


if __name__ == "__main__":
    main()
