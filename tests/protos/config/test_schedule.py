from __future__ import annotations

import pytest

from codistill.config.schedule import ExchangeSchedule


@pytest.mark.parametrize(
    "schedule", [ExchangeSchedule(), ExchangeSchedule(3, 1), ExchangeSchedule(0, 4), ExchangeSchedule(7, 3)]
)
def test_steps_and_rounds_count_each_other(schedule: ExchangeSchedule) -> None:
    exchanging = [step for step in range(50) if schedule.exchanges(step)]
    assert exchanging[0] == schedule.start
    assert [schedule.step_of(number) for number in range(len(exchanging))] == exchanging
    assert [schedule.rounds_before(step) for step in exchanging] == list(range(len(exchanging)))
    for step in range(50):
        assert schedule.rounds_before(step) == sum(earlier < step for earlier in exchanging)
