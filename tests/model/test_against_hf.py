"""Our model and Hugging Face's `LlamaForCausalLM`, on the same weights, agree to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ray.config import ModelConfig
from llama_ray.formats.hf_config import hf_config
from llama_ray.formats.hf_layout import from_hf, to_hf
from llama_ray.formats.llama2c import open_llama2c
from llama_ray.model.llama import LLaMA
from tests.formats.models import place

STORIES = "models/stories260K/stories260K.bin"


def hugging_face(config: ModelConfig, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    theirs = LlamaForCausalLM(LlamaConfig(**hf_config(config))).float()
    converted = dict(to_hf(name, tensor, config) for name, tensor in weights.items())
    missing, unexpected = theirs.load_state_dict(converted, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    return theirs


def assert_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max())
    assert difference <= 1e-5, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_kv_heads", [8, 2], ids=["mha", "gqa"])
def test_logits_and_every_gradient(tie_embeddings: bool, n_kv_heads: int) -> None:
    config = ModelConfig(
        dim=64, n_layers=3, n_heads=8, n_kv_heads=n_kv_heads, ffn_hidden_dim=160, vocab_size=96,
        max_seq_len=64, norm_eps=1e-5, rope_theta=5000.0, tie_embeddings=tie_embeddings,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = LLaMA(config)
    for name, parameter in ours.named_parameters():
        # Wide enough that attention is far from uniform and norms far from one.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    theirs = hugging_face(config, weights)

    tokens = torch.randint(config.vocab_size, (3, 40))
    targets = torch.randint(config.vocab_size, (3, 40))
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    assert_close("logits", our_logits, their_logits)

    ours(tokens, targets).backward()
    torch.nn.functional.cross_entropy(
        their_logits.flatten(0, 1), targets.flatten(), reduction="sum"
    ).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(their_gradients) == len(weights)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        hf_name, gradient = to_hf(name, parameter.grad, config)
        assert_close(name, gradient, their_gradients[hf_name])


def test_mapping_round_trips() -> None:
    config = ModelConfig(preset="debug", n_kv_heads=2, vocab_size=32)
    for name, parameter in LLaMA(config).named_parameters():
        tensor = torch.randn_like(parameter)
        back_name, back = from_hf(*to_hf(name, tensor, config), config)
        assert back_name == name
        assert torch.equal(back, tensor)
    with pytest.raises(KeyError):
        from_hf("model.layers.0.self_attn.q_proj.bias", torch.zeros(1), config)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("33B", 32_528_943_616),
        ("65B", 65_285_660_672),
    ],
)
def test_parameter_counts_of_the_paper(preset: str, parameters: int) -> None:
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        model = LLaMA(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_params == parameters


def test_stories260k_logits(shared: Path) -> None:
    source = open_llama2c(place(shared / STORIES))
    config = source.config
    weights = {name: source.read(name) for name in source.tensors}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    assert (config.n_heads, config.n_kv_heads, config.tie_embeddings) == (8, 4, True)
    ours = LLaMA(config)
    ours.load_state_dict(weights)
    tokens = torch.randint(config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert_close("logits", ours(tokens), hugging_face(config, weights)(tokens).logits)
