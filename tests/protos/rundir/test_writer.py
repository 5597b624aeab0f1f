from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from codistill.rundir.records import Happened, Paced, Record, read
from codistill.rundir.writer import RecordWriter


def event(number: int, length: int = 0) -> Happened:
    return Happened(time=float(number), what="joined", participant="ant", message="x" * length)


def pace(number: int) -> Paced:
    return Paced(time=1.0, participant="ant", steps_trained=number, step_seconds=0.1, wait_seconds=0.0)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RecordWriter]:
    made = RecordWriter(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")
    yield made
    made.close()


def test_records_go_to_their_files_at_once(writer: RecordWriter, tmp_path: Path) -> None:
    records: list[Record] = [event(1), pace(1), pace(2), event(2)]
    for record in records:
        writer.write(record)
    assert list(read(tmp_path / "events.jsonl")) == [event(1), event(2)]
    assert list(read(tmp_path / "metrics.jsonl")) == [pace(1), pace(2)]


def test_a_second_writer_goes_on_where_the_first_ended(writer: RecordWriter, tmp_path: Path) -> None:
    writer.write(event(1))
    writer.close()
    again = RecordWriter(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")
    again.write(event(2))
    again.close()
    assert list(read(tmp_path / "events.jsonl")) == [event(1), event(2)]


def test_another_file_for_events_and_none_for_the_rest(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "supervisor.jsonl")
    writer.write(event(1))
    writer.write(pace(1))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["supervisor.jsonl"]
    assert list(read(tmp_path / "supervisor.jsonl")) == [event(1)]


@pytest.mark.parametrize("whole", [0, 2])
def test_a_torn_line_is_cut_at_reopening(tmp_path: Path, whole: int) -> None:
    lines = [event(number).model_dump_json() + "\n" for number in range(whole)]
    (tmp_path / "events.jsonl").write_text("".join(lines) + '{"kind": "event", "ti')
    writer = RecordWriter(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")
    assert (tmp_path / "events.jsonl").read_text() == "".join(lines)
    writer.write(event(9))
    writer.close()
    assert list(read(tmp_path / "events.jsonl")) == [*map(event, range(whole)), event(9)]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = RecordWriter(None)
    writer.write(event(1))
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(OSError, match="directory"):
        RecordWriter(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")


def test_a_full_disk_is_logged_once_and_spoils_nothing(tmp_path: Path) -> None:
    """The operating system takes half of a record and then no more, until there is room again."""
    script = """
        import logging, resource, signal, sys
        from pathlib import Path
        from codistill.rundir.records import Happened
        from codistill.rundir.writer import RecordWriter
        logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = RecordWriter(Path(sys.argv[1]) / "events.jsonl", Path(sys.argv[1]) / "metrics.jsonl")
        def write(number):
            writer.write(Happened(time=number, what="joined", message="x" * 300))
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for number in range(10):
            write(number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        write(10)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        write(11)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second, "once, and once more after it had worked again"
    assert first.startswith(f"ERROR {tmp_path / 'events.jsonl'} cannot be written: ")
    assert first.endswith("; training goes on without records")
    assert [record.time for record in read(tmp_path / "events.jsonl")] == [0.0, 1.0, 10.0]
