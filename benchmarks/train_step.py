"""A training step of a 134 M LLaMA on one CPU, against Hugging Face's.

12 layers, dim 768, 12 heads, ffn 2048, vocab 32,000; 4 sequences of 512 tokens; bfloat16; all
cores. Hugging Face: `LlamaForCausalLM` with PyTorch's flash attention, eager, under bfloat16
autocast, gradient clipping, fused AdamW, in a process as Python starts it; and once more with the
allocator setting that our workers have (`llama_ray.train.allocator`). Each in a process of its own,
steps taken in turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Ratio, interleaved, medians, parse_args, print_table, report
from benchmarks.stepper import Stepper
from llama_ray.config.model import ModelConfig
from llama_ray.config.pretrain import OptimizerConfig
from llama_ray.formats.hf_config import hf_config
from llama_ray.model import LLaMA
from llama_ray.model.attention import causal_attention, training_attention
from llama_ray.parallel import begin_backward, finish_gradients
from llama_ray.train.flops import measured_matmul_flops
from llama_ray.train.optimizer import build_optimizer, clip_grad_norm

CONFIG = ModelConfig.model_validate({"preset": "134M", "max_seq_len": 512})
SEQUENCES, SEQ_LEN = 4, 512
TOKENS = SEQUENCES * SEQ_LEN


def our_step() -> Callable[[], None]:
    """What `parallelize` makes of the model on one rank: a type to compute in."""
    model = LLaMA(CONFIG)
    model.dtype = torch.bfloat16
    return step_of(model)


def step_of(model: LLaMA) -> Callable[[], None]:
    """An optimizer step of our model, however parallel."""
    tokens = torch.randint(CONFIG.vocab_size, (SEQUENCES, SEQ_LEN + 1))
    return partial(step_on_tokens(model), tokens)


def step_on_tokens(model: LLaMA) -> Callable[[Tensor], None]:
    """As `step_of`, on tokens [SEQUENCES, SEQ_LEN + 1] given each time."""
    optimizer = build_optimizer(model, OptimizerConfig())

    def step(tokens: Tensor) -> None:
        loss = model(tokens[:, :-1], tokens[:, 1:]) / TOKENS
        begin_backward(model, last=True)
        loss.backward()
        finish_gradients(model)
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face_step() -> Callable[[], None]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**hf_config(CONFIG), use_cache=False)
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(CONFIG.vocab_size, (SEQUENCES, SEQ_LEN))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


THEIRS, SAME, OURS = "Hugging Face", "Hugging Face, our allocator setting", "llama_ray"


def best(function: Callable[[], Any], repeats: int = 7) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def attention_seconds() -> dict[str, float]:
    """Forward and backward pass of one layer's attention."""
    shape = (SEQUENCES, SEQ_LEN, CONFIG.n_heads, CONFIG.head_dim)
    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    grad = torch.randn(shape).bfloat16()
    return {
        "flash_kernel": best(lambda: torch.autograd.grad(causal_attention(0, q, k, v), q, grad)),
        "ours": best(lambda: torch.autograd.grad(training_attention(0, q, k, v), q, grad)),
    }


def grouped_seconds() -> dict[str, float]:
    """q, k and v by three products, as here, or by one with their weights side by side."""
    x = torch.randn(TOKENS, CONFIG.dim).bfloat16()
    weights: list[Tensor] = [torch.randn(CONFIG.dim, CONFIG.dim).bfloat16() for _ in range(3)]
    together = torch.cat(weights)
    return {
        "three": best(lambda: [F.linear(x, weight) for weight in weights], 30),
        "one": best(lambda: F.linear(x, together), 30),
    }


def main() -> None:
    args = parse_args(__doc__)
    matmul = measured_matmul_flops(torch.device("cpu"), torch.bfloat16)
    threads = torch.get_num_threads()
    steppers = {
        THEIRS: Stepper(hugging_face_step, threads, keep_freed=False),
        SAME: Stepper(hugging_face_step, threads),
        OURS: Stepper(our_step, threads),
    }
    seconds = interleaved(steppers, 3 if args.quick else 9, warmup=2 if args.quick else 3)
    peaks = {name: stepper.close() for name, stepper in steppers.items()}
    matmul = max(matmul, measured_matmul_flops(torch.device("cpu"), torch.bfloat16))
    step = medians(seconds)
    flops = {n: TOKENS * CONFIG.flops_per_token(SEQ_LEN) / t for n, t in step.items()}

    header = ("", "s/step", "tokens/s", "GFLOP/s", "of products", "peak GB")
    print_table(
        header,
        [
            (n, f"{t:.2f}", f"{TOKENS / t:.0f}", f"{flops[n] / 1e9:.0f}",
             f"{flops[n] / matmul:.0%}", f"{peaks[n] / 1e9:.2f}")
            for n, t in step.items()
        ],
    )  # fmt: skip
    print(f"bfloat16 matrix product of 1024³: {matmul / 1e9:.0f} GFLOP/s\n")
    ratios = {
        "vs_hf": Ratio(step[THEIRS] / step[OURS], 1.5, "higher", "tokens/s of Hugging Face"),
        "vs_hf_same_allocator": Ratio(
            step[SAME] / step[OURS], None, "higher", "tokens/s of Hugging Face, same allocator"
        ),
        "of_matmul_rate": Ratio(
            flops[OURS] / matmul, None, "higher", "FLOP/s of a bfloat16 matrix product"
        ),
        "memory_vs_hf": Ratio(
            peaks[OURS] / peaks[THEIRS], 1.0, "lower", "peak resident memory of Hugging Face"
        ),
    }
    details = {
        "cores": os.cpu_count(),
        "threads": threads,
        "matmul_gflops": matmul / 1e9,
        "seconds": seconds,
        "attention_seconds": attention_seconds(),
        "qkv_seconds": grouped_seconds(),
    }
    report("train_step", ratios, details)


if __name__ == "__main__":
    main()
