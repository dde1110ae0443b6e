"""Tensor-parallel layers: fairscale's, with weights that are DTensors on the "tp" axis.

A column-parallel layer followed by a row-parallel one needs one collective in each pass (Shoeybi
et al. 2019): the output is summed in the forward pass, the input's gradient in the backward pass.
The latter stands in the norm before the layers rather than in each of them, so that q, k and v
(and w1 and w3) share one.

fairscale's constructors allocate and initialise real memory even under `torch.device("meta")`, so
these take over the layer they replace. `to_local` brings gradients back as DTensors: FSDP2,
gradient clipping and distributed checkpoints see one global matrix.
"""

from __future__ import annotations

import fairscale.nn.model_parallel.layers as fairscale_layers
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from llama_ray.model.llama import RMSNorm, rms_norm


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """Each rank computes its share of the outputs, from an input that all ranks have."""

    def __init__(self, linear: nn.Module, mesh: DeviceMesh, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.weight = place(linear.weight, mesh, Shard(0))
        self.gather_output = gather_output

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, local(self.weight))
        return gather_from_model_parallel_region(y) if self.gather_output else y


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """Each rank multiplies its share of the inputs; the products are summed."""

    def __init__(self, linear: nn.Module, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.weight = place(linear.weight, mesh, Shard(1))

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_model_parallel_region(F.linear(x, local(self.weight)))


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """Meta's layout: each rank holds a slice of every token's vector."""

    def __init__(self, embedding: nn.Module, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.weight = place(embedding.weight, mesh, Shard(1))

    def forward(self, tokens: Tensor) -> Tensor:
        return gather_from_model_parallel_region(F.embedding(tokens, local(self.weight)))


class VocabParallelEmbedding(fairscale_layers.VocabParallelEmbedding):
    """Each rank holds the vectors of a range of tokens: the output projection's layout, for models
    whose embeddings are tied to it."""

    def __init__(self, embedding: nn.Module, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.weight = place(embedding.weight, mesh, Shard(0))
        self.num_embeddings_per_partition = self.weight.shape[0] // mesh.size()
        self.vocab_start_index = mesh.get_local_rank() * self.num_embeddings_per_partition

    def forward(self, tokens: Tensor) -> Tensor:
        index = tokens - self.vocab_start_index
        mine = (index >= 0) & (index < self.num_embeddings_per_partition)
        vectors = F.embedding(index.where(mine, 0), local(self.weight)) * mine.unsqueeze(-1)
        return reduce_from_model_parallel_region(vectors)


class ReplicatedRMSNorm(RMSNorm):
    """The same norm on every rank, and the gate to the column-parallel layers behind it: the
    gradients they send back are partial, and are summed here."""

    def __init__(self, norm: RMSNorm, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.eps = norm.eps
        self.weight = place(norm.weight, mesh, Replicate())

    def forward(self, x: Tensor) -> Tensor:
        return copy_to_model_parallel_region(rms_norm(x, local(self.weight), self.eps))


def place(parameter: Tensor | nn.Module, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """The parameter, still on `meta`, as a DTensor of which each rank has its part."""
    assert isinstance(parameter, nn.Parameter)
    assert parameter.is_meta, "parallelise before materialize(): there is nothing to send then"
    part = parameter.data
    if isinstance(placement, Shard):
        part = part.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()].contiguous()
    return nn.Parameter(DTensor.from_local(part, mesh, [placement], run_check=False))


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight."""
    assert isinstance(weight, DTensor)
    return weight.to_local()
