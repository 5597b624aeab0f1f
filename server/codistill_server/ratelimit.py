"""How much one peer may ask of the server: numbers far above what honest use needs, and token buckets that hold them.

Pure: no clock, no socket; time is an argument. Who is over a limit is told so and when to try again, and nobody else
notices.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["Limits", "QuotaExceeded", "Quotas", "Rate", "RepeatQuota", "TokenBucket", "TokenBuckets"]

_MIB = 2**20


class QuotaExceeded(Exception):  # noqa: N818 - an answer, not a fault
    """A peer asks for more than its share; `seconds` is after how long it may ask again."""

    def __init__(self, message: str, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"{message}; try again in {seconds:.1f} s")


@dataclass(frozen=True)
class Rate:
    """So many at once, and so many per second in the long run."""

    burst: float
    per_second: float


@dataclass(frozen=True)
class Limits:
    """What one peer may do. ``docs/security.md`` has the table, and why honest use stays below.

    Attributes:
        joins: of one student; a worker that is restarted every second needs 1 per second.
        calls: unary calls from one host; a worker needs 1 per second, a status that polls every 0.2 s needs 5.
        call_bytes: bytes of unary calls from one host; a report has some hundred, a join some thousand.
        repeats: contributions of one session to rounds that it has contributed to; an honest one makes none.
        watchers: WatchRun streams at a time, from everywhere; `codistill run` has one.
    """

    joins: Rate = Rate(50, 5)
    calls: Rate = Rate(2000, 500)
    call_bytes: Rate = Rate(16 * _MIB, _MIB)
    repeats: Rate = Rate(64, 1)
    watchers: int = 64


class TokenBucket:
    """A token bucket: full at first, refilled as time goes by."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._level = rate.burst
        self._at = now

    def take(self, now: float, amount: float = 1.0) -> float:
        """Takes an amount if it is there; returns 0 if it was, else after how many seconds it will be.

        An amount above the burst is taken from a full bucket, which then owes the rest.
        """
        self._level = min(self._level + max(now - self._at, 0.0) * self._rate.per_second, self._rate.burst)
        self._at = max(now, self._at)
        missing = min(amount, self._rate.burst) - self._level
        if missing > 0:
            return missing / self._rate.per_second
        self._level -= amount
        return 0.0


class TokenBuckets:
    """A bucket for each of many keys; the key that was quiet for longest is forgotten when there are too many.

    Args:
        rate: every bucket's rate.
        most: how many keys are remembered.
    """

    def __init__(self, rate: Rate, most: int = 1024) -> None:
        self._rate = rate
        self._most = most
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: str, now: float, amount: float = 1.0) -> float:
        """Takes from a key's bucket; see :meth:`TokenBucket.take`."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(self._rate, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return bucket.take(now, amount)


class RepeatQuota:
    """How often one session contributes again to rounds that it has contributed to.

    A session goes through the rounds in order, also when it catches up from the journal; only one that does not know
    what it does, or that wants to be sent the same again and again, goes back.
    """

    def __init__(self, rate: Rate, now: float) -> None:
        self._bucket = TokenBucket(rate, now)
        self._next = 0

    def contribute(self, number: int, now: float) -> None:
        """Takes in a contribution.

        Raises:
            QuotaExceeded: it is one repetition too many.
        """
        if number >= self._next:
            self._next = number + 1
            return
        seconds = self._bucket.take(now)
        if seconds:
            raise QuotaExceeded(
                f"round {number}: this session has contributed to it before, and repeats too often", seconds
            )


class Quotas:
    """What a server lets through, of all peers.

    Attributes:
        watching: how many WatchRun streams are open.
    """

    def __init__(self, limits: Limits) -> None:
        self.watching = 0
        self._limits = limits
        self._joins = TokenBuckets(limits.joins)
        self._calls = TokenBuckets(limits.calls)
        self._bytes = TokenBuckets(limits.call_bytes)

    def call(self, host: str, size: int, now: float) -> None:
        """Takes in a unary call.

        Raises:
            QuotaExceeded: its host calls too often, or sends too much.
        """
        seconds = self._calls.take(host, now)
        if seconds:
            raise QuotaExceeded(f"{host} makes more than {self._limits.calls.per_second:g} calls a second", seconds)
        seconds = self._bytes.take(host, now, size)
        if seconds:
            raise QuotaExceeded(
                f"{host} sends more than {self._limits.call_bytes.per_second / _MIB:g} MiB a second", seconds
            )

    def join(self, student: str, now: float) -> None:
        """Takes in a join.

        Raises:
            QuotaExceeded: there were too many for this student.
        """
        seconds = self._joins.take(student, now)
        if seconds:
            who = f"student {student!r}" if student else "students that the experiment does not have"
            raise QuotaExceeded(
                f"{who}: more than {self._limits.joins.per_second:g} joins a second; see that one worker runs, and why it "
                "starts again",
                seconds,
            )

    def watch(self) -> None:
        """Takes in a WatchRun stream; `watching` is to be lowered when it ends.

        Raises:
            QuotaExceeded: there are too many.
        """
        if self.watching >= self._limits.watchers:
            raise QuotaExceeded(f"{self.watching} WatchRun streams are open, as many as are allowed; end some", 1.0)
        self.watching += 1

    def session(self, now: float) -> RepeatQuota:
        """Returns what holds one session's contributions to its share."""
        return RepeatQuota(self._limits.repeats, now)
