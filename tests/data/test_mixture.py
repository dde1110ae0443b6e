from __future__ import annotations

from typing import Any

import pytest

from llama_ray.config.load import validate
from llama_ray.config.pretrain import PAPER_WEIGHTS, DataConfig
from llama_ray.data.mixture import Stage, asked_samples, stages
from llama_ray.errors import UserError

TOKENS = {"books": 1000, "code": 3000, "web": 96_000}


def data(**options: Any) -> DataConfig:
    return validate(DataConfig, {"tokens": "corpus", **options}, "job.yaml")


def shares(options: dict[str, Any], tokens: dict[str, int] = TOKENS) -> list[dict[str, float]]:
    """Of each stage."""
    return [
        {source: stage.share(source) for source in stage.weights}
        for stage in stages(data(**options), tokens, batch_size=4)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"books": 0.01, "code": 0.03, "web": 0.96}),
        ({"weights": {"web": 3, "books": 1}}, {"web": 0.75, "books": 0.25}),
        ({"weights": {"web": 3, "books": 0}}, {"web": 1.0}),
        # 3 × 1000 tokens of books for 1 × 3000 of code.
        ({"epochs": {"books": 3, "code": 1}}, {"books": 0.5, "code": 0.5}),
        # Square roots: 1 and 3.
        ({"weights": {"web": 9, "books": 1}, "temperature": 2}, {"web": 0.75, "books": 0.25}),
        ({"weights": {"web": 3, "books": 1}, "temperature": 0.5}, {"web": 0.9, "books": 0.1}),
    ],
)
def test_weights_follow_from_the_job_file(
    options: dict[str, Any], expected: dict[str, float]
) -> None:
    assert shares(options) == [pytest.approx(expected)]


def test_the_papers_epochs_and_tokens_give_the_papers_weights() -> None:
    """Table 1's epochs, and its sizes in GB for want of tokens."""
    sizes = {
        "commoncrawl": 3300, "c4": 783, "github": 328, "wikipedia": 83, "books": 85, "arxiv": 92,
        "stackexchange": 78,
    }  # fmt: skip
    epochs = {
        "commoncrawl": 1.10, "c4": 1.06, "github": 0.64, "wikipedia": 2.45, "books": 2.23,
        "arxiv": 1.06, "stackexchange": 1.03,
    }  # fmt: skip
    (found,) = shares({"epochs": epochs}, sizes)
    (paper,) = shares({"weights": "llama"}, sizes)
    assert paper == pytest.approx({source: w / 100 for source, w in PAPER_WEIGHTS.items()})
    assert found == pytest.approx(paper, abs=0.025)


def test_stages_begin_at_their_steps() -> None:
    found = stages(
        data(
            weights={"web": 1},
            stages=[
                {"from_step": 10, "epochs": {"books": 3, "code": 1}},
                {"from_step": 25, "weights": {"books": 1}},
            ],
        ),
        TOKENS,
        batch_size=4,
    )
    assert found == [
        Stage(0, {"web": 1}),
        Stage(40, {"books": 3000, "code": 3000}),
        Stage(100, {"books": 1}),
    ]
    assert asked_samples(found, 0, 20) == pytest.approx({"web": 20, "books": 0, "code": 0})
    assert asked_samples(found, 0, 200) == pytest.approx({"web": 40, "books": 130, "code": 30})
    assert asked_samples(found, 30, 110) == pytest.approx({"web": 10, "books": 40, "code": 30})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"weights": {"webb": 1, "web": 1, "prose": 0}},
            r"^data\.weights: there is no source 'webb', 'prose' in data\.tokens; it has books, ",
        ),
        ({"weights": "llama"}, r"^data\.weights: there is no source 'commoncrawl', 'c4', 'githu"),
        ({"epochs": {"webb": 1}}, r"^data\.epochs: there is no source 'webb'"),
        (
            {"stages": [{"from_step": 9, "epochs": {"webb": 1}}]},
            r"^data\.stages\.0\.epochs: there is no source 'webb'",
        ),
    ],
)
def test_sources_that_there_are_not(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        stages(data(**options), TOKENS, batch_size=4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": {"web": -1.0}}, "job.yaml: weights.web: Input should be greater than or"),
        ({"weights": {"web": float("nan")}}, "job.yaml: weights.web: Input should be"),
        ({"weights": {"web": 0}}, "job.yaml: weights: gives no source more than 0"),
        ({"weights": "lama"}, "job.yaml: weights: is no mixture; write `llama`, or a weight"),
        ({"weights": {"web": 1}, "epochs": {"web": 1}}, "epochs takes the place of weights"),
        ({"temperature": 0}, "job.yaml: temperature: Input should be greater than 0"),
        ({"stages": [{"from_step": 5}]}, "job.yaml: stages.0: give either weights or epochs"),
        (
            {"stages": [{"from_step": n, "weights": {"web": 1}} for n in (9, 5)]},
            "stages: the one from step 5 stands after that from step 9; order them",
        ),
        (
            {"stages": [{"from_step": 5, "wieghts": {"web": 1}}]},
            "job.yaml: stages.0.wieghts: unknown key, did you mean 'weights'?",
        ),
    ],
)
def test_mixtures_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        data(**options)
    assert says in str(error.value)
