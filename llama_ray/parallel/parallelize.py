"""Make a model on `meta` parallel: one `apply_*` per concern, in this order.

with torch.device("meta"):
    model = LLaMA(config)
parallelize(model, mesh, torch.bfloat16)
model.materialize("cpu")
initialize(model, seed)
"""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from llama_ray.model.llama import Block, LLaMA
from llama_ray.model.loss import linear_cross_entropy
from llama_ray.parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    ReplicatedRMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    local,
)


def parallelize(model: LLaMA, mesh: DeviceMesh, dtype: torch.dtype) -> LLaMA:
    """Apply tensor parallelism on the mesh's "tp" axis and sharded data parallelism on "dp".

    `dtype` is what matrix products compute in; weights and gradient reductions stay float32.
    """
    apply_tensor_parallel(model, mesh["tp"])
    apply_fsdp(model, mesh["dp"], dtype)
    return model


def apply_tensor_parallel(model: LLaMA, mesh: DeviceMesh) -> None:
    """Heads, FFN and vocabulary are split over the axis; the residual stream is whole on each."""
    for block in model.layers:
        assert isinstance(block, Block)
        attention, ffn = block.attention, block.feed_forward
        block.attention_norm = ReplicatedRMSNorm(block.attention_norm, mesh)
        attention.wq = ColumnParallelLinear(attention.wq, mesh)
        attention.wk = ColumnParallelLinear(attention.wk, mesh)
        attention.wv = ColumnParallelLinear(attention.wv, mesh)
        attention.wo = RowParallelLinear(attention.wo, mesh)
        block.ffn_norm = ReplicatedRMSNorm(block.ffn_norm, mesh)
        ffn.w1 = ColumnParallelLinear(ffn.w1, mesh)
        ffn.w3 = ColumnParallelLinear(ffn.w3, mesh)
        ffn.w2 = RowParallelLinear(ffn.w2, mesh)
    model.norm = ReplicatedRMSNorm(model.norm, mesh)
    model.output = ColumnParallelLinear(model.output, mesh, gather_output=True)
    if model.config.tie_embeddings:
        model.tok_embeddings = VocabParallelEmbedding(model.tok_embeddings, mesh)
        model.output.weight = model.tok_embeddings.weight
    else:
        model.tok_embeddings = ParallelEmbedding(model.tok_embeddings, mesh)
    model.token_loss = partial(_vocab_parallel_loss, mesh)


def _vocab_parallel_loss(
    mesh: DeviceMesh, hidden: Tensor, weight: Tensor, targets: Tensor
) -> Tensor:
    return linear_cross_entropy(hidden, local(weight), targets, mesh.get_group())


def apply_fsdp(model: LLaMA, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 (ZeRO-3) over the axis: each block's weights are gathered before use, in `dtype`, and
    its gradients are *summed* in float32: the loss is already divided by the global token count."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum, which FSDP would otherwise ask for.
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def initialize(model: LLaMA, seed: int) -> None:
    """Draw initial weights: each global matrix is a function of (seed, its name) alone, so every
    layout starts from the same model. One whole matrix at a time is in memory."""
    for name, parameter in model.named_parameters():
        std = model.init_std(name)
        if std is None:
            parameter.fill_(1.0)
            continue
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(parameter.device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        whole = torch.empty(parameter.shape, device=parameter.device)
        whole.normal_(std=std, generator=generator)
        copy_shard(parameter, whole)


@torch.no_grad()
def copy_shard(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of the global tensor `whole` into `parameter`."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, parameter.device_mesh, parameter.placements
    )
    slices = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    parameter.to_local().copy_(whole[slices])
