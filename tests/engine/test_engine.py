"""Whatever is batched, chunked, preempted or cancelled, each request's text is its own."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ray.checkpoint.load import LoadedModel
from llama_ray.engine import (
    AsyncEngine,
    Engine,
    EngineOverloadedError,
    Load,
    Request,
    SamplingParams,
    TokenDelta,
)
from llama_ray.errors import UserError
from llama_ray.formats.hf_config import hf_config
from llama_ray.formats.hf_layout import to_hf
from tests.engine.conftest import MakeEngine

OPENINGS = [
    "Once upon a time",
    "The dog was",
    "Lily said",
    "One day, a boy named Tim",
    "",
    "Mom é 中",
]
IDLE = Load(num_requests_running=0, num_requests_waiting=0, kv_cache_usage=0.0)
GREEDY = SamplingParams(max_tokens=60, temperature=0)

LIMITS = {
    "at ease": {"block_size": 16, "max_batch_tokens": 2048},
    "small blocks, chunked prompts": {"block_size": 2, "max_batch_tokens": 19},
    "one at a time": {"max_batch_size": 1, "max_batch_tokens": 512},
    # 400 tokens for sequences of up to 220: some always have to give way.
    "preempted": {"block_size": 4, "max_batch_tokens": 64, "kv_cache_tokens": 400},
}


@pytest.fixture(scope="module")
def prompts(stories: LoadedModel) -> list[list[int]]:
    """24 prompts of 1 to 160 tokens, cut out of stories as tokens fall."""
    rng = random.Random(0)
    found = []
    for i in range(24):
        text = " ".join(rng.choice(OPENINGS) for _ in range(rng.choice([1, 1, 2, 6, 12])))
        found.append(stories.tokenizer.encode(f"{text} {i}", bos=True)[: rng.randint(1, 160)])
    return found


@pytest.fixture(scope="module")
def expected(stories: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers makes of the prompts, one by one; ends before an end-of-text token."""
    config = stories.model.config
    theirs = LlamaForCausalLM(LlamaConfig(**hf_config(config)))
    weights = stories.model.state_dict()
    theirs.load_state_dict(dict(to_hf(name, w, config) for name, w in weights.items()))
    outputs = []
    for prompt in prompts:
        ids = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0,
            eos_token_id=[1, 2],
        )  # fmt: skip
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_greedy_equals_transformers(
    limits: dict[str, int],
    make_engine: MakeEngine,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    engine = make_engine(**limits)
    completions = engine.generate(prompts, GREEDY)
    assert [c.token_ids for c in completions] == expected
    tokenizer = engine.tokenizer
    for prompt, completion in zip(prompts, completions, strict=True):
        whole = tokenizer.decode(prompt + completion.token_ids)
        assert tokenizer.decode(prompt) + completion.text == whole
    assert engine.load() == IDLE
    assert (engine.scheduler.n_preemptions > 0) == ("kv_cache_tokens" in limits)


def test_a_long_prompt_does_not_stop_the_others(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_tokens=16)
    engine.add(Request("Once upon a time", SamplingParams(max_tokens=100, temperature=0)))
    engine.step()
    engine.add(Request([5] * 300, SamplingParams(max_tokens=2, temperature=0)))
    steps = [engine.step() for _ in range(300 // 15)]
    assert [len(deltas) for deltas in steps] == [1] * 19 + [2]


def test_logprobs_are_the_models(make_engine: MakeEngine, stories: LoadedModel) -> None:
    engine = make_engine()
    prompt = stories.tokenizer.encode("Once upon a time", bos=True)
    (completion,) = engine.generate([prompt], SamplingParams(temperature=1.5, seed=1, logprobs=3))
    with torch.inference_mode():
        logits = stories.model(torch.tensor([prompt + completion.token_ids]))[0]
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    assert len(completion.logprobs) == len(completion.token_ids) == 16
    for row, token_id, reported in zip(
        rows, completion.token_ids, completion.logprobs, strict=True
    ):
        assert reported.token_id == token_id
        assert reported.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [i for i, _ in reported.top] == row.topk(3).indices.tolist()


def test_a_seed_gives_the_same_text_alone_and_in_any_batch(make_engine: MakeEngine) -> None:
    asked = [
        SamplingParams(max_tokens=50, temperature=1.0, seed=seed, top_p=top_p, top_k=top_k)
        for seed in (0, 1, -7)
        for top_p, top_k in ((1.0, 0), (0.8, 0), (1.0, 20), (0.9, 40))
    ]
    prompts = [OPENINGS[i % len(OPENINGS)] for i in range(len(asked))]
    together = make_engine(kv_cache_tokens=400, block_size=4)
    batched = together.generate(prompts, asked)
    assert together.scheduler.n_preemptions > 0
    alone = [
        make_engine().generate([prompt], p)[0] for prompt, p in zip(prompts, asked, strict=True)
    ]
    assert [c.text for c in batched] == [c.text for c in alone]
    assert len({c.text for c in batched}) == len(asked)
    unseeded = [SamplingParams(max_tokens=50)] * 2
    first, second = make_engine().generate(["Once"] * 2, unseeded)
    assert first.text != second.text


def test_stop_strings(make_engine: MakeEngine) -> None:
    whole = make_engine().generate(["Once upon a time"], GREEDY)[0].text
    for stop in ("Lily", " She loved", ".", "park. O"):
        params = SamplingParams(max_tokens=60, temperature=0, stop=("never met", stop))
        (completion,) = make_engine().generate(["Once upon a time"], params)
        assert completion.text == whole[: whole.index(stop)]
        assert completion.finish_reason == "stop"
    params = SamplingParams(max_tokens=60, temperature=0, stop=("never met",))
    assert make_engine().generate(["Once upon a time"], params)[0].text == whole


def test_cancel_frees_blocks_at_once_and_leaves_the_others_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=3, max_batch_tokens=64, kv_cache_tokens=1024)
    kept = engine.add(Request("Once upon a time", GREEDY))
    others = [engine.add(Request([7] * 100, GREEDY)) for _ in range(5)]
    text = ""
    while engine.n_unfinished:
        for delta in engine.step():
            text += delta.text if delta.request_id == kept else ""
        if others:
            engine.cancel(others.pop())
            engine.cancel("no such request")
    assert text == make_engine().generate(["Once upon a time"], GREEDY)[0].text
    assert engine.load() == IDLE


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_bad_parameters_are_named(fields: dict[str, float], parameter: str) -> None:
    with pytest.raises(UserError, match=f"^{parameter}: "):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_prompts_that_cannot_be_served_are_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(UserError, match=r"prompt: 500 tokens and max_tokens 13 .* context of 512"):
        engine.add(Request([5] * 500, SamplingParams(max_tokens=13)))
    with pytest.raises(UserError, match="KV cache of 64"):
        make_engine(kv_cache_tokens=64).add(Request([5] * 60))
    for bad in ([], [512], [-1]):
        with pytest.raises(UserError, match=r"^prompt: "):
            engine.add(Request(bad))
    assert engine.n_unfinished == 0


async def _collect(engine: AsyncEngine, *requests: Request) -> list[TokenDelta]:
    return [delta async for delta in engine.stream(*requests)]


def test_async_streams_cancel_overload_and_stop(make_engine: MakeEngine) -> None:
    expected = make_engine().generate(OPENINGS, GREEDY)
    inner: Engine = make_engine(max_batch_size=4)
    engine = AsyncEngine(inner, max_queued_requests=4)

    async def scenario() -> None:
        requests = [Request(prompt, GREEDY) for prompt in OPENINGS]
        deltas = await _collect(engine, *requests)
        for request, completion in zip(requests, expected, strict=True):
            own = [d.text for d in deltas if d.request_id == request.id]
            assert "".join(own) == completion.text

        long = SamplingParams(max_tokens=450, temperature=1.0)
        streams = [engine.stream(Request("Once", long)) for _ in range(8)]
        for stream in streams[:4]:
            await anext(stream)
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams[4:]]
        await asyncio.sleep(0.05)
        with pytest.raises(EngineOverloadedError):
            await _collect(engine, Request("Once"))
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        assert inner.load() == IDLE
        # All or none: the second of these can never fit.
        with pytest.raises(UserError):
            await _collect(engine, Request("Once"), Request([5] * 600))
        assert inner.n_unfinished == 0

    asyncio.run(scenario())
    engine.check_alive()
    engine.stop()


def test_an_engine_that_breaks_tells_every_stream(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make_engine()
    engine = AsyncEngine(inner, max_queued_requests=1)
    monkeypatch.setattr("threading.excepthook", lambda _: None)

    def broken(step: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(inner.runner, "forward", broken)
    with pytest.raises(RuntimeError, match="engine has stopped") as caught:
        asyncio.run(_collect(engine, Request("Once")))
    assert isinstance(caught.value.__cause__, MemoryError)
    with pytest.raises(RuntimeError, match="engine has stopped"):
        engine.check_alive()
