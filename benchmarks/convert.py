"""Peak memory of conversions over the size of the largest tensor.

A model of over 20 times its largest tensor (float32), through the jobs `import` and `export`, from
and to files; without --quick also quantized, and from and to an S3 server. Each conversion runs in
a process of its own; its peak is the kernel's (VmHWM, mapped files included), beyond what the
process has when all is imported.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import s3fs  # noqa: F401  # not to be counted
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from benchmarks.common import Ratio, parse_args, print_table, report
from llama_ray.config import ExportConfig, ImportConfig, ModelConfig, StorageConfig
from llama_ray.data.tokenizer import train_tokenizer
from llama_ray.formats import export, import_  # noqa: F401  # not to be counted
from llama_ray.formats.hf_write import write_hf
from llama_ray.formats.place import Place
from llama_ray.formats.source import TensorInfo, expected_shapes
from llama_ray.job import dispatch
from llama_ray.storage import Storage
from tests.s3 import BUCKET, s3_server

TARGET = 3.0
S3_PORT = 18_430


def model_config(quick: bool) -> ModelConfig:
    """0.7 or 2.7 GB, of which embedding and output projection take 34 or 134 MB each."""
    dim = 1024 if quick else 2048
    return ModelConfig.model_validate(
        {"dim": dim, "n_layers": 12, "n_heads": 16, "ffn_hidden_dim": 11 * dim // 4,
         "vocab_size": 8 * dim}
    )  # fmt: skip


class RandomSource:
    """A `WeightSource` whose weights are made when they are read."""

    description = "random"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tokenizer: bytes | None = padded_tokenizer(config.vocab_size)
        self.tensors = {
            name: TensorInfo(shape, torch.float32)
            for name, shape in expected_shapes(config).items()
        }

    def read(self, name: str) -> Tensor:
        return torch.empty(self.tensors[name].shape).uniform_(-1, 1)


def padded_tokenizer(vocab_size: int) -> bytes:
    """A small SentencePiece model, filled up with pieces that occur nowhere."""
    trained = train_tokenizer(["The quick brown fox jumps over the lazy dog."] * 50, 300)
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(trained)
    for number in range(len(model.pieces), vocab_size):
        model.pieces.add(piece=f"\ue000{number}", score=-float(number))
    return bytes(model.SerializeToString())


def write_source(config: ModelConfig, storage: StorageConfig) -> None:
    write_hf(RandomSource(config), Place(Storage(storage), "hf"))


def measured(function: Callable[[], None]) -> tuple[int, float]:
    """Peak bytes of resident memory that the call adds, and seconds, in a fresh process."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(theirs, function))
    process.start()
    theirs.close()
    try:
        peak, seconds = ours.recv()
    except EOFError:
        raise SystemExit("a conversion failed; see above") from None
    process.join()
    return peak, seconds


def _run(connection: Connection, function: Callable[[], None]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = _status("VmRSS"), time.perf_counter()
    function()
    connection.send((_status("VmHWM") - before, time.perf_counter() - start))


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def run_import(storage: StorageConfig, name: str, path: str) -> None:
    dispatch(ImportConfig(name=name, path=path, storage=storage))


def run_export(storage: StorageConfig, name: str, **format: Any) -> None:
    dispatch(ExportConfig(name=name, checkpoint="runs/model", storage=storage, **format))


def conversions(local: StorageConfig, s3: StorageConfig | None) -> dict[str, Callable[[], None]]:
    """In an order in which each finds what it reads."""
    found: dict[str, Callable[[], None]] = {
        "hf_to_ours": partial(run_import, local, "model", "hf"),
        "ours_to_hf": partial(run_export, local, "hf"),
        "ours_to_meta": partial(run_export, local, "meta", format="meta", model_parallel=2),
        "meta_to_ours": partial(run_import, local, "from_meta", "exports/meta"),
        "ours_to_gguf": partial(run_export, local, "gguf", format="gguf"),
    }
    if s3 is not None:
        found["ours_to_q8_0"] = partial(
            run_export, local, "q8_0", format="gguf", quantization="Q8_0"
        )
        found["hf_to_ours_s3"] = partial(run_import, s3, "model", "hf")
        found["ours_to_hf_s3"] = partial(run_export, s3, "hf")
    return found


def main() -> None:
    args = parse_args(__doc__)
    config = model_config(args.quick)
    largest = 4 * config.vocab_size * config.dim
    assert 4 * config.n_params >= 20 * largest
    found: dict[str, tuple[int, float]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        local, s3 = StorageConfig(url=f"file://{folder}/storage"), None
        measured(partial(write_source, config, local))
        if not args.quick:
            server = stack.enter_context(s3_server(Path(folder), S3_PORT))
            os.environ.update(server.env)
            s3 = StorageConfig(url=f"s3://{BUCKET}/storage", endpoint_url=server.endpoint_url)
            measured(partial(write_source, config, s3))
        for name, conversion in conversions(local, s3).items():
            found[name] = measured(conversion)

    size = 4 * config.n_params
    print_table(
        (f"{size / 1e9:.2f} GB, largest {largest / 1e6:.0f} MB", "peak MB", "MB/s"),
        [(name, f"{p / 1e6:.0f}", f"{size / s / 1e6:.0f}") for name, (p, s) in found.items()],
    )
    ratios = {
        name: Ratio(peak / largest, TARGET, "lower", "size of the largest tensor")
        for name, (peak, _) in found.items()
    }
    details = {name: {"peak_bytes": peak, "seconds": s} for name, (peak, s) in found.items()}
    report("convert", ratios, details | {"largest_bytes": largest, "model_bytes": size})


if __name__ == "__main__":
    main()
