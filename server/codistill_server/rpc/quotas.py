"""How much one peer may ask of the server: numbers far above what a correct peer needs.

Pure: no clock, no socket; time is an argument. A peer over its quota learns when to try again; no other peer
notices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from codistill_server.ratelimit import Rate, TokenBucket, TokenBuckets

__all__ = ["Limits", "QuotaExceeded", "Quotas", "RepeatQuota"]

_MIB = 2**20


class QuotaExceeded(Exception):  # noqa: N818 - an answer, not a fault
    """A peer asks for more than its share; `seconds` is after how long it may ask again."""

    def __init__(self, message: str, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"{message}; try again in {seconds:.1f} s")


@dataclass(frozen=True)
class Limits:
    """The limits for one peer. ``docs/security.md`` has the table, and why a correct peer stays below.

    Attributes:
        joins: of one participant; a worker that is restarted every second needs 1 per second.
        calls: unary calls from one host; a worker needs 1 per second, a status that polls every 0.2 s needs 5.
        call_bytes: bytes of unary calls from one host; a report has some hundred, a join some thousand.
        repeats: contributions of one session to rounds that it has contributed to; a correct one makes none.
        watchers: WatchRun streams at a time, from everywhere; `codistill run` has one.
    """

    joins: Rate = field(default=Rate(50, 5))
    calls: Rate = field(default=Rate(2000, 500))
    call_bytes: Rate = field(default=Rate(16 * _MIB, _MIB))
    repeats: Rate = field(default=Rate(64, 1))
    watchers: int = 64


class RepeatQuota:
    """How often one session may contribute again to rounds that it has contributed to.

    A correct session goes through the rounds in order, also when it catches up from the journal.
    """

    def __init__(self, rate: Rate, now: float) -> None:
        self._bucket = TokenBucket(rate, now)
        self._next_round = 0

    def contribute(self, round_number: int, now: float) -> None:
        """Count a contribution.

        Raises:
            QuotaExceeded: it is one repetition too many.
        """
        if round_number >= self._next_round:
            self._next_round = round_number + 1
            return
        seconds = self._bucket.take(now)
        if seconds:
            raise QuotaExceeded(
                f"round {round_number}: this session has contributed to it before, and repeats too often", seconds
            )


class Quotas:
    """The quotas of a server's peers.

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
        """Count a unary call of `size` bytes.

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

    def join(self, participant: str, now: float) -> None:
        """Count a join; "" stands for all participants that the experiment does not have.

        Raises:
            QuotaExceeded: there were too many for this participant.
        """
        seconds = self._joins.take(participant, now)
        if seconds:
            joining = (
                f"participant {participant!r}" if participant else "participants that the experiment does not have"
            )
            raise QuotaExceeded(
                f"{joining}: more than {self._limits.joins.per_second:g} joins a second; see that one worker runs, and why it "
                "starts again",
                seconds,
            )

    def watch(self) -> None:
        """Count a WatchRun stream; the caller lowers `watching` when it ends.

        Raises:
            QuotaExceeded: there are too many.
        """
        if self.watching >= self._limits.watchers:
            raise QuotaExceeded(f"{self.watching} WatchRun streams are open, as many as are allowed; end some", 1.0)
        self.watching += 1

    def repeats(self, now: float) -> RepeatQuota:
        """Return a new session's quota of repeated contributions."""
        return RepeatQuota(self._limits.repeats, now)
