"""Run a job file: `ray job submit jobs/pretrain.yaml`, `./jobs/pretrain.yaml` or
`python -m llama_ray.job jobs/pretrain.yaml train.steps=100 --dry-run`.

Load → validate → dispatch. Exit status 0: done; 1: the job failed; 2: the job file is wrong; 130:
interrupted (Ctrl-C).
The reason is the last line.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from llama_ray.config import (
    CleanConfig,
    ExportConfig,
    ImportConfig,
    InspectConfig,
    JobConfig,
    PrepareConfig,
    PretrainConfig,
    load_job,
)
from llama_ray.errors import UserError, user_error_cause


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return _fail(UserError("interrupted; run the same job again"), status=130)


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="llama_ray.job", description=__doc__)
    parser.add_argument("file", help="the job file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="validate, print what would run, touch nothing"
    )
    options = parser.parse_intermixed_args(arguments)
    # The driver's output is read through a pipe: by line, or progress would arrive in blocks.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        config = load_job(options.file, options.overrides)
        describe(config, options.dry_run)
    except UserError as error:
        return _fail(error, status=2)
    if options.dry_run:
        return 0
    try:
        dispatch(config)
    except Exception as error:
        # Ray raises its own exceptions around what a worker raised.
        if (cause := user_error_cause(error)) is None:
            traceback.print_exc()
        return _fail(cause or error, status=1)
    return 0


def describe(config: JobConfig, dry_run: bool) -> None:
    """Print the quantities that follow from the job file; in a dry run also those that take a
    while to find."""
    if isinstance(config, PretrainConfig):
        from llama_ray.train.describe import describe_pretrain

        describe_pretrain(config, dry_run)
    elif isinstance(config, PrepareConfig):
        from llama_ray.data.prepare import describe_prepare

        describe_prepare(config)
    elif isinstance(config, CleanConfig):
        from llama_ray.data.clean.describe import describe_clean

        describe_clean(config)
    elif isinstance(config, InspectConfig):
        from llama_ray.data.inspect import describe_inspect

        describe_inspect(config)
    elif isinstance(config, ImportConfig):
        from llama_ray.formats.import_ import describe_import

        describe_import(config, dry_run)
    elif isinstance(config, ExportConfig):
        from llama_ray.formats.export import describe_export

        describe_export(config, dry_run)


def dispatch(config: JobConfig) -> None:
    """Run the job. Imports are here so that a typo in a job file is told in under a second."""
    if isinstance(config, PretrainConfig):
        from llama_ray.train.run import pretrain

        pretrain(config)
    elif isinstance(config, PrepareConfig):
        from llama_ray.data.prepare import prepare

        prepare(config)
    elif isinstance(config, CleanConfig):
        from llama_ray.data.clean.pipeline import clean

        clean(config)
    elif isinstance(config, InspectConfig):
        from llama_ray.data.inspect import inspect

        inspect(config)
    elif isinstance(config, ImportConfig):
        from llama_ray.formats.conversion import return_freed_memory
        from llama_ray.formats.import_ import import_model

        return_freed_memory()
        import_model(config)
    elif isinstance(config, ExportConfig):
        from llama_ray.formats.conversion import return_freed_memory
        from llama_ray.formats.export import export

        return_freed_memory()
        export(config)


def _fail(error: Exception, status: int) -> int:
    sys.stdout.flush()
    text = str(error).strip() or repr(error)
    if not isinstance(
        error, UserError
    ):  # Ray's messages are tracebacks; their last line is the reason
        text = text.splitlines()[-1]
    print(f"error: {text}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
