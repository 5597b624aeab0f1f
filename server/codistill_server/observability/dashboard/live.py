"""The data of the live page, made so seldom that the run is not disturbed.

There are two JSON documents. ``now`` is small, has the run's state, and is asked for every two seconds. Its ``version``
names the records written so far. Where the page has drawn another version, it asks for the run's document
(:mod:`codistill_server.observability.dashboard.document`), which has a ``version`` too. The work does not grow with the
number of open pages: each document is cached until it is old.
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
from codistill.rundir.follower import Follower
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import seconds
from codistill.wire.words import word
from codistill_server.observability.dashboard.document import run_document
from codistill_server.observability.dashboard.html import encoded_json

__all__ = ["POLL_SECONDS", "LivePage"]

POLL_SECONDS = 2.0
"""How often a page asks, in seconds; `assets/live.js` has the same number."""

_NOW_SECONDS = 0.5
_DOCUMENT_SECONDS = 1.0
_PAUSE_FACTOR = 20  # a new document no earlier than 20 times the time of the last one: 5 % of a core
_EVENTS = 6
_SWITCH_SECONDS = 0.0005


class LivePage:
    """The data of one run's page; its methods may be called from any thread.

    Args:
        experiment: the run's.
        folder: the run's, to which its records are written.
        snapshot: returns the run's state.
        clock: monotonic time in seconds.
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
        self._now_lock = threading.Lock()
        self._document_lock = threading.Lock()
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
        """Whether a page asked in the last few seconds."""
        return self._clock() - self._asked < 2 * POLL_SECONDS

    def end(self) -> None:
        """Tell the pages from now on that the server is going down."""
        self._ending = True
        self._now_until = 0.0

    def now(self) -> str:
        """Return the run's state as JSON.

        Raises:
            Exception: the snapshot's error. Calls that waited meanwhile raise the same error and do not try again.
        """
        with self._now_lock:
            self._asked = self._clock()
            if self._asked >= self._now_until:
                try:
                    state = self._snapshot()
                    self._complete = state.complete
                    self._now = encoded_json(self._state_now(state))
                except Exception as error:  # noqa: BLE001 - raised below
                    self._now = error
                self._now_until = self._clock() + _NOW_SECONDS
            if isinstance(self._now, Exception):
                raise self._now
            return self._now

    def document(self) -> tuple[str, str]:
        """Return the version of the run's document, and the document as JSON.

        Raises:
            ValueError: a record cannot be read.
            OSError: a file cannot be read.
        """
        with self._document_lock:
            # Once all have finished nobody is disturbed any more, and open pages should show the end.
            if self._clock() >= self._document_until or self._complete:
                self._update_document()
            return self._version, self._document

    def _update_document(self) -> None:
        if self._document and self._follower.version == self._follower.written:
            return
        with _short_switch_interval():
            history = self._follower.advance()
            began = time.thread_time()
            document = run_document(history)
            self._version = f"{self._started}-{self._follower.version}"
            self._document = encoded_json({"version": self._version, **document})
        took = time.thread_time() - began
        self._document_until = self._clock() + max(_DOCUMENT_SECONDS, _PAUSE_FACTOR * took)

    def _state_now(self, state: pb.Run) -> dict[str, Any]:
        return {
            "version": f"{self._started}-{self._follower.written}",
            "complete": state.complete,
            "ending": self._ending,
            "steps_trained": state.steps_trained,
            "total_steps": state.total_steps,
            "frontier": state.frontier,
            "total_rounds": state.total_rounds,
            "rounds_per_second": state.rounds_per_second,
            "ensemble_accuracy": state.ensemble_accuracy if state.HasField("ensemble_accuracy") else None,
            "waiting": {"participants": list(state.waiting_for), "seconds": seconds(state.waiting_time)},
            "participants": [_participant(participant) for participant in state.participants],
            "events": [
                {
                    "time": event.time.seconds + event.time.nanos / 1e9,
                    "what": word(pb.EventKind, event.kind),
                    "participant": event.participant,
                    "message": event.message,
                }
                for event in state.events[-_EVENTS:]
            ],
        }


def _participant(participant: pb.ParticipantStatus) -> dict[str, Any]:
    return {
        "name": participant.name,
        "role": word(pb.Role, participant.role),
        "state": word(pb.ParticipantState, participant.state),
        "awaited": participant.awaited,
        "steps_trained": participant.steps_trained,
        "epochs_trained": participant.epochs_trained,
        "train_accuracy": _accuracy(participant, pb.SPLIT_TRAIN),
        "test_accuracy": _accuracy(participant, pb.SPLIT_TEST),
        "step_seconds": seconds(participant.step_time) if participant.HasField("step_time") else None,
        "wait_seconds": seconds(participant.wait_time) if participant.HasField("wait_time") else None,
        "missed_rounds": participant.missed_rounds,
        "joins": participant.joins,
    }


def _accuracy(participant: pb.ParticipantStatus, split: pb.Split.ValueType) -> float | None:
    return next((measured.accuracy for measured in participant.measurements if measured.split == split), None)


@contextmanager
def _short_switch_interval() -> Generator[None]:
    """Let other threads run after half a millisecond instead of five, so that the rounds' event loop need not wait."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
