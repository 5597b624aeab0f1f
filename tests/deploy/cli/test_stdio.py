from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.cli.app import app
from codistill_deploy.cli.stdio import LossyStream
from codistill_deploy.console.progress import LiveProgress, PlainProgress, make_view

PROGRAM = textwrap.dedent("""
    import sys
    from codistill_deploy.cli import app as cli
    from codistill_deploy.cli.stdio import console, tolerate_lost_stdout
    from codistill_deploy.console.progress import make_view

    def command(**options):
        tolerate_lost_stdout()
        view = make_view(console)
        view.start("x")
        if sys.argv[1] == "pipe":
            sys.stdin.readline()
        for _ in range(3000):
            view.note("one of many lines")
        view.finish()
        raise SystemExit(7)

    cli.app = command
    cli.main()
""")


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(self.number, "gone")

    def flush(self) -> None:
        raise OSError(self.number, "gone")

    number = errno.EPIPE


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_a_view_without_its_output_goes_on_and_logs_it_once(
    terminal: bool, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Gone()
    stream.number = number
    console = Console(file=cast("Any", LossyStream(stream, "standard output")), force_terminal=terminal)
    view = make_view(console)
    assert isinstance(view, LiveProgress if terminal else PlainProgress)
    view.start("x")
    view.note("a line")
    view.update(pb.Run(name="x", complete=True))
    view.finish()
    console.print("report: x")
    assert caplog.messages == ["standard output cannot be written: gone; the run goes on without it"]


def test_a_pipe_that_nobody_reads_changes_no_exit_code() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "pipe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "x: starting\n"
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("on\n", timeout=60)
    assert process.returncode == 7, errors
    assert errors.splitlines() == [errors.strip()]
    assert "WARNING standard output cannot be written: Broken pipe; the run goes on" in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_both_changes_no_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", PROGRAM, "full"], check=False, stdout=full, stderr=full)
    assert ended.returncode == 7


SAYS = textwrap.dedent("""
    import logging, sys
    from rich.table import Table
    from codistill_deploy.cli import app as cli
    from codistill_deploy.cli.stdio import console, tolerate_lost_stdout

    def command(**options):
        for tolerate in (lambda: None, tolerate_lost_stdout):
            tolerate()
            console.print("98 – 99 % ± 0.2, 8×8 … é \\U0001f600")
            table = Table("–")
            table.add_row("±")
            console.print(table)
            print("→ of a user's code")
            logging.getLogger("codistill").warning("round 7 – é")
        raise ValueError("no – é")

    cli.app = command
    cli.main()
""")


@pytest.mark.parametrize(
    ("encoding", "said", "error"),
    [
        ("ascii", b"98 - 99 % +/- 0.2, 8x8 ... \\xe9 \\U0001f600", b"no - \\xe9"),
        ("latin-1", b"98 - 99 % \xb1 0.2, 8\xd78 ... \xe9 \\U0001f600", b"no - \xe9"),
        ("ascii:strict", b"98 - 99 % +/- 0.2", b"no - \\xe9"),
        ("utf-8", "98 – 99 % ± 0.2, 8×8 … é \U0001f600".encode(), "no – é".encode()),
    ],
)
def test_every_character_can_be_printed_in_a_narrow_encoding(encoding: str, said: bytes, error: bytes) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-c", SAYS], check=False, capture_output=True, env=environment)
    assert ended.returncode == 1
    assert ended.stdout.count(said) == 2
    assert b"error: ValueError: " + error in ended.stderr
    assert b"round 7 " in ended.stderr
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [[], *([registered.callback.__name__] for registered in app.registered_commands)])  # type: ignore[union-attr]
def test_the_help_of_every_command_can_be_printed_in_ascii(command: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    program = [sys.executable, "-m", "codistill_deploy", *command, "--help"]
    ended = subprocess.run(program, check=False, capture_output=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"Usage: codistill" in ended.stdout
