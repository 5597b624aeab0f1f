"""One process of a run through its lives, and the port that it comes back to."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill_deploy.supervise.child import Child, Port
from codistill_deploy.supervise.process import Launch, Process
from codistill_deploy.supervise.restart_policy import RAN_WELL, GiveUp, Restart

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def launch() -> Iterator[Launch]:
    reading, writing = os.pipe()
    yield Launch(dict(os.environ), reading)
    os.close(reading)
    os.close(writing)


@pytest.fixture
def make(launch: Launch, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def member(script: str, *, ends: bool = True, restarts: int = 10, hang_after: float = 600) -> Child:
        arguments = [sys.executable, "-c", script]
        log = tmp_path / "log.txt"
        made.append(
            Child("student 'a'", "a", lambda: Process(arguments, log, launch, hang_after), log, restarts, ends=ends)
        )
        return made[-1]

    yield member
    for each in made:
        each.close()


def refuse_to_start(*arguments: object, **named: object) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def end_of(member: Child) -> None:
    deadline = time.monotonic() + 60
    while member.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_is_started_again_after_its_pause(make: Callable[..., Child]) -> None:
    member = make(SLEEP)
    member.start(100)
    assert member.poll(100) is None
    member.tell(signal.SIGKILL)
    end_of(member)
    assert member.poll(101) == Restart(0.1, 1, 10)
    assert str(member.ending) == "was killed by SIGKILL"
    assert member.poll(101.05) is None
    assert not member.running, "the pause is not over"
    assert member.poll(101.2) is None
    assert member.running
    member.tell(signal.SIGKILL)
    end_of(member)
    assert member.poll(102) == Restart(0.2, 2, 10)
    member.poll(102.3)
    member.tell(signal.SIGKILL)
    end_of(member)
    assert member.poll(102.3 + RAN_WELL) == Restart(0.1, 1, 10), "it had run well"


def test_a_start_that_fails_counts_and_is_made_again(
    make: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    member = make("import sys; sys.exit(1)")
    member.start(0)
    end_of(member)
    assert member.poll(1) == Restart(0.1, 1, 10)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse_to_start)
        assert member.poll(2) == Restart(0.2, 2, 10)
        assert str(member.ending) == "could not be started: [Errno 11] Resource temporarily unavailable"
        assert member.poll(2.1) is None, "the pause is not over"
        assert member.poll(3) == Restart(0.4, 3, 10), "the same lack twice is no error of its own"
    assert not member.running
    assert member.poll(4) is None
    end_of(member)
    assert member.poll(5) == Restart(0.8, 4, 10), "it has lived once more"


def test_starts_that_fail_use_the_restarts_up(make: Callable[..., Child], monkeypatch: pytest.MonkeyPatch) -> None:
    member = make("import sys; sys.exit(1)", restarts=3)
    member.start(0)
    end_of(member)
    member.poll(1)
    before = open_files()
    monkeypatch.setattr(subprocess, "Popen", refuse_to_start)
    decisions = [member.poll(10 * number) for number in (1, 2, 3)]
    assert decisions == [Restart(0.2, 2, 3), Restart(0.4, 3, 3), GiveUp("3 restarts are used up")]
    assert member.given_up == "3 restarts are used up"
    assert member.poll(1000) is None
    assert open_files() < before, "nothing is left open"


def test_a_folder_that_was_moved_away_is_made_again(make: Callable[..., Child], tmp_path: Path) -> None:
    member = make("print('up')", ends=False)
    member.start(0)
    end_of(member)
    member.poll(1)
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert member.poll(2) is None
    end_of(member)
    assert member.log.read_text() == "up\n"


@pytest.mark.parametrize("number", [signal.SIGSTOP, None])
def test_what_gives_no_sign_of_life_is_killed(make: Callable[..., Child], number: signal.Signals | None) -> None:
    """Stopped, or with every thread held up: here by a regular expression, which lets no other thread run."""
    held = "re.match('(a|aa)+$', 60 * 'a' + 'b')" if number is None else "time.sleep(600)"
    member = make(
        f"import re, time; from codistill_deploy.supervise.heartbeat import beat; beat(); print('up', flush=True); {held}",
        hang_after=2,
    )
    member.start(0)
    while not member.log.read_text():
        assert member.running
    if number is not None:
        member.tell(number)
    end_of(member)
    assert member.poll(1) == Restart(0.1, 1, 10)
    assert str(member.ending).startswith("ended with exit code 11: killed after 2 s without a sign of life, ")
    assert member.poll(2) is None
    assert member.running, "and it lives again"


def test_what_beats_is_left_alone(make: Callable[..., Child]) -> None:
    member = make(
        "from codistill_deploy.supervise.heartbeat import beat; import time; beat(); time.sleep(5)", hang_after=3
    )
    member.start(0)
    end_of(member)
    assert member.done


def test_once_the_run_is_over_nothing_is_started_again(make: Callable[..., Child]) -> None:
    member = make("import sys; sys.exit(1)")
    member.start(0)
    end_of(member)
    assert member.poll(1, start=False) is not None, "how it ended still counts"
    assert member.poll(100, start=False) is None
    assert not member.running


def test_what_has_done_its_part_is_left_alone(make: Callable[..., Child]) -> None:
    member = make("")
    member.start(0)
    end_of(member)
    assert member.done
    assert member.poll(1) is None
    assert member.ending is None


def test_a_server_has_never_done_its_part(make: Callable[..., Child]) -> None:
    member = make("", ends=False)
    member.start(0)
    end_of(member)
    assert not member.done
    assert member.poll(1) == Restart(0.1, 1, 10)


def test_the_same_error_twice_is_given_up(make: Callable[..., Child], tmp_path: Path) -> None:
    script = "import sys; print('12:00:00 INFO'); print('error: ValueError: boom'); print('more'); sys.exit(1)"
    member = make(script)
    member.start(0)
    end_of(member)
    assert member.poll(1) == Restart(0.1, 1, 10)
    member.poll(2)
    end_of(member)
    decision = member.poll(3)
    assert isinstance(decision, GiveUp)
    assert member.given_up == decision.reason
    assert str(member.ending) == "ended with exit code 1: ValueError: boom"
    assert member.poll(1000) is None
    assert not member.running
    assert (tmp_path / "log.txt").read_text().count("boom") == 2, "the log goes on"


def test_only_what_this_life_printed_counts(make: Callable[..., Child], tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("error: of an earlier run\n")
    member = make("import sys; sys.exit(1)")
    member.start(0)
    end_of(member)
    member.poll(1)
    assert member.ending is not None
    assert member.ending.line == "it printed nothing"


def test_a_log_that_is_gone_is_no_fault_of_the_run(make: Callable[..., Child], tmp_path: Path) -> None:
    member = make("import sys; sys.exit(1)")
    member.start(0)
    end_of(member)
    (tmp_path / "log.txt").unlink()
    assert member.poll(1) == Restart(0.1, 1, 10)
    assert str(member.ending) == "ended with exit code 1: its log cannot be read: No such file or directory"


def test_of_a_long_log_only_the_end_is_read(make: Callable[..., Child]) -> None:
    member = make("import sys; print('error: early'); print(100_000 * 'more\\n'); print('late'); sys.exit(1)")
    member.start(0)
    end_of(member)
    member.poll(1)
    assert str(member.ending) == "ended with exit code 1: late"


def test_a_stopped_process_can_be_closed(make: Callable[..., Child]) -> None:
    member = make(SLEEP)
    member.start(0)
    member.tell(signal.SIGSTOP)
    member.close()
    assert member.code == -signal.SIGKILL


def test_without_restarts_the_first_end_is_the_last(make: Callable[..., Child]) -> None:
    member = make(f"import sys; sys.exit({ExitCode.ERROR})", restarts=0)
    member.start(0)
    end_of(member)
    assert isinstance(member.poll(1), GiveUp)


def listener(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    made.listen()
    return made


def test_a_free_port_is_chosen_once_and_a_server_can_come_back_to_it() -> None:
    port = Port("127.0.0.1:0", "listen")
    host, _, number = port.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(number) > 0
    try:
        for _ in range(2):
            with listener(int(number)) as server, socket.create_connection(("127.0.0.1", int(number)), 10):
                server.accept()[0].close()
    finally:
        port.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only there is the port kept")
def test_nobody_else_gets_the_port_while_the_server_is_away() -> None:
    port = Port("127.0.0.1:0", "listen")
    try:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", int(port.address.rpartition(":")[2])))
    finally:
        port.close()


def test_a_port_in_use_and_an_address_that_is_none_are_left_to_the_server_to_refuse() -> None:
    with listener(0) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        assert Port(address, "listen").address == address
    assert Port("nonsense", "listen").address == "nonsense"
