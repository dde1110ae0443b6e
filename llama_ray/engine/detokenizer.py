"""Token ids → text, as the tokens come.

The text of a token depends on its neighbours: a SentencePiece tokenizer drops the space before
the first word only, and a character outside the vocabulary is several byte tokens. So a window of
the last few tokens is decoded each time, and what it adds is emitted once it can change no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character
_MAX_PENDING_BYTES = 3  # a UTF-8 character has at most four bytes
_MAX_WINDOW = 16
_WINDOW = 6  # tokens kept when the window moves on: the pending bytes and some text before them


class Decoder(Protocol):
    """The part of a tokenizer this needs."""

    def decode(self, ids: list[int]) -> str: ...


class TextStream:
    """Decodes one sequence. `decode(prompt) + all deltas == decode(prompt + output)`, but for
    characters that straddle the two."""

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._window = list(prompt_ids[-_MAX_WINDOW:])
        self._text = decoder.decode(self._window)
        self._emitted = len(self._text)

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes final; never part of a character."""
        if len(self._window) >= _MAX_WINDOW:
            self._move_on()
        self._window.append(token_id)
        self._text = self._decoder.decode(self._window)
        return self._emit(len(self._text) - self._n_pending())

    def flush(self) -> str:
        """The sequence is over: what was held back, whole characters or not."""
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        delta = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return delta

    def _n_pending(self) -> int:
        """Characters at the end of the text that the next bytes may turn into another one."""
        stripped = self._text[-_MAX_PENDING_BYTES:].rstrip(_REPLACEMENT)
        return min(len(self._text), _MAX_PENDING_BYTES) - len(stripped)

    def _move_on(self) -> None:
        held_back = len(self._text) - self._emitted
        window = self._window[-_WINDOW:]
        text = self._decoder.decode(window)
        # Text of nothing but control tokens would drop the next word's space as if it were first.
        if len(text) > held_back:
            self._window, self._text = window, text
            self._emitted = len(text) - held_back


class StopStrings:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """→ text that is before any stop string, and whether one was met."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self, text: str) -> str:
        """The sequence is over: what was held back, then `text` (up to a stop string in them)."""
        text, stopped = self.push(text)
        held, self._held = self._held, ""
        return text if stopped else text + held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning, but not all, of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class TokenTexts:
    """A name for single tokens: their text, spaces kept, or `token_id:<id>` where a token is no
    text of its own (a byte of a character, a control token)."""

    def __init__(self, decoder: Decoder, anchor: int) -> None:
        """`anchor`: a token with visible text, which the decoder's first-word rule falls on."""
        self._decoder = decoder
        self._anchor = anchor
        self._prefix = len(decoder.decode([anchor]))
        self._known: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        if token_id not in self._known:
            text = self._decoder.decode([self._anchor, token_id])[self._prefix :]
            is_text = text and _REPLACEMENT not in text
            self._known[token_id] = text if is_text else f"token_id:{token_id}"
        return self._known[token_id]
