"""Two completions over HTTP, for a person to read: one whole, one as it is written.

python -m serve.demo --url http://127.0.0.1:8000 --prompt 'def main():'
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

TIMEOUT_SECONDS = 120
# For the quickstart's corpus, Python packages and their documentation.
DEFAULT_PROMPTS = ["The following example shows how to", "import os\nimport sys\n\n\ndef main("]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serve.demo", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--prompt", action="append", help="give it twice to continue one whole, the other streamed"
    )
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    options = parser.parse_args(arguments)
    prompts = options.prompt or DEFAULT_PROMPTS
    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature, "top_p": 0.95}
    try:
        model = _get(f"{options.url}/v1/models")["data"][0]["id"]
        url = f"{options.url}/v1/completions"
        show_whole(url, {"model": model, "prompt": prompts[0], "seed": 1, **sampling})
        print()
        show_streamed(url, {"model": model, "prompt": prompts[-1], "seed": 2, **sampling})
    except urllib.error.HTTPError as error:
        print(
            f"error: {options.url} answered {error.code}: {error.read().decode()}", file=sys.stderr
        )
        return 1
    except OSError as error:
        reason = getattr(error, "reason", error)
        print(f"error: {options.url} does not answer: {reason}", file=sys.stderr)
        return 1
    return 0


def show_whole(url: str, body: dict[str, Any]) -> None:
    started = time.perf_counter()
    answer = json.load(_post(url, body))
    seconds = time.perf_counter() - started
    n_tokens = answer["usage"]["completion_tokens"]
    print(f"── {answer['model']}, whole")
    print(_highlight(body["prompt"]) + answer["choices"][0]["text"])
    print(f"── {n_tokens} tokens in {seconds:.2f} s: {n_tokens / seconds:.0f} tokens/s")


def show_streamed(url: str, body: dict[str, Any]) -> None:
    started = time.perf_counter()
    first: float | None = None
    usage: dict[str, int] = {}
    print(f"── {body['model']}, streamed")
    print(_highlight(body["prompt"]), end="", flush=True)
    for chunk in _events(url, body | {"stream": True, "stream_options": {"include_usage": True}}):
        for choice in chunk["choices"]:
            first = first or time.perf_counter() - started
            print(choice["text"], end="", flush=True)
        usage = chunk["usage"] or usage
    seconds = time.perf_counter() - started
    n_tokens = usage["completion_tokens"]
    print(
        f"\n── {n_tokens} tokens in {seconds:.2f} s: {n_tokens / seconds:.0f} tokens/s, "
        f"the first after {1000 * (first or seconds):.0f} ms"
    )


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with _post(url, body) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
        return json.load(response)


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def _highlight(prompt: str) -> str:
    return f"\x1b[1m{prompt}\x1b[0m" if sys.stdout.isatty() else prompt


if __name__ == "__main__":
    sys.exit(main())
