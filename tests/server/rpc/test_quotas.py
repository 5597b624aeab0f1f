from __future__ import annotations

import pytest

from codistill_server.ratelimit import Rate
from codistill_server.rpc.quotas import Limits, QuotaExceeded, Quotas, RepeatQuota


class TestRepeatQuota:
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


class TestQuotas:
    def test_joins_are_limited_for_each_participant(self) -> None:
        quotas = Quotas(Limits())
        for _ in range(50):
            quotas.join("ant", 0)
        with pytest.raises(
            QuotaExceeded, match=r"participant 'ant': more than 5 joins a second; see that one worker runs"
        ):
            quotas.join("ant", 0)
        quotas.join("bee", 0)
        quotas.join("ant", 0.2)

    def test_names_that_the_experiment_does_not_have_share_one(self) -> None:
        quotas = Quotas(Limits(joins=Rate(1, 1)))
        quotas.join("", 0)
        with pytest.raises(QuotaExceeded, match="participants that the experiment does not have: more than 1 joins"):
            quotas.join("", 0)

    def test_calls_and_their_bytes_are_limited_for_each_host(self) -> None:
        quotas = Quotas(Limits(calls=Rate(3, 1), call_bytes=Rate(2**20, 2**20)))
        quotas.call("ipv4:10.0.0.1", 2**20, 0)
        with pytest.raises(
            QuotaExceeded, match=r"ipv4:10\.0\.0\.1 sends more than 1 MiB a second; try again in 0\.0 s"
        ):
            quotas.call("ipv4:10.0.0.1", 1, 0)
        quotas.call("ipv4:10.0.0.1", 0, 0)
        with pytest.raises(
            QuotaExceeded, match=r"ipv4:10\.0\.0\.1 makes more than 1 calls a second; try again in 1\.0 s"
        ):
            quotas.call("ipv4:10.0.0.1", 0, 0)
        quotas.call("ipv4:10.0.0.2", 2**20, 0)

    def test_watchers_are_counted(self) -> None:
        quotas = Quotas(Limits(watchers=2))
        quotas.watch()
        quotas.watch()
        with pytest.raises(QuotaExceeded, match="2 WatchRun streams are open, as many as are allowed"):
            quotas.watch()
        quotas.watching -= 1
        quotas.watch()


class TestCorrectUse:
    """The limits must never stop a correct peer."""

    def test_a_worker_restarted_every_second_for_an_hour(self) -> None:
        quotas = Quotas(Limits())
        for second in range(3600):
            quotas.join("ant", second)

    def test_a_status_every_fifth_of_a_second_beside_256_workers_on_one_host(self) -> None:
        quotas = Quotas(Limits())
        for worker in range(256):
            quotas.call("ipv4:127.0.0.1", 8_000, 0)
            quotas.join(f"s{worker}", 0)
        for tick in range(600):
            now = tick / 5
            quotas.call("ipv4:127.0.0.1", 0, now)
            if tick % 5 == 0:
                for _ in range(256):
                    quotas.call("ipv4:127.0.0.1", 500, now)

    def test_a_worker_that_catches_up_at_full_speed(self) -> None:
        repeats = Quotas(Limits()).repeats(0)
        for number in range(100_000):
            repeats.contribute(number, number / 1e6)
