"""GGUF: read back by its own library, by transformers, and (where installed) by llama.cpp."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import Regex, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.config import StorageConfig
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.formats.gguf import write_gguf
from llama_ray.formats.gguf_tokenizer import LLAMA3_WORDS
from llama_ray.formats.llama2c import open_llama2c
from llama_ray.formats.place import Place
from llama_ray.formats.source import WeightSource
from llama_ray.model import LLaMA
from llama_ray.storage import Storage
from tests.data.test_tokenizer import TEXTS
from tests.formats.models import Memory, model_config, place, random_source, tokenizer
from tests.s3 import BUCKET, S3Server

Quantization = Literal["Q8_0"]


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return tokenizer()


def our_model(source: WeightSource) -> LLaMA:
    model = LLaMA(source.config)
    weights = {name: source.read(name).float() for name in source.tensors}
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    model.load_state_dict(weights)
    return model


def logits(source: WeightSource, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return our_model(source)(tokens)


def their_logits(folder: Path, file: str, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    with torch.inference_mode():
        return model(tokens).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rounded(source: Memory) -> Memory:
    """To what Q8_0 has of it."""
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    weights = {
        name: torch.tensor(gguf.dequantize(gguf.quantize(weight.float().numpy(), q8_0), q8_0))
        if weight.ndim == 2
        else weight
        for name, weight in source.weights.items()
    }
    return Memory(source.config, source.tokenizer, weights)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        ("F32", torch.float32, None),
        ("F16", torch.float16, None),
        ("BF16", torch.bfloat16, None),
        ("Q8_0", torch.bfloat16, "Q8_0"),
    ],
)
def test_transformers_gives_our_logits_and_ids(
    name: str,
    dtype: torch.dtype,
    quantization: Quantization | None,
    tied: bool,
    pieces: bytes,
    tmp_path: Path,
) -> None:
    source = random_source(model_config(tie_embeddings=tied), pieces, dtype)
    write_gguf(source, place(tmp_path), "tiny", quantization)
    file = f"tiny-{name}.gguf"
    assert [path.name for path in tmp_path.iterdir()] == [file]
    tokens = torch.randint(384, (2, 60), generator=torch.Generator().manual_seed(0))
    found = their_logits(tmp_path, file, tokens)
    expected = source if quantization is None else rounded(source)
    assert relative_error(found, logits(expected, tokens)) <= 1e-5
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file)
    text = "The quick brown fox jumps over 1234567890 dogs."
    assert theirs(text).input_ids == Tokenizer(pieces).encode(text, bos=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_and_key_is_in_the_file(
    dtype: torch.dtype, pieces: bytes, tmp_path: Path
) -> None:
    source = random_source(model_config(), pieces, dtype)
    write_gguf(source, place(tmp_path), "tiny")
    (file,) = tmp_path.iterdir()
    reader = gguf.GGUFReader(file)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.config.n_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(source.tensors)
    for name, weight in source.weights.items():
        tensor = tensors[str(names.get_name(name, try_suffixes=(".weight",)))]
        values = gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        assert np.array_equal(values.reshape(weight.shape), weight.float().numpy()), name
        assert tensor.data_offset % 32 == 0

    def key(name: str) -> Any:
        return reader.fields[name].contents()

    c = source.config
    assert key("general.architecture") == "llama"
    assert key("llama.context_length") == c.max_seq_len
    assert key("llama.attention.head_count_kv") == c.n_kv_heads
    assert key("llama.rope.freq_base") == c.rope_theta
    assert key("llama.attention.layer_norm_rms_epsilon") == pytest.approx(c.norm_eps)
    assert key("tokenizer.ggml.add_bos_token") is True
    assert len(key("tokenizer.ggml.tokens")) == c.vocab_size


def test_q8_0_is_the_librarys_and_rows_it_cannot_cut_stay_float32(tmp_path: Path) -> None:
    source = random_source(model_config(ffn_hidden_dim=172))
    write_gguf(source, place(tmp_path), "tiny", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "tiny-Q8_0.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    gate = source.weights["layers.0.feed_forward.w1.weight"].numpy()
    expected = gguf.quantize(gate, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(tensors["blk.0.ffn_gate.weight"].data, expected)
    down = source.weights["layers.0.feed_forward.w2.weight"].numpy()  # rows of 172
    assert np.array_equal(tensors["blk.0.ffn_down.weight"].data, down)


def test_it_streams_to_object_storage(
    s3: S3Server, pieces: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    source = random_source(model_config(), pieces)
    storage = Storage(StorageConfig(url=f"s3://{BUCKET}/gguf", endpoint_url=s3.endpoint_url))
    write_gguf(source, Place(storage, "tiny"), "tiny")
    write_gguf(source, place(tmp_path), "tiny")
    assert storage.read("tiny/tiny-F32.gguf") == (tmp_path / "tiny-F32.gguf").read_bytes()


def test_of_a_write_that_fails_nothing_is_left(tmp_path: Path) -> None:
    source = random_source(model_config())
    source.weights["layers.2.ffn_norm.weight"][3] = torch.nan
    with pytest.raises(UserError, match=r"layers\.2\.ffn_norm\.weight holds values"):
        write_gguf(source, place(tmp_path / "model"), "tiny")
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


def byte_level(words: str, special: tuple[str, ...] = ("<|endoftext|>",)) -> bytes:
    """A `tokenizer.json` trained here that cuts words as one family does."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=words == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    made.pre_tokenizer = {
        "gpt-2": lambda: plain,
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), plain]
        ),
        "llama-bpe": lambda: pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
        "words": lambda: pre_tokenizers.Whitespace(),
    }[words]()
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=370,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made.to_str().encode()


FAMILIES = ["gpt-2", "smollm", "llama-bpe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_byte_level_bpe_goes_under_its_familys_name(family: str, tmp_path: Path) -> None:
    data = byte_level(family)
    source = random_source(model_config(), data)  # of 384 rows: some are no token's
    write_gguf(source, place(tmp_path), "tiny")
    reader = gguf.GGUFReader(tmp_path / "tiny-F32.gguf")

    def key(name: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    content, ours = json.loads(data), Tokenizer(data)
    assert (key("model"), key("pre")) == ("gpt2", family)
    assert key("tokens")[: ours.vocab_size] == [
        token for token, _ in sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    ]
    assert key("tokens")[-1] == "[PAD383]"
    assert key("token_type")[-1] == gguf.TokenType.UNUSED
    assert key("token_type")[ours.bos_id] == gguf.TokenType.CONTROL
    assert len(key("merges")) == len(content["model"]["merges"])
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny-F32.gguf")
    assert len(theirs.get_vocab()) >= ours.vocab_size


def sentencepiece_model(**options: Any) -> bytes:
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe", "vocab_size": 384, "byte_fallback": True, "hard_vocab_limit": False,
        "normalization_rule_name": "identity", "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "that is not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises characters"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces after words"),
        ({"byte_fallback": False}, "without bytes for unknown characters"),
    ],
)
def test_a_sentencepiece_model_that_llama_cpp_would_run_otherwise_is_refused(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    source = random_source(model_config(vocab_size=500), sentencepiece_model(**options))
    with pytest.raises(UserError, match=f"memory: its tokenizer .*{reason}"):
        write_gguf(source, place(tmp_path / "model"), "tiny")
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("words", lambda content: None),
        ("gpt-2", lambda content: content["pre_tokenizer"].update(add_prefix_space=True)),
        ("gpt-2", lambda content: content.update(normalizer={"type": "NFC"})),
        ("gpt-2", lambda content: content["model"].update(ignore_merges=True)),
        ("llama-bpe", lambda content: content["model"].update(ignore_merges=False)),
        ("llama-bpe", lambda content: first_step(content).update(pattern={"Regex": "x"})),
        ("smollm", lambda content: first_step(content).update(individual_digits=False)),
    ],
)
def test_a_tokenizer_json_that_llama_cpp_has_no_name_for_is_refused(
    family: str, change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    content = json.loads(byte_level(family))
    change(content)
    source = random_source(model_config(), json.dumps(content).encode())
    with pytest.raises(UserError, match="no byte-level BPE that cuts words as"):
        write_gguf(source, place(tmp_path / "model"), "tiny")


def first_step(content: dict[str, Any]) -> dict[str, Any]:
    step: dict[str, Any] = content["pre_tokenizer"]["pretokenizers"][0]
    return step


def test_a_tokenizer_of_another_model_is_refused(pieces: bytes, tmp_path: Path) -> None:
    source = random_source(model_config(vocab_size=300), pieces)
    with pytest.raises(UserError, match="has 384 pieces, the model 300"):
        write_gguf(source, place(tmp_path / "model"), "tiny")


def greedy(source: WeightSource, ids: list[int], n_tokens: int) -> list[int]:
    model = our_model(source)
    with torch.inference_mode():
        for _ in range(n_tokens):
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids


def test_a_story_is_the_same_through_transformers(shared: Path, tmp_path: Path) -> None:
    models = shared / "models/stories260K"
    source = open_llama2c(place(models / "stories260K.bin"), (models / "tok512.model").read_bytes())
    write_gguf(source, place(tmp_path), "stories")
    ids = Tokenizer(source.tokenizer or b"").encode("Once upon a time", bos=True)
    file = "stories-F32.gguf"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file, dtype=torch.float32)
    told = model.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0].tolist()
    assert told == greedy(source, ids, 60)
