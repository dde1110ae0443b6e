"""LLaMA, top to bottom, as in section 2.2 of Touvron et al. 2023: pre-normalisation with RMSNorm,
rotary embeddings, causal attention that stores no scores, SwiGLU, no biases.

Plain PyTorch that knows nothing of parallelism: `llama_ray.parallel` replaces its linear layers,
its embedding and its loss by parallel ones, and the code below stays as it is. It therefore reads
the number of heads off the width of what a layer returns: under tensor parallelism that is this
rank's share. Weights and their names have Meta's layout.

Shapes: B batch, S sequence, D dim, H query heads, K key/value heads, E head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ray.config.model import ModelConfig
from llama_ray.model.loss import linear_cross_entropy

# (layer index, q [B,S,H,E], k [B,S,K,E], v [B,S,K,E]) → [B,S,H,E]. Training uses
# `causal_attention`; the engine passes one that writes to and reads from its KV cache.
AttentionCore = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token attends to itself and those before it, within its sequence."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


class RMSNorm(nn.Module):
    """x / rms(x) × weight (Zhang & Sennrich 2019), the mean taken in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.type_as(x) * weight


def rope_table(max_seq_len: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """cos and sin of position × θ^(-2i/E) (Su et al. 2021): [max_seq_len, E/2, 2] float32."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(max_seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / theta**exponents)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its position's angle.

    x [B,S,H,E]; rope [S,E/2,2] or [B,S,E/2,2]. Pairs are neighbours, as in Meta's weights; Hugging
    Face pairs i with i + E/2, which its conversion makes up for by permuting rows.
    """
    cos, sin = rope.unsqueeze(-3).unbind(-1)  # [(B,)S,1,E/2]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x)


class Attention(nn.Module):
    wq: nn.Module  # declared as modules, because parallelize() puts other classes in their place
    wk: nn.Module
    wv: nn.Module
    wo: nn.Module

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, attend: AttentionCore) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        out = attend(self.layer, apply_rope(q, rope), apply_rope(k, rope), v)
        return self.wo(out.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): W2 (silu(W1 x) · W3 x)."""

    w1: nn.Module
    w2: nn.Module
    w3: nn.Module

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Normalise, attend, add; normalise, transform, add."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_hidden_dim)

    def forward(self, x: Tensor, rope: Tensor, attend: AttentionCore) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    """The whole model. Build it under `torch.device("meta")`, shard it, then `materialize`."""

    rope: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.token_loss = linear_cross_entropy
        self.register_buffer("rope", self._rope(self.norm.weight.device), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        attend: AttentionCore = causal_attention,
    ) -> Tensor:
        """tokens [B,S] int64 → logits [B,S,V]; with targets [B,S], the *sum* of the tokens'
        cross-entropies in nats (a float32 scalar), without ever holding all the logits.

        positions [B,S] default to 0…S-1.
        """
        x = self.hidden(tokens, positions, attend)
        if targets is None:
            return self.output(x)
        return self.token_loss(x, self.output.weight, targets)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attend: AttentionCore = causal_attention,
    ) -> Tensor:
        """tokens [B,S] → [B,S,D], to be multiplied by the output projection. The engine stops
        here: of a whole prompt it needs the last token's logits alone."""
        rope = self.rope[: tokens.shape[1]] if positions is None else self.rope[positions]
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            x = block(x, rope, attend)
        return self.norm(x)

    def materialize(self, device: torch.device | str) -> LLaMA:
        """Allocate memory for weights built on `meta` (uninitialised: load or initialise next)."""
        self.to_empty(device=device)
        if self.config.tie_embeddings:  # to_empty gives each name memory of its own
            self.output.weight = self.tok_embeddings.weight
        self.rope = self._rope(torch.device(device))
        return self

    def init_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's initial normal distribution; None: ones (norms).

        The paper does not give its initialisation; this is GPT-2's: 0.02, and less by √(2 layers)
        for the projections that add to the residual stream, so that its variance does not grow
        with depth.
        """
        if "norm" in name:
            return None
        residual = name.endswith(("wo.weight", "w2.weight"))
        return 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02

    def _rope(self, device: torch.device) -> Tensor:
        c = self.config
        return rope_table(c.max_seq_len, c.head_dim, c.rope_theta, device)
