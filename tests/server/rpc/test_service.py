from __future__ import annotations

import asyncio
from typing import ClassVar

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from codistill.config.fingerprint import identity
from codistill.methods.aggregator import LOGITS, RoundInputs, Targets
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import duration, seconds
from codistill_server import methods
from codistill_server.storage.journal import ClosedRound, Journal, JournalError
from server.rpc.support import PATIENCE, Participant, drive, error_of, returning, serving, until
from server.support import join_request, make_experiment


class TestRounds:
    def test_eight_participants_get_the_same_bytes(self) -> None:
        async def test() -> None:
            async with serving(make_experiment([f"s{number}" for number in range(8)])) as served:
                participants = await served.participants()
                for number in range(12):
                    await asyncio.gather(*(participant.send(number) for participant in participants))
                    answers = await asyncio.gather(*(participant.answer() for participant in participants))
                    assert len(set(answers)) == 1
                    assert pb.ExchangeResponse.FromString(answers[0]).targets.round == number
                assert served.coordinator.frontier == 12

        drive(test)

    def test_a_participant_that_comes_back_is_answered_from_the_journal(self) -> None:
        async def test() -> None:
            async with serving() as served:
                ant, bee = await served.participants()
                answers: list[bytes] = []
                for number in range(7):
                    await asyncio.gather(ant.send(number), bee.send(number))
                    answers.append(await ant.answer())
                ant.call.cancel()
                await until(lambda: served.states["ant"] == "disconnected")
                again = Participant(served, "ant")
                await again.start(2)
                for number in range(2, 7):
                    await again.send(number)
                assert [await again.answer() for _ in range(5)] == answers[2:]

        drive(test)

    def test_who_waits_is_told_whom_for(self) -> None:
        async def test() -> None:
            async with serving(make_experiment(exchange={"waiting_notice": 0.3})) as served:
                ant, bee = await served.participants()
                await ant.send(0)
                raw = await ant.call.read()
                waiting = pb.ExchangeResponse.FromString(raw).waiting
                assert (waiting.round, list(waiting.participants)) == (0, ["bee"])
                assert seconds(waiting.elapsed) >= 0.3
                run = (await served.stub.GetRun(pb.GetRunRequest())).run
                assert list(run.waiting_for) == ["bee"]
                await bee.send(0)
                assert await ant.answer() == await bee.answer()

        drive(test)

    def test_a_participant_that_finished_is_reported_and_completes_the_run(self) -> None:
        async def test() -> None:
            async with serving(make_experiment()) as served:
                ant, bee = await served.participants()
                await served.stub.Report(pb.ReportRequest(session_id=ant.session_id, round=3, epochs_trained=1))
                run = (await served.stub.GetRun(pb.GetRunRequest())).run
                assert [(participant.name, participant.round) for participant in run.participants] == [
                    ("ant", 3),
                    ("bee", 0),
                ]
                await served.close_rounds((ant, bee))
                for participant in (ant, bee):
                    assert not served.coordinator.complete
                    leave = pb.LeaveRequest(session_id=participant.session_id, reason=pb.LEAVE_REASON_FINISHED)
                    await served.stub.Leave(leave)
                    participant.call.cancel()
                assert served.coordinator.complete

        drive(test)


class TestWatchRun:
    @pytest.mark.parametrize(
        ("interval", "shown"),
        [
            (Duration(), "0.0"),
            (Duration(nanos=99_999_999), "0.099999999"),
            (Duration(seconds=60, nanos=1), "60.000000001"),
            (Duration(seconds=61), "61.0"),
            (Duration(seconds=-1), "-1.0"),
            (Duration(nanos=-1), "-1e-09"),
            (Duration(seconds=1, nanos=-1), "0.999999999"),
            (Duration(nanos=2 * 10**9), "2.0"),
            (Duration(seconds=2**62), str(float(2**62))),
        ],
    )
    def test_an_interval_that_is_not_allowed(self, interval: Duration, shown: str) -> None:
        async def test() -> None:
            async with serving() as served:
                call = served.stub.WatchRun(pb.WatchRunRequest(interval=interval))
                error = await error_of(call.read())
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert f"interval: {shown} s is not allowed; allowed: 0.1 s to 60 s" in (error.details() or "")

        drive(test)

    @pytest.mark.parametrize("interval", [None, duration(0.1)])
    def test_it_goes_on_until_the_run_is_complete(self, interval: Duration | None) -> None:
        async def test() -> None:
            async with serving() as served:
                call = served.stub.WatchRun(pb.WatchRunRequest(interval=interval))
                assert not (await call.read()).run.complete
                participants = await served.participants()
                await served.close_rounds(participants)
                for participant in participants:
                    await served.stub.Leave(
                        pb.LeaveRequest(session_id=participant.session_id, reason=pb.LEAVE_REASON_FINISHED)
                    )
                async with asyncio.timeout(PATIENCE):
                    states = []
                    while (state := await call.read()) is not grpc.aio.EOF:
                        states.append(state.run.complete)
                assert states[-1]
                assert not any(states[:-1])

        drive(test)

    def test_a_watcher_that_goes_away_is_let_go(self) -> None:
        async def test() -> None:
            async with serving() as served:
                before = len(asyncio.all_tasks())
                calls = [served.stub.WatchRun(pb.WatchRunRequest(interval=duration(0.1))) for _ in range(5)]
                for call in calls:
                    await call.read()
                while calls:
                    calls.pop().cancel()
                await until(lambda: len(asyncio.all_tasks()) <= before)

        drive(test)


class _BrokenJournal(Journal):
    def append(self, closed: ClosedRound) -> None:
        del closed
        raise JournalError("the disk is full")


class TestFaults:
    @pytest.mark.parametrize("ensemble", ["linear", "min_logit"])
    def test_a_round_that_cannot_be_written_ends_the_run(self, ensemble: str) -> None:
        experiment = make_experiment(distillation={"ensemble": ensemble})

        async def test() -> None:
            async with serving(experiment, _BrokenJournal(None, identity(experiment))) as served:
                participants = await served.participants()
                for participant in participants:
                    await participant.send(0)
                await until(lambda: bool(served.failures))
                assert [str(failure) for failure in served.failures] == ["the disk is full"]
                served.service.end()  # as the process does on a failure
                for participant in participants:
                    assert (await participant.ending()).code() is grpc.StatusCode.UNAVAILABLE

        drive(test)

    def test_so_does_one_that_its_deadline_closes(self) -> None:
        """Were the ticks to end unnoticed, no deadline would ever close a round again."""
        experiment = make_experiment(
            distillation={"ensemble": "min_logit"}, exchange={"on_absence": "proceed", "round_deadline": 0.2}
        )

        async def test() -> None:
            async with serving(experiment, _BrokenJournal(None, identity(experiment))) as served:
                first, _ = await served.participants()
                await first.send(0)
                await until(lambda: bool(served.failures))
                assert [str(failure) for failure in served.failures] == ["the disk is full"]
                assert (await first.ending()).code() is grpc.StatusCode.UNAVAILABLE

        drive(test)

    @pytest.mark.parametrize("goes", ["Leave", "Join"])
    def test_so_does_a_fault_in_a_call_that_closes_a_round(self, goes: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The round is half decided; were the server to go on, it would never close."""
        experiment = make_experiment(
            distillation={"ensemble": "min_logit"}, exchange={"on_absence": "proceed", "evict_after": 30}
        )

        async def test() -> None:
            async with serving(experiment) as served:
                first, second = await served.participants()

                def fault(record: object) -> None:
                    raise ZeroDivisionError("a fault of ours")

                monkeypatch.setattr(served.coordinator._journal, "append", fault)
                monkeypatch.setattr(served.coordinator._journal, "remember", fault)
                await first.send(0)
                await until(lambda: served.coordinator.snapshot().waiting_for == ["bee"])
                if goes == "Leave":
                    call = served.stub.Leave(
                        pb.LeaveRequest(session_id=second.session_id, reason=pb.LEAVE_REASON_STOPPED)
                    )
                else:
                    call = served.stub.Join(join_request(experiment, "bee"))
                error = await error_of(call)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert "going down" in (error.details() or "")
                assert [str(failure) for failure in served.failures] == ["a fault of ours"]
                assert (await first.ending()).code() is grpc.StatusCode.UNAVAILABLE

        drive(test)

    @pytest.mark.parametrize("heavy", [True, False])
    def test_so_does_any_other_fault_in_making_targets(self, monkeypatch: pytest.MonkeyPatch, heavy: bool) -> None:
        """Nobody is left to wait for a round that cannot be decided."""

        class Broken:
            student: ClassVar = {"logits": LOGITS}
            teacher: ClassVar = {}

            def __init__(self) -> None:
                self.heavy = heavy

            def targets(self, inputs: RoundInputs) -> Targets:
                del inputs
                raise ZeroDivisionError("a fault of the method")

        monkeypatch.setattr(methods, "create", returning(Broken()))

        async def test() -> None:
            async with serving() as served:
                for participant in await served.participants():
                    await participant.send(0)
                await until(lambda: bool(served.failures))
                assert [type(failure) for failure in served.failures] == [ZeroDivisionError]

        drive(test)

    def test_a_journal_that_fails_at_a_join(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(record: object) -> None:
            raise JournalError("the disk is full")

        async def test() -> None:
            async with serving() as served:
                monkeypatch.setattr(served.coordinator._journal, "remember", full)
                error = await error_of(served.stub.Join(join_request(served.experiment, "ant")))
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert "the disk is full" in (error.details() or "")
                assert [str(failure) for failure in served.failures] == ["the disk is full"]

        drive(test)
