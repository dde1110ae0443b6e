"""Output projection and cross-entropy in one, a chunk of tokens at a time.

The logits of a LLaMA step are its largest tensor (B × S × 32,000 in float32, and their gradient
again). Here a chunk's logits, loss and gradients are computed together and dropped, so that peak
memory depends on the chunk alone. Gradients are therefore computed in `forward`; `backward` only
scales them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum over tokens of -log softmax(hidden · Wᵀ)[target], in nats.

    hidden [B,S,D]; weight [V,D]; targets [B,S] → float32 scalar. With a process group, `weight`
    is this rank's equal share of the vocabulary, in rank order; the loss is that of the whole,
    and the gradient for `hidden` is this rank's part of a sum over the group.
    """
    return _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), group, torch.is_grad_enabled()
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        needs_grad: bool,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        # Summed over chunks in float32: bfloat16 would lose the small terms.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        first = dist.get_rank(group) * weight.shape[0] if group else 0
        for start in range(0, len(targets), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits = (hidden[chunk] @ weight.T).float()  # [T,V]
            local = targets[chunk] - first
            mine = (local >= 0) & (local < weight.shape[0])
            index = local.where(mine, 0).unsqueeze(1)

            peak = logits.amax(1, keepdim=True)
            if group:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group)
            logits -= peak
            picked = logits.gather(1, index).squeeze(1) * mine
            probabilities = logits.exp_()
            denominator = probabilities.sum(1)
            if group:
                both = torch.stack((picked, denominator))
                dist.all_reduce(both, dist.ReduceOp.SUM, group)
                picked, denominator = both.unbind()
            total += (denominator.log() - picked).sum()

            if grad_hidden is not None and grad_weight is not None:
                probabilities /= denominator.unsqueeze(1)
                probabilities.scatter_add_(1, index, -mine.float().unsqueeze(1))
                grad_logits = probabilities.type_as(weight)
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
                grad_weight += grad_logits.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = grad_hidden * grad.type_as(grad_hidden)
        return grad_hidden, (grad_weight * grad).to(ctx.weight_dtype), None, None, None
