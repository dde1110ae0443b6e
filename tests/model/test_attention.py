"""The blocked attention of training on CPUs against PyTorch's, in float64 and in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ray.model import attention
from llama_ray.model.attention import BLOCK_QUERIES, training_attention

BATCH, HEAD_DIM = 2, 16


def tensors(seq_len: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """q [B,S,H,E], k and v [B,S,K,E], and a gradient like q: in float64, of what bfloat16 holds."""
    torch.manual_seed(0)
    shapes = [(BATCH, seq_len, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape).bfloat16().double() for shape in shapes)


def run(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = attend(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return training_attention(0, q, k, v)


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    "seq_len", [1, 5, BLOCK_QUERIES, BLOCK_QUERIES + 1, 2 * BLOCK_QUERIES, 3 * BLOCK_QUERIES - 7]
)
def test_float64(seq_len: int, heads: int, kv_heads: int) -> None:
    given = tensors(seq_len, heads, kv_heads)
    for got, want in zip(run(ours, given), run(theirs, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads_at_once", [1, 3, 5])
def test_heads_are_taken_in_blocks(heads_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 × 4 KV heads, three and five at a time leave a smaller last block."""
    seq_len, group = 48, 2
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(attention, "BLOCK_SCORES", heads_at_once * group * 16 * seq_len)
    given = tensors(seq_len, 8, 4)
    for got, want in zip(run(ours, given), run(theirs, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)], ids=["mha", "gqa"])
def test_bfloat16(heads: int, kv_heads: int) -> None:
    """Within a few roundings of float64: gradients of keys and values are sums over blocks of
    queries, and would not be if summed in bfloat16."""
    given = tensors(8 * BLOCK_QUERIES, heads, kv_heads)
    narrow = run(ours, tuple(x.bfloat16() for x in given))
    for got, want in zip(narrow, run(theirs, given), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < 0.006 * want.norm()
