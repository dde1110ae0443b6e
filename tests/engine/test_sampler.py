"""Distributions are what they say, and draws follow them."""

from __future__ import annotations

import torch

from llama_ray.engine.sampler import distribution, draw, keep_likeliest, uniform


def test_top_k_and_top_p_keep_the_fewest_likeliest() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]] * 4)
    kept = keep_likeliest(p, k=torch.tensor([4, 2, 4, 3]), p=torch.tensor([1.0, 1.0, 0.65, 0.5]))
    expected = torch.tensor(
        [
            [0.1, 0.4, 0.2, 0.3],
            [0.0, 0.4, 0.0, 0.3],
            [0.0, 0.4, 0.0, 0.3],  # 0.4 < 0.65 ≤ 0.7
            [0.0, 0.4, 0.0, 0.3],  # of the three likeliest, 0.9 together, half is 0.45
        ]
    )
    assert torch.equal(kept, expected)


def test_one_token_is_always_left() -> None:
    p = torch.full((1, 5), 0.2)
    kept = keep_likeliest(p, k=torch.tensor([5]), p=torch.tensor([1e-9]))
    assert kept.count_nonzero() == 1


def test_each_row_has_its_own_parameters() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = distribution(logits, temperature=[0.5, 1.0, 2.0], top_k=[0, 5, 0], top_p=[1, 1, 0.5])
    for i, (t, k, p) in enumerate([(0.5, 0, 1.0), (1.0, 5, 1.0), (2.0, 0, 0.5)]):
        alone = distribution(logits[i : i + 1], [t], [k], [p])
        assert torch.equal(together[i], alone[0])
    assert torch.allclose(together[0], (logits[0] / 0.5).softmax(-1))
    assert together[1].count_nonzero() == 5


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1000.0, -1000.0, 1000.5]])
    p = distribution(logits, temperature=[1e-30], top_k=[0], top_p=[1.0])
    assert p.tolist() == [[0.0, 0.0, 1.0]]


def test_draws_follow_the_distribution() -> None:
    """Chi-square with 5 degrees of freedom: 20.5 is exceeded once in a thousand times."""
    p = torch.tensor([0.0, 0.05, 0.1, 0.0, 0.25, 0.3, 0.2, 0.1, 0.0])
    n = 20_000
    uniforms = torch.tensor([uniform(seed, 3) for seed in range(n)], dtype=torch.float64)
    counts = draw(p.expand(n, -1) * 0.7, uniforms).bincount(minlength=len(p)).float()
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * n
    assert float(((counts[p > 0] - expected) ** 2 / expected).sum()) < 20.5


def test_extreme_draws_stay_within_the_kept() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert draw(p, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]
    assert draw(p, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [2]


def test_uniforms_depend_on_seed_and_index_alone() -> None:
    values = [uniform(seed, index) for seed in (-1, 0, 1) for index in range(3)]
    assert len(set(values)) == 9
    assert values == [uniform(seed, index) for seed in (-1, 0, 1) for index in range(3)]
