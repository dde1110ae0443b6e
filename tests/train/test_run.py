"""What the driver refuses before it starts workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ray.config import PretrainConfig, load_job
from llama_ray.errors import UserError
from llama_ray.train.run import check_group_fits_a_node

JOBS = Path(__file__).parents[2] / "jobs"


def job(*overrides: str) -> PretrainConfig:
    config = load_job(str(JOBS / "pretrain.yaml"), overrides)
    assert isinstance(config, PretrainConfig)
    return config


HEAD = {"CPU": 4.0}
GPU_NODE = {"CPU": 32.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("overrides", "nodes", "use_gpu", "message"),
    [
        (
            ["parallel.tensor=4"],
            [HEAD, GPU_NODE, GPU_NODE],
            True,
            "a group of 4 ranks must fit on one node, and the largest has 2 GPUs; choose from 1, 2",
        ),
        (
            ["parallel.tensor=4", "parallel.cpus_per_worker=2"],
            [HEAD, HEAD],
            False,
            "a group of 4 ranks × parallel.cpus_per_worker 2 must fit on one node, and the "
            "largest has 4 CPUs; choose from 1, 2, or lower parallel.cpus_per_worker",
        ),
        (
            ["parallel.tensor=2", "parallel.cpus_per_worker=8"],
            [HEAD],
            False,
            "the largest has 4 CPUs; lower parallel.cpus_per_worker",
        ),
    ],
)
def test_a_group_that_fits_no_node_is_refused(
    overrides: list[str], nodes: list[dict[str, float]], use_gpu: bool, message: str
) -> None:
    with pytest.raises(UserError) as error:
        check_group_fits_a_node(job(*overrides), nodes, use_gpu)
    assert str(error.value).startswith("parallel.tensor: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "nodes", "use_gpu"),
    [
        (["parallel.tensor=2"], [HEAD, GPU_NODE], True),
        (["parallel.tensor=4"], [HEAD], False),
        (["parallel.tensor=4", "parallel.cpus_per_worker=0.5"], [{"CPU": 2.0}], False),
        # Not about groups: Ray waits for such a node, and says so.
        (["parallel.tensor=1", "parallel.cpus_per_worker=8"], [HEAD], False),
        # A head without CPUs, whose workers have yet to come.
        (["parallel.tensor=4"], [{"memory": 1e9}], False),
    ],
)
def test_others_are_not(overrides: list[str], nodes: list[dict[str, float]], use_gpu: bool) -> None:
    check_group_fits_a_node(job(*overrides), nodes, use_gpu)
