"""YAML file + dotted overrides → a validated config, or an error that names file and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from llama_ray.config.clean import CleanConfig
from llama_ray.config.export import ExportConfig
from llama_ray.config.import_ import ImportConfig
from llama_ray.config.inspect import InspectConfig
from llama_ray.config.job_base import JobConfig
from llama_ray.config.prepare import PrepareConfig
from llama_ray.config.pretrain import PretrainConfig
from llama_ray.errors import UserError

JOB_KINDS: dict[str, type[JobConfig]] = {
    "clean": CleanConfig,
    "prepare": PrepareConfig,
    "inspect": InspectConfig,
    "pretrain": PretrainConfig,
    "import": ImportConfig,
    "export": ExportConfig,
}

Model = TypeVar("Model", bound=BaseModel)


def load_job(path: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Read the job file at `path`, apply `a.b=value` overrides, validate.

    Raises `UserError` naming the file, the key and the valid choices.
    """
    data = apply_overrides(read_yaml(path), overrides)
    # `storage:` with nothing under it, all its keys commented out, means the defaults.
    data = {key: value for key, value in data.items() if value is not None}
    kind = data.get("kind")
    if kind not in JOB_KINDS:
        raise UserError(
            f"{path}: kind: {kind!r} is no kind of job{nearest(str(kind), JOB_KINDS)}; "
            f"choose from {', '.join(JOB_KINDS)}"
        )
    return validate(JOB_KINDS[kind], data, path)


def validate(model: type[Model], data: Any, where: str) -> Model:
    """`model.model_validate` whose errors are `UserError`s that start with `where` and the key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(_explain(error, model, where)) from None


def read_yaml(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no `key: value` pairs")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`["train.steps=10"]` sets `data["train"]["steps"] = 10`; values are read as YAML."""
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise UserError(f"override {override!r}: write it as section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {override!r}: the value is not valid YAML: {error}"
            ) from None
        *parents, last = key.split(".")
        section = data
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"override {override!r}: {parent!r} is a value, not a section")
        section[last] = value
    return data


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (value before, value now) where two dumped configs differ."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    keys = sorted(old.keys() | new.keys())
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        prefix = f"{where}: {key}: " if key else f"{where}: "
        if problem["type"] == "extra_forbidden":
            valid = list(_fields_at(model, problem["loc"][:-1]))
            guess = nearest(str(problem["loc"][-1]), valid)
            lines.append(f"{prefix}unknown key{guess}; valid keys: {', '.join(valid)}")
        elif problem["type"] == "missing":
            lines.append(f"{prefix}is missing; add it")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            scalar = isinstance(given, str | int | float | bool)
            lines.append(prefix + message + (f" (given: {given!r})" if scalar and key else ""))
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> dict[str, Any]:
    """The fields of the model that `location` leads to."""
    for key in (part for part in location if not isinstance(part, int)):  # a list's items
        annotation = model.model_fields[str(key)].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model.model_fields


def nearest(key: str, valid: Iterable[str]) -> str:
    """ ", did you mean 'steps'?", or nothing where no valid key is like `key`."""
    match = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""
