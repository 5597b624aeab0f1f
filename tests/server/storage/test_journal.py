from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill_server.rounds.events import ParticipantRecord, Restored, Samples
from codistill_server.storage.journal import ClosedRound, Journal, JournalError

IDENTITY = '{"seed":1,"name":"x"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    made = Journal(path, IDENTITY)
    yield made
    made.close()


def closed(number: int, **changes: object) -> ClosedRound:
    ids, labels = number.to_bytes(8, "little"), b"\1" + bytes(7)
    fields: dict[str, object] = {"replies": {"": b"reply %d" % number}, "state": b"state %d" % number}
    return ClosedRound(number, Samples(ids, labels), **{**fields, **changes})  # type: ignore[arg-type]


def reopened(path: Path) -> Journal:
    return Journal(path, IDENTITY)


def closed_in_full(number: int) -> ClosedRound:
    """Return a round with something in every column, large enough for several pages."""
    replies = {"": number.to_bytes(2, "little") * 700} if number % 2 else {"ant": b"%d" % number, "bee": bytes(900)}
    return closed(number, replies=replies, contributors=("ant", "bee"))


ANT = ParticipantRecord("ant", 3, 5, finished=False, worker_id=2**64 - 1)
ROUNDS = 30
EVERYTHING = (
    Restored(oldest=0, frontier=ROUNDS, participants=(ANT,)),
    "mine",
    b"state %d" % (ROUNDS - 1),
    [closed_in_full(number) for number in range(ROUNDS)],
)


def written(path: Path) -> Journal:
    """Write a journal with something in every table."""
    journal = Journal(path, IDENTITY)
    journal.settle("data", "mine")
    journal.remember(ANT)
    for number in range(ROUNDS):
        journal.append(closed_in_full(number))
    return journal


def everything_in(path: Path) -> tuple[Restored, str | None, bytes, list[ClosedRound | None]]:
    """Read all that :func:`written` has written."""
    with contextlib.closing(Journal(path, IDENTITY)) as journal:
        restored = journal.restore()
        rounds = [journal.read(number) for number in range(restored.oldest, restored.frontier)]
        return restored, journal.settled("data"), journal.last_state(), rounds


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True, check=False).returncode == 0


class TestRounds:
    @pytest.mark.parametrize("replies", [{"": b"shared"}, {"ant": b"for ant", "bee": b"for bee"}])
    def test_a_round_reads_back_as_it_was(self, journal: Journal, path: Path, replies: dict[str, bytes]) -> None:
        written = closed(3, replies=replies)
        journal.append(written)
        assert journal.read(3) == written
        journal.close()
        again = reopened(path)
        assert again.read(3) == written
        again.close()

    def test_a_reply_is_everyones_or_each_participants_own(self) -> None:
        assert closed(0, replies={"": b"all"}).reply_to("ant") == b"all"
        assert closed(0, replies={"ant": b"1", "bee": b"2"}).reply_to("bee") == b"2"

    def test_a_round_that_is_not_there(self, journal: Journal) -> None:
        assert journal.read(0) is None
        assert journal.last_state() == b""
        assert journal.restore() == Restored()

    def test_a_closed_round_never_changes(self, journal: Journal) -> None:
        journal.append(closed(0))
        with pytest.raises(JournalError, match="cannot be written: UNIQUE"):
            journal.append(closed(0, replies={"": b"another", "ant": b"more"}))
        assert journal.read(0) == closed(0)

    def test_all_of_a_round_is_written_or_nothing(self, journal: Journal) -> None:
        # A value that SQLite does not take stands for whatever may go wrong half way.
        for broken, error in (
            ({"ant": b"good", "bee": None}, JournalError),
            ({"ant": b"", "bee": object()}, Exception),
        ):
            with pytest.raises(error):
                journal.append(closed(0, replies=broken))
            assert journal.read(0) is None
        journal.append(closed(0))
        assert journal.read(0) == closed(0), "nor did the failed rounds leave a transaction open"

    def test_a_commit_that_fails_leaves_nothing_to_read(self, journal: Journal) -> None:
        database = journal._database
        database.execute("PRAGMA foreign_keys = ON")  # a deferred check fails at COMMIT, and not before
        database.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        database.execute("DROP TABLE targets")
        database.execute(
            "CREATE TABLE targets (round INTEGER REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED, "
            "participant TEXT, reply BLOB)"
        )
        with pytest.raises(JournalError, match="FOREIGN KEY"):
            journal.append(closed(0))
        assert journal.read(0) is None
        database.execute("INSERT INTO parent VALUES (0)")
        journal.append(closed(0))
        assert journal.read(0) == closed(0)

    def test_the_state_is_that_of_the_newest_round(self, journal: Journal) -> None:
        for number in (4, 5, 6):
            journal.append(closed(number))
        assert journal.last_state() == b"state 6"

    def test_power_safe_journals_sync_every_round(self, path: Path) -> None:
        for durability, level in (("power", 2), ("process", 0)):
            made = Journal(path, IDENTITY, durability)  # type: ignore[arg-type]
            assert made._database.execute("PRAGMA synchronous").fetchone() == (level,)
            made.close()

    @pytest.mark.skipif(not can_trace(), reason="needs strace, and the right to trace")
    @pytest.mark.parametrize("durability", ["power", "process"])
    def test_the_disk_is_asked_for_each_round_or_for_none(self, durability: str, path: Path) -> None:
        script = """
            import sys
            from pathlib import Path
            from codistill_server.storage.journal import ClosedRound, Journal
            from codistill_server.rounds.events import Samples
            made = Journal(Path(sys.argv[1]), "{}", sys.argv[2])
            print("open", file=sys.stderr, flush=True)
            for number in range(5):
                made.append(ClosedRound(number, Samples(b"", b""), {"": b"reply"}))
                print("closed", file=sys.stderr, flush=True)
            import os
            os._exit(0)
        """
        traced = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run([*traced, str(path), durability], capture_output=True, text=True, timeout=60, check=True)
        rounds = done.stderr.partition("open\n")[2].split("closed\n")[:5]
        synced = [part.count("journal.sqlite-wal>") for part in rounds]
        assert synced == [1] * 5 if durability == "power" else [0] * 5, done.stderr


class TestForget:
    def test_rounds_before_one_go_with_their_targets(self, journal: Journal) -> None:
        for number in range(5):
            journal.append(closed(number))
        journal.forget(3)
        assert [journal.read(number) is not None for number in range(5)] == [False, False, False, True, True]
        assert journal._database.execute("SELECT round FROM targets ORDER BY round").fetchall() == [(3,), (4,)]
        assert journal.restore() == Restored(oldest=3, frontier=5)

    def test_the_newest_always_stays(self, journal: Journal) -> None:
        journal.forget(7)
        for number in range(3):
            journal.append(closed(number))
        journal.forget(100)
        assert journal.restore() == Restored(oldest=2, frontier=3)
        assert journal.last_state() == b"state 2"

    @given(st.lists(st.one_of(st.just("append"), st.integers(0, 12)), max_size=30))
    @settings(max_examples=60)
    def test_any_course_keeps_a_contiguous_newest_part(self, course: list[str | int]) -> None:
        journal = Journal(None, IDENTITY)
        newest, oldest = -1, 0
        for step in course:
            if isinstance(step, str):
                newest += 1
                journal.append(closed(newest))
            else:
                journal.forget(step)
                oldest = max(oldest, min(step, newest))
        assert journal.restore() == Restored(oldest=oldest if newest >= 0 else 0, frontier=newest + 1)
        for number in range(newest + 2):
            assert journal.read(number) == (closed(number) if oldest <= number <= newest else None)
        journal.close()


class TestRun:
    def test_participants_are_remembered(self, journal: Journal, path: Path) -> None:
        for record in (
            ParticipantRecord("ant", 1, 0, finished=False),
            ParticipantRecord("bee", 2, 7, finished=True),
            ParticipantRecord("ant", 3, 5, finished=False, worker_id=2**64 - 1),
        ):
            journal.remember(record)
        journal.close()
        again = reopened(path)
        assert again.restore().participants == (
            ParticipantRecord("ant", 3, 5, finished=False, worker_id=2**64 - 1),
            ParticipantRecord("bee", 2, 7, finished=True),
        )
        again.close()

    def test_what_is_settled_stays(self, journal: Journal, path: Path) -> None:
        assert journal.settled("data") is None
        journal.settle("data", "mine")
        with pytest.raises(JournalError):
            journal.settle("data", "yours")
        journal.close()
        again = reopened(path)
        assert again.settled("data") == "mine"
        again.close()

    def test_another_experiments_journal_is_refused(self, journal: Journal, path: Path) -> None:
        with pytest.raises(JournalError) as error:
            Journal(path, '{"seed":2,"name":"x"}')
        assert str(error.value) == (
            f"journal {path} belongs to another run: experiment field seed: the run has 1, this experiment has 2; "
            "choose another run folder"
        )
        journal.append(closed(0))  # the right one goes on

    @pytest.mark.parametrize("number", ["2", "99"])
    def test_another_format_is_refused(self, number: str, journal: Journal, path: Path) -> None:
        journal._database.execute("UPDATE run SET value = ? WHERE key = 'schema'", (number,))
        with pytest.raises(JournalError) as refused:
            Journal(path, IDENTITY)
        assert str(refused.value) == (
            f"journal {path} has format {number}; this version reads 3; finish the run with the version that began it, "
            "or choose another run folder"
        )

    def test_in_memory_nothing_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        journal = Journal(None, IDENTITY)
        journal.append(closed(0))
        journal.close()
        assert list(tmp_path.iterdir()) == []


class TestFaults:
    def test_a_file_that_is_no_journal(self, path: Path) -> None:
        path.parent.mkdir()
        path.write_bytes(b"these are notes of mine, long enough to be looked at. " * 100)
        before = path.read_bytes()
        with pytest.raises(
            JournalError, match=r"cannot be opened: file is not a database; .* another run folder"
        ) as error:
            Journal(path, IDENTITY)
        assert str(path) in str(error.value)
        assert path.read_bytes() == before

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file" / "journal.sqlite", tmp_path):
            with pytest.raises(JournalError, match=f"journal {path} cannot be opened"):
                Journal(path, IDENTITY)

    def test_a_closed_or_damaged_journal_says_so(self, path: Path) -> None:
        journal = Journal(path, IDENTITY)
        for number in range(200):
            journal.append(closed(number, replies={"": os.urandom(2000)}))
        journal.close()
        with pytest.raises(JournalError, match="cannot be read"):
            journal.restore()
        with path.open("r+b") as file:  # all but the first page, which holds the schema
            file.seek(4096)
            file.write(b"\xff" * (path.stat().st_size - 4096))
        malformed = pytest.raises(
            JournalError,
            match=r"cannot be (opened|read): database disk image is malformed; put a whole copy in its place",
        )
        with malformed, contextlib.closing(Journal(path, IDENTITY)) as damaged:
            damaged.restore()

    @pytest.mark.parametrize(
        ("statement", "part"),
        [
            ("UPDATE rounds SET labels = x'02' WHERE round = 7", "round 7 is not what was written"),
            ("UPDATE rounds SET round = 90 WHERE round = 29", "of its rounds 0 to 90 it holds 30"),
            ("DELETE FROM rounds WHERE round = 7", "of its rounds 0 to 29 it holds 29"),
            ("UPDATE targets SET reply = x'02' WHERE round = 7", "round 7 is not what was written"),
            ("UPDATE targets SET participant = 'ant' WHERE round = 7", "round 7 is not what was written"),
            ("DELETE FROM targets WHERE round = 7", "round 7 is not what was written"),
            ("UPDATE rounds SET state = x'02' WHERE round = 29", "round 29 is not what was written"),
            ("UPDATE rounds SET contributors = 'ant' WHERE round = 7", "round 7 is not what was written"),
            ("UPDATE rounds SET contributors = x'616e' WHERE round = 7", "round 7 is not what was written"),
            ("UPDATE targets SET participant = x'616e' WHERE participant = 'ant'", "round 0 is not what was written"),
            ("UPDATE participants SET worker_id = '8'", "what it says of participant 'ant' is not what was written"),
            ("UPDATE participants SET durable_round = 9", "what it says of participant 'ant' is not what was written"),
            (
                "UPDATE participants SET participant = 'anu'",
                "what it says of participant 'anu' is not what was written",
            ),
            ("UPDATE run SET value = 'yours' WHERE key = 'data'", "what it says of the run is not what was written"),
            ("UPDATE run SET key = 'dada' WHERE key = 'data'", "what it says of the run is not what was written"),
        ],
    )
    def test_what_was_not_written_is_not_read(self, path: Path, statement: str, part: str) -> None:
        """SQLite itself finds nothing wrong with any of this."""
        written(path).close()
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            assert other.execute(statement).rowcount > 0
        with pytest.raises(JournalError) as error:
            everything_in(path)
        assert str(error.value) == (
            f"journal {path} is damaged: {part}; put a whole copy in its place and resume the run, or start it anew in "
            "another run folder"
        )

    def test_cut_short_anywhere_it_is_refused(self, path: Path) -> None:
        """Each byte of the header and around each page's end is tried, and every 31st of the rest."""
        written(path).close()
        size, page = path.stat().st_size, 4096
        # From less than two bytes SQLite makes a new file; the check of joins then rejects participants who are ahead.
        lengths = {
            *range(2, 150),
            *range(150, size, 31),
            *(end + offset for end in range(page, size, page) for offset in range(-9, 9)),
        }
        for length in sorted((length for length in lengths if length < size), reverse=True):
            os.truncate(path, length)
            with pytest.raises(JournalError) as error:
                everything_in(path)
            assert str(path) in str(error.value), length
            assert re.search(r"whole copy in its place|another run folder", str(error.value)), str(error.value)

    def test_a_flipped_bit_anywhere_changes_nothing_that_is_read(self, path: Path) -> None:
        written(path).close()
        whole = path.read_bytes()
        refusals = 0
        for position in {*range(150), *range(150, len(whole), 53)}:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            found = None
            with contextlib.suppress(JournalError):
                found = everything_in(path)
            # Free space, and some numbers that SQLite makes no use of, may be damaged without harm.
            assert found in (None, EVERYTHING), position
            refusals += found is None
        assert refusals > 500

    @pytest.mark.parametrize("damage", ["cut", "flipped"])
    def test_of_a_torn_log_the_good_part_is_used(self, path: Path, damage: str, tmp_path: Path) -> None:
        """As a power cut may leave it: the newest rounds are lost, and none is another than it was."""
        journal = written(path)
        log = path.with_name(f"{path.name}-wal").read_bytes()
        main = path.read_bytes()
        journal.close()
        frontiers: set[int] = set()
        copy = tmp_path / "copy" / path.name
        for number, position in enumerate(range(0, len(log), 1009)):
            copy.parent.mkdir()
            torn = bytearray(log)
            if damage == "cut":
                del torn[position:]
            else:
                torn[position] ^= 1 << number % 8
            copy.write_bytes(main)
            copy.with_name(f"{path.name}-wal").write_bytes(torn)
            with contextlib.closing(Journal(copy, IDENTITY)) as opened:
                restored = opened.restore()
                frontiers.add(restored.frontier)
                rounds = {each: opened.read(each) for each in range(restored.oldest, restored.frontier)}
            assert rounds == {each: closed_in_full(each) for each in range(restored.frontier)}
            shutil.rmtree(copy.parent)
        assert {0, 15} < frontiers, "none and many survived"

    @pytest.mark.parametrize(
        ("left", "step"),
        [
            (10, "free disk space or check the folder's permissions"),
            (2**30, r"the disk is not full, so look at .*quota"),
        ],
    )
    def test_a_disk_that_is_full(
        self, journal: Journal, path: Path, left: int, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = os.statvfs_result((4096, 4096, 2**31, left, left, 10, 10, 10, 0, 255))
        monkeypatch.setattr(os, "statvfs", lambda _: found)
        database = journal._database
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages + 8}")

        def fill() -> None:
            for number in range(1000):
                journal.append(closed(number, replies={"": os.urandom(2000)}))

        with pytest.raises(JournalError, match=f"is full; {step}") as error:
            fill()
        assert str(path) in str(error.value)
        (written,) = {
            journal.restore().frontier,
            journal._database.execute("SELECT count(*) FROM targets").fetchone()[0],
        }
        assert 0 < written < 100
        assert journal.read(written) is None
        database.execute("PRAGMA max_page_count = 100000")
        journal.append(closed(written))
        assert journal.restore().frontier == written + 1

    def test_writes_beyond_the_file_size_limit(self, path: Path) -> None:
        """The operating system itself refuses; what was written before is all there."""
        script = """
            import os, resource, signal, sys
            from pathlib import Path
            from codistill_server.storage.journal import ClosedRound, Journal, JournalError
            from codistill_server.rounds.events import Samples
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            journal = Journal(Path(sys.argv[1]), sys.argv[2])
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            number = 0
            try:
                while number < 10_000:
                    journal.append(ClosedRound(number, Samples(bytes(8), bytes(8)), {"": os.urandom(4000)}, b""))
                    number += 1
            except JournalError as error:
                print(number, journal.restore().frontier, error)
        """
        number, frontier, text = _python(script, str(path), IDENTITY).split(" ", 2)
        assert 0 < int(number) < 10_000
        assert frontier == number
        assert "File too large (this process may have 1048576 bytes in a file: ulimit -f); raise the limit" in text
        assert "free disk space" not in text
        again = reopened(path)
        assert again.restore() == Restored(oldest=0, frontier=int(number))
        again.close()

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_a_folder_without_permission(self, path: Path) -> None:
        path.parent.mkdir()
        path.parent.chmod(0o500)
        with pytest.raises(JournalError, match="cannot be opened"):
            Journal(path, IDENTITY)

    def test_a_journal_that_turned_read_only(self, journal: Journal) -> None:
        journal._database.execute("PRAGMA query_only = ON")
        with pytest.raises(
            JournalError, match=r"cannot be written: attempt to write a readonly database; .*permissions"
        ):
            journal.append(closed(0))
        assert journal.read(0) is None

    def test_two_servers_never_close_the_same_round(self, journal: Journal, path: Path) -> None:
        other = reopened(path)
        journal.append(closed(0))
        with pytest.raises(JournalError):
            other.append(closed(0, replies={"": b"another"}))
        assert other.read(0) == closed(0)
        other.close()

    def test_a_journal_that_another_process_holds(self, path: Path, journal: Journal) -> None:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        journal._database.execute("PRAGMA busy_timeout = 10")
        with pytest.raises(JournalError, match="database is locked"):
            journal.append(closed(0))
        other.execute("ROLLBACK")
        other.close()
        journal.append(closed(0))


@pytest.mark.parametrize("after", [1, 40, 150])
def test_whatever_was_answered_outlives_kill_9(path: Path, after: int) -> None:
    """A writer that says each round after it was appended is killed; every round said is there, and none is torn."""
    script = """
        import sys
        from pathlib import Path
        from codistill_server.storage.journal import ClosedRound, Journal
        from codistill_server.rounds.events import Samples
        journal = Journal(Path(sys.argv[1]), sys.argv[2])
        number = 0
        while True:
            content = number.to_bytes(8, "little") * 500
            journal.append(ClosedRound(number, Samples(content, content), {"ant": content, "bee": content[::-1]}, content))
            print(number, flush=True)
            number += 1
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(path), IDENTITY], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    with writer.stdout as output:
        said = -1
        for line in output:
            said = int(line)
            if said == after:
                writer.kill()
    assert writer.wait(60) == -signal.SIGKILL
    journal = reopened(path)
    restored = journal.restore()
    assert said >= after
    # One more may be whole on disk whose answer was not out yet.
    assert restored.oldest == 0
    assert restored.frontier in (said + 1, said + 2)
    for number in range(restored.frontier):
        content = number.to_bytes(8, "little") * 500
        assert journal.read(number) == ClosedRound(
            number, Samples(content, content), {"ant": content, "bee": content[::-1]}, content
        )
    journal.append(closed(restored.frontier))
    journal.close()


def _python(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_journal_grows_with_its_experiment_only_if_it_may(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    older, newer = '{"seed":0,"students":["a","b"]}', '{"seed":0,"students":["a","b","c"]}'
    Journal(path, older).close()
    with pytest.raises(JournalError, match="students"):
        Journal(path, newer)
    Journal(path, newer, may_grow=True).close()
    Journal(path, newer).close()
    with pytest.raises(JournalError, match="students"):
        Journal(path, older, may_grow=True)


def test_who_contributed_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", "run")
    for number, names in enumerate([("ant", "bee"), ("bee",), ()]):
        journal.append(ClosedRound(number, Samples(b"", b""), {"": b"x"}, contributors=names))
        read = journal.read(number)
        assert read is not None
        assert read.contributors == names
        assert (read.reply_to("bee"), read.reply_to("cow")) == (b"x", b"x")
    journal.close()
