"""Names and layout of Hugging Face's `LlamaForCausalLM`, and back: one tensor at a time.

Both hold the same numbers. Names differ, and the rows of wq and wk: Meta rotates neighbours
(2i, 2i+1) of a head, Hugging Face rotates i with i + E/2, so rows within a head are permuted. The
maps are linear and norm-preserving, so a gradient is mapped just as its weight is.
"""

from __future__ import annotations

from torch import Tensor

from llama_ray.config.model import ModelConfig

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_ROTATED = ("attention.wq.weight", "attention.wk.weight")


def hf_name(name: str) -> str:
    """Our parameter's name → Hugging Face's. Raises KeyError for what is none of `LLaMA`'s."""
    if name in _TOP:
        return _TOP[name]
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{_IN_BLOCK[inner]}"


def our_name(name: str) -> str:
    """And back. Raises KeyError for what is no parameter of `LlamaForCausalLM`."""
    if name in _TOP_BACK:
        return _TOP_BACK[name]
    prefix, _, rest = name.partition("model.layers.")
    layer, _, inner = rest.partition(".")
    if prefix or inner not in _IN_BLOCK_BACK:
        raise KeyError(name)
    return f"layers.{layer}.{_IN_BLOCK_BACK[inner]}"


def to_hf(name: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """Our parameter (or its gradient) → Hugging Face's name and tensor."""
    if name.endswith(_ROTATED):
        # Per head: rows (pair, half) → (half, pair).
        heads = tensor.unflatten(0, (-1, config.head_dim // 2, 2))
        tensor = heads.transpose(1, 2).flatten(0, 2)
    return hf_name(name), tensor


def from_hf(name: str, tensor: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """Hugging Face's parameter (or its gradient) → our name and tensor."""
    ours = our_name(name)
    if ours.endswith(_ROTATED):
        heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
        tensor = heads.transpose(1, 2).flatten(0, 2)
    return ours, tensor
