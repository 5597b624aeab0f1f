from __future__ import annotations

from codistill_server.ratelimit import Rate, TokenBucket, TokenBuckets


class TestTokenBucket:
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


class TestTokenBuckets:
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
