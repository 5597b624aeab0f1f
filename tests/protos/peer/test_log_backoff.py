"""When a wait is worth another line."""

from __future__ import annotations

from codistill.peer.log_backoff import LogBackoff


def test_a_long_wait_is_told_less_and_less_often_and_once_a_minute_in_the_end() -> None:
    telling = LogBackoff()
    telling.begin(100)
    assert [second for second in range(300) if telling.due(100 + second)] == [5, 15, 35, 75, 135, 195, 255]


def test_the_next_wait_is_told_as_soon_as_the_first() -> None:
    telling = LogBackoff()
    telling.begin(0)
    assert telling.due(50)
    telling.begin(60)
    assert not telling.due(64.9)
    assert telling.due(65)
