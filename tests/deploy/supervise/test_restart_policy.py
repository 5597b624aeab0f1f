"""Restarts: of which processes, after how long, how often, and why not."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.process.exit_codes import ExitCode
from codistill_deploy.supervise.restart_policy import RAN_WELL, Ending, GiveUp, Restart, decide

KILLED = Ending(-signal.SIGKILL)
RESTARTED = [
    ExitCode.OK,  # the server, ended by a signal of somebody else
    ExitCode.ERROR,
    ExitCode.UNREACHABLE,
    ExitCode.GAVE_UP,
    ExitCode.WORKER_FAILED,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.HUNG,
    ExitCode.NO_RESOURCES,  # a process does not end with it; the command does
    ExitCode.DEVICE_FAILED,
    ExitCode.INTERRUPTED,
]
NOT_RESTARTED = [
    ExitCode.USAGE,
    ExitCode.CONFIGURATION,
    ExitCode.REFUSED,
    ExitCode.DIVERGED,
    ExitCode.SUPERSEDED,
    ExitCode.STORAGE,
]

endings = st.builds(
    Ending,
    code=st.sampled_from([-signal.SIGKILL, -signal.SIGSEGV, *RESTARTED]),
    line=st.sampled_from(["one", "two"]),
    ran=st.sampled_from([0.0, RAN_WELL - 1, RAN_WELL, 10 * RAN_WELL]),
)


def test_every_exit_code_is_decided_about() -> None:
    assert {*RESTARTED, *NOT_RESTARTED} == set(ExitCode)


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, -64, *RESTARTED])
def test_what_is_restarted(code: int) -> None:
    assert decide(Ending(code, "line"), [], 10) == Restart(0.1, 1, 10)


@pytest.mark.parametrize("code", NOT_RESTARTED)
def test_what_is_not_restarted(code: ExitCode) -> None:
    assert isinstance(decide(Ending(code, "line"), [], 10), GiveUp)


def test_without_restarts_nothing_is_restarted() -> None:
    assert decide(KILLED, [], 0) == GiveUp("restarts are turned off")


def test_pauses_double_up_to_ten_seconds() -> None:
    decisions = [decide(KILLED, [KILLED] * count, 2000) for count in range(2000)]
    assert all(isinstance(decision, Restart) for decision in decisions)
    seconds = [decision.after for decision in decisions if isinstance(decision, Restart)]
    assert seconds[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0])
    assert set(seconds[8:]) == {10.0}


def test_restarts_are_used_up() -> None:
    assert decide(KILLED, [KILLED] * 2, 3) == Restart(0.4, 3, 3)
    assert decide(KILLED, [KILLED] * 3, 3) == GiveUp("3 restarts are used up")
    assert decide(KILLED, [KILLED], 1) == GiveUp("1 restart is used up")


def test_ten_good_minutes_give_the_restarts_back() -> None:
    well = Ending(-signal.SIGKILL, ran=RAN_WELL)
    assert decide(well, [KILLED] * 3, 3) == Restart(0.1, 1, 3)
    assert decide(KILLED, [KILLED, KILLED, KILLED, well], 3) == Restart(0.2, 2, 3)
    assert decide(KILLED, [well, KILLED, KILLED], 3) == GiveUp("3 restarts are used up")
    nearly = Ending(-signal.SIGKILL, ran=RAN_WELL - 1)
    assert isinstance(decide(nearly, [KILLED] * 3, 3), GiveUp)


def test_the_same_error_twice_in_a_row_is_enough() -> None:
    error = Ending(ExitCode.ERROR, "ValueError: boom")
    assert isinstance(decide(error, [], 10), Restart)
    given_up = decide(error, [error], 10)
    assert isinstance(given_up, GiveUp)
    assert "twice in a row" in given_up.reason
    assert isinstance(decide(error, [error, KILLED], 10), Restart), "not in a row"
    assert isinstance(decide(Ending(ExitCode.ERROR, "ValueError: crash"), [error], 10), Restart), "another line"
    assert isinstance(decide(Ending(ExitCode.HUNG, error.line), [error], 10), Restart), "another code"
    after_a_good_run = Ending(error.code, error.line, RAN_WELL)
    assert isinstance(decide(after_a_good_run, [error], 10), Restart), "not at the same place"


@pytest.mark.parametrize(
    ("one", "another"),
    [
        (
            "TypeError: <Net object at 0x7f00aa10> is not callable",
            "TypeError: <Net object at 0x7f11bb20> is not callable",
        ),
        ("No such file or directory: '/x/histogram_4123.db'", "No such file or directory: '/x/histogram_977.db'"),
        ("bind 127.0.0.1:41181: not permitted", "bind 127.0.0.1:50001: not permitted"),
        ("cannot write /tmp/tmpq3_8zk1a/x", "cannot write /tmp/tmpabcdefgh/x"),
        ("lock of process 12 on a1b2c3d4", "lock of process 1377 on 9f8e7d6c"),
    ],
)
def test_an_error_is_the_same_whatever_numbers_a_start_puts_in_it(one: str, another: str) -> None:
    assert isinstance(decide(Ending(ExitCode.ERROR, one), [Ending(ExitCode.ERROR, another)], 10), GiveUp)


@pytest.mark.parametrize(
    ("one", "another"),
    [("KeyError at round 7", "KeyError at round 70"), ("no such file: a", "no such file: b"), ("epoch 1", "epoch 2")],
)
def test_an_error_at_another_place_is_another(one: str, another: str) -> None:
    assert isinstance(decide(Ending(ExitCode.ERROR, one), [Ending(ExitCode.ERROR, another)], 10), Restart)


def test_an_error_of_a_server_may_not_come_back() -> None:
    error = Ending(ExitCode.ERROR, "gRPC stopped listening")
    assert isinstance(decide(error, [error], 10), GiveUp)
    assert isinstance(decide(error, [error], 10, deterministic=False), Restart)
    assert isinstance(decide(error, [error] * 10, 10, deterministic=False), GiveUp)


@pytest.mark.parametrize("code", [ExitCode.GAVE_UP, ExitCode.HUNG, ExitCode.UNREACHABLE])
def test_a_long_wait_is_no_good_run(code: ExitCode) -> None:
    """With the default limits a wait alone takes as long as a process must run to get its restarts back."""
    waited = Ending(code, "gave up after 600 s: round 7 still waits for cnn", ran=605.0)
    assert isinstance(decide(waited, [], 10), Restart)
    assert isinstance(decide(waited, [waited], 10), GiveUp)
    others = [Ending(code, f"round {number}", ran=605.0) for number in range(10)]
    assert isinstance(decide(waited, others, 10), GiveUp)


def test_memory_may_be_there_the_next_time() -> None:
    error = Ending(ExitCode.OUT_OF_MEMORY, "student 'cnn' ran out of memory on cuda:0")
    assert isinstance(decide(error, [error] * 3, 10), Restart)
    assert isinstance(decide(error, [error] * 10, 10), GiveUp)


def test_a_device_that_failed_gets_a_new_process_until_the_same_step_fails_again() -> None:
    def failed(step: int) -> Ending:
        line = f"student 'cnn' can no longer use cuda:0 in step {step}: CUDA error: unspecified launch failure"
        return Ending(ExitCode.DEVICE_FAILED, line)

    assert isinstance(decide(failed(3), [], 10), Restart)
    assert isinstance(decide(failed(9), [failed(3)], 10), Restart)
    assert isinstance(decide(failed(3), [failed(3)], 10), GiveUp)


def test_the_same_signal_twice_is_no_error_of_its_own() -> None:
    assert isinstance(decide(KILLED, [KILLED], 10), Restart)
    for code in (ExitCode.OK, ExitCode.INTERRUPTED):  # SIGTERM, which a process answers itself
        stopped = Ending(code, "going down")
        assert isinstance(decide(stopped, [stopped], 10), Restart)


@given(st.lists(endings, max_size=40), st.integers(0, 12))
def test_a_process_that_never_runs_well_is_restarted_at_most_so_often(script: list[Ending], limit: int) -> None:
    earlier: list[Ending] = []
    since_well = 0
    for ending in script:
        waited = ending.code in (ExitCode.GAVE_UP, ExitCode.HUNG, ExitCode.UNREACHABLE)
        since_well = 0 if ending.ran >= RAN_WELL and not waited else since_well
        decision = decide(ending, earlier, limit)
        if isinstance(decision, GiveUp):
            break
        since_well += 1
        assert decision.number == since_well <= limit
        assert 0 < decision.after <= 10
        earlier.append(ending)
    assert since_well <= limit


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Ending(-signal.SIGSEGV), "was killed by SIGSEGV"),
        (Ending(-40), "was killed by signal 40"),
        (Ending(ExitCode.OK, "line"), "ended before the run did"),
        (Ending(ExitCode.ERROR, "ValueError: boom"), "ended with exit code 1: ValueError: boom"),
    ],
)
def test_how_it_ended_in_words(ending: Ending, text: str) -> None:
    assert str(ending) == text


def test_a_process_lost_with_its_machine_is_restarted() -> None:
    lost = Ending(-signal.SIGKILL, lost="its node 10.0.0.7 died")
    assert str(lost) == "was lost: its node 10.0.0.7 died"
    assert decide(lost, [lost], 10) == Restart(0.2, 2, 10)
