"""The engine: requests in, text out, many at a time.

add → waiting → running → finished    scheduler     which tokens are computed next
         ↑ preempted ↓                blocks        where their keys and values lie
                                      runner        their logits
step: schedule, forward, sample,      sampler       the next token
      give out text                   detokenizer   its text
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from llama_ray.checkpoint.load import LoadedModel
from llama_ray.config.serve import EngineConfig
from llama_ray.engine import sampler
from llama_ray.engine.blocks import BlockManager, KVCache
from llama_ray.engine.detokenizer import StopStrings, TextStream, TokenTexts
from llama_ray.engine.runner import Runner
from llama_ray.engine.scheduler import Chunk, Scheduler
from llama_ray.engine.sequence import (
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    State,
    TokenDelta,
    TokenLogprob,
)
from llama_ray.errors import UserError


@dataclass
class Completion:
    """All of a request's deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: TokenDelta) -> None:
        self.text += delta.text
        self.token_ids.append(delta.token_id)
        if delta.logprob:
            self.logprobs.append(delta.logprob)
        self.finish_reason = delta.finish_reason


@dataclass(frozen=True, slots=True)
class Load:
    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    """Share of the KV cache's blocks in use, 0 to 1."""


class Engine:
    """`add`, `prepare`, `submit` and `cancel` may be called from any thread, `step` from one."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig) -> None:
        self.tokenizer = loaded.tokenizer
        self.model_config = loaded.model.config
        n_blocks = -(-config.kv_cache_tokens // config.block_size)
        weight = loaded.model.tok_embeddings.weight
        cache = KVCache(self.model_config, n_blocks, config.block_size, weight.dtype, weight.device)
        self.scheduler = Scheduler(
            BlockManager(n_blocks, config.block_size),
            config.max_batch_size,
            config.max_batch_tokens,
        )
        self.runner = Runner(loaded.model, cache, config.block_size)
        self.token_texts = TokenTexts(self.tokenizer, self.tokenizer.encode("a")[-1])
        # A beginning-of-text token says as surely as an end that this document is over.
        self._end_ids = frozenset({self.tokenizer.eos_id, self.tokenizer.bos_id})
        self._sequences: dict[str, Sequence] = {}
        self._lock = threading.Lock()

    @property
    def n_unfinished(self) -> int:
        """Requests waiting or running."""
        return len(self._sequences)

    def load(self) -> Load:
        """How busy the engine is."""
        with self._lock:
            scheduler = self.scheduler
            used = 1 - scheduler.blocks.n_free / scheduler.blocks.n_blocks
            return Load(len(scheduler.running), len(scheduler.waiting), used)

    def prepare(self, request: Request) -> Sequence:
        """Encode and check a request, the slow part of `add`; safe in any thread.

        Raises `UserError` where prompt and `max_tokens` can never fit, or ids are no tokens.
        """
        ids = self._encode(request.prompt)
        blocks = self.scheduler.blocks
        capacity = blocks.n_blocks * blocks.block_size
        limit = min(self.model_config.max_seq_len, capacity)
        max_tokens = request.params.max_tokens
        if len(ids) + max_tokens > limit:
            what = "context" if limit == self.model_config.max_seq_len else "KV cache"
            raise UserError(
                f"prompt: {len(ids):,} tokens and max_tokens {max_tokens:,} exceed the model's "
                f"{what} of {limit:,} tokens; shorten the prompt or lower max_tokens"
            )
        text = TextStream(self.tokenizer, ids)
        return Sequence(request.id, ids, request.params, text, StopStrings(request.params.stop))

    def submit(self, seq: Sequence) -> None:
        """Queue what `prepare` returned."""
        with self._lock:
            self._sequences[seq.id] = seq
            self.scheduler.add(seq)

    def add(self, request: Request) -> str:
        """Queue a request; → its id. Raises `UserError` as `prepare` does."""
        self.submit(self.prepare(request))
        return request.id

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its blocks at once; no error where it is already over."""
        with self._lock:
            if seq := self._sequences.pop(request_id, None):
                self.scheduler.finish(seq)

    def step(self) -> list[TokenDelta]:
        """One forward pass; → a token of each sequence that has one now."""
        with self._lock:
            chunks = self.scheduler.schedule()
            if not chunks:
                return []
            # A sequence cancelled from here on leaves its blocks to the next schedule(), which
            # comes after this step's last write to them.
            step = self.runner.prepare(chunks)
        logits = self.runner.forward(step)
        sequences = [chunk.seq for chunk in chunks if chunk.is_last]
        token_ids = sampler.sample(logits, sequences)
        logprobs = sampler.logprobs(logits, token_ids, sequences)
        with self._lock:
            return self._advance(chunks, token_ids, logprobs)

    def _advance(
        self, chunks: Seq[Chunk], token_ids: Seq[int], logprobs: Seq[TokenLogprob | None]
    ) -> list[TokenDelta]:
        deltas = []
        sampled = iter(zip(token_ids, logprobs, strict=True))
        for chunk in chunks:
            seq = chunk.seq
            result = next(sampled) if chunk.is_last else None
            if seq.state is State.FINISHED:  # cancelled during the forward pass
                continue
            seq.n_computed = chunk.end
            if result is None:
                continue
            token_id, logprob = result
            text, finish_reason = seq.append(token_id, self._end_ids)
            deltas.append(TokenDelta(seq.id, seq.n_prompt, token_id, text, logprob, finish_reason))
            if finish_reason:
                self.scheduler.finish(seq)
                del self._sequences[seq.id]
        return deltas

    def generate(
        self, prompts: Seq[str | list[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> list[Completion]:
        """Continue all prompts; for use without a server."""
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        completions: dict[str, Completion] = {}
        for prompt, p in zip(prompts, params, strict=True):
            completions[self.add(Request(prompt, p))] = Completion()
        while self.n_unfinished:
            for delta in self.step():
                completions[delta.request_id].add(delta)
        return list(completions.values())

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=True)
        if not prompt:
            raise UserError("prompt: holds no tokens")
        vocab_size = self.model_config.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in prompt):
            raise UserError(f"prompt: token ids must be between 0 and {vocab_size - 1}")
        return list(prompt)
