"""Freed memory is kept, in a thread as in Ray Train's: no page of it is mapped again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llama_ray.train.allocator import KEEP_FREED_MEMORY

SCRIPT = """
import resource, threading, torch

def step():
    tensors = [torch.ones(megabytes << 18) for megabytes in (3, 40, 98, 6)]
    return [tensor * 2 for tensor in tensors]

def faults():
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=faults)
thread.start()
thread.join()
"""


def page_faults(environment: dict[str, str]) -> int:
    """Of one step, after others like it."""
    variables = os.environ | environment
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION"), reason="another C library")
def test_a_step_maps_no_memory_again() -> None:
    assert page_faults(KEEP_FREED_MEMORY) < page_faults({}) / 10
