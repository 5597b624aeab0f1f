"""What the live page asks for, made at most as often as it does not disturb the run.

Two JSON documents. ``now`` is small and asked for every two seconds: where the run stands. Its ``version`` names what was
recorded by then; where that is not what the page has drawn, it asks for the other one, the run's document
(:mod:`codistill_server.observability.dashboard.document`) with its ``version``. However many pages are open, the work is that of one: what
was made is handed to all of them until it is old.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codistill.config.experiment import Experiment
from codistill.rundir.history import Follower
from codistill.v1 import distillation_pb2 as pb
from codistill_server.observability.dashboard.document import run_document
from codistill_server.observability.dashboard.html import encoded

__all__ = ["POLL_SECONDS", "LivePage"]

POLL_SECONDS = 2.0
"""How often a page asks; the script's own number is the same."""

_NOW_SECONDS = 0.5
_DOCUMENT_SECONDS = 1.0
_SHARE = 20  # a new document no earlier than after 20 times what the last one took: 5 % of a core
_EVENTS = 6
_SWITCH_SECONDS = 0.0005
_STATES = {
    pb.STUDENT_STATE_EXPECTED: "expected",
    pb.STUDENT_STATE_PRESENT: "training",
    pb.STUDENT_STATE_ABSENT: "absent",
    pb.STUDENT_STATE_FINISHED: "finished",
    pb.STUDENT_STATE_FAILED: "failed",
}


class LivePage:
    """The data of one run's page; its methods may be called from any thread.

    Args:
        experiment: the run's.
        folder: the run's, to which its records are written.
        snapshot: where the run stands.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        snapshot: Callable[[], pb.Run],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title = experiment.name
        self._follower = Follower(experiment, folder)
        self._snapshot = snapshot
        self._clock = clock
        self._started = format(time.time_ns(), "x")
        self._making_now = threading.Lock()
        self._making_document = threading.Lock()
        self._now: str | Exception = ""
        self._now_until = 0.0
        self._asked = -POLL_SECONDS * 2
        self._complete = False
        self._ending = False
        self._document = ""
        self._version = ""
        self._document_until = 0.0

    @property
    def watched(self) -> bool:
        """Whether a page asked lately."""
        return self._clock() - self._asked < 2 * POLL_SECONDS

    def end(self) -> None:
        """Has the pages told from now on that the server goes down."""
        self._ending = True
        self._now_until = 0.0

    def now(self) -> str:
        """Returns where the run stands.

        Raises:
            Exception: what kept that from being known; who waited meanwhile is told the same, and waits no second time.
        """
        with self._making_now:
            self._asked = self._clock()
            if self._asked >= self._now_until:
                try:
                    state = self._snapshot()
                    self._complete = state.complete
                    self._now = encoded(self._about(state))
                except Exception as error:  # noqa: BLE001 - raised below
                    self._now = error
                self._now_until = self._clock() + _NOW_SECONDS
            if isinstance(self._now, Exception):
                raise self._now
            return self._now

    def document(self) -> tuple[str, str]:
        """Returns the version of the run's document, and the document.

        Raises:
            ValueError: what is recorded cannot be read.
            OSError: a file cannot be read.
        """
        with self._making_document:
            # Nobody is disturbed any more once all have finished, and who watches should see the end.
            if self._clock() >= self._document_until or self._complete:
                self._make()
            return self._version, self._document

    def _make(self) -> None:
        if self._document and self._follower.version == self._follower.written:
            return
        with _in_small_turns():
            history = self._follower.advance()
            began = time.thread_time()
            document = run_document(history)
            self._version = f"{self._started}-{self._follower.version}"
            self._document = encoded({"version": self._version, **document})
        took = time.thread_time() - began
        self._document_until = self._clock() + max(_DOCUMENT_SECONDS, _SHARE * took)

    def _about(self, state: pb.Run) -> dict[str, Any]:
        return {
            "version": f"{self._started}-{self._follower.written}",
            "complete": state.complete,
            "ending": self._ending,
            "round": state.frontier,
            "rounds": state.total_rounds,
            "rate": state.rounds_per_second,
            "ensemble": state.ensemble_accuracy if state.HasField("ensemble_accuracy") else None,
            "waiting": {"students": list(state.waiting_for), "seconds": state.waiting_seconds},
            "students": [_student(student) for student in state.students],
            "events": [
                {"time": event.unix_seconds, "what": event.kind, "student": event.student, "message": event.message}
                for event in state.events[-_EVENTS:]
            ],
        }


def _student(student: pb.StudentStatus) -> dict[str, Any]:
    return {
        "name": student.name,
        "state": _STATES.get(student.state, "unknown"),
        "round": student.round,
        "epoch": student.epoch,
        "train": _accuracy(student, pb.SPLIT_TRAIN),
        "test": _accuracy(student, pb.SPLIT_TEST),
        "step": student.step_seconds or None,
        "wait": student.wait_seconds if student.step_seconds else None,
        "missed_rounds": student.missed_rounds,
        "joins": student.joins,
    }


def _accuracy(student: pb.StudentStatus, split: pb.Split.ValueType) -> float | None:
    return next((each.accuracy for each in student.measurements if each.split == split), None)


@contextmanager
def _in_small_turns() -> Generator[None]:
    """Lets other threads in after half a millisecond instead of five: the rounds' event loop does not wait for a page."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
