"""Typed job files. `load_job` reads one; each kind has a module of its own."""

from llama_ray.config.clean import CleanConfig
from llama_ray.config.export import ExportConfig
from llama_ray.config.import_ import ImportConfig
from llama_ray.config.inspect import InspectConfig
from llama_ray.config.job_base import JobConfig
from llama_ray.config.load import load_job, validate
from llama_ray.config.model import PRESETS, ModelConfig
from llama_ray.config.prepare import PrepareConfig
from llama_ray.config.pretrain import PretrainConfig
from llama_ray.config.serve import EngineConfig, ServeConfig
from llama_ray.config.storage import StorageConfig

__all__ = [
    "PRESETS",
    "CleanConfig",
    "EngineConfig",
    "ExportConfig",
    "ImportConfig",
    "InspectConfig",
    "JobConfig",
    "ModelConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ServeConfig",
    "StorageConfig",
    "load_job",
    "validate",
]
