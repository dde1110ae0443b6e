"""The one exception type that means "you can fix this"."""

from __future__ import annotations

from typing import TypeVar


class UserError(ValueError):
    """Something the user can put right: says what is wrong, where, and what to do.

    `llama_ray.job` prints its message without a traceback, as the last line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        # Ray Data adds advice of its own to the `args` of what a read task raises.
        self.message = message

    def __str__(self) -> str:
        return self.message


def user_error_cause(error: BaseException | None) -> UserError | None:
    """The `UserError` that `error` was raised from; None where there is none."""
    return find_cause(error, UserError)


Found = TypeVar("Found", bound=BaseException)


def find_cause(error: BaseException | None, kind: type[Found]) -> Found | None:
    """The exception of this very type that `error` was raised from, looking through what Ray wraps
    around those of tasks and actors (`RayTaskError.cause`); None where there is none."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        if type(current) is kind:
            return current
        seen.add(id(current))
        pending += [current.__context__, current.__cause__]
        pending += [getattr(current, name, None) for name in ("cause", "_base_exc")]
        # Ray Train: one error per failed worker.
        pending += list(getattr(current, "worker_failures", {}).values())
    return None
