"""What a client asks for, and how far the engine is with it."""

from __future__ import annotations

import math
import secrets
import uuid
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from llama_ray.engine.detokenizer import StopStrings, TextStream
from llama_ray.errors import UserError

FinishReason = Literal["stop", "length"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end. Raises `UserError` naming the parameter."""

    max_tokens: int = 16
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach this probability."""
    seed: int | None = None
    """Same seed, same text, whatever else runs. None: a new one each time."""
    stop: tuple[str, ...] = ()
    """Ends before the first of these; the text does not contain it."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many likeliest tokens."""

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, 1, None)
        _check("temperature", self.temperature, 0, 2)
        _check("top_k", self.top_k, 0, None)
        _check("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise UserError("top_p: must be above 0 (temperature 0 takes the likeliest token)")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise UserError(f"stop: at most {MAX_STOP_STRINGS} strings, given {len(self.stop)}")
        if "" in self.stop:
            raise UserError("stop: an empty string would end every text before it begins")


def _check(name: str, value: float, low: float, high: float | None) -> None:
    if math.isnan(value) or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name}: must be {bounds}, given {value}")


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, as text (a beginning-of-text token is put before it) or token ids (taken as they
    are), and how to continue it."""

    prompt: str | list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities, before temperature and top_k/top_p."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens, likeliest first."""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step adds to one sequence."""

    request_id: str
    n_prompt: int
    """Tokens in the request's prompt."""
    token_id: int
    text: str
    """Text that is now final: empty while it may still become part of a longer character or of a
    stop string. All deltas of a request, joined, are its text."""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the engine."""

    id: str
    token_ids: list[int]
    """Prompt, then what was generated."""
    params: SamplingParams
    text: TextStream
    stops: StopStrings
    n_prompt: int = 0
    n_computed: int = 0
    """Tokens whose keys and values lie in the cache."""
    blocks: list[int] = field(default_factory=list)
    state: State = State.WAITING
    seed: int = 0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.token_ids)
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def n_output(self) -> int:
        return len(self.token_ids) - self.n_prompt

    @property
    def n_pending(self) -> int:
        """Tokens not yet in the cache: 1 while generating, more while reading a prompt."""
        return len(self.token_ids) - self.n_computed

    def append(self, token_id: int, end_ids: frozenset[int]) -> tuple[str, FinishReason | None]:
        """Take the next token; → the text it makes final, and whether the sequence is over."""
        self.token_ids.append(token_id)
        if token_id in end_ids:
            return self.stops.flush(self.text.flush()), "stop"
        text, stopped = self.stops.push(self.text.push(token_id))
        if stopped:
            return text, "stop"
        if self.n_output < self.params.max_tokens:
            return text, None
        return text + self.stops.flush(self.text.flush()), "length"
