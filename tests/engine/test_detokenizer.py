"""Streamed text, joined, is the text; no piece of it is half a character."""

from __future__ import annotations

import random

import pytest

from llama_ray.checkpoint.load import LoadedModel
from llama_ray.engine.detokenizer import StopStrings, TextStream, TokenTexts

TEXTS = [
    "Once upon a time",
    " two  spaces,   three",
    "naïve café 中文字 🙂🙂👍🏽 end",
    "\n\n  indented\n\ttab",
    "中" * 30,
    "replacement \ufffd character \ufffd\ufffd",
    " " * 40 + "x",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("n_prompt", [0, 1, 3])
def test_streamed_text_is_the_text(stories: LoadedModel, text: str, n_prompt: int) -> None:
    tokenizer = stories.tokenizer
    ids = tokenizer.encode("é" if text.startswith("中") else "A", bos=True)[:n_prompt]
    n_prompt = len(ids)
    ids += tokenizer.encode(text)
    stream = TextStream(tokenizer, ids[:n_prompt])
    deltas = [stream.push(token_id) for token_id in ids[n_prompt:]]
    for delta in deltas:
        assert "\ufffd" not in delta or "\ufffd" in text
    assert tokenizer.decode(ids[:n_prompt]) + "".join(deltas) + stream.flush() == tokenizer.decode(
        ids
    )


def test_random_tokens_stream_as_they_decode(stories: LoadedModel) -> None:
    """Bytes that are no characters, control tokens and spaces in any order."""
    tokenizer = stories.tokenizer
    rng = random.Random(0)
    for bytes_only in (True, False) * 50:
        vocabulary = range(3, 259) if bytes_only else range(tokenizer.vocab_size)
        ids = [rng.choice(vocabulary) for _ in range(60)]
        stream = TextStream(tokenizer, ids[:2])
        text = "".join(stream.push(token_id) for token_id in ids[2:]) + stream.flush()
        straddling = tokenizer.decode(ids[:2]).count("\ufffd") and bytes_only
        if not straddling:
            assert tokenizer.decode(ids[:2]) + text == tokenizer.decode(ids)


def test_stop_strings_hold_back_no_more_than_needed() -> None:
    stops = StopStrings(["END", "\n\n"])
    pushed = [stops.push(text) for text in ("a", "E", "N", "x", "EN", "\n", "E", "ND tail")]
    assert pushed == [
        ("a", False), ("", False), ("", False), ("ENx", False), ("", False), ("EN", False),
        ("\n", False), ("", True),
    ]  # fmt: skip
    assert StopStrings(["END"]).flush("xEN") == "xEN"
    assert StopStrings(["END", "x"]).push("aENDx") == ("a", True)


def test_single_tokens_keep_their_space(stories: LoadedModel) -> None:
    tokenizer = stories.tokenizer
    texts = TokenTexts(tokenizer, tokenizer.encode("a")[-1])
    assert [texts[i] for i in tokenizer.encode("Once upon a")] == [" Once", " upon", " a"]
    assert texts[tokenizer.eos_id] == f"token_id:{tokenizer.eos_id}"
