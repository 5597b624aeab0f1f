"""One process of a run through its restarts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill_deploy.supervise.child import Child
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

    def child(
        script: str,
        *,
        finishes: bool = True,
        restarts: int = 10,
        hang_after: float = 600,
        serves: Callable[[], bool] = lambda: False,
    ) -> Child:
        arguments = [sys.executable, "-c", script]
        log = tmp_path / "log.txt"
        made.append(
            Child(
                "student 'a'",
                "a",
                lambda: Process(arguments, log, launch, hang_after),
                log,
                restarts,
                finishes=finishes,
                serves=serves,
            )
        )
        return made[-1]

    yield child
    for started in made:
        started.close()


def refuse_to_start(*arguments: object, **named: object) -> None:
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def wait_for_end(child: Child) -> None:
    deadline = time.monotonic() + 60
    while child.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_process_is_started_again_after_its_pause(make: Callable[..., Child]) -> None:
    child = make(SLEEP)
    child.start(100)
    assert child.poll(100) is None
    child.send_signal(signal.SIGKILL)
    wait_for_end(child)
    assert child.poll(101) == Restart(0.1, 1, 10)
    assert str(child.ending) == "was killed by SIGKILL"
    assert child.poll(101.05) is None
    assert not child.running, "the pause is not over"
    assert child.poll(101.2) is None
    assert child.running
    child.send_signal(signal.SIGKILL)
    wait_for_end(child)
    assert child.poll(102) == Restart(0.2, 2, 10)
    child.poll(102.3)
    child.send_signal(signal.SIGKILL)
    wait_for_end(child)
    assert child.poll(102.3 + RAN_WELL) == Restart(0.1, 1, 10), "it had run well"


def test_a_start_that_fails_counts_and_is_repeated(make: Callable[..., Child], monkeypatch: pytest.MonkeyPatch) -> None:
    child = make("import sys; sys.exit(1)")
    child.start(0)
    wait_for_end(child)
    assert child.poll(1) == Restart(0.1, 1, 10)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse_to_start)
        assert child.poll(2) == Restart(0.2, 2, 10)
        assert str(child.ending) == "could not be started: [Errno 11] Resource temporarily unavailable"
        assert child.poll(2.1) is None, "the pause is not over"
        assert child.poll(3) == Restart(0.4, 3, 10), "the same lack twice is no error of its own"
    assert not child.running
    assert child.poll(4) is None
    wait_for_end(child)
    assert child.poll(5) == Restart(0.8, 4, 10), "it ran in between"


def test_starts_that_fail_use_the_restarts_up(make: Callable[..., Child], monkeypatch: pytest.MonkeyPatch) -> None:
    child = make("import sys; sys.exit(1)", restarts=3)
    child.start(0)
    wait_for_end(child)
    child.poll(1)
    before = open_files()
    monkeypatch.setattr(subprocess, "Popen", refuse_to_start)
    decisions = [child.poll(now) for now in (10, 20, 30)]
    assert decisions == [Restart(0.2, 2, 3), Restart(0.4, 3, 3), GiveUp("3 restarts are used up")]
    assert child.given_up == "3 restarts are used up"
    assert child.poll(1000) is None
    assert open_files() < before, "nothing is left open"


def test_in_a_folder_that_is_gone_nothing_is_started_and_the_folder_not_made_again(
    make: Callable[..., Child], tmp_path: Path
) -> None:
    child = make("print('up')", finishes=False)
    child.start(0)
    wait_for_end(child)
    child.poll(1)
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert isinstance(child.poll(2), GiveUp)
    assert str(child.ending) == f"could not be started: [Errno 2] No such file or directory: '{child.log}'"
    assert child.ending is not None
    assert child.ending.code == ExitCode.STORAGE
    assert not tmp_path.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE])
def test_a_start_that_lacks_storage_or_files_is_not_repeated(
    make: Callable[..., Child], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    child = make("import sys; sys.exit(1)")
    child.start(0)
    wait_for_end(child)
    child.poll(1)
    monkeypatch.setattr(subprocess, "Popen", fail)
    assert isinstance(child.poll(2), GiveUp)
    assert child.ending is not None
    assert child.ending.code == ExitCode.STORAGE
    assert os.strerror(number) in str(child.ending)


@pytest.mark.parametrize("number", [signal.SIGSTOP, None])
def test_a_process_without_a_heartbeat_is_killed(make: Callable[..., Child], number: signal.Signals | None) -> None:
    """Stopped, or with every thread held up: here by a regular expression, which lets no other thread run."""
    held = "re.match('(a|aa)+$', 60 * 'a' + 'b')" if number is None else "time.sleep(600)"
    child = make(
        f"import re, time; from codistill_deploy.supervise.heartbeat import start_heartbeat; start_heartbeat(); print('up', flush=True); {held}",
        hang_after=2,
    )
    child.start(0)
    while not child.log.read_text():
        assert child.running
    if number is not None:
        child.send_signal(number)
    wait_for_end(child)
    assert child.poll(1) == Restart(0.1, 1, 10)
    assert str(child.ending).startswith("ended with exit code 11: killed after 2 s without a sign of life, ")
    assert child.poll(2) is None
    assert child.running, "it was restarted"


def test_a_process_with_a_heartbeat_is_left_alone(make: Callable[..., Child]) -> None:
    child = make(
        "from codistill_deploy.supervise.heartbeat import announce_exit, start_heartbeat; import time; "
        "start_heartbeat(); time.sleep(5); announce_exit()",
        hang_after=3,
    )
    child.start(0)
    wait_for_end(child)
    assert child.done


def test_a_process_that_something_ends_with_0_has_not_done_its_work(make: Callable[..., Child]) -> None:
    child = make(
        "from codistill_deploy.supervise.heartbeat import start_heartbeat; import os; start_heartbeat(); os._exit(0)"
    )
    child.start(0)
    wait_for_end(child)
    assert not child.done
    assert isinstance(child.poll(1), Restart), "it may have been the machine's doing"
    assert child.ending is not None
    assert str(child.ending).startswith("ended with exit code 1: something in it ended the process, with 0 and before")


def test_once_the_run_is_over_nothing_is_started_again(make: Callable[..., Child]) -> None:
    child = make("import sys; sys.exit(1)")
    child.start(0)
    wait_for_end(child)
    assert child.poll(1, restart=False) is not None, "how it ended still counts"
    assert child.poll(100, restart=False) is None
    assert not child.running


def test_a_process_whose_work_is_done_is_not_restarted(make: Callable[..., Child]) -> None:
    child = make("")
    child.start(0)
    wait_for_end(child)
    assert child.done
    assert child.poll(1) is None
    assert child.ending is None


def test_the_work_of_a_server_is_never_done(make: Callable[..., Child]) -> None:
    child = make("", finishes=False)
    child.start(0)
    wait_for_end(child)
    assert not child.done
    assert child.poll(1) == Restart(0.1, 1, 10)


def test_the_same_error_twice_is_given_up(make: Callable[..., Child], tmp_path: Path) -> None:
    script = "import sys; print('12:00:00 INFO'); print('error: ValueError: boom'); print('more'); sys.exit(1)"
    child = make(script)
    child.start(0)
    wait_for_end(child)
    assert child.poll(1) == Restart(0.1, 1, 10)
    child.poll(2)
    wait_for_end(child)
    decision = child.poll(3)
    assert isinstance(decision, GiveUp)
    assert child.given_up == decision.reason
    assert str(child.ending) == "ended with exit code 1: ValueError: boom"
    assert child.poll(1000) is None
    assert not child.running
    assert (tmp_path / "log.txt").read_text().count("boom") == 2, "the log goes on"


def test_only_what_this_process_printed_counts(make: Callable[..., Child], tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("error: of an earlier run\n")
    child = make("import sys; sys.exit(1)")
    child.start(0)
    wait_for_end(child)
    child.poll(1)
    assert child.ending is not None
    assert child.ending.line == "it printed nothing"


def test_the_last_line_of_a_log_that_is_gone_is_still_read(make: Callable[..., Child], tmp_path: Path) -> None:
    child = make("import sys; print('error: it broke'); sys.exit(1)")
    child.start(0)
    wait_for_end(child)
    (tmp_path / "log.txt").unlink()
    assert child.poll(1) == Restart(0.1, 1, 10)
    assert str(child.ending) == "ended with exit code 1: it broke"


def test_of_a_long_log_only_the_end_is_read(make: Callable[..., Child]) -> None:
    child = make("import sys; print('error: early'); print(100_000 * 'more\\n'); print('late'); sys.exit(1)")
    child.start(0)
    wait_for_end(child)
    child.poll(1)
    assert str(child.ending) == "ended with exit code 1: late"


def test_a_stopped_process_can_be_closed(make: Callable[..., Child]) -> None:
    child = make(SLEEP)
    child.start(0)
    child.send_signal(signal.SIGSTOP)
    child.close()
    assert child.code == -signal.SIGKILL


def test_without_restarts_the_first_end_is_the_last(make: Callable[..., Child]) -> None:
    child = make(f"import sys; sys.exit({ExitCode.ERROR})", restarts=0)
    child.start(0)
    wait_for_end(child)
    assert isinstance(child.poll(1), GiveUp)


def test_the_same_error_of_a_server_is_given_up_until_it_has_served(make: Callable[..., Child], tmp_path: Path) -> None:
    address = tmp_path / "address"
    script = "import os; print(f'error: no /x/{os.getpid()}.db', flush=True); raise SystemExit(1)"
    for served in (False, True):
        child = make(script, finishes=False, serves=address.exists)
        child.start(0)
        if served:
            address.touch()
            child.poll(0)
            address.unlink()
        wait_for_end(child)
        assert child.poll(1) == Restart(0.1, 1, 10)
        child.poll(2)
        wait_for_end(child)
        assert isinstance(child.poll(3), Restart if served else GiveUp)


def test_a_process_of_any_environment_ends_with_its_own_code_and_an_error_that_can_be_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    environment = {**os.environ, "PYTHONINSPECT": "1", "PYTHONIOENCODING": "utf-16"}
    script = "print('error: no é'); raise SystemExit(7)"
    process = Process([sys.executable, "-c", script], tmp_path / "log.txt", Launch(environment, reading), 600)
    try:
        deadline = time.monotonic() + 60
        while process.code is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (process.code, process.ending(1).line) == (7, "no é")
    finally:
        process.close()
        os.close(reading)
        os.close(writing)
