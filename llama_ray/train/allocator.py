"""What a CPU process does with memory it has freed."""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for the next allocation, however large; returns whether it does.

    By default it hands each large block back to the kernel, which maps and zeroes it anew, page by
    page, for the next tensor: `python -m benchmarks.train_step` shows what that costs a step. A
    training step allocates the same tensors each time, so nothing is lost by keeping them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
