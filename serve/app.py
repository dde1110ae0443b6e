"""The Ray Serve application: `serve deploy serve/config.yaml` builds it with `build_app`."""

# No `from __future__ import annotations` here: Ray ships the class below by value, and a name that
# only a string mentions would stay behind, where FastAPI looks for it.
import logging
import math
import time
from dataclasses import asdict
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve import Application

from llama_ray.checkpoint.load import load_model
from llama_ray.config import ServeConfig, validate
from llama_ray.engine import AsyncEngine, Engine
from llama_ray.storage import Storage
from serve.completions import CompletionStream
from serve.errors import UnknownModelError, add_error_handlers
from serve.protocol import Completion, CompletionRequest, Health, Model, ModelList

# Requests Ray Serve lets into a replica beyond those the engine takes: the replica, not Serve, then
# says that it is full, in OpenAI's words, and still answers /health and /v1/models.
_ONGOING_BEYOND_ENGINE = 64

api = FastAPI(title="llama_ray", docs_url=None, redoc_url=None)  # those pages load from a CDN
add_error_handlers(api)


@serve.deployment
@serve.ingress(api)
class LLaMAServer:
    """One replica: a model, its engine, and the endpoints in front."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises `UserError`, which becomes the deployment's status message."""
        torch.set_num_threads(math.ceil(config.cpus_per_replica))
        started = time.monotonic()
        loaded = load_model(
            config.checkpoint,
            Storage(config.storage),
            tokenizer=config.tokenizer,
            dtype=getattr(torch, config.engine.dtype),
            device="cuda" if config.gpus_per_replica else "cpu",
        )
        self._engine = AsyncEngine(Engine(loaded, config.engine), config.max_queued_requests)
        self._model = Model(id=config.model_name, created=int(time.time()))
        logging.getLogger("ray.serve").info(
            f"loaded {loaded.description} in {time.monotonic() - started:.1f} s"
        )

    @api.post("/v1/completions", response_model=Completion)
    async def completions(self, body: CompletionRequest) -> Response:
        self._check_model(body.model)
        stream = CompletionStream(self._engine, body)
        await stream.start()
        if body.stream:
            return StreamingResponse(stream.events(), media_type="text/event-stream")
        return JSONResponse((await stream.whole()).model_dump())

    @api.get("/v1/models")
    async def models(self) -> ModelList:
        return ModelList(data=[self._model])

    @api.get("/v1/models/{model:path}")
    async def model(self, model: str) -> Model:
        self._check_model(model)
        return self._model

    @api.get("/health")
    async def health(self) -> Health:
        self._engine.check_alive()
        return Health(status="ok", **asdict(self._engine.engine.load()))

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose engine has stopped."""
        self._engine.check_alive()

    def _check_model(self, name: str) -> None:
        if name != self._model.id:
            raise UnknownModelError(name)


def build_app(args: dict[str, Any]) -> Application:
    """`import_path: serve.app:build_app` in a Serve config; `args` are `ServeConfig`'s fields.

    Raises `UserError` naming the key.
    """
    config = validate(ServeConfig, args, "args")
    engine_takes = config.engine.max_batch_size + config.max_queued_requests
    return LLaMAServer.options(  # type: ignore[attr-defined]
        num_replicas=config.num_replicas,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
        max_ongoing_requests=engine_takes + _ONGOING_BEYOND_ENGINE,
        # What a constructor reports (no checkpoint, wrong tokenizer) seldom mends itself, and
        # storage has retries of its own.
        max_constructor_retry_count=1,
    ).bind(config)
