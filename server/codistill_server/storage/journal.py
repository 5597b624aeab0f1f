"""The closed rounds of a run on disk, in SQLite.

A round is written in one transaction before any participant is answered. So whenever the process dies, a round is either wholly
there or was never sent to anyone. A closed round is never changed. Rounds that no participant needs any more are deleted, oldest
first.

Disks damage what they hold, and SQLite notices only damage to its own structures. So every row has a checksum, and a
journal is verified when it is opened. It is used as it was written, or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from codistill.config.fingerprint import difference, extends
from codistill.process.exit_codes import ExitCode
from codistill.rundir.storage import cause_behind, describe_disk, explain
from codistill.wire.checksum import crc32c
from codistill_server.rounds.events import ParticipantRecord, Restored, Samples

__all__ = ["ClosedRound", "Journal", "JournalError", "holds_rounds"]

_SCHEMA_VERSION = 3
_CHECK_FILE = "check that it is a run's journal, whole and not locked, or choose another run folder"
_MAKE_ROOM = "free disk space or check the folder's permissions, then resume the run"
_RAISE = "raise the limit (`ulimit -f`), then resume the run"
_QUOTA = (
    "the disk is not full, so look at this user's quota (`quota`) and in the system's log for a disk that fails, then "
    "resume the run"
)
_REPLACE = "put a whole copy in its place and resume the run, or start it anew in another run folder"
# SQLite quotes damaged bytes in its messages, which sqlite3 then fails to decode.
_ERRORS = (sqlite3.Error, UnicodeDecodeError)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS participants (
    participant TEXT PRIMARY KEY, session_id INTEGER NOT NULL, durable_round INTEGER NOT NULL, finished INTEGER NOT NULL,
    worker_id TEXT NOT NULL, checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, ids BLOB NOT NULL, labels BLOB NOT NULL, state BLOB NOT NULL, contributors TEXT NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS targets (
    round INTEGER NOT NULL, participant TEXT NOT NULL, reply BLOB NOT NULL, PRIMARY KEY (round, participant)
) WITHOUT ROWID;
"""


class JournalError(RuntimeError):
    """The journal cannot be read or written; the text names the file and what to do.

    Attributes:
        code: how the process ends; None leaves it to the caller.
    """

    def __init__(self, message: str, code: ExitCode | None = None) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True)
class ClosedRound:
    """A closed round: its samples, its replies and the method's state after it.

    Attributes:
        round: the round.
        samples: the samples of its contributions.
        replies: the serialised ``ExchangeResponse`` by participant; under "" for every participant that has none of its own.
        state: the method's serialised state after the round.
        contributors: the participants whose contributions the targets were made of, in the experiment's order.
    """

    round: int
    samples: Samples
    replies: Mapping[str, bytes] = field(repr=False)
    state: bytes = field(default=b"", repr=False)
    contributors: tuple[str, ...] = ()

    def reply_to(self, participant: str) -> bytes | None:
        """Return the reply to a participant; None if none was made, as it did not contribute."""
        return self.replies.get(participant, self.replies.get(""))


class Journal:
    """One run's journal; used by one thread at a time."""

    def __init__(
        self,
        path: Path | None,
        identity: str,
        durability: Literal["process", "power"] = "process",
        *,
        may_grow: bool = False,
    ) -> None:
        """Open a journal, or create it.

        Args:
            path: the file; None keeps the journal in memory, for runs in one process.
            identity: the experiment's :func:`codistill.config.fingerprint.identity`; a journal of another experiment is refused.
            durability: "process": a closed round survives the death of the process; "power": also the machine's.
            may_grow: accept the journal of this experiment with fewer students.

        Raises:
            JournalError: the file cannot be used, or belongs to another experiment.
        """
        self._location = str(path) if path is not None else ":memory:"
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._location, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"journal {self._location} cannot be opened: {error}; {_CHECK_FILE}") from error
        try:
            self._prepare(identity, durability, may_grow)
        except BaseException:
            self.close()
            raise

    def _prepare(self, identity: str, durability: Literal["process", "power"], may_grow: bool) -> None:
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            # Without a sync the pages are the kernel's once written: they survive this process, not a power cut.
            self._database.execute(f"PRAGMA synchronous={'FULL' if durability == 'power' else 'OFF'}")
            self._database.executescript(_SCHEMA)
        except _ERRORS as error:
            raise self._failed("opened", error, _CHECK_FILE) from error
        stored: dict[str, str] = dict(self._query("SELECT key, value FROM run"))  # pyright: ignore[reportArgumentType]
        if stored and stored.get("schema") != str(_SCHEMA_VERSION):
            raise JournalError(
                f"journal {self._location} has format {stored.get('schema')}; this version reads {_SCHEMA_VERSION}; "
                "finish the run with the version that began it, or choose another run folder"
            )
        self._verify()
        if not stored:
            with self._transaction():
                self._settle("schema", str(_SCHEMA_VERSION))
                self._settle("identity", identity)
        elif may_grow and extends(stored.get("identity", ""), identity):
            with self._transaction():
                row = ("identity", identity)
                self._write("INSERT OR REPLACE INTO run VALUES (?, ?, ?)", (*row, _checksum(*row)))
        elif stored.get("identity") != identity:
            reason = difference(stored.get("identity", ""), identity) or "identity"
            raise JournalError(
                f"journal {self._location} belongs to another run: {reason.replace('this worker', 'this experiment')}; "
                "choose another run folder"
            )

    def _verify(self) -> None:
        """Verify SQLite's structures, that no round is missing in between, and the checksums of all other rows."""
        ((result,),) = self._query("PRAGMA quick_check(1)")
        if result != "ok":
            raise self._damaged(" ".join(str(result).split()))
        ((oldest, newest, count),) = self._query("SELECT min(round), max(round), count(*) FROM rounds")
        if count and count != newest - oldest + 1:
            raise self._damaged(f"of its rounds {oldest} to {newest} it holds {count}")
        for *row, checksum in self._query("SELECT key, value, checksum FROM run"):
            if checksum != _checksum(*row):
                raise self._damaged("what it says of the run is not what was written")
        for *row, checksum in self._query(
            "SELECT participant, session_id, durable_round, finished, worker_id, checksum FROM participants"
        ):
            if checksum != _checksum(*row):
                raise self._damaged(f"what it says of participant {row[0]!r} is not what was written")

    def restore(self) -> Restored:
        """Return the rounds that are kept and the participants' records; the state machine starts from them."""
        ((oldest, newest),) = self._query("SELECT min(round), max(round) FROM rounds")
        frontier = newest + 1 if newest is not None else 0
        participants = self._query(
            "SELECT participant, session_id, durable_round, finished, worker_id FROM participants"
        )
        return Restored(
            oldest=frontier if oldest is None else oldest,
            frontier=frontier,
            participants=tuple(
                ParticipantRecord(participant, session_id, durable_round, bool(finished), int(worker_id))
                for participant, session_id, durable_round, finished, worker_id in participants
            ),
        )

    def settled(self, key: str) -> str | None:
        """Return the value to which the run was settled under a key, or None."""
        rows = self._query("SELECT value FROM run WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def settle(self, key: str, value: str) -> None:
        """Settle a value of the run, once and for all.

        Raises:
            JournalError: the key is settled already, or the value could not be written.
        """
        with self._transaction():
            self._settle(key, value)

    def last_state(self) -> bytes:
        """Return the method's state after the newest closed round; empty before the first."""
        ((newest,),) = self._query("SELECT max(round) FROM rounds")
        last = None if newest is None else self.read(newest)
        return b"" if last is None else last.state

    def append(self, closed: ClosedRound) -> None:
        """Write a closed round, all of it or nothing.

        Raises:
            JournalError: it could not be written; nothing of it is there.
        """
        with self._transaction():
            samples, replies = closed.samples, sorted(closed.replies.items())
            row = (closed.round, samples.ids, samples.labels, closed.state, ",".join(closed.contributors))
            self._write("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?)", (*row, _checksum(*row, *chain(*replies))))
            for reply in replies:
                self._write("INSERT INTO targets VALUES (?, ?, ?)", (closed.round, *reply))

    def read(self, round_number: int) -> ClosedRound | None:
        """Return a closed round, or None if it is not kept.

        Raises:
            JournalError: it cannot be read, or is not what was written.
        """
        rows = self._query(
            "SELECT round, ids, labels, state, contributors, checksum FROM rounds WHERE round = ?", (round_number,)
        )
        if not rows:
            return None
        ((*row, checksum),) = rows
        replies = self._query(
            "SELECT participant, reply FROM targets WHERE round = ? ORDER BY participant", (round_number,)
        )
        if checksum != _checksum(*row, *chain(*replies)):
            raise self._damaged(f"round {round_number} is not what was written")
        _, ids, labels, state, contributors = row
        names = tuple(contributors.split(",")) if contributors else ()
        return ClosedRound(round_number, Samples(ids, labels), dict(replies), state, names)

    def remember(self, record: ParticipantRecord) -> None:
        """Write a participant's record in place of its earlier one.

        Raises:
            JournalError: it could not be written.
        """
        with self._transaction():
            # 64 bits without a sign are more than an INTEGER holds.
            row = (
                record.participant,
                record.session_id,
                record.durable_round,
                int(record.finished),
                str(record.worker_id),
            )
            self._write("INSERT OR REPLACE INTO participants VALUES (?, ?, ?, ?, ?, ?)", (*row, _checksum(*row)))

    def forget(self, before: int) -> None:
        """Drop the rounds before one; the newest round always stays, as it holds the method's state.

        Raises:
            JournalError: they could not be dropped.
        """
        with self._transaction():
            ((newest,),) = self._query("SELECT max(round) FROM rounds")
            limit = min(before, newest if newest is not None else before)
            self._write("DELETE FROM rounds WHERE round < ?", (limit,))
            self._write("DELETE FROM targets WHERE round < ?", (limit,))

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def _query(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except _ERRORS as error:
            raise JournalError(
                f"journal {self._location} cannot be read: {error}; {_REPLACE if _is_damage(error) else _CHECK_FILE}"
            ) from error

    def _settle(self, key: str, value: str) -> None:
        self._write("INSERT INTO run VALUES (?, ?, ?)", (key, value, _checksum(key, value)))

    def _failed(self, done: str, error: Exception, otherwise: str) -> JournalError:
        """Return the error of a journal that cannot be `done`; where its disk is the cause, with the space left there."""
        line = f"journal {self._location} cannot be {done}: {error}"
        if _is_of_storage(error):
            path = Path(self._location)
            cause = cause_behind(Path(f"{path}{end}") for end in ("", "-wal", "-shm"))
            if cause is not None and cause.errno == errno.EFBIG:
                line, step = f"{line}: {cause.filename}: {explain(cause, path)}", _RAISE
            else:
                read_only = _primary_code(error) == sqlite3.SQLITE_READONLY
                step = f"{_MAKE_ROOM if cause is None or read_only else _QUOTA} ({describe_disk(path)})"
            return JournalError(f"{line}; {step}", ExitCode.STORAGE)
        return JournalError(f"{line}; {_REPLACE if _is_damage(error) else otherwise}")

    def _damaged(self, how: str) -> JournalError:
        return JournalError(f"journal {self._location} is damaged: {how}; {_REPLACE}")

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        self._database.execute(statement, values)

    @contextlib.contextmanager
    def _transaction(self) -> Generator[None, None, None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # some errors have rolled it back already
                    self._database.execute("ROLLBACK")
                raise
        except _ERRORS as error:
            raise self._failed("written", error, _MAKE_ROOM) from error


def holds_rounds(path: Path) -> bool:
    """Return whether a journal holds a closed round; True also if it cannot be read, so that nothing is thrown away."""
    if not path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            tables = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'rounds'").fetchone()
            return tables != (0,) and database.execute("SELECT 1 FROM rounds LIMIT 1").fetchone() is not None
    except sqlite3.Error:
        return True


def read_identity(path: Path) -> str | None:
    """Return the identity of the experiment that a journal belongs to; None without one, or if it cannot be read."""
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            row = database.execute("SELECT value FROM run WHERE key = 'identity'").fetchone()
    except sqlite3.Error:
        return None
    return row[0] if row is not None and isinstance(row[0], str) else None


def _is_of_storage(error: Exception) -> bool:
    """Return whether an error comes from a full disk, a read-only one, or one that fails."""
    return _primary_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)


def _is_damage(error: Exception) -> bool:
    return isinstance(error, UnicodeDecodeError) or _primary_code(error) == sqlite3.SQLITE_CORRUPT


def _primary_code(error: Exception) -> int:
    """Return SQLite's code of an error without its extension; 0 if it has none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _checksum(*values: object) -> int:
    """Return a CRC-32C over values, their types and their lengths; a damaged row may hold any type anywhere."""
    checksum = 0
    for value in values:
        content = value if isinstance(value, bytes) else str(value).encode()
        checksum = crc32c(content, crc32c(f"{type(value).__name__} {len(content)} ".encode(), checksum))
    return checksum
