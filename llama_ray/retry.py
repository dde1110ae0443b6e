"""Requests to storage that fail for a while: which are worth repeating, and for how long.

Object stores answer "slow down", drop connections and are away for minutes as a matter of
course. A request is repeated after a random part of a growing delay (full jitter, so that a
thousand ranks do not come back at once) until it works, fails for good or has taken too long.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import aiohttp
import botocore.exceptions
from botocore.parsers import ResponseParserError
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception
from tenacity.wait import wait_random_exponential

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.2, 10.0
LOG_EVERY_SECONDS = 60.0

_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
# What S3 answers with other statuses: a body arrived damaged or in part, two writers met.
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_ERRORS = (
    ConnectionError,
    TimeoutError,
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.FlexibleChecksumError,
    botocore.exceptions.MetadataRetrievalError,  # an instance's role
    botocore.exceptions.CredentialRetrievalError,
    ResponseParserError,
)
_TRANSIENT_ERRNO = {
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
}


class ShortReadError(OSError):
    """Fewer bytes came than were asked for."""


class GaveUpError(OSError):
    """A request that could be repeated has failed for too long; raised from its last error."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"tried for {seconds:.0f} s")
        self.seconds = seconds


def http_answer(error: BaseException) -> tuple[int, str]:
    """Status and S3 error code of what a server answered; 0 and "" where it did not."""
    for candidate in (error, error.__cause__):  # s3fs raises OSErrors from botocore's
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
    status = getattr(error, "code", None)  # gcsfs
    return (status, "") if isinstance(status, int) else (0, "")


def described(error: BaseException) -> str:
    """With the status the server answered, and never empty as a timeout is."""
    status, code = http_answer(error)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{status} {code}: {text}" if status else text


def is_transient(error: BaseException) -> bool:
    """Whether the same request may work later: the server or the way to it is at fault."""
    status, code = http_answer(error)
    if status:
        return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    if isinstance(error, botocore.exceptions.SSLError):
        return False  # a certificate does not get better
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    return isinstance(error, (ShortReadError, *_TRANSIENT_ERRORS))


class Retries:
    """Repeats requests to one storage, and logs when they begin to fail and when they work again.

    Usable from several threads and event loops at a time.
    """

    def __init__(self, where: str, seconds: float) -> None:
        self.where = where
        self.seconds = seconds
        """For how long one request is repeated."""
        self._logged_at = float("-inf")
        self._failing = False

    def call(self, function: Callable[[], T]) -> T:
        """Raises what `function` raises, or `GaveUpError` from it."""
        for attempt in Retrying(**self._policy(None)):
            with attempt:
                result = function()
        self._worked(attempt.retry_state)
        return result

    async def call_async(
        self, function: Callable[[], Awaitable[T]], deadline: float | None = None
    ) -> T:
        """As `call`; also ends at `deadline`, in `time.monotonic()`."""
        async for attempt in AsyncRetrying(**self._policy(deadline)):
            with attempt:
                result = await function()
        self._worked(attempt.retry_state)
        return result

    def _policy(self, deadline: float | None) -> dict[str, Any]:
        end = time.monotonic() + self.seconds
        end = end if deadline is None else min(end, deadline)
        return {
            "retry": retry_if_exception(is_transient),
            "wait": wait_random_exponential(FIRST_DELAY_SECONDS, max=LONGEST_DELAY_SECONDS),
            "stop": lambda state: time.monotonic() + state.upcoming_sleep >= end,
            "before_sleep": self._failed,
            "retry_error_callback": _give_up,
        }

    def _failed(self, state: RetryCallState) -> None:
        now = time.monotonic()
        if now < self._logged_at + LOG_EVERY_SECONDS:
            return  # a server that refuses one request in ten would fill the log
        self._logged_at, self._failing = now, True
        logger.warning(
            "%s: %s; trying again for up to %.0f s",
            self.where,
            described(_error(state)),
            self.seconds,
        )

    def _worked(self, state: RetryCallState) -> None:
        if state.attempt_number > 1 and self._failing:
            self._failing = False
            logger.warning("%s: works again after %.0f s", self.where, state.seconds_since_start)


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


def _give_up(state: RetryCallState) -> NoReturn:
    assert state.seconds_since_start is not None
    raise GaveUpError(state.seconds_since_start) from _error(state)
