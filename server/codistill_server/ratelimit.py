"""Rates and the token buckets that hold callers to them.

Pure: no clock, no socket; time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["Rate", "TokenBucket", "TokenBuckets"]


@dataclass(frozen=True)
class Rate:
    """An amount allowed at once, and an amount per second in the long run."""

    burst: float
    per_second: float


class TokenBucket:
    """A token bucket: full at first, refilled as time goes by."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._level = rate.burst
        self._refilled_at = now

    def take(self, now: float, amount: float = 1.0) -> float:
        """Take an amount if it is there; return 0 if it was, else after how many seconds it will be.

        An amount above the burst is taken from a full bucket, which then owes the rest.
        """
        self._level = min(self._level + max(now - self._refilled_at, 0.0) * self._rate.per_second, self._rate.burst)
        self._refilled_at = max(now, self._refilled_at)
        missing = min(amount, self._rate.burst) - self._level
        if missing > 0:
            return missing / self._rate.per_second
        self._level -= amount
        return 0.0


class TokenBuckets:
    """A bucket for each of many keys; if there are too many, the key that was idle for longest is dropped.

    Args:
        rate: every bucket's rate.
        most: how many keys are kept.
    """

    def __init__(self, rate: Rate, most: int = 1024) -> None:
        self._rate = rate
        self._most = most
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, now: float, amount: float = 1.0) -> float:
        """Take an amount from a key's bucket; see :meth:`TokenBucket.take`."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(self._rate, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket.take(now, amount)
