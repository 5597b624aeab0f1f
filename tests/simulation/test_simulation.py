"""Five hundred seeds of the simulated cluster; and bugs planted in it, each of which it must find."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from codistill.peer.session import Session, _Leave, _Receive
from codistill.v1 import distillation_pb2 as pb
from codistill_server import coordinator as coordinator_module
from codistill_server.coordinator import Coordinator
from codistill_server.rounds.actions import Action, Decide, End
from codistill_server.rounds.events import Join, Leave, LeaveReason, Restored
from codistill_server.rounds.machine import Rounds
from codistill_server.storage.journal import ClosedRound
from simulation.cluster import Outcome, Plant, simulate
from simulation.model import GoingOn
from simulation.server import DiskJournal
from simulation.worker import Store

BATCH = 25
SEEDS = 500


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny: more threads would only be in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def describe(outcome: Outcome) -> str:
    return f"seed {outcome.seed}: {outcome.violation}\nreplay: python tests/simulation/replay.py {outcome.seed} --trace"


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_all_invariants_hold(first: int) -> None:
    for seed in range(first, first + BATCH):
        outcome = simulate(seed)
        assert outcome.violation is None, describe(outcome)


def test_a_seed_is_always_the_same_run() -> None:
    for seed in (3, 14, 159):
        traces: list[list[str]] = [[], []]
        for trace in traces:
            simulate(seed, trace=trace.append)
        assert traces[0] == traces[1]
        assert len(traces[0]) > 20


def test_every_kind_of_fault_is_injected_and_every_ending_met() -> None:
    outcomes = [simulate(seed) for seed in range(60)]
    faults = {what for outcome in outcomes for what in outcome.faults}
    assert faults >= {
        "another process of a student",
        "call doubled",
        "checkpoint torn",
        "delayed",
        "link cut",
        "message damaged",
        "message doubled",
        "message overtook",
        "message swallowed",
        "reply lost",
        "request lost",
        "server asked to end",
        "server killed",
        "server killed in the act",
        "server killed with its machine",
        "server stopped and continued",
        "stream broken",
        "stream dead and unnoticed",
        "stream half-open downwards",
        "stream half-open upwards",
        "worker asked to stop",
        "worker killed",
        "worker killed with its machine",
        "worker stopped and continued",
    }
    endings = {code for outcome in outcomes for code in outcome.endings}
    assert endings >= {"OK", "SUPERSEDED", "UNREACHABLE", "INTERRUPTED"}


def test_the_ledger_of_runs_that_go_on_without_somebody_holds_where_nobody_is_missing() -> None:
    for seed in range(20):
        outcome = simulate(seed, Plant(ledger=GoingOn, proceed=False))
        assert outcome.violation is None, describe(outcome)


# --- bugs that it must find


class AnswersBeforeJournalling(DiskJournal):
    def append(self, closed: ClosedRound) -> None:
        self.cluster.kernel.after(0.01, lambda: DiskJournal.append(self, closed))


class LosesTheNewestRound(DiskJournal):
    """The effect of a machine's power cut on a file that was never synced."""

    def restore(self) -> Restored:
        database: sqlite3.Connection = self._database
        ((newest,),) = database.execute("SELECT max(round) FROM rounds").fetchall()
        database.execute("DELETE FROM rounds WHERE round = ?", (newest,))
        database.execute("DELETE FROM targets WHERE round = ?", (newest,))
        return super().restore()


class ForgetsParticipants(DiskJournal):
    def remember(self, record: Any) -> None:
        """Sessions begin at 1 again after a restart."""


class LosesTheMethodsState(DiskJournal):
    def last_state(self) -> bytes:
        return b""


class ReducesInOrderOfArrival(Coordinator):
    def _decide(self, decide: Decide) -> None:
        order = sorted(decide.contributions, key=lambda name: decide.arrived[name])
        contributions = {name: decide.contributions[name] for name in order}
        super()._decide(replace(decide, contributions=contributions))


class DoesNotWait(Coordinator):
    """Closes the open round without the last student."""

    def _decide(self, decide: Decide) -> None:
        kept = list(decide.contributions)[:-1]
        super()._decide(replace(decide, contributions={name: decide.contributions[name] for name in kept}))


class GivesTargetsBelowTheQuorum(Coordinator):
    def _decide(self, decide: Decide) -> None:
        super()._decide(replace(decide, targets=True))


class LeavesSomebodyOut(Coordinator):
    """Closes a round as if the last who is there were skipped."""

    def _decide(self, decide: Decide) -> None:
        names = list(decide.contributions)
        kept = names[:-1] if len(names) > 2 else names
        super()._decide(replace(decide, contributions={name: decide.contributions[name] for name in kept}))


class TakesEveryEndForTheLast(Coordinator):
    """A participant that stops has finished, wherever it was."""

    def leave(self, request: pb.LeaveRequest) -> None:
        if request.reason == pb.LEAVE_REASON_STOPPED:
            self._process(Leave(request.session_id, LeaveReason.FINISHED)).raise_if_rejected()
        else:
            super().leave(request)


class KeepsBothSessions(Rounds):
    def _join(self, event: Join, now: float) -> list[Action]:
        self._session_of.pop(event.participant, None)
        return super()._join(event, now)

    def _forget_session(self, session_id: int, state: Any) -> None:
        participant = self._sessions.get(session_id)
        if participant is not None:
            self._session_of.setdefault(participant, session_id)
        super()._forget_session(session_id, state)


class SupersedesNobody(Rounds):
    """The older session's stream is left open."""

    def _join(self, event: Join, now: float) -> list[Action]:
        return [action for action in super()._join(event, now) if not isinstance(action, End)]


def with_rounds(rounds: type[Rounds]) -> Any:
    def make(*arguments: Any) -> Coordinator:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coordinator_module, "Rounds", rounds)
            return Coordinator(*arguments)

    return make


class TakesAnyRound(Session):
    def targets(self, round_number: int, now: float) -> bool:
        goal = self._goal
        super().targets(goal.round_number if isinstance(goal, _Receive) else round_number, now)
        return True


class WaitsForEver(Session):
    def silence(self, now: float) -> None:
        pass


class SendsNothingAgain(Session):
    def joined(self, session_id: int) -> None:
        super().joined(session_id)
        if self._open is not None:
            self._open = replace(self._open, sent=True)


class AsksFromTheStart(Session):
    def reached(self, round_number: int) -> None:
        pass


class ComesBackWhenSuperseded(Session):
    def broke(self, failure: Any, now: float) -> None:
        super().broke(type(failure)(failure.code, failure.details), now)


class TakesAnEndForARefusal(Session):
    def broke(self, failure: Any, now: float) -> None:
        if failure.code == "ABORTED":
            failure = type(failure)("FAILED_PRECONDITION", failure.details, failure.superseded)
        super().broke(failure, now)


class LeavesOnce(Session):
    def leave_failed(self, failure: Any, now: float) -> None:
        assert isinstance(self._goal, _Leave)
        self._goal = replace(self._goal, finished=False)
        super().leave_failed(failure, now)


class StaysOnASilentStream(Session):
    def silence(self, now: float) -> None:
        if isinstance(self._goal, _Receive):
            self._goal = replace(self._goal, heard_at=now)
        super().silence(now)


class CallsTheNewestDurable(Store):
    @property
    def durable_step(self) -> int:
        return self._steps[-1] if self._steps else 0


class OverwritesLaterOnes(Store):
    def save(self, step: int, state: bytes) -> bool:
        self.disk.previous, self.disk.newest, self.disk.torn = self.disk.newest, (step, state), False
        self._steps = [*self._steps[-1:], step]
        return True


PLANTS: Mapping[str, tuple[Plant, str]] = {
    "answers before journalling": (Plant(journal=AnswersBeforeJournalling), "not journalled|not in the journal"),
    "a journal that loses a round": (Plant(journal=LosesTheNewestRound), "decided a second time|REFUSED"),
    "a journal that loses the participants": (Plant(journal=ForgetsParticipants), "is not newer than"),
    "a journal that loses the method's state": (Plant(journal=LosesTheMethodsState), "not those of the expected"),
    "reduces in order of arrival": (Plant(coordinator=ReducesInOrderOfArrival), "not those of the expected"),
    "does not wait for all": (Plant(coordinator=DoesNotWait), "not those of the expected"),
    "gives targets below the quorum": (
        Plant(coordinator=GivesTargetsBelowTheQuorum, proceed=True),
        "not those of the con",
    ),
    "leaves somebody out": (Plant(coordinator=LeavesSomebodyOut, proceed=True), "not those of the contributions"),
    "takes every end for the last": (Plant(coordinator=TakesEveryEndForTheLast), "has finished with"),
    "two sessions of one participant": (Plant(coordinator=with_rounds(KeepsBothSessions)), "the server holds"),
    "an older stream is left open": (Plant(coordinator=with_rounds(SupersedesNobody)), "the server holds"),
    "takes the targets of any round": (Plant(session=TakesAnyRound), "other targets|not journalled"),
    "waits for ever": (Plant(session=WaitsForEver), "waits in receive"),
    "sends nothing again": (Plant(session=SendsNothingAgain), "not complete|GAVE_UP"),
    "asks for rounds from the start": (Plant(session=AsksFromTheStart), "REFUSED"),
    "comes back when superseded": (Plant(session=ComesBackWhenSuperseded), "joins again although"),
    "takes an end for a refusal": (Plant(session=TakesAnEndForARefusal), "REFUSED"),
    "leaves once": (Plant(session=LeavesOnce), "not complete"),
    "stays on a silent stream": (Plant(session=StaysOnASilentStream), "not complete|GAVE_UP"),
    "calls the newest checkpoint durable": (Plant(store=CallsTheNewestDurable), "REFUSED"),
    "overwrites later checkpoints": (Plant(store=OverwritesLaterOnes), "what .* has saved is not the end|REFUSED"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_it_finds_a_planted_bug(name: str) -> None:
    plant, expected = PLANTS[name]
    plant = replace(plant, proceed=bool(plant.proceed))  # where everybody is waited for, more is forbidden
    for seed in range(400):
        violation = simulate(seed, plant).violation
        if violation is not None:
            assert re.search(expected, violation), f"seed {seed}: {violation}"
            return
    pytest.fail("not found in 400 seeds")
