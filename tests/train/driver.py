"""A job's driver in a process of its own, to be watched and to be killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

from llama_ray.config import PretrainConfig

REPOSITORY = Path(__file__).parents[2]


class Driver:
    """`python -m llama_ray.job` on a job file; its output as it comes."""

    def __init__(
        self, config: PretrainConfig, folder: Path, address: str, env: dict[str, str] | None = None
    ) -> None:
        """env: for the job's workers too, as `ray job submit --runtime-env-json` gives it."""
        env = env or {}
        runtime_env = json.dumps({"runtime_env": {"env_vars": env}})
        file = folder / f"{config.name}.yaml"
        job = config.model_dump(mode="json", exclude_none=True)
        file.write_text(yaml.safe_dump({"kind": "pretrain", **job}))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama_ray.job", str(file)],
            cwd=REPOSITORY,
            env=os.environ
            | env
            | {"RAY_ADDRESS": address, "RAY_JOB_CONFIG_JSON_ENV_VAR": runtime_env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 90, after: int = 0) -> re.Match[str]:
        """The first line, of those from number `after` on, that has the pattern."""
        deadline = time.monotonic() + seconds
        while True:
            for line in self.lines[after:]:
                if match := re.search(pattern, line):
                    return match
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.output}"
            time.sleep(0.02)

    def wait_for_step(self, step: int, after: int = 0) -> None:
        self.wait_for(rf"^ +{step} +\d+\.\d+ ", after=after)

    def end(self, seconds: float = 120) -> int:
        """Its exit status."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still at work after {seconds} s:\n{self.output}") from None
        self.reader.join()
        return status

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
