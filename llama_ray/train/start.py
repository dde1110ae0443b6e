"""Where a run starts: from nothing, from its own newest checkpoint, or from another's."""

from __future__ import annotations

from llama_ray.checkpoint.store import CheckpointInfo, CheckpointStore, read_info, resolve
from llama_ray.config.pretrain import PretrainConfig
from llama_ray.data.skips import SkippedBatches
from llama_ray.errors import UserError
from llama_ray.storage import Storage


def find_start(config: PretrainConfig, storage: Storage) -> str | None:
    """Folder of the checkpoint to go on from; None: begin with fresh weights."""
    store = CheckpointStore(storage, config.name)
    if committed := store.committed_steps():
        return store.path(committed[-1])
    if config.checkpoint.resume in ("auto", "never"):
        return None
    return resolve(storage, config.checkpoint.resume)


def check_start(
    config: PretrainConfig, storage: Storage, folder: str, tokenizer_sha256: str
) -> CheckpointInfo:
    """Describe the checkpoint. Raises `UserError` where it is no start for this run."""
    info, url = read_info(storage, folder), storage.url(folder)
    if info.model.model_dump(exclude={"preset"}) != config.model.model_dump(exclude={"preset"}):
        raise UserError(
            f"checkpoint.resume: {url} is of another model ({info.model}) than this run's "
            f"({config.model}); make `model` equal"
        )
    if info.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"data.tokens: {config.data.tokens} was tokenized with another tokenizer than {url}; "
            "choose the tokens of that run or another name"
        )
    if "data" in info.config:
        skips = info.config["data"].get("skip_steps", []), config.data.skip_steps
        before, now = (SkippedBatches(skip).runs(0, info.step) for skip in skips)
        if before != now:
            raise UserError(
                f"data.skip_steps: {url} has trained on other batches than {skips[1]} leaves; keep "
                f"its own, {skips[0]}, as far as they come before its step {info.step:,}"
            )
    return info
