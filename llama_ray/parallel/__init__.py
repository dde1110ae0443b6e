"""Tensor and sharded data parallelism. `parallelize` is the whole plan."""

from llama_ray.parallel.mesh import destroy_mesh, init_mesh
from llama_ray.parallel.parallelize import copy_shard, initialize, parallelize

__all__ = ["copy_shard", "destroy_mesh", "init_mesh", "initialize", "parallelize"]
