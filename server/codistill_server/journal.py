"""The closed rounds of a run on disk, in SQLite.

A round is written in one transaction before anybody is answered, so after the death of the process, at whatever
instant, a round is either wholly there or was never told to anyone. Nothing in the journal is ever changed; rounds
that no student needs any more are deleted from its old end.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from codistill.experiment import difference, extends
from codistill_server.rounds import Restored, Samples, StudentRecord

__all__ = ["ClosedRound", "Journal", "JournalError"]

_SCHEMA_VERSION = 1
_LOOK = "check that it is a run's journal, whole and not locked, or choose another run folder"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS students (
    student TEXT PRIMARY KEY, session INTEGER NOT NULL, durable_round INTEGER NOT NULL, finished INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, ids BLOB NOT NULL, labels BLOB NOT NULL, state BLOB NOT NULL, contributors TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS targets (
    round INTEGER NOT NULL, student TEXT NOT NULL, reply BLOB NOT NULL, PRIMARY KEY (round, student)
) WITHOUT ROWID;
"""


class JournalError(RuntimeError):
    """The journal cannot be read or written; the text names the file and what to do."""


@dataclass(frozen=True)
class ClosedRound:
    """A round as it was decided.

    Attributes:
        round: the round.
        samples: the samples that it was about.
        replies: the serialised ``ExchangeReply`` by student; under "" for every student that has none of its own.
        state: the method's serialised state after the round.
        contributors: the students that the targets were made of, in the experiment's order.
    """

    round: int
    samples: Samples
    replies: Mapping[str, bytes] = field(repr=False)
    state: bytes = field(default=b"", repr=False)
    contributors: tuple[str, ...] = ()

    def reply_to(self, student: str) -> bytes | None:
        """Returns what a student is answered; None if nothing was made for one that did not contribute."""
        return self.replies.get(student, self.replies.get(""))


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
        """Opens a journal, or starts it.

        Args:
            path: the file; None keeps the journal in memory, for runs in one process.
            identity: the experiment's :func:`codistill.experiment.identity`; a journal of another experiment is refused.
            durability: whether a closed round survives the processes' death only, or the machine's.
            may_grow: take over the journal of an experiment to which students were added since.

        Raises:
            JournalError: the file cannot be used, or belongs to another experiment.
        """
        self._where = str(path) if path is not None else ":memory:"
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._where, isolation_level=None, check_same_thread=False)
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"journal {self._where} cannot be opened: {error}; {_LOOK}") from error
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
        except sqlite3.Error as error:
            raise JournalError(f"journal {self._where} cannot be opened: {error}; {_LOOK}") from error
        stored: dict[str, str] = dict(self._query("SELECT key, value FROM run"))  # pyright: ignore[reportArgumentType]
        if not stored:
            with self._transaction():
                self._write("INSERT INTO run VALUES ('schema', ?), ('identity', ?)", (str(_SCHEMA_VERSION), identity))
        elif stored.get("schema") != str(_SCHEMA_VERSION):
            raise JournalError(
                f"journal {self._where} has format {stored.get('schema')}; this version reads {_SCHEMA_VERSION}"
            )
        elif may_grow and extends(stored.get("identity", ""), identity):
            with self._transaction():
                self._write("UPDATE run SET value = ? WHERE key = 'identity'", (identity,))
        elif stored.get("identity") != identity:
            reason = difference(stored.get("identity", ""), identity) or "identity"
            raise JournalError(
                f"journal {self._where} belongs to another run: {reason.replace('this worker', 'this experiment')}; "
                "choose another run folder"
            )

    def restore(self) -> Restored:
        """Returns what the rounds' state machine starts from."""
        ((oldest, newest),) = self._query("SELECT min(round), max(round) FROM rounds")
        frontier = newest + 1 if newest is not None else 0
        students = self._query("SELECT student, session, durable_round, finished FROM students")
        return Restored(
            oldest=frontier if oldest is None else oldest,
            frontier=frontier,
            students=tuple(
                StudentRecord(name, session, durable, bool(done)) for name, session, durable, done in students
            ),
        )

    def settled(self, key: str) -> str | None:
        """Returns what the run was settled to under a key, or None."""
        rows = self._query("SELECT value FROM run WHERE key = ?", (key,))
        return rows[0][0] if rows else None

    def settle(self, key: str, value: str) -> None:
        """Settles a value of the run, once and for all.

        Raises:
            JournalError: the key is settled already, or it could not be written.
        """
        with self._transaction():
            self._write("INSERT INTO run VALUES (?, ?)", (key, value))

    def last_state(self) -> bytes:
        """Returns the method's state after the newest closed round; empty before the first."""
        rows = self._query("SELECT state FROM rounds ORDER BY round DESC LIMIT 1")
        return rows[0][0] if rows else b""

    def append(self, closed: ClosedRound) -> None:
        """Writes a closed round, all of it or nothing.

        Raises:
            JournalError: it could not be written; nothing of it is there.
        """
        with self._transaction():
            self._write(
                "INSERT INTO rounds VALUES (?, ?, ?, ?, ?)",
                (closed.round, closed.samples.ids, closed.samples.labels, closed.state, ",".join(closed.contributors)),
            )
            for student, reply in closed.replies.items():
                self._write("INSERT INTO targets VALUES (?, ?, ?)", (closed.round, student, reply))

    def read(self, number: int) -> ClosedRound | None:
        """Returns a closed round, or None if it is not kept."""
        rows = self._query("SELECT ids, labels, state, contributors FROM rounds WHERE round = ?", (number,))
        if not rows:
            return None
        ((ids, labels, state, contributors),) = rows
        replies = dict(self._query("SELECT student, reply FROM targets WHERE round = ?", (number,)))
        names = tuple(contributors.split(",")) if contributors else ()
        return ClosedRound(number, Samples(ids, labels), replies, state, names)

    def remember(self, record: StudentRecord) -> None:
        """Writes what must be remembered of a student."""
        with self._transaction():
            self._write(
                "INSERT OR REPLACE INTO students VALUES (?, ?, ?, ?)",
                (record.student, record.session, record.durable_round, int(record.finished)),
            )

    def forget(self, before: int) -> None:
        """Drops the rounds before one; the newest round always stays, as it holds the method's state."""
        with self._transaction():
            ((newest,),) = self._query("SELECT max(round) FROM rounds")
            limit = min(before, newest if newest is not None else before)
            self._write("DELETE FROM rounds WHERE round < ?", (limit,))
            self._write("DELETE FROM targets WHERE round < ?", (limit,))

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def _query(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise JournalError(f"journal {self._where} cannot be read: {error}; {_LOOK}") from error

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
        except sqlite3.Error as error:
            raise JournalError(
                f"journal {self._where} cannot be written: {error}; free disk space or check the folder's "
                "permissions, then resume the run"
            ) from error
