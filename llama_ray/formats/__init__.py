"""Weights of other programs, in and out: Hugging Face, Meta, llama2.c, GGUF. A tensor at a time."""
