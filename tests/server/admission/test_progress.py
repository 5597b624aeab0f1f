from __future__ import annotations

from typing import Any

import pytest

from codistill.v1 import distillation_pb2 as pb
from codistill_server.rounds.actions import Status
from codistill_server.rounds.machine import ParticipantState
from server.support import TOTAL_ROUNDS, Run, independent_experiment, make_experiment, refused


class TestReports:
    def test_measurements_reach_the_run_state(self, run: Run) -> None:
        measured = pb.Measurement(split=pb.SPLIT_TEST, round=3, accuracy=0.5, loss=1.25)
        run.report("ant", round=4, epoch=4 / 3, measurements=[measured], step_seconds=0.5, wait_seconds=0.1)
        (participant, _) = run.coordinator.snapshot().participants
        assert participant.round == 4
        assert list(participant.measurements) == [measured]
        assert (participant.step_seconds, participant.wait_seconds) == (0.5, 0.1)

    @pytest.mark.parametrize(
        ("fields", "part"),
        [
            ({"round": TOTAL_ROUNDS + 1}, f"round: {TOTAL_ROUNDS + 1} is not allowed; allowed: 0 to {TOTAL_ROUNDS}"),
            ({"durable_round": 2**64 - 1}, "durable_round: 18446744073709551615"),
            ({"epoch": float("nan")}, "epoch: nan"),
            ({"step_seconds": -1.0}, "step_seconds: -1.0"),
            ({"wait_seconds": float("inf")}, "wait_seconds: inf"),
            ({"measurements": [pb.Measurement(accuracy=0.5)]}, "measurements.0.split: 0"),
            ({"measurements": [pb.Measurement(split=pb.SPLIT_TEST, accuracy=1.5)]}, "measurements.0.accuracy: 1.5"),
            ({"measurements": [pb.Measurement(split=pb.SPLIT_TEST, accuracy=float("nan"))]}, "accuracy: nan"),
            ({"measurements": [pb.Measurement(split=pb.SPLIT_TEST, loss=float("nan"))]}, "loss: nan"),
            (
                {"measurements": [pb.Measurement(split=pb.SPLIT_TEST, distillation_loss=float("inf"))]},
                "measurements.0.distillation_loss: inf",
            ),
            ({"measurements": [pb.Measurement(split=pb.SPLIT_TEST, round=999)]}, "measurements.0.round: 999"),
        ],
    )
    @pytest.mark.parametrize("exchanging", [True, False])
    def test_values_that_cannot_be_are_refused(self, exchanging: bool, fields: dict[str, Any], part: str) -> None:
        run = Run(make_experiment() if exchanging else independent_experiment())
        run.join("ant")
        error = refused(lambda: run.report("ant", **fields))
        assert error.status is Status.INVALID_ARGUMENT
        assert part in str(error)
        assert run.coordinator.states["ant"] is ParticipantState.CONNECTED
        run.report("ant", round=1, durable_round=1)

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
