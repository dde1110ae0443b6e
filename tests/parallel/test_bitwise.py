"""What only changes when something is computed or sent, and not what, changes no bit: of the loss,
of any gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.parallel.layouts import Layout, backward, batch, grads, laid_out, relative_error, tiny
from tests.parallel.ranks import Ranks

CONFIG = tiny(n_heads=8, n_kv_heads=4)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def results(rank: int, layout: Layout) -> dict[str, Tensor]:
    """Loss and gradients as they are on this rank."""
    with laid_out(CONFIG, layout) as (model, _):
        loss = backward(model, batch(CONFIG, 0), layout)
        local = {
            name: grad.to_local() if isinstance(grad, DTensor) else grad
            for name, grad in grads(model).items()
        }
        return local | {"loss": loss}


def compare(rank: int, layouts: list[Layout]) -> None:
    want = results(rank, layouts[0])
    for layout in layouts[1:]:
        for name, got in results(rank, layout).items():
            assert torch.equal(got, want[name]), f"{layout}: {name}"


@PRECISIONS
@pytest.mark.parametrize(
    "base",
    [
        Layout(),
        Layout(2),
        Layout(2, sequence=False),
        Layout(4),
        Layout(1, 2),
        Layout(2, 2),
        Layout(1, 4, shard=2),
    ],
    ids=str,
)
def test_recomputation_and_overlap(base: Layout, dtype: torch.dtype, ranks: Ranks) -> None:
    layouts = [
        replace(base, dtype=dtype, micro_batches=2, recompute=recompute, overlap=overlap)
        for recompute, overlap in product(("none", "selective", "full"), (True, False))
    ]
    ranks(base.world_size, compare, layouts)


def test_overlap_of_four_sharded_ranks_differs_by_rounding(ranks: Ranks) -> None:
    """gloo adds up around a ring, `PendingReductions` in the order of ranks: of two it is the same.
    The forward pass and recomputation stay equal."""
    base = Layout(1, 4, micro_batches=2)
    for overlap in (True, False):
        layouts = [replace(base, overlap=overlap, recompute=r) for r in ("none", "full")]
        ranks(4, compare, layouts)
    for with_overlap, without in zip(
        *(ranks(4, results, replace(base, overlap=overlap)) for overlap in (True, False)),
        strict=True,
    ):
        assert torch.equal(with_overlap["loss"], without["loss"])
        for name, grad in with_overlap.items():
            assert relative_error(grad, without[name]) < 1e-6, name
