"""Hugging Face's format, both ways: bitwise, and with the logits of transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.data.tokenizer_json import with_marks
from llama_ray.formats.hf_read import HuggingFaceSource
from llama_ray.formats.hf_write import write_hf
from llama_ray.formats.source import WeightSource
from llama_ray.model import LLaMA
from tests.data.test_tokenizer_json import byte_level
from tests.formats.models import Memory, assert_same, model_config, place, random_source, tokenizer


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return tokenizer()


def our_logits(source: WeightSource, tokens: torch.Tensor) -> torch.Tensor:
    model = LLaMA(source.config)
    weights = {name: source.read(name).float() for name in source.tensors}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    model.load_state_dict(weights)
    with torch.inference_mode():
        return model(tokens)


def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(tokens).logits


def assert_equal_logits(source: WeightSource, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(source.config.vocab_size, (2, 100), generator=generator)
    theirs = their_logits(folder, tokens)
    difference = float((our_logits(source, tokens) - theirs).abs().max() / theirs.abs().max())
    assert difference <= 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_kv_heads", [8, 2], ids=["mha", "gqa"])
def test_transformers_loads_what_is_written(
    tied: bool, n_kv_heads: int, pieces: bytes, tmp_path: Path
) -> None:
    config = model_config(tie_embeddings=tied, n_kv_heads=n_kv_heads)
    source = random_source(config, pieces)
    write_hf(source, place(tmp_path / "hf"))
    assert_equal_logits(source, tmp_path / "hf")
    assert_same(HuggingFaceSource(place(tmp_path / "hf"), None), source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_hold_every_weight_once_in_its_type(
    dtype: torch.dtype, pieces: bytes, tmp_path: Path
) -> None:
    source = random_source(model_config(), pieces, dtype)
    write_hf(source, place(tmp_path / "hf"), shard_bytes=100_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 2
    held = []
    for file in files:
        assert file.stat().st_size < 102_000 or len(safe_open(file, "pt").keys()) == 1
        held += [(name, file.name) for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert sorted(held) == sorted(index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(i.nbytes for i in source.tensors.values())
    assert_same(HuggingFaceSource(place(tmp_path / "hf"), None), source)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_what_transformers_saves_is_read(tmp_path: Path, pieces: bytes) -> None:
    source = random_source(model_config(tie_embeddings=True), pieces)
    write_hf(source, place(tmp_path / "ours"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    found = HuggingFaceSource(place(tmp_path / "theirs"), None)
    assert found.tokenizer is None
    assert_same(found, source)


def test_types_may_differ_between_weights(tmp_path: Path) -> None:
    weights = random_source(model_config()).weights
    mixed = {n: w if "norm" in n else w.bfloat16() for n, w in weights.items()}
    source = Memory(model_config(), None, mixed)
    write_hf(source, place(tmp_path / "hf"))
    assert_same(HuggingFaceSource(place(tmp_path / "hf"), None), source)
    assert_equal_logits(source, tmp_path / "hf")


def texts() -> list[str]:
    rng = random.Random(0)
    junk = ["".join(rng.choices(" \n\taeT1.,é▁日🙂</s>", k=200)) for _ in range(50)]
    code = Path(__file__).read_text()
    return ["Hello world", " leading", "  two  spaces ", "", " ", " " * 33, "▁under", code, *junk]


def assert_same_ids(folder: Path, ours: Tokenizer) -> None:
    """Both put BOS first, and nothing last."""
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in texts():
        ids = ours.encode(text, bos=True)
        # `</s>` in a text is text.
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)


def test_a_sentencepiece_tokenizer_gives_the_same_ids(pieces: bytes, tmp_path: Path) -> None:
    write_hf(random_source(model_config(), pieces), place(tmp_path / "hf"))
    assert_same_ids(tmp_path / "hf", Tokenizer(pieces))
    assert HuggingFaceSource(place(tmp_path / "hf"), None).tokenizer == pieces


@pytest.mark.parametrize(
    "file", ["llama_tokenizer.model", pytest.param("stories260K/tok512.model", id="takes spaces")]
)
def test_trained_tokenizers_give_the_same_ids(file: str, shared: Path, tmp_path: Path) -> None:
    """LLaMA's, and one that takes runs of spaces for one space, and those at the ends for none."""
    data = (shared / "models" / file).read_bytes()
    trained = Tokenizer(data)
    config = model_config(vocab_size=trained.vocab_size)
    write_hf(random_source(config, data), place(tmp_path / "hf"))
    assert_same_ids(tmp_path / "hf", trained)


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def test_a_tokenizer_json_goes_and_comes_back_the_same(tmp_path: Path) -> None:
    """`<|eot_id|>` as EOS is no well-known choice: it is written into the file (`with_marks`), in a
    way that transformers would put it after every prompt."""
    unmarked = byte_level(LLAMA3)
    ours = with_marks(unmarked, "<|begin_of_text|>", "<|eot_id|>", "here")
    assert ours != unmarked
    for data in (ours, byte_level(LLAMA3, "<|begin_of_text|> $A")):
        tokenizer = Tokenizer(data)
        folder = tmp_path / tokenizer.sha256
        config = model_config(vocab_size=tokenizer.vocab_size)
        write_hf(random_source(config, data), place(folder))
        assert_same_ids(folder, tokenizer)
        assert HuggingFaceSource(place(folder), None).tokenizer == data


def test_new_tokens_are_in_tokenizer_json_alone(pieces: bytes, tmp_path: Path) -> None:
    """As fine-tuning leaves them: `tokenizer.model` is of the model before it."""
    write_hf(random_source(model_config(), pieces), place(tmp_path / "hf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs.add_special_tokens({"pad_token": "<pad>"})
    write_hf(random_source(model_config(vocab_size=385)), place(tmp_path / "tuned"))
    theirs.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned/tokenizer.model").write_bytes(pieces)
    found = HuggingFaceSource(place(tmp_path / "tuned"), None)
    assert found.tokenizer is not None
    ours = Tokenizer(found.tokenizer)
    assert ours.vocab_size == 385
    assert ours.encode("fox", bos=True) == theirs("fox")["input_ids"]
