"""When a wait is worth another line."""

from __future__ import annotations

from codistill.peer.log_backoff import LogBackoff


def test_a_long_wait_is_logged_less_and_less_often_and_once_a_minute_in_the_end() -> None:
    backoff = LogBackoff()
    backoff.begin(100)
    assert [second for second in range(300) if backoff.due(100 + second)] == [5, 15, 35, 75, 135, 195, 255]


def test_the_next_wait_is_logged_as_soon_as_the_first() -> None:
    backoff = LogBackoff()
    backoff.begin(0)
    assert backoff.due(50)
    backoff.begin(60)
    assert not backoff.due(64.9)
    assert backoff.due(65)
