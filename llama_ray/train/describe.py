"""What a pretraining job amounts to, before it runs."""

from __future__ import annotations

from llama_ray.config.pretrain import PretrainConfig
from llama_ray.format import count, print_table, si


def describe_pretrain(config: PretrainConfig) -> None:
    """Print what follows from the job file. Reads nothing but the config."""
    model, train, parallel = config.model, config.train, config.parallel
    n, tokens = model.n_params, train.steps * config.tokens_per_step
    flops = model.flops_per_token(config.data.seq_len)
    print_table(
        f"pretrain {config.name}",
        [
            (
                "model",
                f"{count(n)} parameters ({n:,}): {model.n_layers} layers, dim {model.dim}, "
                f"{model.n_heads} heads, ffn {model.ffn_hidden_dim}, vocab {model.vocab_size:,}",
            ),
            ("ranks", f"{parallel.world_size} = tensor {parallel.tensor} × data {parallel.data}"),
            (
                "step",
                f"{config.tokens_per_step:,} tokens = {train.batch_size} sequences × "
                f"{config.data.seq_len}; per rank {config.grad_accum_steps} × "
                f"{train.micro_batch_size} sequences",
            ),
            (
                "training",
                f"{train.steps:,} steps = {count(tokens)} tokens = {si(tokens * flops)}FLOPs",
            ),
            (
                "memory",
                f"{si(16 * n / parallel.world_size, 'B')} per rank for weights, gradients and "
                "optimizer (16 bytes a parameter), activations besides",
            ),
            ("checkpoint", f"{si(12 * n, 'B')} every {config.checkpoint.every:,} steps"),
            ("tokens", f"{config.storage.url}/tokens/{config.data.tokens}"),
            ("writes to", f"{config.storage.url}/runs/{config.name}"),
        ],
    )
