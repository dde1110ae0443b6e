"""Compute of the engine: one forward pass of the training model over a ragged batch.

All tokens of a step stand in one row [1,T], sequence after sequence, so that the matrix products,
nearly all of the work, see no padding. Only attention knows where sequences begin: it writes the
new keys and values to the cache, then attends for all single tokens (generating) at once and for
each longer chunk (reading a prompt) on its own.

Shapes: T tokens of the step, B sequences that generate, L longest of their contexts, H query
heads, K KV heads, G = H / K, E head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.engine.blocks import KVCache
from llama_ray.engine.scheduler import Chunk
from llama_ray.model.attention import causal_attention
from llama_ray.model.llama import LLaMA


@dataclass(frozen=True, slots=True)
class Step:
    """The tensors of one forward pass, made from the chunks."""

    tokens: Tensor
    """[1,T]: first the B single tokens, then the longer chunks."""
    positions: Tensor
    """[1,T]"""
    slots: Tensor
    """[T]: where in the cache each token's keys and values go."""
    single: Tensor | None
    """Block table [B,N] of the sequences that generate; padded with block 0."""
    single_mask: Tensor | None
    """[B,1,1,L]: which rows of those blocks hold a token of the sequence."""
    longer: list[tuple[slice, int, Tensor]]
    """Of each longer chunk: its tokens in [T], its start in the sequence, its blocks [1,N]."""
    last: Tensor
    """Index into [T] of each last token, in the order of the chunks that are last."""


class Runner:
    def __init__(self, model: LLaMA, cache: KVCache, block_size: int) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self.device = model.tok_embeddings.weight.device

    def prepare(self, chunks: Seq[Chunk]) -> Step:
        """Read all that `forward` needs off the sequences, which may change while it runs."""
        size = self.block_size
        ordered = sorted(chunks, key=lambda chunk: chunk.n_tokens > 1)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        singles: list[Chunk] = []
        longer: list[tuple[slice, int, Tensor]] = []
        ends: dict[int, int] = {}
        for chunk in ordered:
            blocks = chunk.seq.blocks
            span = range(chunk.start, chunk.end)
            if chunk.n_tokens == 1:
                singles.append(chunk)
            else:
                where = slice(len(tokens), len(tokens) + chunk.n_tokens)
                used = blocks[: -(-chunk.end // size)]
                longer.append((where, chunk.start, self._tensor([used])))
            tokens += chunk.seq.token_ids[chunk.start : chunk.end]
            positions += span
            slots += [blocks[i // size] * size + i % size for i in span]
            ends[id(chunk)] = len(tokens) - 1
        table, mask = self._block_table(singles)
        return Step(
            tokens=self._tensor([tokens]),
            positions=self._tensor([positions]),
            slots=self._tensor(slots),
            single=table,
            single_mask=mask,
            longer=longer,
            last=self._tensor([ends[id(chunk)] for chunk in chunks if chunk.is_last]),
        )

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """Logits [B,V] float32 of each chunk that is last, in order; the cache now holds the keys
        and values of all tokens of the step."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(step, layer, q, k, v)

        hidden = self.model.hidden(step.tokens, step.positions, attend)[step.last]
        return self.model.output(hidden).float()

    def _attend(self, step: Step, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1,T,H,E], k and v [1,T,K,E] → [1,T,H,E]."""
        self.cache.write(layer, step.slots, k[0], v[0])
        parts: list[Tensor] = []
        if step.single is not None:
            n = step.single.shape[0]
            cached_k, cached_v = self.cache.read(layer, step.single)
            parts.append(_attend_single(q[0, :n], cached_k, cached_v, step.single_mask))
        for where, start, blocks in step.longer:
            if start == 0:
                parts.append(causal_attention(layer, q[:, where], k[:, where], v[:, where])[0])
                continue
            end = start + where.stop - where.start
            cached_k, cached_v = (x[:, :end] for x in self.cache.read(layer, blocks))
            parts.append(_attend_chunk(q[:, where], cached_k, cached_v, start)[0])
        return torch.cat(parts).unsqueeze(0)

    def _block_table(self, singles: Seq[Chunk]) -> tuple[Tensor | None, Tensor | None]:
        if not singles:
            return None, None
        lengths = self._tensor([chunk.end for chunk in singles])
        width = -(-max(chunk.end for chunk in singles) // self.block_size)
        table = [
            (chunk.seq.blocks + [0] * (width - len(chunk.seq.blocks)))[:width] for chunk in singles
        ]
        rows = torch.arange(width * self.block_size, device=self.device)
        mask = rows < lengths.unsqueeze(1)
        return self._tensor(table), mask.view(len(singles), 1, 1, -1)

    def _tensor(self, values: Seq[int] | Seq[Seq[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _attend_single(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query a sequence: q [B,H,E], k and v [B,L,K,E], mask [B,1,1,L] → [B,H,E].

    The G query heads that share a KV head stand where a sequence's tokens would, so that keys and
    values are read once and not repeated.
    """
    grouped = q.unflatten(1, (k.shape[2], -1))  # [B,K,G,E]
    out = F.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.flatten(1, 2)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """A chunk that is not its sequence's first: q [1,S,H,E], k and v [1,L,K,E] → [1,S,H,E]."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(start)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)
