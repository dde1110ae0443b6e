"""OpenAI's completions API: what goes over the wire, and what of it is served.

https://platform.openai.com/docs/api-reference/completions. Fields that change nothing here are
accepted; those that would change the text and are not served yet are refused, never dropped.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama_ray.engine import Request, SamplingParams

# parameter: the value that means "off" and is therefore welcome
_NOT_SERVED: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    """Send one more chunk, without choices, that tells the tokens used."""


class CompletionRequest(BaseModel):
    """Body of `POST /v1/completions`. `null` stands for the default, as with OpenAI."""

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    """Text or token ids, one or several; token ids are taken as they are, text gets a
    beginning-of-text token."""
    max_tokens: int | None = None
    """16 unless given."""
    temperature: float | None = None
    """1 unless given; 0 takes the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    """Not in OpenAI's API: choose among the k likeliest tokens."""
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _served(self) -> CompletionRequest:
        for name, off in _NOT_SERVED.items():
            if getattr(self, name) not in (None, off):
                raise ValueError(f"{name}: this server takes no value but {off!r}")
        if self.prompt == []:
            raise ValueError("prompt: holds no prompt")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only with stream: true")
        return self

    def to_engine(self) -> list[Request]:
        """One engine request a prompt. Raises `UserError` naming the parameter."""
        given = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "logprobs": self.logprobs,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        }
        params = SamplingParams(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [Request(prompt, params)]
        return [Request(one, params) for one in prompt]  # type: ignore[arg-type]


class Logprobs(BaseModel):
    """One entry a token. A token that is no text of its own (part of a character, a control
    token) is called `token_id:<id>`."""

    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []

    def __add__(self, later: Logprobs) -> Logprobs:
        return Logprobs(
            tokens=self.tokens + later.tokens,
            token_logprobs=self.token_logprobs + later.token_logprobs,
            top_logprobs=self.top_logprobs + later.top_logprobs,
            text_offset=self.text_offset + later.text_offset,
        )


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The response, and each chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llama_ray"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Of the replica that answers."""

    status: Literal["ok"]
    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    """Share of the KV cache in use, 0 to 1."""


def error_body(
    message: str,
    type: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, dict[str, str | None]]:
    """The body of every answer that is no success."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
