"""Engine tokens → OpenAI's response, whole or as server-sent events."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from llama_ray.engine import AsyncEngine, TokenDelta
from serve.protocol import Choice, Completion, CompletionRequest, Logprobs, Usage, error_body


class CompletionStream:
    """One HTTP request on its way through the engine: `start`, then `whole` or `events`."""

    def __init__(self, engine: AsyncEngine, body: CompletionRequest) -> None:
        """Raises `UserError` naming the parameter."""
        requests = body.to_engine()
        self._body = body
        self._head = Completion(id=f"cmpl-{uuid.uuid4().hex}", model=body.model, choices=[])
        self._token_texts = engine.engine.token_texts
        self._index = {request.id: i for i, request in enumerate(requests)}
        self._n_chars = [0] * len(requests)
        self._n_prompt_tokens: dict[str, int] = {}
        self._n_tokens = 0
        self._deltas = engine.stream(*requests)
        self._first: TokenDelta | None = None

    async def start(self) -> None:
        """Wait for the first token, so that what is refused (a long prompt, a full queue) is known
        before any header is sent.

        Raises `UserError`, `EngineOverloadedError` or `EngineStoppedError`.
        """
        self._first = await anext(self._deltas)

    async def whole(self) -> Completion:
        choices = [Choice(index=i, text="") for i in range(len(self._index))]
        async with aclosing(self._choices()) as parts:
            async for part in parts:
                choice = choices[part.index]
                choice.text += part.text
                choice.finish_reason = part.finish_reason
                if part.logprobs:
                    choice.logprobs = (choice.logprobs or Logprobs()) + part.logprobs
        return self._head.model_copy(update={"choices": choices, "usage": self._usage()})

    async def events(self) -> AsyncGenerator[str]:
        """A text/event-stream: a chunk whenever there is text, at last `[DONE]`."""
        async with aclosing(self._choices()) as parts:
            try:
                async for part in parts:
                    if part.text or part.finish_reason or part.logprobs:
                        yield _event(self._head.model_copy(update={"choices": [part]}))
            except RuntimeError as error:
                # The status line is long gone; clients look for this instead.
                yield f"data: {json.dumps(error_body(str(error), type='server_error'))}\n\n"
                return
        options = self._body.stream_options
        if options and options.include_usage:
            yield _event(self._head.model_copy(update={"usage": self._usage()}))
        yield "data: [DONE]\n\n"

    async def _choices(self) -> AsyncGenerator[Choice]:
        async with aclosing(self._deltas) as deltas:
            if self._first:
                yield self._choice(self._first)
            async for delta in deltas:
                yield self._choice(delta)

    def _choice(self, delta: TokenDelta) -> Choice:
        index = self._index[delta.request_id]
        self._n_prompt_tokens[delta.request_id] = delta.n_prompt
        self._n_tokens += 1
        logprobs = None
        if delta.logprob:
            name = self._token_texts[delta.token_id]
            top = {self._token_texts[i]: value for i, value in delta.logprob.top}
            logprobs = Logprobs(
                tokens=[name],
                token_logprobs=[delta.logprob.logprob],
                top_logprobs=[top | {name: delta.logprob.logprob}],
                text_offset=[self._n_chars[index]],
            )
        self._n_chars[index] += len(delta.text)
        return Choice(
            index=index, text=delta.text, logprobs=logprobs, finish_reason=delta.finish_reason
        )

    def _usage(self) -> Usage:
        n_prompt = sum(self._n_prompt_tokens.values())
        return Usage(
            prompt_tokens=n_prompt,
            completion_tokens=self._n_tokens,
            total_tokens=n_prompt + self._n_tokens,
        )


def _event(chunk: Completion) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"
