from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import codistill_deploy
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import duration
from codistill_deploy.cli import stdio
from codistill_deploy.console.literal import literal, make_console
from codistill_deploy.console.progress import LiveProgress, PlainProgress
from codistill_deploy.console.status import print_status

NAMES = {
    "x[/b]": "x[/b]",
    "[bold]z": "[bold]z",
    ":smile:": ":smile:",
    "a\x1b[31m": "a\\x1b[31m",
    "b\rc\nd": "b\\rc\\nd",
    "e\x9b2J\u202e": "e\\x9b2J\\u202e",
}
names = pytest.mark.parametrize(("name", "shown"), NAMES.items(), ids=map(ascii, NAMES))


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_of(name: str) -> pb.Run:
    return pb.Run(
        name=name,
        method=name,
        participants=[pb.ParticipantStatus(name=name, model=name, state=pb.PARTICIPANT_STATE_CONNECTED)],
        waiting_for=[name],
        waiting_time=duration(9),
        events=[pb.Event(kind=pb.EVENT_KIND_REFUSED, participant=name, message=name)],
    )


@names
@pytest.mark.parametrize("terminal", [False, True])
def test_status_and_progress_show_names_as_they_are(name: str, shown: str, terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=300, force_terminal=terminal, color_system=None)
    print_status(run_of(name), console)
    assert printed(console).count(shown) >= 7
    for view in (PlainProgress(console), LiveProgress(console)):
        before = len(printed(console))
        view.start(name)
        view.update(run_of(name))
        view.note(name)
        view.finish()
        assert shown in printed(console)[before:]
    assert name == shown or name not in printed(console)


@names
def test_a_console_shows_strings_as_they_are_wherever_they_stand(name: str, shown: str) -> None:
    console = make_console(file=io.StringIO(), width=300)
    table = Table(name, title=name, caption=name)
    table.add_row(name)
    console.print(name, table, literal(name))
    console.rule(name)
    assert printed(console).count(shown) == 7
    assert name == shown or name not in printed(console)


def test_the_console_of_the_commands_takes_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    stdio.console.print("report: x[/b]/:smile:/[bold]z\x1b[31m", soft_wrap=True)
    assert capsys.readouterr().out == "report: x[/b]/:smile:/[bold]z\\x1b[31m\n"


def test_nothing_else_makes_a_console_or_a_text() -> None:
    made = re.compile(r"(?<![\w.])(Console|Text|Text\.from_markup)\(")
    for path in Path(codistill_deploy.__file__).parent.rglob("*.py"):
        if path.name != "literal.py":
            assert not made.search(path.read_text(encoding="utf-8")), path


def test_log_lines_show_what_acts_on_a_terminal() -> None:
    program = (
        "import logging\n"
        "from codistill_deploy.cli import app\n"
        "app._set_up_logging(False)\n"
        "logging.getLogger('codistill').warning('%s', 'a\\x1b[31m\\rb\\nc')\n"
        "logging.getLogger('other').warning('d\\x1b[31m\\ne')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    lines = ended.stderr.splitlines()
    assert lines[0].endswith("WARNING a\\x1b[31m\\rb\\nc")
    assert lines[1].endswith("WARNING d\\x1b[31m")
    assert lines[2:] == ["e"]


@pytest.mark.parametrize("size", ["0", "00", "", "-1", "wide"])
def test_a_terminal_size_in_the_environment_that_is_none_hides_nothing(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, size)
    for terminal in (False, True):
        console = make_console(file=io.StringIO(), force_terminal=terminal)
        console.print("report: x", soft_wrap=True)
        table = Table("a heading")
        console.print(table)
        assert "report: x" in printed(console)
        assert "a heading" in printed(console)
