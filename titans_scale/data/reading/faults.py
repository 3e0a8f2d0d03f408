"""What may go wrong while samples are read, and how often it is tried again."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_exponential

from titans_scale.config import DataConfig

LONGEST_WAIT_SECONDS = 60


class ReadError(ValueError):
    """A file or a sample that cannot be read; another attempt may help."""


class DamagedError(ReadError):
    """What was read is not what was written; one other look tells a stale copy in between from a damaged file."""


class LostError(ReadError):
    """No other attempt will help."""


@dataclass(frozen=True, kw_only=True)
class ReadPolicy:
    """The keys of the data section that say how to deal with faults; see `DataConfig` for each."""

    verify: Literal["size", "hash"] = "size"
    on_error: Literal["raise", "skip"] = "raise"
    retries: int = 4
    retry_seconds: float = 0.5
    timeout_seconds: float = 15.0
    cache_dir: str | None = None
    cache_gib: float | None = None

    @classmethod
    def of(cls, config: DataConfig) -> "ReadPolicy":
        """The policy of a run."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def longest_seconds(self) -> float:
        """How long it may take until a remote that says nothing is given up."""
        waits = sum(min(self.retry_seconds * 2**retry, LONGEST_WAIT_SECONDS) for retry in range(self.retries))
        return (self.retries + 1) * self.timeout_seconds + waits

    def retrying(self, on_retry: Callable[[], None]) -> Retrying:
        """Attempts with growing waits, to call or to iterate over; the last one's error is raised.

        Args:
            on_retry: called before each further attempt, to count it.
        """
        growing = wait_exponential(multiplier=self.retry_seconds, max=LONGEST_WAIT_SECONDS)
        return Retrying(
            stop=stop_after_attempt(self.retries + 1),
            # the ranks that failed together must not all come back together
            wait=lambda state: growing(state) * random.uniform(0.5, 1),
            retry=_may_pass,
            before_sleep=lambda state: on_retry(),
            reraise=True,
        )


def _may_pass(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, DamagedError):
        return state.attempt_number == 1
    return isinstance(error, ReadError) and not isinstance(error, LostError)
