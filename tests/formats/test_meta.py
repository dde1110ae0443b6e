"""Meta's original files, both ways: against fairscale's layers, bitwise, in object storage."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize_model_parallel
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llama_ray.config import StorageConfig
from llama_ray.config.model import PRESETS, ModelConfig
from llama_ray.data.tokenizer import Tokenizer
from llama_ray.data.tokenizer_json import with_marks
from llama_ray.errors import UserError
from llama_ray.formats.meta import open_meta
from llama_ray.formats.meta_params import ffn_rule
from llama_ray.formats.meta_write import write_meta
from llama_ray.formats.place import Place
from llama_ray.formats.source import WeightSource
from llama_ray.model import LLaMA
from llama_ray.storage import Storage
from tests.data.test_tokenizer_json import byte_level
from tests.distributed import run_distributed
from tests.formats.models import Memory, assert_same, model_config, place, random_source, tokenizer
from tests.s3 import BUCKET, S3Server

# Which no file of Meta's tells.
LONGEST = {"max_seq_len": 2048}


class MetasModel(nn.Module):
    """LLaMA of fairscale's layers, with the names and rotation of Meta's code."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], vocabulary_parallel: bool
    ) -> None:
        super().__init__()
        self.config = config
        c, kv_dim = config, config.n_kv_heads * config.head_dim

        def given(name: str) -> Callable[[Tensor], Tensor]:
            return lambda tensor: tensor.data.copy_(weights[name])

        def column(name: str, n_in: int, n_out: int, gather: bool = False) -> nn.Module:
            return ColumnParallelLinear(
                n_in, n_out, bias=False, gather_output=gather, init_method=given(name)
            )

        def row(name: str, n_in: int, n_out: int) -> nn.Module:
            return RowParallelLinear(
                n_in, n_out, bias=False, input_is_parallel=True, init_method=given(name)
            )

        def norm(name: str) -> nn.Module:
            module = nn.RMSNorm(c.dim, c.norm_eps)
            module.weight.data.copy_(weights[name])
            return module

        embedding = VocabParallelEmbedding if vocabulary_parallel else ParallelEmbedding
        name = "tok_embeddings.weight"
        self.tok_embeddings = embedding(c.vocab_size, c.dim, init_method=given(name))
        self.norm = norm("norm.weight")
        self.output = column("output.weight", c.dim, c.vocab_size, gather=True)
        self.layers = nn.ModuleList()
        for i in range(c.n_layers):
            layer, at = nn.Module(), f"layers.{i}"
            layer.attention, layer.feed_forward = nn.Module(), nn.Module()
            layer.attention.wq = column(f"{at}.attention.wq.weight", c.dim, c.dim)
            layer.attention.wk = column(f"{at}.attention.wk.weight", c.dim, kv_dim)
            layer.attention.wv = column(f"{at}.attention.wv.weight", c.dim, kv_dim)
            layer.attention.wo = row(f"{at}.attention.wo.weight", c.dim, c.dim)
            hidden = c.ffn_hidden_dim
            layer.feed_forward.w1 = column(f"{at}.feed_forward.w1.weight", c.dim, hidden)
            layer.feed_forward.w2 = row(f"{at}.feed_forward.w2.weight", hidden, c.dim)
            layer.feed_forward.w3 = column(f"{at}.feed_forward.w3.weight", c.dim, hidden)
            layer.attention_norm = norm(f"{at}.attention_norm.weight")
            layer.ffn_norm = norm(f"{at}.ffn_norm.weight")
            self.layers.append(layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,S] → logits [B,S,V]."""
        x, e = self.tok_embeddings(tokens), self.config.head_dim
        for layer in self.layers:
            y, attention = layer.attention_norm(x), layer.attention
            q, k, v = (
                w(y).unflatten(-1, (-1, e)) for w in (attention.wq, attention.wk, attention.wv)
            )
            groups = q.shape[2] // k.shape[2]
            q, k = self.rotate(q), self.rotate(k)
            k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + attention.wo(y.transpose(1, 2).flatten(2))
            y, ffn = layer.ffn_norm(x), layer.feed_forward
            x = x + ffn.w2(F.silu(ffn.w1(y)) * ffn.w3(y))
        return self.output(self.norm(x))

    def rotate(self, x: Tensor) -> Tensor:
        """[B,S,H,E]: neighbours as complex numbers, as in Meta's code."""
        s, e = x.shape[1], x.shape[3]
        frequencies = self.config.rope_theta ** -(torch.arange(0, e, 2) / e)
        angles = torch.outer(torch.arange(s), frequencies)[:, None]
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(3)


def save_as_meta(rank: int, folder: str, config: ModelConfig, vocabulary_parallel: bool) -> None:
    """One process of a training: saves its share, and then loads and compares what we wrote."""
    initialize_model_parallel(torch.distributed.get_world_size())
    weights = torch.load(f"{folder}/weights.pt", weights_only=True)
    model = MetasModel(config, weights, vocabulary_parallel)
    tokens = torch.randint(config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    freqs = torch.ones(config.head_dim // 2)
    saved = model.state_dict() | {"rope.freqs": freqs}
    for i in range(config.n_layers):  # as in LLaMA 1
        saved[f"layers.{i}.attention.inner_attention.rope.freqs"] = freqs
    (Path(folder) / "theirs").mkdir(exist_ok=True)
    torch.save(saved, f"{folder}/theirs/consolidated.{rank:02}.pth")

    torch.distributed.barrier()
    if vocabulary_parallel:
        return
    if rank == 0:
        source = Memory(config, None, weights)
        write_meta(source, place(Path(folder) / "ours"), torch.distributed.get_world_size())
    torch.distributed.barrier()
    ours = torch.load(f"{folder}/ours/consolidated.{rank:02}.pth", weights_only=True, mmap=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    fresh = MetasModel(config, {n: torch.zeros_like(t) for n, t in weights.items()}, False)
    fresh.load_state_dict(ours, strict=True)
    assert torch.equal(fresh(tokens), logits)
    if rank == 0:
        torch.save((tokens, logits.detach()), f"{folder}/logits.pt")


@pytest.mark.parametrize(
    ("degree", "vocabulary_parallel"), [(1, False), (2, False), (4, False), (2, True)]
)
def test_fairscales_layers_save_what_we_read_and_load_what_we_write(
    degree: int, vocabulary_parallel: bool, tmp_path: Path
) -> None:
    source = random_source(model_config())
    torch.save(source.weights, tmp_path / "weights.pt")
    run_distributed(save_as_meta, degree, str(tmp_path), source.config, vocabulary_parallel)
    theirs = tmp_path / "theirs"
    write_params(theirs, source.config)
    read = open_meta(place(theirs))
    assert_same(read, with_config(source, **LONGEST))
    if not vocabulary_parallel:
        tokens, logits = torch.load(tmp_path / "logits.pt", weights_only=True)
        torch.testing.assert_close(our_logits(read, tokens), logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_read_back_bit_for_bit(
    degree: int, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    pieces = tokenizer()
    source = random_source(model_config(tie_embeddings=tied), pieces, dtype)
    write_meta(source, place(tmp_path / "model"), degree)
    names = {file.name for file in (tmp_path / "model").iterdir()}
    shards = {f"consolidated.{i:02}.pth" for i in range(degree)}
    assert names == shards | {"params.json", "tokenizer.model"}
    read = open_meta(place(tmp_path / "model"))
    assert_same(read, with_config(source, **LONGEST))
    assert read.tokenizer == pieces


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_a_file_of_ours_as_one_of_its_own(mmap: bool, tmp_path: Path) -> None:
    source = random_source(model_config(), dtype=torch.bfloat16)
    write_meta(source, place(tmp_path / "model"))
    file = tmp_path / "model" / "consolidated.00.pth"
    state = torch.load(file, weights_only=True, mmap=mmap)
    assert state.keys() == source.tensors.keys()
    assert list(state)[:4] == [
        "tok_embeddings.weight", "norm.weight", "output.weight", "layers.0.attention.wq.weight",
    ]  # fmt: skip
    for name, tensor in state.items():
        assert torch.equal(tensor, source.weights[name])
        assert tensor.data_ptr() % 64 == 0
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None  # reads all and checks the CRCs


def test_meta_and_back_through_object_storage(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in s3.env.items():
        monkeypatch.setenv(key, value)
    source = random_source(model_config())
    storage = Storage(StorageConfig(url=f"s3://{BUCKET}/formats", endpoint_url=s3.endpoint_url))
    write_meta(source, Place(storage, "runs/meta"), model_parallel=2)
    assert_same(open_meta(Place(storage, "runs/meta")), with_config(source, **LONGEST))


def test_tensors_that_share_memory_are_read(tmp_path: Path) -> None:
    """As torch saves parameters that are pieces of one flat one."""
    source = random_source(model_config())
    flat = torch.cat([tensor.flatten() for tensor in source.weights.values()])
    pieces = flat.split([tensor.numel() for tensor in source.weights.values()])
    state = {
        name: nn.Parameter(piece.view(tensor.shape))
        for (name, tensor), piece in zip(source.weights.items(), pieces, strict=True)
    }
    torch.save(state, tmp_path / "consolidated.00.pth")
    write_params(tmp_path, source.config)
    assert_same(open_meta(place(tmp_path)), with_config(source, **LONGEST))


def test_the_tokenizer_is_found_one_level_up_and_of_llama_3_left(tmp_path: Path) -> None:
    source, pieces = random_source(model_config()), tokenizer()
    write_meta(source, place(tmp_path / "7B"))
    assert open_meta(place(tmp_path / "7B")).tokenizer is None
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    assert open_meta(place(tmp_path / "7B")).tokenizer == pieces
    (tmp_path / "7B" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's
    assert open_meta(place(tmp_path / "7B")).tokenizer is None
    assert open_meta(place(tmp_path / "7B"), b"named").tokenizer == b"named"


def test_beside_a_tokenizer_of_tiktokens_its_json_is_taken(tmp_path: Path) -> None:
    """With BOS and EOS as `tokenizer_config.json` names them."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    data = byte_level(special)
    write_meta(random_source(model_config(vocab_size=Tokenizer(data).vocab_size)), place(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    (tmp_path / "tokenizer.json").write_bytes(data)
    marks = {"bos_token": special[0], "eos_token": special[2]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(marks))
    found = open_meta(place(tmp_path)).tokenizer
    assert found == with_marks(data, special[0], special[2], "here")
    assert Tokenizer(found).eos_id != Tokenizer(data).eos_id


def test_a_degree_that_does_not_divide_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model_parallel: 3 does not divide.* 1, 2, 4$"):
        write_meta(random_source(model_config()), place(tmp_path / "model"), 3)
    assert not (tmp_path / "model").exists()


def test_of_a_write_that_fails_nothing_is_left(tmp_path: Path) -> None:
    source = random_source(model_config())
    source.weights["layers.2.feed_forward.w2.weight"][3, 3] = torch.inf
    with pytest.raises(UserError, match=r"layers\.2\.feed_forward\.w2\.weight holds values"):
        write_meta(source, place(tmp_path / "model"), 2)
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("B")])
def test_the_released_models_have_the_rule_of_their_time(preset: str) -> None:
    dim, *_, ffn_hidden_dim = PRESETS[preset]
    assert ffn_rule(dim, ffn_hidden_dim) == {"multiple_of": 256}


@given(st.integers(1, 16_384), st.integers(1, 65_536))
def test_metas_code_comes_to_the_width_that_was_written(dim: int, ffn_hidden_dim: int) -> None:
    rule = ffn_rule(dim, ffn_hidden_dim)
    # `FeedForward.__init__` of Meta's model.py, given 4 × dim.
    hidden = int(2 * (4 * dim) / 3)
    if (multiplier := rule.get("ffn_dim_multiplier")) is not None:
        hidden = int(multiplier * hidden)
    multiple_of = rule["multiple_of"]
    assert multiple_of * ((hidden + multiple_of - 1) // multiple_of) == ffn_hidden_dim


def write_params(folder: Path, config: ModelConfig) -> None:
    """As Meta's are: without the vocabulary, and with a rule for the feed-forward's width."""
    params = {
        "dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads, "norm_eps": config.norm_eps, "multiple_of": 32,
        "ffn_dim_multiplier": 0.9, "rope_theta": config.rope_theta, "vocab_size": -1,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


def with_config(source: Memory, **changes: object) -> Memory:
    return Memory(source.config.model_copy(update=changes), source.tokenizer, source.weights)


def our_logits(source: WeightSource, tokens: Tensor) -> Tensor:
    model = LLaMA(source.config)
    model.load_state_dict({name: source.read(name) for name in source.tensors})
    with torch.inference_mode():
        return model(tokens)
