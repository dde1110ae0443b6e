"""Every failure answered as OpenAI does: status, `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from llama_ray.engine import EngineOverloadedError
from llama_ray.errors import UserError
from serve.protocol import CompletionRequest, error_body

_RETRY_AFTER_SECONDS = 1


class UnknownModelError(Exception):
    """A request for a model that is not served here."""


def add_error_handlers(api: FastAPI) -> None:
    api.add_exception_handler(UserError, _bad_request)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(UnknownModelError, _unknown_model)
    api.add_exception_handler(EngineOverloadedError, _overloaded)
    api.add_exception_handler(HTTPException, _http)
    api.add_exception_handler(Exception, _unexpected)


def _bad_request(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(_explained(str(error)), 400)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse(_explained(_first_problem(error.errors())), 400)


def _unknown_model(_: Request, error: Exception) -> JSONResponse:
    message = f"The model `{error}` does not exist; GET /v1/models lists what is served"
    return JSONResponse(error_body(message, param="model", code="model_not_found"), 404)


def _overloaded(_: Request, error: Exception) -> JSONResponse:
    body = error_body(f"Too many requests: {error}", "rate_limit_error", code="server_overloaded")
    return JSONResponse(body, 429, headers={"Retry-After": str(_RETRY_AFTER_SECONDS)})


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{error.detail} ({request.method} {request.url.path})"
    return JSONResponse(error_body(message), error.status_code, headers=error.headers)


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logging.getLogger("ray.serve").error(f"{request.url.path} failed", exc_info=error)
    # What went wrong inside is for the log, not for strangers.
    message = "The server had an error while processing your request; see the replica's log"
    return JSONResponse(error_body(message, "server_error"), 500)


def _explained(message: str) -> dict[str, Any]:
    """Our messages start with the parameter's name, where one is to blame."""
    name, separator, _ = message.partition(": ")
    param = name if separator and name in CompletionRequest.model_fields else None
    code = "context_length_exceeded" if "exceed the model's context" in message else None
    return error_body(message, param=param, code=code)


def _first_problem(problems: Sequence[Any]) -> str:
    problem = problems[0]
    location = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return "We could not parse the JSON body of your request"
    if problem["type"] == "model_attributes_type":
        return "The body must be a JSON object, sent as Content-Type: application/json"
    if not location:  # the body as a whole; a validator's own message names the parameter
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"Unrecognized request argument supplied: {location[0]}"
    if problem["type"] == "missing":
        return f"{location[0]}: is missing"
    return f"{location[0]}: {problem['msg']}"
