"""A process that hangs is ended; one that was merely stopped is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from codistill.process.exit_codes import ExitCode
from codistill.process.watchdog import Watchdog


def ticks_until_it_ends(watchdog: Watchdog, elapsed: float, most: int = 1000) -> int:
    return next(count for count in range(1, most) if watchdog.tick(elapsed) is not None)


def test_it_ends_the_process_after_the_time_allowed() -> None:
    watchdog = Watchdog()
    watchdog.begin("saving a checkpoint, round 7", 10)
    assert ticks_until_it_ends(watchdog, 0.25) == 1 + 40, "the first tick sees the mark, the others count"
    assert watchdog.tick(0.25) == "hung for 10 s: saving a checkpoint, round 7"


def test_without_a_mark_nothing_hangs() -> None:
    watchdog = Watchdog()
    assert all(watchdog.tick(0.25) is None for _ in range(1000))


def test_each_mark_starts_the_count_again_even_one_that_says_the_same() -> None:
    watchdog = Watchdog()
    for _ in range(1000):
        watchdog.begin("the forward pass, round 7", 1)
        assert watchdog.tick(0.25) is None
        assert watchdog.tick(0.25) is None
        assert watchdog.tick(0.25) is None


def test_a_jump_of_the_clock_counts_as_one_tick() -> None:
    watchdog = Watchdog()
    watchdog.begin("waiting", 600)
    assert watchdog.tick(0.25) is None
    assert watchdog.tick(86400) is None, "a machine that slept for a day"
    assert ticks_until_it_ends(watchdog, 0.25, 5000) == 2398


def test_its_thread_counts_and_stops_when_the_context_ends() -> None:
    lines: list[str] = []
    ended = threading.Event()

    def end(line: str) -> None:
        lines.append(line)
        ended.set()

    with Watchdog(end) as watchdog:
        watchdog.begin("the first", 0.3)
        assert ended.wait(30)
    assert lines == ["hung for 0.3 s: the first"]
    with Watchdog(end) as watchdog:
        watchdog.begin("the second", 1000)
    assert not [thread for thread in threading.enumerate() if thread.name == "codistill-watchdog"]
    assert len(lines) == 1


SCRIPT = """
    import sys, threading, time
    from codistill.process.watchdog import Watchdog

    def the_place_that_hangs():
        threading.Event().wait()

    with Watchdog() as watchdog:
        for _ in range(int(sys.argv[1])):
            watchdog.begin("a short step", 2)
            print("step", flush=True)
            time.sleep(0.05)
        watchdog.begin("a long step, round 3", 0.5)
        the_place_that_hangs()
"""


def start(steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_hung_process_ends_with_a_line_and_its_stacks() -> None:
    process = start(0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == ExitCode.HUNG
    assert errors.splitlines()[-1].startswith("error: hung for 0.5 s: a long step, round 3; ")
    assert "in the_place_that_hangs" in errors


def test_a_stopped_process_is_left_alone_when_it_goes_on() -> None:
    process = start(100_000)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        while (
            time.monotonic() < stopped_at + 4
        ):  # twice what a step may take; this is the fault, not a wait for anything
            time.sleep(0.1)
        assert Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T"
        process.send_signal(signal.SIGCONT)
        for _ in range(60):  # a pipe's worth of old lines is read first
            assert process.stdout.readline() == "step\n"
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_terminal_that_takes_no_more_does_not_hold_it_up() -> None:
    script = "from codistill.process.watchdog import _end_process; _end_process('x' * 1_000_000)"
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen([sys.executable, "-c", script], stderr=writing)
        assert process.wait(60) == ExitCode.HUNG
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("seconds", [0.1, 3])
def test_what_was_begun_last_counts(seconds: float) -> None:
    watchdog = Watchdog()
    watchdog.begin("the first", 0.5)
    watchdog.tick(0.25)
    watchdog.begin("the second", seconds)
    count = ticks_until_it_ends(watchdog, 0.25)
    assert count >= 1 + seconds / 0.25
    assert watchdog.tick(0.25) == f"hung for {seconds:g} s: the second"
