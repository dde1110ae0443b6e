"""What a process that trains on a CPU does with memory it has freed: it keeps it.

By default glibc hands each large block back to the kernel, which maps and zeroes it anew, page by
page, for the next tensor: `python -m benchmarks.train_step` shows what that costs a step. A
training step allocates the same tensors each time.

It is said in the environment a process starts with, for all its threads: Ray Train runs the
training function in one that is not the main thread, whose heaps `mallopt` would not reach. (Other
C libraries ignore it.)
"""

KEEP_FREED_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.arena_max=1",
            "glibc.malloc.mmap_max=0",
            f"glibc.malloc.trim_threshold={2**40}",
        )
    )
}
