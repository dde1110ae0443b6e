"""Peak matrix-product rates, the denominator of MFU.

MFU = tokens/s × FLOPs per token / peak FLOP/s of all ranks, with FLOPs per token as in
`ModelConfig.flops_per_token` (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

# Dense bfloat16 rates in FLOP/s, from NVIDIA's data sheets (those with sparsity halved). The first
# name found in the device's name counts, so longer names stand first.
GPU_PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s of all ranks together, where the number comes from).

    A CPU's is measured, on all ranks at once since they may share cores. Every rank must call it.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, rate in GPU_PEAK_FLOPS.items():
            if known in name:
                return rate * dist.get_world_size(), f"{name}, data sheet"
    total = torch.tensor(measured_matmul_flops(device, dtype), device=device)
    dist.all_reduce(total)
    return total.item(), f"{str(dtype).removeprefix('torch.')} matrix product, measured"


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a 1024 × 1024 × 1024 product: the best of many, the machine being shared."""
    n = 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    if dist.is_initialized():
        dist.barrier()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(4):
            product = a @ b
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 4 * 2 * n**3 / best
