from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.data.order import BITS, Mixture, SourceStream, TokenOrder
from llama_ray.errors import UserError

weights_strategy = st.lists(
    st.one_of(st.integers(1, 10**12), st.floats(1e-6, 1e6)), min_size=1, max_size=7
)
seeds = st.integers(0, 2**31)


@settings(deadline=None)
@given(weights_strategy, seeds, st.integers(0, 5000), st.integers(1, 300))
def test_counts_in_closed_form(weights: list[float], seed: int, start: int, n: int) -> None:
    mixture = Mixture(weights, seed)
    drawn = np.bincount(mixture.sources(0, start + n), minlength=len(weights))
    assert mixture.counts_before(start + n) == drawn.tolist()
    assert (mixture.sources(start, start + n) == mixture.sources(0, start + n)[start:]).all()


@settings(deadline=None)
@given(weights_strategy, seeds, st.integers(0, 12), st.integers(0, 1000))
def test_every_aligned_run_holds_the_proportions(
    weights: list[float], seed: int, m: int, run: int
) -> None:
    n = 1 << m
    drawn = np.bincount(
        Mixture(weights, seed).sources(run * n, (run + 1) * n), minlength=len(weights)
    )
    expected = n * np.array(weights, float) / sum(weights)
    assert (np.abs(drawn - expected) < 2).all()


@settings(deadline=None)
@given(weights_strategy, seeds, st.integers(2**31, 2**45))
def test_jumping_far(weights: list[float], seed: int, start: int) -> None:
    mixture = Mixture(weights, seed)
    before, after = mixture.counts_before(start), mixture.counts_before(start + 64)
    assert sum(before) == start
    drawn = np.bincount(mixture.sources(start, start + 64), minlength=len(weights))
    assert (np.array(after) - np.array(before) == drawn).all()
    share = np.array(before) / start
    assert share == pytest.approx(np.array(weights) / sum(weights), abs=2 * BITS / start + 2**-31)


shard_sizes = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@settings(deadline=None)
@given(shard_sizes, seeds, st.integers(0, 5))
def test_each_token_once_an_epoch(sizes: list[int], seed: int, epoch: int) -> None:
    stream = SourceStream("web", sizes, seed)
    ranges = stream.ranges(epoch * sum(sizes), (epoch + 1) * sum(sizes))
    seen = Counter((r.shard, i) for r in ranges for i in range(r.start, r.stop))
    assert seen == Counter({(shard, i): 1 for shard, n in enumerate(sizes) for i in range(n)})
    if epoch == 0:
        assert [(r.shard, r.start, r.stop) for r in ranges] == [
            (shard, 0, n) for shard, n in enumerate(sizes)
        ]


@settings(deadline=None)
@given(shard_sizes, seeds, st.integers(0, 400), st.lists(st.integers(0, 90), max_size=5))
def test_ranges_do_not_depend_on_how_they_are_asked_for(
    sizes: list[int], seed: int, start: int, cuts: list[int]
) -> None:
    def flat(begin: int, end: int) -> list[tuple[int, int]]:
        ranges = SourceStream("web", sizes, seed).ranges(begin, end)
        return [(r.shard, i) for r in ranges for i in range(r.start, r.stop)]

    ends = [start, *sorted(start + cut for cut in cuts), start + 90]
    pieces = [place for a, b in pairwise(ends) for place in flat(a, b)]
    assert pieces == flat(start, start + 90)


def test_epochs_differ_and_follow_the_seed() -> None:
    def epoch(seed: int, number: int) -> list[object]:
        return list(
            SourceStream("web", [40, 50, 60], seed).ranges(number * 150, number * 150 + 150)
        )

    assert epoch(0, 1) == epoch(0, 1)
    assert len({repr(epoch(seed, number)) for seed in (0, 1) for number in (1, 2, 3)}) == 6


def test_samples_number_each_source_without_gaps() -> None:
    order = TokenOrder({"a": [700, 300], "b": [5000]}, 16, seed=3, weights={"b": 1, "a": 3})
    sources, numbers = order.samples(0, 4000)
    for source in (0, 1):
        assert (numbers[sources == source] == np.arange((sources == source).sum())).all()
    assert np.bincount(sources).tolist() == pytest.approx([3000, 1000], abs=2)
    late_sources, late_numbers = order.samples(3000, 3100)
    assert (late_sources == sources[3000:3100]).all()
    assert (late_numbers == numbers[3000:3100]).all()


def test_default_weights_end_the_epochs_of_all_sources_together() -> None:
    order = TokenOrder({"a": [10_000], "b": [30_000], "c": [960_000]}, 100, seed=0)
    assert order.mixture.counts_before(10_000) == pytest.approx([100, 300, 9600], abs=2)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"webb": 1.0}, r"data\.weights: there is no source 'webb'; choose from books, web"),
        ({"web": -1.0}, r"data\.weights: web: -1\.0 is no weight"),
        ({"web": float("nan")}, r"data\.weights: web: nan is no weight"),
        ({"web": 0.0}, r"data\.weights: every weight is 0"),
        ({"books": 1.0}, r"data\.seq_len: source 'books' has 16 training tokens, less than one"),
    ],
)
def test_mixtures_that_cannot_be(weights: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TokenOrder({"web": [1000], "books": [16]}, 16, 0, weights)
