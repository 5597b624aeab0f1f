from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from codistill.v1 import distillation_pb2 as pb
from codistill.wire.times import LONGEST, duration, seconds
from codistill_server.rounds.actions import Status
from codistill_server.rounds.machine import ParticipantState
from server.support import TOTAL_ROUNDS, TOTAL_STEPS, Run, independent_experiment, make_experiment, refused


class TestReports:
    def test_measurements_reach_the_run_state(self, run: Run) -> None:
        measured = pb.Measurement(split=pb.SPLIT_TEST, steps_trained=3, accuracy=0.5, loss=1.25)
        times = {"step_time": duration(0.5), "wait_time": duration(0.1)}
        run.report("ant", steps_trained=4, epochs_trained=4 / 3, round=4, measurements=[measured], **times)
        (participant, _) = run.coordinator.snapshot().participants
        assert (participant.steps_trained, participant.epochs_trained, participant.round) == (4, 4 / 3, 4)
        assert list(participant.measurements) == [measured]
        assert (seconds(participant.step_time), seconds(participant.wait_time)) == (0.5, 0.1)

    @pytest.mark.parametrize(
        ("fields", "part"),
        [
            ({"round": TOTAL_ROUNDS + 1}, f"round: {TOTAL_ROUNDS + 1} is not allowed; allowed: 0 to ROUNDS"),
            ({"durable_round": 2**64 - 1}, "durable_round: 18446744073709551615 is not allowed; allowed: 0 to 0"),
            (
                {"steps_trained": TOTAL_STEPS + 1},
                f"steps_trained: {TOTAL_STEPS + 1} is not allowed; allowed: 0 to {TOTAL_STEPS}",
            ),
            ({"epochs_trained": float("nan")}, "epochs_trained: nan"),
            ({"epochs_trained": -0.5}, "epochs_trained: -0.5 is not allowed; allowed are 0 and above"),
            (
                {"step_time": Duration(seconds=-1)},
                "step_time: -1 s and 0 ns is not allowed; allowed: 0 to 315576000000 s, with 0 to 999999999 ns",
            ),
            ({"step_time": Duration(nanos=-1)}, "step_time: 0 s and -1 ns"),
            ({"wait_time": Duration(nanos=10**9)}, "wait_time: 0 s and 1000000000 ns"),
            ({"wait_time": Duration(seconds=2**62)}, f"wait_time: {2**62} s and 0 ns"),
            ({"measurements": [pb.Measurement(accuracy=0.5)]}, "measurements.0.split: 0"),
            ({"measurements": [pb.Measurement(split=pb.SPLIT_TEST, accuracy=1.5)]}, "measurements.0.accuracy: 1.5"),
            ({"measurements": [pb.Measurement(split=pb.SPLIT_TEST, accuracy=float("nan"))]}, "accuracy: nan"),
            ({"measurements": [pb.Measurement(split=pb.SPLIT_TEST, loss=float("nan"))]}, "loss: nan"),
            (
                {"measurements": [pb.Measurement(split=pb.SPLIT_TEST, distillation_loss=float("inf"))]},
                "measurements.0.distillation_loss: inf",
            ),
            (
                {"measurements": [pb.Measurement(split=pb.SPLIT_TEST, steps_trained=999)]},
                "measurements.0.steps_trained: 999",
            ),
        ],
    )
    @pytest.mark.parametrize("exchanging", [True, False])
    def test_values_that_cannot_be_are_refused(self, exchanging: bool, fields: dict[str, Any], part: str) -> None:
        run = Run(make_experiment() if exchanging else independent_experiment())
        run.join("ant")
        error = refused(lambda: run.report("ant", **fields))
        assert error.status is Status.INVALID_ARGUMENT
        assert part.replace("ROUNDS", str(TOTAL_ROUNDS if exchanging else 0)) in str(error)
        assert run.coordinator.snapshot().participants[0].steps_trained == 0
        assert run.coordinator.states["ant"] is ParticipantState.CONNECTED
        run.report("ant", steps_trained=1, round=int(exchanging), durable_round=int(exchanging))

    def test_no_round_is_durable_that_is_not_reached(self, run: Run) -> None:
        error = refused(lambda: run.report("ant", round=3, durable_round=4))
        assert error.status is Status.INVALID_ARGUMENT
        assert str(error) == "durable_round: 4 is not allowed; allowed: 0 to 3"
        run.report("ant", round=3, durable_round=3)

    def test_the_longest_durations_are_taken(self, run: Run) -> None:
        longest = Duration(seconds=LONGEST, nanos=999_999_999)
        run.report("ant", step_time=longest, wait_time=longest)
        (participant, _) = run.coordinator.snapshot().participants
        assert participant.step_time == participant.wait_time == longest

    def test_a_session_that_is_over_reports_nothing(self, run: Run) -> None:
        session_id = run.session_ids["ant"]
        run.join("ant")
        error = refused(lambda: run.coordinator.report(pb.ReportRequest(session_id=session_id, round=2)))
        assert error.status is Status.ABORTED

    def test_rounds_that_nobody_needs_are_forgotten(self, run: Run) -> None:
        for number in range(6):
            run.close_round(number)
        run.report("ant", round=6, durable_round=5)
        assert run.journal.restore().oldest == 0
        run.report("bee", round=6, durable_round=3)
        assert run.journal.restore().oldest == 3
        error = refused(lambda: run.contribute("bee", 2))
        assert error.status is Status.FAILED_PRECONDITION
        assert "keeps rounds from 3 on" in str(error)
        error = refused(lambda: run.join("bee", 1))
        assert "keeps rounds from 3 on" in str(error)
        run.join("bee", 3)

    def test_a_journal_that_keeps_all_forgets_nothing(self) -> None:
        run = Run(make_experiment(exchange={"journal": {"keep": "all"}}))
        run.join_all()
        for number in range(6):
            run.close_round(number)
        for participant in run.experiment.names:
            run.report(participant, round=6, durable_round=6)
        assert run.journal.restore().oldest == 0
