"""The fused projection and cross-entropy against PyTorch's on full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama_ray.model import loss as loss_module
from llama_ray.model.loss import linear_cross_entropy
from llama_ray.model.projection import Linear


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_value_and_gradients_for_any_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(120, 16, dtype=torch.float64, requires_grad=True)
    output = Linear(16, 50).double()
    targets = torch.randint(50, (120,))
    want = F.cross_entropy(hidden @ output.weight.T, targets, reduction="sum")
    want_gradients = torch.autograd.grad(want * 0.3, (hidden, output.weight))
    got = linear_cross_entropy(hidden, output, targets)
    gradients = torch.autograd.grad(got * 0.3, (hidden, output.weight))
    assert torch.allclose(got.double(), want, rtol=1e-6)
    for got_gradient, want_gradient in zip(gradients, want_gradients, strict=True):
        assert torch.allclose(got_gradient, want_gradient, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    hidden, output = torch.full((2, 4), 100.0), Linear(4, 8)
    output.weight.data.copy_(torch.eye(8, 4) * 100)
    loss = linear_cross_entropy(hidden, output, torch.tensor([0, 7]))
    assert loss.item() == pytest.approx(2 * torch.tensor(4.0).log().item() + 10_000)


@pytest.mark.parametrize("gap", [2.0, 4.0, 6.0, 8.0])
def test_bfloat16_keeps_the_pull_of_a_confident_target(gap: float) -> None:
    """p - 1 is small where p is near 1, but not nothing."""
    hidden = torch.tensor([[gap, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    output = Linear(2, 2).bfloat16()
    output.weight.data.copy_(torch.eye(2))
    linear_cross_entropy(hidden, output, torch.tensor([0])).backward()
    other = torch.sigmoid(torch.tensor(-gap))
    assert hidden.grad is not None
    assert torch.allclose(hidden.grad.float(), torch.stack((-other, other)), rtol=2**-8)
