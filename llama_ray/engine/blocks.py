"""Memory of the engine: the KV cache, cut into blocks that sequences borrow and give back.

A sequence's token at position i lies in its block i // block_size, in row i % block_size, so
memory is lent a block at a time and no sequence needs a contiguous stretch (Kwon et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ray.config.model import ModelConfig
from llama_ray.engine.sequence import Sequence


class BlockManager:
    """Counts which blocks are free and which sequence holds which. Touches no tensors."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def n_missing(self, seq: Sequence, n_tokens: int) -> int:
        """Blocks that `seq` lacks to hold its first `n_tokens` tokens."""
        return max(0, -(-n_tokens // self.block_size) - len(seq.blocks))

    def allocate(self, seq: Sequence, n_tokens: int) -> bool:
        """Give `seq` the blocks for its first `n_tokens` tokens: all of them, or none and False."""
        n = self.n_missing(seq, n_tokens)
        if n > self.n_free:
            return False
        seq.blocks.extend(self._free.pop() for _ in range(n))
        return True

    def release(self, seq: Sequence) -> None:
        """Take back all of a sequence's blocks; its keys and values are lost."""
        self._free.extend(reversed(seq.blocks))
        seq.blocks.clear()
        seq.n_computed = 0


class KVCache:
    """Keys and values of all layers: each [layers, n_blocks, block_size, K, E].

    K: KV heads (of this rank), E: head_dim. A *slot* is block × block_size + row.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.n_layers, n_blocks, block_size, config.n_kv_heads, config.head_dim)
        # Zeros, not empty: attention masks rows that were never written by adding -inf to their
        # score, and 0 × NaN in a value would come through.
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k, v [T,K,E] into slots [T]."""
        self._keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        self._values[layer].flatten(0, 1).index_copy_(0, slots, v)

    def read(self, layer: int, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks of block_table [B,N] → copies of keys and values [B, N × block_size, K, E]."""
        flat = block_table.flatten()
        shape = (block_table.shape[0], -1, *self._keys.shape[-2:])
        return (
            self._keys[layer].index_select(0, flat).view(shape),
            self._values[layer].index_select(0, flat).view(shape),
        )
