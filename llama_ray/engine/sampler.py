"""From logits to tokens: small functions on rows [B,V], each by its own request's parameters."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from llama_ray.engine.sequence import Sequence, TokenLogprob


def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """The next token of each sequence, from its logits [B,V] float32."""
    chosen = logits.argmax(-1)
    rows = [i for i, seq in enumerate(sequences) if seq.params.temperature > 0]
    if rows:
        drawing = [sequences[i] for i in rows]
        probabilities = distribution(
            logits[rows],
            temperature=[seq.params.temperature for seq in drawing],
            top_k=[seq.params.top_k for seq in drawing],
            top_p=[seq.params.top_p for seq in drawing],
        )
        uniforms = [uniform(seq.seed, seq.n_output) for seq in drawing]
        chosen[rows] = draw(probabilities, torch.tensor(uniforms, dtype=torch.float64))
    return [int(token) for token in chosen.tolist()]


def distribution(
    logits: Tensor, temperature: Seq[float], top_k: Seq[int], top_p: Seq[float]
) -> Tensor:
    """Probabilities [B,V] after temperature (> 0), top_k (0: off) and top_p (1: off), in this
    order."""
    device = logits.device
    # The maximum is taken off first, or a tiny temperature would overflow.
    logits = logits - logits.amax(-1, keepdim=True)
    probabilities = (logits / torch.tensor(temperature, device=device).unsqueeze(1)).softmax(-1)
    rows = [i for i in range(len(top_k)) if top_k[i] > 0 or top_p[i] < 1]
    if rows:
        k = torch.tensor([top_k[i] or logits.shape[-1] for i in rows], device=device)
        p = torch.tensor([top_p[i] for i in rows], device=device)
        probabilities[rows] = keep_likeliest(probabilities[rows], k, p)
    return probabilities


def keep_likeliest(probabilities: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """Zero all but the k likeliest tokens, then all but the fewest of these that reach p of what
    is left (Holtzman et al. 2020); k, p [B]. The rows no longer sum to one."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    ordered *= rank < k.unsqueeze(1)
    before = ordered.cumsum(-1) - ordered
    ordered *= before < p.unsqueeze(1) * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(ordered).scatter_(-1, index, ordered)


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that decides output token `index`: a function of these two alone, so
    neither the batch nor a preemption changes what a seed gives."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=index))
    return float(generator.random())


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Token [B] at which the cumulative distribution passes uniforms [B]; rows need not sum to
    one."""
    cumulative = probabilities.double().cumsum(-1)
    target = uniforms.to(cumulative.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def logprobs(
    logits: Tensor, chosen: Seq[int], sequences: Seq[Sequence]
) -> list[TokenLogprob | None]:
    """What each sequence that asks for it is told of its token; logits [B,V] float32."""
    found: list[TokenLogprob | None] = [None] * len(sequences)
    for i, seq in enumerate(sequences):
        if seq.params.logprobs is None:
            continue
        row = logits[i].log_softmax(-1)
        values, ids = row.topk(min(seq.params.logprobs, len(row)))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        found[i] = TokenLogprob(chosen[i], float(row[chosen[i]]), top)
    return found
