"""GGUF in llama.cpp itself: same ids, logits and text. Runs where `pip install llama-cpp-python`
has been done, which builds from source in some 8 minutes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.formats.gguf import write_gguf
from llama_ray.formats.llama2c import open_llama2c
from llama_ray.formats.source import as_dtype
from llama_ray.model import LLaMA
from tests.data.test_tokenizer import TEXTS
from tests.formats.models import TEXT, Memory, model_config, place, random_source, tokenizer
from tests.formats.test_gguf import (
    FAMILIES,
    Quantization,
    byte_level,
    greedy,
    logits,
    relative_error,
)

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow
# Its threads spin while they wait for each other, which where cores are shared takes minutes.
LLAMA_CPP = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "Q8_0")],
)
def test_llama_cpp_tells_the_same_story(
    dtype: torch.dtype, quantization: Quantization | None, shared: Path, tmp_path: Path
) -> None:
    models = shared / "models/stories260K"
    pieces = (models / "tok512.model").read_bytes()
    source = open_llama2c(place(models / "stories260K.bin"), pieces)
    write_gguf(as_dtype(source, dtype), place(tmp_path), "stories", quantization)
    (file,) = tmp_path.iterdir()
    llama = llama_cpp.Llama(str(file), **LLAMA_CPP)
    prompt = "Once upon a time"
    told = llama(prompt, max_tokens=100, temperature=0)["choices"][0]["text"]
    llama.close()
    ids = greedy(source, Tokenizer(pieces).encode(prompt, bos=True), 100)
    assert prompt + told == Tokenizer(pieces).decode(ids)


def test_llama_cpp_says_what_a_model_trained_here_says(tmp_path: Path) -> None:
    """Untied, a key for each query, byte-level BPE: what the stories' model has not."""
    data = byte_level("smollm")
    pieces = Tokenizer(data)
    model = LLaMA(model_config(n_kv_heads=8, rope_theta=10_000.0))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        std = model.init_std(name)
        torch.nn.init.ones_(parameter) if std is None else torch.nn.init.normal_(parameter, std=std)
    ids = torch.tensor([pieces.encode(TEXT, bos=True)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]) / ids.numel()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    weights = {name: value.detach() for name, value in model.named_parameters()}
    write_gguf(Memory(model.config, data, weights), place(tmp_path), "tiny")
    llama = llama_cpp.Llama(str(tmp_path / "tiny-F32.gguf"), **LLAMA_CPP)
    told = llama("The quick", max_tokens=ids.shape[1] - 10, temperature=0)["choices"][0]["text"]
    llama.close()
    assert len(told) > 40
    assert TEXT.startswith("The quick" + told)


@pytest.mark.parametrize("kind", ["sentencepiece", "llama", *FAMILIES])
def test_llama_cpp_gives_our_ids_and_logits(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "sentencepiece":
        data = tokenizer()
    elif kind == "llama":
        data = (request.getfixturevalue("shared") / "models/llama_tokenizer.model").read_bytes()
    else:
        data = byte_level(kind)
    source = random_source(model_config(vocab_size=max(384, Tokenizer(data).vocab_size)), data)
    write_gguf(source, place(tmp_path), "tiny")
    llama = llama_cpp.Llama(str(tmp_path / "tiny-F32.gguf"), logits_all=True, **LLAMA_CPP)
    ours = Tokenizer(data)
    rng = random.Random(0)
    alphabet = "abcdef THE  quick 0123456789 .,;'\"!? \n\tüñ漢字🙂"
    texts = [*TEXTS[:20], *("".join(rng.choices(alphabet, k=60)) for _ in range(100))]
    for text in texts:
        assert llama.tokenize(text.encode(), add_bos=True) == ours.encode(text, bos=True), text
    ids = ours.encode("The quick brown fox", bos=True)
    llama.eval(ids)
    found = torch.tensor(np.array(llama.scores[: len(ids)]))
    llama.close()
    assert relative_error(found, logits(source, torch.tensor([ids]))[0]) <= 1e-2
