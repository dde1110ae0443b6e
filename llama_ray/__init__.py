"""Pretrain LLaMA on your own Ray cluster and serve it."""

__version__ = "0.1.0"
