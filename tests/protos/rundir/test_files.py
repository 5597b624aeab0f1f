"""Locks that live as long as their holder, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from codistill.rundir import files
from codistill.rundir.files import (
    is_locked,
    locked,
    remove_abandoned_parts,
    staged,
    sync_folder,
    try_lock,
    write_atomically,
)

Start = Callable[..., "subprocess.Popen[str]"]

HOLD = """
    from codistill.rundir.files import locked
    with locked(path):
        print("held", flush=True)
        sys.stdin.read()
"""
# A process that hands the lock's descriptor to a child and dies; the child sleeps on.
HAND_ON = """
    import os, subprocess
    from codistill.rundir.files import locked
    with locked(path) as file:
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        child = subprocess.Popen(sleep, pass_fds=[file.fileno()], stdout=subprocess.DEVNULL)
        print(child.pid, flush=True)
        sys.stdin.read()
"""
STAGE = """
    from codistill.rundir.files import staged
    with staged(path, b"half", sys.argv[2]):
        print("staged", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Start scripts, wait for their first line, and end those that a test leaves."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, path: Path, *arguments: str) -> subprocess.Popen[str]:
        text = "import sys\nfrom pathlib import Path\npath = Path(sys.argv[1])\n" + textwrap.dedent(script)
        process = subprocess.Popen(
            [sys.executable, "-c", text, str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        kill(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def wait_until_free(path: Path) -> None:
    deadline = time.monotonic() + 10
    while is_locked(path):
        assert time.monotonic() < deadline, f"{path} is still locked"
        time.sleep(0.01)


class TestLock:
    def test_one_that_another_process_holds(self, start: Start, tmp_path: Path) -> None:
        path = tmp_path / "a.lock"
        assert not is_locked(path), "there is no such file"
        holder = start(HOLD, path)
        assert first_line(holder) == "held"
        assert is_locked(path)
        waited: list[str] = []
        with (
            pytest.raises(TimeoutError, match=r"a\.lock is locked by another process"),
            locked(path, 0.2, lambda: waited.append("waiting")),
        ):
            pass
        assert waited == ["waiting"], "once"
        kill(holder)
        assert not is_locked(path), "the kernel lets go when the holder dies"
        with locked(path, 0):
            assert is_locked(path)
        assert not is_locked(path)

    def test_a_wait_ends_when_the_holder_lets_go(self, start: Start, tmp_path: Path) -> None:
        holder = start(HOLD, tmp_path / "a.lock")
        assert first_line(holder) == "held"
        assert holder.stdin is not None
        with locked(tmp_path / "a.lock", 10, holder.stdin.close):
            holder.wait()
            assert is_locked(tmp_path / "a.lock")

    def test_a_child_that_inherited_the_descriptor_holds_it_after_its_opener_died(
        self, start: Start, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.lock"
        opener = start(HAND_ON, path)
        child = int(first_line(opener))
        try:
            kill(opener)
            assert is_locked(path)
            with pytest.raises(TimeoutError), locked(path, 0.2):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
        wait_until_free(path)

    def test_two_holders_in_one_process_exclude_each_other_too(self, tmp_path: Path) -> None:
        with locked(tmp_path / "a.lock"), (tmp_path / "a.lock").open() as second:
            assert not try_lock(second)
        with (tmp_path / "a.lock").open() as second:
            assert try_lock(second)

    @pytest.mark.parametrize("keep", [True, False])
    def test_what_the_file_held(self, keep: bool, tmp_path: Path) -> None:
        (tmp_path / "a.lock").write_text("before ")
        with locked(tmp_path / "a.lock", keep_content=keep) as file:
            file.write("after")
        assert (tmp_path / "a.lock").read_text() == ("before after" if keep else "after")

    def test_a_lock_that_was_let_go_of_by_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "a.lock"):
            raise ZeroDivisionError
        assert not is_locked(tmp_path / "a.lock")


class TestWriteAtomically:
    def test_text_and_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        write_atomically(path, "schön")
        assert path.read_bytes() == "schön".encode()
        write_atomically(path, b"\xff")
        assert path.read_bytes() == b"\xff"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("fails_at", ["open", "fsync", "replace"])
    def test_what_was_there_stays_where_it_fails(
        self, fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.json"
        write_atomically(path, "old")

        def fail(*_: object) -> None:
            raise OSError("no space left")

        if fails_at == "fsync":
            monkeypatch.setattr(files.os, "fsync", fail)
        else:
            monkeypatch.setattr(Path, fails_at, fail)
        with pytest.raises(OSError, match="no space left"):
            write_atomically(path, "new")
        monkeypatch.undo()
        assert path.read_text() == "old"
        write_atomically(path, "newer")
        assert path.read_text() == "newer", "what the failed attempt left is in nobody's way"

    def test_content_is_durable_before_the_name_is_and_the_name_before_it_returns(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The order that a power cut could reveal, which no test can make."""
        calls: list[str] = []
        fsync, replace = os.fsync, Path.replace

        def sync(descriptor: int) -> None:
            calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "content")
            fsync(descriptor)

        def rename(source: Path, target: Path) -> Path:
            calls.append("name")
            return replace(source, target)

        monkeypatch.setattr(files.os, "fsync", sync)
        monkeypatch.setattr(Path, "replace", rename)
        write_atomically(tmp_path / "a.json", "text")
        assert calls == ["content", "name", "folder"]

    def test_the_replaced_file_is_kept_where_it_is_asked_for(self, tmp_path: Path) -> None:
        path, previous = tmp_path / "model.bin", tmp_path / "model.previous.bin"
        for content in ("1", "2", "3"):
            write_atomically(path, content, writer="a", previous=previous)
        assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {path.name: "3", previous.name: "2"}

    def test_many_writers_of_one_name_at_once(self, tmp_path: Path) -> None:
        """Each content is whole at every moment, and nobody removes another's part."""
        path = tmp_path / "a.json"
        contents = [f"{writer}" * 50_000 for writer in range(4)]

        def write(content: str) -> None:
            for _ in range(25):
                write_atomically(path, content)
                assert path.read_text() in contents

        with ThreadPoolExecutor(len(contents)) as pool:
            list(pool.map(write, contents))
        assert list(tmp_path.iterdir()) == [path]


class TestStaged:
    def test_the_caller_renames_it(self, tmp_path: Path) -> None:
        place = tmp_path / "model.bin"
        with staged(place, b"weights", "a") as part:
            assert part.parent == tmp_path
            assert part.read_bytes() == b"weights"
            assert not place.exists()
            part.replace(place)
        sync_folder(tmp_path)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"weights"]

    def test_what_is_not_renamed_is_removed(self, tmp_path: Path) -> None:
        with staged(tmp_path / "model.bin", b"weights", "a"):
            pass
        with pytest.raises(ZeroDivisionError), staged(tmp_path / "model.bin", b"weights", "a"):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_keeps_no_part(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="no space left"), staged(tmp_path / "model.bin", b"weights", "a"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_two_writers_of_one_place_do_not_mix(self, tmp_path: Path) -> None:
        place = tmp_path / "model.bin"
        with staged(place, b"ours", "a") as ours, staged(place, b"theirs", "b") as theirs:
            assert (ours.read_bytes(), theirs.read_bytes()) == (b"ours", b"theirs")
            ours.replace(place)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"ours"]

    def test_a_killed_writers_part_is_removed_and_a_living_ones_is_not(self, start: Start, tmp_path: Path) -> None:
        place = tmp_path / "model.bin"
        place.write_bytes(b"whole")
        writers = {name: start(STAGE, place, name) for name in ("dead", "alive")}
        for process in writers.values():
            assert first_line(process) == "staged"
        kill(writers["dead"])
        parts = {name: place.with_name(f"model.bin.{name}.part") for name in writers}
        assert all(part.exists() for part in parts.values())
        remove_abandoned_parts(tmp_path)
        assert not parts["dead"].exists()
        assert parts["alive"].read_bytes() == b"half"
        assert place.read_bytes() == b"whole"

    def test_a_part_removed_between_its_opening_and_its_locking_is_written_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flock, removed = fcntl.flock, list[Path]()

        def remove_first(file: IO[bytes], operation: int) -> None:
            if not removed:
                removed.extend(tmp_path.glob("*.part"))
                removed[0].unlink()
            flock(file, operation)

        monkeypatch.setattr(files.fcntl, "flock", remove_first)
        write_atomically(tmp_path / "model.bin", b"weights", writer="a")
        assert removed
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"weights"]

    def test_the_next_part_of_a_living_writer_is_not_removed_for_the_one_before_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "model.bin"
        part = place.with_name("model.bin.a.part")
        part.write_bytes(b"first")
        lock = files.try_lock

        def renamed_meanwhile(file: IO[bytes]) -> bool:
            part.replace(place)
            part.write_bytes(b"second")
            return lock(file)

        monkeypatch.setattr(files, "try_lock", renamed_meanwhile)
        remove_abandoned_parts(tmp_path)
        assert part.read_bytes() == b"second"

    def test_a_part_that_another_writer_holds_is_awaited_for_a_bounded_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "_PART_SECONDS", 0.2)
        place = tmp_path / "model.bin"
        with staged(place, b"theirs") as part:
            with pytest.raises(TimeoutError, match="is being written by another process"):
                write_atomically(place, b"ours")
            assert part.read_bytes() == b"theirs"

    def test_a_file_system_without_locks_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: object) -> None:
            raise OSError("no locks available")

        monkeypatch.setattr(files.fcntl, "flock", none)
        with staged(tmp_path / "model.bin", b"weights", "a") as part:
            remove_abandoned_parts(tmp_path)
            assert part.exists(), "it may be a living writer's"

    def test_a_folder_that_is_not_there_has_no_parts(self, tmp_path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            remove_abandoned_parts(tmp_path / "nothing")
