"""The facts of a run's starts, and what has changed between two of them."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from codistill.rundir import info
from codistill.rundir.info import RunInfo, Start, add_start, differences, record_code, write_info
from codistill.rundir.layout import RunLayout

BEFORE: dict[str, Any] = {
    "versions": {"torch": "2.1", "python": "3.11.7", "grpcio": "1.6"},
    "machine": {"processor": "A", "cpus": 2, "system": "x"},
    "code": {"mine": "a" * 64, "gone": "b" * 64},
}


def start(**changes: Any) -> Start:
    return Start(**{**BEFORE, **changes})


def test_the_first_facts_stay_and_later_ones_are_added(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    first = Start.now("grpc")
    write_info(path, first)
    again = first.model_copy(update={"command": ("codistill", "run", "--resume")})
    assert add_start(path, again).command == first.command
    third = again.model_copy(update={"versions": {"torch": "9"}})
    assert add_start(path, third).command == again.command
    read = RunInfo.read(path)
    assert Start(**{name: getattr(read, name) for name in Start.model_fields}) == first
    assert read.resumed == (again, third)
    assert read.last == third


def test_the_facts_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["codistill", "run", "\udcff.yaml"])
    now = Start.now("in-process")
    assert now.mode == "in-process"
    assert {"codistill", "python", "torch", "numpy"} <= now.versions.keys()
    assert now.machine.keys() == {"system", "processor", "cpus"}
    assert now.command == ("codistill", "run", "\\udcff.yaml")
    assert isinstance(now.created, datetime)
    assert Start.model_validate_json(now.model_dump_json()) == now


def test_only_the_last_of_many_starts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_MOST_RESUMES", 3)
    write_info(tmp_path / "run.json", start(command=("first",)))
    for number in range(5):
        add_start(tmp_path / "run.json", start(command=(str(number),)))
    read = RunInfo.read(tmp_path / "run.json")
    assert read.command == ("first",)
    assert [each.command for each in read.resumed] == [("2",), ("3",), ("4",)]


def test_where_there_is_no_file_the_start_is_the_first(tmp_path: Path) -> None:
    assert add_start(tmp_path / "run.json", start()) == RunInfo()
    assert json.loads((tmp_path / "run.json").read_text())["versions"] == BEFORE["versions"]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        (
            {"versions": {**BEFORE["versions"], "torch": "2.2"}},
            ["torch: the run was last started with 2.1, now with 2.2"],
        ),
        ({"versions": {"torch": "2.1"}}, ["python: the run was last started with 3.11.7, now with none"]),
        ({"versions": {**BEFORE["versions"], "grpcio": "2", "timm": "1"}}, []),
        ({"machine": {"processor": "B"}}, ["processor: the run was last started with A, now with B"]),
        ({"machine": {"processor": "A", "cpus": 64, "system": "y"}}, []),
        (
            {"code": {"mine": "c" * 64, "new": "d" * 64}},
            [
                "module 'mine' has changed since the run was last started: its SHA-256 was aaaaaaaaaaaa… and is cccccccccccc…"
            ],
        ),
    ],
)
def test_what_decides_numbers_and_differs_is_a_line_with_both_values(changes: dict[str, Any], lines: list[str]) -> None:
    assert list(differences(start(), start(**changes))) == lines


def test_a_file_of_before_the_processor_and_the_code_were_recorded_raises_no_difference() -> None:
    assert list(differences(start(machine={}, code={}, versions={}), start())) == []


def test_code_is_recorded_once_it_is_loaded_and_each_change_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used: dict[str, str] = {}
    monkeypatch.setattr(info.user_code, "digests", lambda: dict(used))
    layout = RunLayout(tmp_path)
    record_code(layout)
    assert not layout.info_file.exists()
    write_info(layout.info_file, Start.now("grpc"))
    used |= {"mine": "a" * 64}
    record_code(layout)
    used |= {"late": "b" * 64}
    record_code(layout)
    read = RunInfo.read(layout.info_file)
    assert (read.code, read.resumed, caplog.messages) == (used, (), [])

    used |= {"late": "c" * 64}
    record_code(layout)
    record_code(layout)
    (warning,) = caplog.messages
    assert warning.startswith(f"module 'late' has changed since the run was last started: its SHA-256 was {'b' * 12}")
    read = RunInfo.read(layout.info_file)
    assert (read.code["late"], [start.code["late"] for start in read.resumed]) == ("b" * 64, ["c" * 64])


def test_code_that_only_an_earlier_start_used_is_compared_with(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_info(path, start())
    add_start(path, start(code={"mine": "a" * 64}))
    (line,) = differences(add_start(path, start()), start(code={"gone": "d" * 64}))
    assert line.startswith("module 'gone' has changed")
