"""Which batch a step trains on where some are left out, against counting them one by one."""

from __future__ import annotations

from itertools import chain, count, islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from llama_ray.data.skips import SkippedBatches

ranges = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda r: (r[0], r[0] + r[1])), max_size=5
)


@given(ranges, st.integers(0, 40), st.integers(0, 20))
def test_against_counting(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    skipped = SkippedBatches(ranges)
    trained_on = (n for n in count() if not any(first <= n <= last for first, last in ranges))
    expected = list(islice(trained_on, start + length))[start:]
    runs = skipped.runs(start, start + length)
    assert list(chain(*runs)) == expected
    assert all(before.stop < after.start for before, after in pairwise(runs))
    if expected:
        assert skipped.batch_of(start) == expected[0]
