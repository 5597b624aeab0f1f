"""When a process without a heartbeat hangs. test_child.py stops real ones."""

from __future__ import annotations

import pytest

from codistill_deploy.supervise.heartbeat import HEARTBEAT_VARIABLE, Heartbeat, announce_exit, start_heartbeat


def end_of_silence(heartbeat: Heartbeat, start: float, step: float = 0.1) -> float:
    """Let time go by in silence; return when that is too long."""
    now = start
    while heartbeat.tick(now, b"") is None:
        now += step
        assert now < start + 10_000
    return now


def test_silence_after_a_heartbeat_has_a_bound() -> None:
    heartbeat = Heartbeat(30, 100)
    assert heartbeat.tick(101, b".") is None
    assert end_of_silence(heartbeat, 101) == pytest.approx(131, abs=0.2)


def test_a_heartbeat_ends_the_silence() -> None:
    heartbeat = Heartbeat(5, 0)
    for now in range(1, 1000):
        assert heartbeat.tick(now, b"." * (now % 4 == 0)) is None
    assert end_of_silence(heartbeat, 999) == pytest.approx(1001, abs=0.2), "the last was at 996"


def test_a_start_may_take_longer_and_not_for_ever() -> None:
    assert end_of_silence(Heartbeat(5, 0), 0) == pytest.approx(60, abs=0.2)


def test_an_end_may_take_longer_and_not_for_ever() -> None:
    heartbeat = Heartbeat(5, 0)
    heartbeat.tick(1, b"..")
    heartbeat.tick(2, b".e.")
    assert end_of_silence(heartbeat, 2) == pytest.approx(67, abs=0.2)


def test_time_in_which_nobody_listened_is_no_silence() -> None:
    heartbeat = Heartbeat(5, 0)
    heartbeat.tick(1, b".")
    assert heartbeat.tick(10_000, b"") is None, "this process was stopped, or the machine slept"
    assert end_of_silence(heartbeat, 10_000) == pytest.approx(10_004, abs=0.2)


def test_the_line_says_when_so_that_two_are_not_the_same_error() -> None:
    heartbeat = Heartbeat(2, 0)
    for now in (1, 2, 3):
        heartbeat.tick(now, b".")
    heartbeat.tick(4, b"")
    line = heartbeat.tick(5, b"")
    assert line is not None
    assert line.startswith("killed after 2 s without a sign of life, 3.0 s after its start: ")
    assert line.endswith("it was stopped, or something held all its threads; training.hang_after sets the limit")


def test_a_process_without_a_supervisor_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEAT_VARIABLE, raising=False)
    start_heartbeat()
    announce_exit()
