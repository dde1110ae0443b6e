"""Policy of the engine: which sequences run in the next step, and how many tokens of each.

First come, first served. A step has a budget of tokens. Every sequence that is generating gets one
first, so that reading a long prompt never stops the others; what is left goes to prompts, cut into
chunks where they are longer. A sequence is admitted only when the blocks for all of its tokens are
free. When blocks run out later, the sequence that came last gives up its own and is computed again
from its tokens when its turn comes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llama_ray.engine.blocks import BlockManager
from llama_ray.engine.sequence import Sequence, State


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + n_tokens) of a sequence, to be computed in this step."""

    seq: Sequence
    start: int
    n_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.n_tokens

    @property
    def is_last(self) -> bool:
        """Whether its logits give the sequence's next token."""
        return self.end == len(self.seq.token_ids)


class Scheduler:
    def __init__(self, blocks: BlockManager, max_batch_size: int, max_batch_tokens: int) -> None:
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.n_preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and its blocks back at once."""
        if seq.state is State.RUNNING:
            self.running.remove(seq)
        elif seq.state is State.WAITING:
            self.waiting.remove(seq)
        seq.state = State.FINISHED
        self.blocks.release(seq)

    def schedule(self) -> list[Chunk]:
        """The next step; empty when there is nothing to do."""
        budget = self.max_batch_tokens
        chunks: list[Chunk] = []
        preempted = self._make_room()
        for seq in self.running:
            if seq.n_pending == 1:
                chunks.append(Chunk(seq, seq.n_computed, 1))
                budget -= 1
        for seq in self.running:
            if seq.n_pending > 1 and budget:
                chunks.append(self._cut(seq, budget))
                budget -= chunks[-1].n_tokens
        while not preempted and budget and self._admit():
            chunks.append(self._cut(self.running[-1], budget))
            budget -= chunks[-1].n_tokens
        return chunks

    def _make_room(self) -> bool:
        """A block for each running sequence that needs another; whether any was preempted."""
        preempted = False
        for seq in list(self.running):
            # Only ever taken from later arrivals: the first one always comes to its end.
            while seq.state is State.RUNNING:
                if self.blocks.allocate(seq, len(seq.token_ids)):
                    break
                self._preempt(self.running[-1])
                preempted = True
        return preempted

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.release(seq)
        seq.state = State.WAITING
        self.waiting.appendleft(seq)
        self.n_preemptions += 1

    def _admit(self) -> bool:
        """Let the first waiting sequence run, if it fits."""
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return False
        seq = self.waiting[0]
        # One block to grow by for each that runs, or it would soon be preempted again.
        if self.blocks.n_missing(seq, len(seq.token_ids)) + len(self.running) > self.blocks.n_free:
            return False
        self.blocks.allocate(seq, len(seq.token_ids))
        self.waiting.popleft()
        seq.state = State.RUNNING
        self.running.append(seq)
        return True

    def _cut(self, seq: Sequence, budget: int) -> Chunk:
        return Chunk(seq, seq.n_computed, min(seq.n_pending, budget))
