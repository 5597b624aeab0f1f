from __future__ import annotations

import pytest

from codistill_server.ratelimit import Limits, QuotaExceeded, Quotas, Rate, RepeatQuota, TokenBucket, TokenBuckets


class TestBucket:
    def test_a_burst_and_then_the_rate(self) -> None:
        bucket = TokenBucket(Rate(3, 2), now=10)
        assert [bucket.take(10) for _ in range(3)] == [0, 0, 0]
        assert bucket.take(10) == 0.5, "half a second until the next"
        assert bucket.take(10.25) == 0.25
        assert bucket.take(10.5) == 0
        assert bucket.take(10.5) > 0

    def test_what_is_refused_costs_nothing(self) -> None:
        bucket = TokenBucket(Rate(1, 1), now=0)
        bucket.take(0)
        assert [bucket.take(0.5) for _ in range(100)] == [0.5] * 100
        assert bucket.take(1) == 0

    def test_it_never_holds_more_than_its_burst(self) -> None:
        bucket = TokenBucket(Rate(3, 2), now=0)
        assert [bucket.take(1e9) > 0 for _ in range(4)] == [False, False, False, True]

    def test_more_than_the_burst_at_once_is_paid_later(self) -> None:
        bucket = TokenBucket(Rate(10, 1), now=0)
        assert bucket.take(0, 25) == 0
        assert bucket.take(0) == 16
        assert bucket.take(15) == 1
        assert bucket.take(16) == 0

    def test_a_clock_that_goes_back_gives_nothing(self) -> None:
        bucket = TokenBucket(Rate(1, 1), now=100)
        assert bucket.take(100) == 0
        assert bucket.take(50) == 1
        assert bucket.take(100.5) == 0.5


class TestBuckets:
    def test_each_key_has_its_own(self) -> None:
        buckets = TokenBuckets(Rate(1, 1))
        assert buckets.take("a", 0) == 0
        assert buckets.take("a", 0) == 1
        assert buckets.take("b", 0) == 0

    def test_they_are_bounded_and_forget_who_was_quiet_for_longest(self) -> None:
        buckets = TokenBuckets(Rate(1, 1), most=3)
        for key in "abc":
            buckets.take(key, 0)
        buckets.take("a", 0)
        for number in range(1000):
            buckets.take(f"other {number}", 0)
            assert buckets.take("a", 0) > 0, "who goes on asking is not forgotten"
        assert len(buckets) == 3


class TestRepeats:
    def test_going_forward_costs_nothing_at_any_speed(self) -> None:
        repeats = RepeatQuota(Rate(0, 1), now=0)
        for number in range(100_000):
            repeats.contribute(number, 0)

    def test_gaps_are_no_repetition(self) -> None:
        repeats = RepeatQuota(Rate(0, 1), now=0)
        for number in (7, 8, 100):
            repeats.contribute(number, 0)

    def test_going_back_is_counted(self) -> None:
        repeats = RepeatQuota(Rate(2, 1), now=0)
        repeats.contribute(5, 0)
        repeats.contribute(5, 0)
        repeats.contribute(0, 0)
        with pytest.raises(QuotaExceeded, match=r"round 3: this session has contributed .* again in 1\.0 s") as caught:
            repeats.contribute(3, 0)
        assert caught.value.seconds == 1
        repeats.contribute(6, 0)
        repeats.contribute(6, 1)


class TestGate:
    def test_joins_are_limited_for_each_student(self) -> None:
        gate = Quotas(Limits())
        for _ in range(50):
            gate.join("ant", 0)
        with pytest.raises(QuotaExceeded, match=r"student 'ant': more than 5 joins a second; see that one worker runs"):
            gate.join("ant", 0)
        gate.join("bee", 0)
        gate.join("ant", 0.2)

    def test_names_that_the_experiment_does_not_have_share_one(self) -> None:
        gate = Quotas(Limits(joins=Rate(1, 1)))
        gate.join("", 0)
        with pytest.raises(QuotaExceeded, match="students that the experiment does not have: more than 1 joins"):
            gate.join("", 0)

    def test_calls_and_their_bytes_are_limited_for_each_host(self) -> None:
        gate = Quotas(Limits(calls=Rate(3, 1), call_bytes=Rate(2**20, 2**20)))
        gate.call("ipv4:10.0.0.1", 2**20, 0)
        with pytest.raises(
            QuotaExceeded, match=r"ipv4:10\.0\.0\.1 sends more than 1 MiB a second; try again in 0\.0 s"
        ):
            gate.call("ipv4:10.0.0.1", 1, 0)
        gate.call("ipv4:10.0.0.1", 0, 0)
        with pytest.raises(
            QuotaExceeded, match=r"ipv4:10\.0\.0\.1 makes more than 1 calls a second; try again in 1\.0 s"
        ):
            gate.call("ipv4:10.0.0.1", 0, 0)
        gate.call("ipv4:10.0.0.2", 2**20, 0)

    def test_watchers_are_counted(self) -> None:
        gate = Quotas(Limits(watchers=2))
        gate.watch()
        gate.watch()
        with pytest.raises(QuotaExceeded, match="2 WatchRun streams are open, as many as are allowed"):
            gate.watch()
        gate.watching -= 1
        gate.watch()


class TestHonestUse:
    """What the numbers must never hit."""

    def test_a_worker_restarted_every_second_for_an_hour(self) -> None:
        gate = Quotas(Limits())
        for second in range(3600):
            gate.join("ant", second)

    def test_a_status_every_fifth_of_a_second_beside_256_workers_on_one_host(self) -> None:
        gate = Quotas(Limits())
        for worker in range(256):
            gate.call("ipv4:127.0.0.1", 8_000, 0)
            gate.join(f"s{worker}", 0)
        for tick in range(600):
            now = tick / 5
            gate.call("ipv4:127.0.0.1", 0, now)
            if tick % 5 == 0:
                for _ in range(256):
                    gate.call("ipv4:127.0.0.1", 500, now)

    def test_a_worker_that_catches_up_at_full_speed(self) -> None:
        repeats = Quotas(Limits()).session(0)
        for number in range(100_000):
            repeats.contribute(number, number / 1e6)
