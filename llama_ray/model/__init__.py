"""The model, plain: `llama.py` reads like the paper."""

from llama_ray.model.llama import LLaMA

__all__ = ["LLaMA"]
