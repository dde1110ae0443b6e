"""Output projection and cross-entropy in one, a chunk of tokens at a time.

The logits of a LLaMA step are its largest tensor (N × 32,000 in float32, and their gradient again).
Here a chunk's logits, loss and gradients are computed together and dropped, so that peak memory
depends on the chunk alone. Gradients are therefore computed in `forward`; `backward` only scales
them.

Under tensor parallelism each rank has a range of the vocabulary, and under sequence parallelism a
share of the hidden states: a chunk's states are gathered, and its gradients sent back, while others
are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from llama_ray.model.projection import Weight

CHUNK_TOKENS = 1024


class Vocabulary(Protocol):
    """How hidden states reach a rank, and what it needs of ranks with other parts of the
    vocabulary: `parallel.tensor.SharedVocabulary`, or `WholeVocabulary`."""

    first: int
    """The rank's first token."""

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(which tokens, their hidden states [T,D]), in order, until all of them were there."""

    def combine(self, local: Tensor) -> Tensor:
        """[3,T], each token's largest logit, Σ exp(logit - largest), and logit of the target (0 if
        another rank has it) → the same over the whole vocabulary."""

    def send_back(self, grad: Tensor) -> None:
        """The gradient [T,D] of the last chunk's hidden states: this rank's part of a sum."""

    def grad_hidden(self) -> Tensor:
        """The gradient of all that was sent back."""


class WholeVocabulary:
    def __init__(self, hidden: Tensor, n_vocab: int) -> None:
        self.first, self.hidden = 0, hidden

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, len(self.hidden)), self.hidden

    def combine(self, local: Tensor) -> Tensor:
        return local

    def send_back(self, grad: Tensor) -> None:
        self.grad = grad

    def grad_hidden(self) -> Tensor:
        return self.grad


def linear_cross_entropy(
    hidden: Tensor,
    output: Weight,
    targets: Tensor,
    vocabulary: Callable[[Tensor, int], Vocabulary] = WholeVocabulary,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden · Wᵀ)[target], in nats.

    hidden [N,D], or a rank's share of it; output holds W [V,D], or a rank's equal share of it in
    rank order; targets [N] → float32 scalar, the same on all ranks that share the vocabulary.
    """
    shared = vocabulary(hidden, len(output.local_weight()))
    return _LinearCrossEntropy.apply(
        hidden,
        output.local_weight(),
        output.operand(hidden.dtype),
        targets,
        shared,
        torch.is_grad_enabled(),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        operand: Tensor,
        targets: Tensor,
        vocabulary: Vocabulary,
        needs_grad: bool,
    ) -> Tensor:
        # Summed over chunks in float32: bfloat16 would lose the small terms.
        grad_weight = torch.zeros_like(operand, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for tokens, states in vocabulary.chunks():
            grads = []
            for part, target in zip(
                states.split(CHUNK_TOKENS), targets[tokens].split(CHUNK_TOKENS), strict=True
            ):
                loss, grad_logits = _chunk(part, operand, target, vocabulary)
                total += loss
                if grad_weight is not None:
                    grads.append(grad_logits @ operand)
                    grad_weight += grad_logits.T @ part
            if needs_grad:
                vocabulary.send_back(torch.cat(grads))
        if grad_weight is not None:
            ctx.save_for_backward(vocabulary.grad_hidden(), grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = grad_hidden * grad.type_as(grad_hidden)
        return grad_hidden, (grad_weight * grad).to(ctx.weight_dtype), None, None, None, None


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """hidden [T,D], weight [V,D], targets [T] → (sum of their losses, its gradient for the rank's
    logits [T,V])."""
    logits = hidden @ weight.T
    index = targets - vocabulary.first
    mine = (index >= 0) & (index < len(weight))
    index = index.where(mine, 0).unsqueeze(1)

    local_peak = logits.amax(1, keepdim=True).float()
    picked = logits.gather(1, index).squeeze(1).float() * mine
    probabilities = (logits - local_peak).exp_()  # float32, being of both types
    local = torch.stack((local_peak.squeeze(1), probabilities.sum(1), picked))
    peak, denominator, picked = vocabulary.combine(local).unbind()
    loss = (denominator.log() + peak - picked).sum()

    probabilities *= ((local[0] - peak).exp() / denominator).unsqueeze(1)
    probabilities.scatter_add_(1, index, -mine.type_as(probabilities).unsqueeze(1))
    return loss, probabilities.type_as(weight)
