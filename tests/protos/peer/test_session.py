"""The decisions about a session, step by step, without a clock or a socket."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from codistill.peer.errors import PeerError
from codistill.peer.session import Session
from codistill.peer.steps import Cancel, Done, Failure, Join, Leave, Listen, Pause, Send, Step
from codistill.process.exit_codes import ExitCode

GONE = Failure("UNAVAILABLE", "gone")
OVER = Failure("ABORTED", "evicted; join again")
SUPERSEDED = Failure("ABORTED", "a newer worker has joined", superseded=True)
REFUSED = Failure("FAILED_PRECONDITION", "seed: 3, not 4")
CONNECT, GIVE_UP, SILENCE = 10.0, 100.0, 1000.0


def joined(first_round: int = 0, session: int = 1, silence: float = SILENCE) -> Session:
    """Return a connected session, at time 0."""
    made = Session("host:1", CONNECT, GIVE_UP, silence)
    made.join(first_round, 0)
    assert isinstance(made.step(0, 0.5), Join)
    made.joined(session)
    assert made.step(0, 0.5) == Done()
    return made


def receiving(round_number: int = 0, now: float = 0, silence: float = SILENCE) -> Session:
    """Return a session that waits for a round's targets."""
    made = joined(round_number, silence=silence)
    assert made.send(round_number), "the stream is open, so it goes out at once"
    made.receive(round_number, now)
    assert made.step(now, 0.5) == Listen(min(GIVE_UP, silence))
    return made


def raises(code: ExitCode, text: str, call: Callable[[], object]) -> None:
    with pytest.raises(PeerError) as ended:
        call()
    assert ended.value.code is code
    assert text in str(ended.value)


def steps(session: Session, now: float, until: type[Step], fail: Failure = GONE) -> list[float]:
    """Let Join fail until another step comes; return the pauses before each, as at a jitter of none."""
    pauses: list[float] = []
    while not isinstance(step := session.step(now, 0.5), until):
        if isinstance(step, Pause):
            pauses.append(step.seconds)
            now += step.seconds
        else:
            assert isinstance(step, Join)
            session.join_failed(fail, now)
    return pauses


# --- joining


def test_a_call_has_a_limit_of_its_own_within_what_is_left() -> None:
    session = Session("host:1", 30, GIVE_UP, SILENCE)
    session.join(5, 1000)
    assert session.step(1000, 0) == Join(first_round=5, session_id=0, timeout=20, remaining=30)
    assert session.step(1025, 0) == Join(first_round=5, session_id=0, timeout=5, remaining=5)
    assert session.step(1031, 0) == Join(first_round=5, session_id=0, timeout=0.1, remaining=-1), (
        "one last time, and briefly"
    )


def test_pauses_between_joins_double_up_to_a_limit_and_are_jittered() -> None:
    session = Session("host:1", 1000, GIVE_UP, SILENCE)
    session.join(0, 0)
    pauses: list[float] = []
    for _ in range(9):
        session.join_failed(GONE, 0)
        step = session.step(0, 0.5)
        assert isinstance(step, Pause)
        pauses.append(step.seconds)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5])
    for jitter, seconds in ((0, 2.5), (1, 7.5)):
        session.join_failed(GONE, 0)
        assert session.step(0, jitter) == Pause(seconds)


def test_pauses_end_with_the_time_there_is() -> None:
    session = Session("host:1", CONNECT, GIVE_UP, SILENCE)
    session.join(0, 0)
    session.join_failed(GONE, CONNECT - 0.04)
    step = session.step(CONNECT - 0.04, 0.5)
    assert isinstance(step, Pause)
    assert step.seconds == pytest.approx(0.04)


def test_a_server_never_reached_is_given_up_after_connect_timeout() -> None:
    session = Session("host:1", CONNECT, GIVE_UP, SILENCE)
    session.join(0, 0)
    session.join_failed(GONE, CONNECT - 0.1)
    raises(
        ExitCode.UNREACHABLE,
        "server host:1 cannot be reached within 10 s: gone; check",
        lambda: session.join_failed(GONE, CONNECT),
    )


@pytest.mark.parametrize(
    ("failure", "code", "text"),
    [
        (REFUSED, ExitCode.REFUSED, "server host:1 refused: seed: 3, not 4"),
        (OVER, ExitCode.REFUSED, "refused: evicted"),
        (SUPERSEDED, ExitCode.SUPERSEDED, "a newer worker has joined"),
        (Failure("UNIMPLEMENTED", "no such method"), ExitCode.REFUSED, "does not answer as an aggregation server"),
        (
            Failure("INVALID_ARGUMENT", "the participant has diverged"),
            ExitCode.DIVERGED,
            "refused: the participant has diverged",
        ),
    ],
)
def test_what_ends_a_join_at_once(failure: Failure, code: ExitCode, text: str) -> None:
    session = Session("host:1", CONNECT, GIVE_UP, SILENCE)
    session.join(0, 0)
    raises(code, text, lambda: session.join_failed(failure, 0))


# --- a round


def test_targets_of_the_round_waited_for_and_no_others() -> None:
    session = receiving(7)
    assert not session.targets(6, 1), "a round answered twice"
    assert not session.targets(8, 1)
    assert session.targets(7, 1)
    assert not session.targets(7, 1), "it waits for nothing now"


def test_what_is_open_goes_out_again_and_the_join_names_the_round_that_is_needed() -> None:
    session = receiving(7)
    session.broke(GONE, 1)
    assert not session.connected
    assert session.step(1, 0) == Join(7, 1, 20, GIVE_UP - 1), "at once"
    session.joined(2)
    assert (session.session_id, session.connected) == (2, True)
    assert session.step(1, 0) == Send(7)
    assert session.step(1, 0) == Listen(GIVE_UP - 1), "once"
    assert session.targets(7, 1)
    session.receive(8, 2)
    session.broke(GONE, 2)
    assert session.step(2, 0) == Join(8, 2, 20, GIVE_UP)
    session.joined(3)
    assert session.step(2, 0) == Listen(GIVE_UP), "nothing is open"


def test_what_is_sent_while_the_stream_is_down_waits_for_the_next() -> None:
    session = receiving(0)
    session.broke(GONE, 1)
    assert not session.send(1)
    session.receive(1, 1)
    assert isinstance(session.step(1, 0), Join)
    session.joined(2)
    assert session.step(1, 0) == Send(1)


def test_streams_that_break_again_and_again_are_paused_between() -> None:
    session = receiving()
    pauses: list[float] = []
    for _ in range(5):
        session.broke(GONE, 0)
        pauses += steps(session, 0, Join)
        session.joined(2)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8]), "none before the first"


@pytest.mark.parametrize("how", ["silence", "waiting", "stale targets", "broken stream"])
def test_a_wait_ends_with_its_limit_whatever_comes(how: str) -> None:
    session = receiving(3)
    session.waiting(3, ["mlp", "vit"], 50)
    session.waiting(2, ["cnn"], 51)  # of another round: late news
    calls: dict[str, Callable[[float], object]] = {
        "silence": session.silence,
        "waiting": lambda now: session.waiting(3, ["mlp", "vit"], now),
        "stale targets": lambda now: session.targets(2, now),
        "broken stream": lambda now: session.broke(GONE, now),
    }
    if how != "broken stream":
        calls[how](GIVE_UP - 0.1)
    raises(ExitCode.GAVE_UP, "gave up after 100 s: round 3 still waits for mlp, vit; ", lambda: calls[how](GIVE_UP))


def test_a_server_that_is_away_does_not_make_the_wait_longer() -> None:
    session = receiving(3)
    session.broke(GONE, 70)
    session.join_failed(GONE, 99.9)
    raises(
        ExitCode.UNREACHABLE,
        "server host:1 went away and did not come back within 30 s: gone",
        lambda: session.join_failed(GONE, GIVE_UP),
    )


def test_one_that_comes_back_at_the_last_moment_is_listened_to() -> None:
    session = receiving(3)
    session.broke(GONE, 99)
    assert isinstance(session.step(100.5, 0), Join)
    session.joined(2)
    assert session.step(100.5, 0) == Send(3)
    assert session.step(100.5, 0) == Listen(0.2)
    assert session.targets(3, 100.6)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (SUPERSEDED, ExitCode.SUPERSEDED),
        (REFUSED, ExitCode.REFUSED),
        (Failure("INVALID_ARGUMENT", "the participant has diverged"), ExitCode.DIVERGED),
        (Failure("PERMISSION_DENIED", "not you"), ExitCode.REFUSED),
    ],
)
def test_how_a_stream_ends_may_end_the_worker(failure: Failure, code: ExitCode) -> None:
    session = receiving()
    raises(code, failure.details, lambda: session.broke(failure, 1))


@pytest.mark.parametrize("failure", [GONE, OVER, Failure("CANCELLED", ""), Failure("DEADLINE_EXCEEDED", "")])
def test_or_not(failure: Failure) -> None:
    session = receiving()
    session.broke(failure, 1)
    assert isinstance(session.step(1, 0), Join)


# --- damage


MAY_BE_DAMAGE = [
    Failure(code, "frame of unknown type")
    for code in ("UNKNOWN", "UNIMPLEMENTED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
]
DAMAGED = Failure("UNAVAILABLE", "a reply of 90 bytes was damaged on the way", damaged=True)


def again(session: Session, now: float = 0) -> Join:
    """Return the next join, after the pauses."""
    while isinstance(step := session.step(now, 0.5), Pause):
        pass
    assert isinstance(step, Join)
    return step


@pytest.mark.parametrize("failure", MAY_BE_DAMAGE, ids=lambda failure: failure.code)
def test_a_failure_that_damage_can_cause_passes_but_not_for_ever(failure: Failure) -> None:
    session = receiving()
    for number in range(2, 6):
        session.broke(failure, 0)
        assert again(session).new_channel, "on another connection"
        session.joined(number)
        assert isinstance(session.step(0, 0.5), Send)
    raises(ExitCode.REFUSED, "frame of unknown type", lambda: session.broke(failure, 0))


@pytest.mark.parametrize("how", ["targets", "waiting", "an answered report"])
def test_only_failures_in_a_row_count_as_a_refusal(how: str) -> None:
    session = receiving()
    for number in range(12):
        session.broke(MAY_BE_DAMAGE[0], 0)
        again(session)
        session.joined(number + 2)
        if how == "targets":
            assert session.targets(number, 0)
            session.receive(number + 1, 0)
        elif how == "waiting":
            session.waiting(0, ["mlp"], 0)
        else:
            session.report_answered()


def test_join_and_leave_may_fail_by_damage_too_once_there_was_a_session() -> None:
    session = receiving()
    session.broke(GONE, 0)
    for _ in range(4):
        again(session)
        session.join_failed(MAY_BE_DAMAGE[0], 0)
    again(session)
    raises(ExitCode.REFUSED, "frame of unknown type", lambda: session.join_failed(MAY_BE_DAMAGE[0], 0))
    session = joined()
    session.leave(0, finished=True, active=True)
    for number in range(2, 6):
        assert session.step(0, 0.5) == Leave()
        session.leave_failed(MAY_BE_DAMAGE[0], 0)
        assert isinstance(session.step(0, 0.5), Pause)
        assert session.step(0, 0.5) == Cancel()
        session.broke(Failure("CANCELLED", "by us"), 0)
        assert again(session).new_channel
        session.joined(number)
    raises(ExitCode.REFUSED, "frame of unknown type", lambda: session.leave_failed(MAY_BE_DAMAGE[0], 0))


@pytest.mark.parametrize("failure", MAY_BE_DAMAGE, ids=lambda failure: failure.code)
def test_a_server_never_joined_is_believed_at_once(failure: Failure) -> None:
    session = Session("host:1", CONNECT, GIVE_UP, SILENCE)
    session.join(0, 0)
    raises(ExitCode.REFUSED, "frame of unknown type", lambda: session.join_failed(failure, 0))


def test_a_pushback_is_no_damage() -> None:
    session = receiving()
    for number in range(2, 12):
        session.broke(Failure("RESOURCE_EXHAUSTED", "too many", pushback=True), 0)
        assert not again(session).new_channel
        session.joined(number)


@pytest.mark.parametrize(
    ("failure", "renew"),
    [
        (GONE, True),
        (Failure("DEADLINE_EXCEEDED", "no answer"), True),
        (DAMAGED, True),
        (Failure("RESOURCE_EXHAUSTED", "too many", pushback=True), False),
    ],
    ids=lambda value: value.code if isinstance(value, Failure) else None,
)
def test_a_join_that_failed_is_made_on_another_connection(failure: Failure, renew: bool) -> None:
    session = Session("host:1", CONNECT, GIVE_UP, SILENCE)
    session.join(0, 0)
    assert not again(session).new_channel
    session.join_failed(failure, 0)
    assert again(session).new_channel is renew
    assert not again(session).new_channel, "one is enough"


def test_after_a_damaged_reply_the_connection_is_left() -> None:
    session = receiving(7)
    session.broke(DAMAGED, 1)
    assert session.step(1, 0) == Join(7, 1, 20, GIVE_UP - 1, new_channel=True), "at once"
    session.joined(2)
    assert session.step(1, 0) == Send(7)
    session.broke(GONE, 1)
    assert not again(session, 1).new_channel, "the new one is not to blame"


def test_a_stream_that_says_nothing_is_left_and_what_is_open_goes_out_again() -> None:
    session = receiving(7, silence=15)
    assert session.step(10, 0) == Listen(5)
    session.silence(14.9)
    assert isinstance(session.step(14.9, 0), Listen), "not yet"
    session.silence(15)
    assert session.step(15, 0) == Cancel("nothing was heard of round 7 for 15 s")
    session.broke(Failure("CANCELLED", "by us"), 15)
    assert session.step(15, 0) == Join(7, 1, 20, GIVE_UP - 15, new_channel=True)
    session.joined(2)
    assert session.step(16, 0) == Send(7)
    assert session.step(16, 0) == Listen(15), "which counts anew from then"


@pytest.mark.parametrize("how", ["waiting", "stale targets"])
def test_a_stream_that_says_anything_is_not_left(how: str) -> None:
    session = receiving(7, silence=15)
    for now in range(10, 90, 10):
        if how == "waiting":
            session.waiting(7, ["mlp"], now)
        else:
            assert not session.targets(6, now)
        assert session.step(now, 0) == Listen(min(15, GIVE_UP - now))


def test_silence_between_rounds_is_none() -> None:
    """A step, an evaluation or a checkpoint may take as long as it likes."""
    session = receiving(7, silence=15)
    assert session.targets(7, 1)
    session.silence(50)
    session.reconnect(50)
    assert session.step(50, 0) == Cancel()
    session.broke(GONE, 50)
    session.joined(2)
    assert session.send(8)
    session.receive(8, 90)
    session.silence(91)
    assert session.step(91, 0) == Listen(14)


# --- between rounds, and the end


def test_reconnecting_asks_how_the_stream_ended_before_it_joins_again() -> None:
    session = joined()
    session.reached(4)
    session.reconnect(0)
    assert session.step(0, 0) == Cancel()
    raises(ExitCode.SUPERSEDED, "newer worker", lambda: session.broke(SUPERSEDED, 0))
    session = joined()
    session.reached(4)
    session.reconnect(0)
    session.broke(GONE, 0)
    assert session.step(0, 0) == Join(4, 1, 20, GIVE_UP)
    session.joined(2)
    assert session.step(0, 0) == Done()


def test_leave_of_a_finished_participant_is_repeated_in_a_new_session() -> None:
    session = joined()
    session.leave(0, finished=True, active=True)
    for now, failure in ((1.0, GONE), (2.0, OVER)):
        assert session.step(now, 0.5) == Leave()
        session.leave_failed(failure, now)
        assert session.step(now, 0.5) == Pause(0.1)
        assert session.step(now, 0.5) == Cancel()
        session.broke(Failure("CANCELLED", "by us"), now)
        assert isinstance(session.step(now, 0.5), Join)
        session.joined(2)
    assert session.step(3, 0.5) == Leave()
    session.left()
    assert session.step(3, 0.5) == Done()


def test_leave_of_a_finished_participant_has_a_limit_and_may_be_refused() -> None:
    session = joined()
    session.leave(0, finished=True, active=True)
    raises(ExitCode.REFUSED, "seed: 3, not 4", lambda: session.leave_failed(REFUSED, 1))
    raises(ExitCode.UNREACHABLE, "within 100 s: gone", lambda: session.leave_failed(GONE, GIVE_UP))


@pytest.mark.parametrize("active", [True, False])
def test_any_other_leave_is_tried_once_while_the_stream_is_open(active: bool) -> None:
    session = joined()
    session.leave(0, finished=False, active=active)
    if active:
        assert session.step(0, 0) == Leave()
        session.leave_failed(REFUSED, 0)
    assert session.step(0, 0) == Done()


def test_join_comes_first() -> None:
    session = Session("host:1", CONNECT, GIVE_UP, SILENCE)
    assert not session.send(0)
    session.receive(0, 0)
    with pytest.raises(RuntimeError, match="send and receive come after join"):
        session.step(0, 0)
