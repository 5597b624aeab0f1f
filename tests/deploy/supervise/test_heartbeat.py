"""When a process that gives no sign of life hangs. test_supervision.py stops real ones."""

from __future__ import annotations

import pytest

from codistill_deploy.supervise.heartbeat import HEARTBEAT_VARIABLE, Heartbeat, announce_exit, start_heartbeat


def first_silence(pulse: Heartbeat, start: float, step: float = 0.1) -> float:
    """Lets time go by in silence; returns when that is too long."""
    now = start
    while pulse.tick(now, b"") is None:
        now += step
        assert now < start + 10_000
    return now


def test_silence_after_a_sign_has_a_bound() -> None:
    pulse = Heartbeat(30, 100)
    assert pulse.tick(101, b".") is None
    assert first_silence(pulse, 101) == pytest.approx(131, abs=0.2)


def test_a_sign_begins_the_silence_anew() -> None:
    pulse = Heartbeat(5, 0)
    for now in range(1, 1000):
        assert pulse.tick(now, b"." * (now % 4 == 0)) is None
    assert first_silence(pulse, 999) == pytest.approx(1001, abs=0.2), "the last was at 996"


def test_a_start_may_take_longer_and_not_for_ever() -> None:
    assert first_silence(Heartbeat(5, 0), 0) == pytest.approx(60, abs=0.2)


def test_an_end_may_take_longer_and_not_for_ever() -> None:
    pulse = Heartbeat(5, 0)
    pulse.tick(1, b"..")
    pulse.tick(2, b".e.")
    assert first_silence(pulse, 2) == pytest.approx(67, abs=0.2)


def test_who_was_not_there_to_listen_heard_no_silence() -> None:
    pulse = Heartbeat(5, 0)
    pulse.tick(1, b".")
    assert pulse.tick(10_000, b"") is None, "this process was stopped, or the machine slept"
    assert first_silence(pulse, 10_000) == pytest.approx(10_004, abs=0.2)


def test_the_line_says_since_when_so_that_two_are_not_the_same_error() -> None:
    pulse = Heartbeat(2, 0)
    for now in (1, 2, 3):
        pulse.tick(now, b".")
    pulse.tick(4, b"")
    line = pulse.tick(5, b"")
    assert line is not None
    assert line.startswith("killed after 2 s without a sign of life, 3.0 s after its start: ")
    assert line.endswith("it was stopped, or something held all its threads; training.hang_after sets the limit")


def test_a_process_that_nobody_listens_to_gives_no_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HEARTBEAT_VARIABLE, raising=False)
    start_heartbeat()
    announce_exit()
