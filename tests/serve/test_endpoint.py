"""The endpoint as clients meet it: a real model, deployed from the config file, over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from ray import serve

from llama_ray.local import Head
from serve import demo
from serve.deploy import deploy, load_config
from tests.conftest import free_port

CONFIG = str(Path(__file__).parents[2] / "serve/config.yaml")
STORY = ", there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def url(ray_cluster: Head, shared: Path) -> Iterator[str]:
    """stories260K, small enough limits to run into."""
    folder = shared / "models/stories260K"
    config = load_config(
        CONFIG,
        [
            f"http_options.port={free_port()}",
            f"args.checkpoint={folder / 'stories260K.bin'}",
            f"args.tokenizer={folder / 'tok512.model'}",
            "args.model_name=stories",
            "args.max_queued_requests=2",
            "args.engine.max_batch_size=2",
            "args.engine.kv_cache_tokens=1024",
            "args.engine.dtype=float32",
        ],
    )
    yield deploy(config)
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "stories", "prompt": "Once upon a time"} | fields
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_streamed_and_whole_text_are_the_same_fluent_story(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "stories",
        "prompt": "Once upon a time",
        "max_tokens": 60,
        "temperature": 0,
    }
    whole = client.completions.create(**asked)
    assert whole.choices[0].text.startswith(STORY)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 60)

    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage == whole.usage
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert len(choices) > 20
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]


def test_sampling_stop_logprobs_and_several_prompts(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> openai.types.Completion:
        fields = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 30} | fields
        return client.completions.create(**fields)

    seeded = [ask(seed=5, top_p=0.9).choices[0].text for _ in range(2)]
    assert seeded[0] == seeded[1] != ask(seed=6, top_p=0.9).choices[0].text

    stopped = ask(temperature=0, stop=["She loved", "\n"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (STORY[: STORY.index("She loved")], "stop")

    several = ask(prompt=["Once upon a time", "The dog"], temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == ask(temperature=0).choices[0].text

    scored = ask(temperature=0, logprobs=2, max_tokens=4).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.tokens == [",", " there", " was", " a"]
    assert scored.logprobs.text_offset == [0, 1, 7, 11]
    for name, value, top in zip(
        scored.logprobs.tokens,
        scored.logprobs.token_logprobs or [],
        scored.logprobs.top_logprobs or [],
        strict=True,
    ):
        assert top[name] == value == max(top.values()) <= 0
        assert len(top) == 2


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"temperature": 2.5}, "temperature", "between 0 and 2"),
        ({"temperature": "warm"}, "temperature", "valid number"),
        ({"n": 2}, "n", "no value but 1"),
        ({"echo": True}, "echo", "no value but False"),
        ({"tempereature": 1}, None, "Unrecognized request argument supplied: tempereature"),
        ({"prompt": []}, "prompt", "no prompt"),
        ({"prompt": [600]}, "prompt", "between 0 and 511"),
        ({"prompt": ["a"] * 5}, "prompt", "at most 4 prompts"),
        ({"prompt": "word " * 600}, "prompt", "exceed the model's context of 512"),
        ({"stream": False, "stream_options": {}}, "stream_options", "only with stream"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_400_and_name_the_parameter(
    url: str, fields: dict[str, Any], param: str | None, message: str, stream: bool
) -> None:
    response = post(url, **{"stream": stream, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_other_failures_have_openais_form(url: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`gpt` does not exist") as caught:
        client.completions.create(model="gpt", prompt="Hi")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="stories", prompt="word " * 600)
    assert too_long.value.code == "context_length_exceeded"
    for media_type, message in (
        ("application/json", "parse the JSON"),
        ("text/plain", "as Content-"),
    ):
        headers = {"Content-Type": media_type}
        broken = httpx.post(f"{url}/v1/completions", content=b"{", headers=headers)
        assert broken.status_code == 400
        assert message in broken.json()["error"]["message"]
    for response, status in (
        (httpx.get(f"{url}/v1/nothing"), 404),
        (httpx.delete(f"{url}/health"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_models_and_health(url: str, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["stories"]
    assert client.models.retrieve("stories").object == "model"
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


# Greedy, this prompt goes round in circles: it takes 500 tokens, half the KV cache.
ENDLESS: dict[str, Any] = {
    "model": "stories",
    "prompt": "aaaaaaaaaaaa",
    "max_tokens": 490,
    "temperature": 0,
}


def stream_endless(url: str, **fields: Any) -> AbstractContextManager[httpx.Response]:
    body = ENDLESS | {"stream": True} | fields
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60)


def wait_until_idle(url: str) -> float:
    """→ the largest KV cache usage seen meanwhile."""
    highest = 0.0
    deadline = time.monotonic() + 60
    while True:
        health = httpx.get(f"{url}/health", timeout=60).json()
        if health == {
            "status": "ok",
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage": 0.0,
        }:
            return highest
        highest = max(highest, health["kv_cache_usage"])
        assert time.monotonic() < deadline, health


def test_a_disconnect_cancels_and_frees_blocks(url: str) -> None:
    """Were it not noticed, usage would go on to 0.5."""
    with stream_endless(url) as response:
        lines = response.iter_lines()  # to drop it would disconnect
        next(lines)
        assert httpx.get(f"{url}/health").json()["num_requests_running"] == 1
    assert wait_until_idle(url) < 0.4
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=ENDLESS, timeout=0.1)
    assert wait_until_idle(url) < 0.4


def test_a_full_queue_is_429_before_any_header(url: str, client: openai.OpenAI) -> None:
    """Two run and two wait, so that the next is told to come back, streaming or not."""
    with stream_endless(url, prompt=[ENDLESS["prompt"]] * 4) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        for stream in (False, True):
            refused = post(url, stream=stream)
            assert refused.status_code == 429
            assert refused.headers["Retry-After"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="stories", prompt="Once")
        assert httpx.get(f"{url}/health").json()["num_requests_waiting"] == 2
    wait_until_idle(url)
    assert post(url).status_code == 200


def test_the_demo_shows_both_completions(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--url", url, "--prompt", "Once upon a time", "--max-tokens", "20"]) == 0
    output = capsys.readouterr().out
    assert output.count("Once upon a time") == 2
    assert output.count("tokens/s") == 2
    assert demo.main(["--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err
