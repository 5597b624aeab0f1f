from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from codistill import PROTOCOL_VERSION
from codistill.config.fingerprint import identity
from codistill.v1 import distillation_pb2 as pb
from codistill_server.rounds.actions import Status
from codistill_server.rounds.machine import ParticipantState
from server.support import (
    TOTAL_ROUNDS,
    Run,
    contribution,
    independent_experiment,
    join_request,
    make_experiment,
    refused,
)


class TestJoin:
    def test_the_session_is_opened_and_told(self) -> None:
        run = Run()
        first, second = run.join("ant"), run.join("bee")
        assert (first.session_id, first.frontier, first.run) == (1, 0, "small")
        assert second.session_id > first.session_id
        assert [event.participant for event in run.events("joined")] == ["ant", "bee"]
        assert run.coordinator.states == {"ant": ParticipantState.CONNECTED, "bee": ParticipantState.CONNECTED}

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"protocol_version": 7}, ["protocol_version", f"server speaks {PROTOCOL_VERSION}", "this worker 7"]),
            ({"participant": "cow"}, ["'cow'", "ant, bee"]),
            ({"experiment": "no JSON"}, ["experiment", "not the JSON"]),
            ({"data__classes": 10}, ["data.classes", "has 3", "worker 10"]),
        ],
    )
    def test_what_differs_from_the_experiment_is_refused(self, changes: dict[str, Any], parts: list[str]) -> None:
        run = Run()
        error = refused(lambda: run.coordinator.join(join_request(run.experiment, "ant", **changes)))
        assert error.status is Status.FAILED_PRECONDITION
        for part in parts:
            assert part in str(error)
        assert run.coordinator.states["ant"] is ParticipantState.EXPECTED
        (event,) = run.events("refused")
        assert event.message == str(error)

    def test_another_experiment_is_refused_by_field_and_both_values(self) -> None:
        run = Run()
        other = identity(make_experiment(seed=5))
        error = refused(lambda: run.join("ant", experiment=other))
        assert error.status is Status.FAILED_PRECONDITION
        assert "experiment field seed: the run has 0, this worker has 5" in str(error)

    def test_operational_differences_are_none_of_the_runs(self) -> None:
        run = Run()
        run.join("ant", experiment=identity(make_experiment(exchange={"give_up_after": 17})))

    @pytest.mark.parametrize(
        "outputs", [{}, {"logits": [4]}, {"logits": [3, 1]}, {"embedding": [8], "logits": [3]}, {"embedding": [3]}]
    )
    def test_other_outputs_are_refused(self, outputs: dict[str, list[int]]) -> None:
        run = Run()
        request = join_request(run.experiment, "ant")
        request.ClearField("outputs")
        for name, dims in outputs.items():
            request.outputs[name].dims.extend(dims)
        error = refused(lambda: run.coordinator.join(request))
        assert error.status is Status.FAILED_PRECONDITION
        assert str(outputs) in str(error)
        assert "{'logits': [3]}" in str(error)

    @pytest.mark.parametrize(
        ("changes", "field", "values"),
        [
            ({"data__digest": "f" * 64}, "data.digest", ("0" * 64, "f" * 64)),
            ({"data__train_samples": 13}, "data.train_samples", ("12", "13")),
            ({"total_rounds": 99}, "total_rounds", (str(TOTAL_ROUNDS), "99")),
        ],
    )
    def test_other_data_than_the_first_workers_are_refused(
        self, tmp_path: Path, changes: dict[str, Any], field: str, values: tuple[str, str]
    ) -> None:
        run = Run(path=tmp_path / "journal.sqlite")
        run.join("ant")
        for _ in range(2):  # the server that comes after this one holds to them too
            error = refused(partial(run.join, "bee", **changes))
            assert error.status is Status.FAILED_PRECONDITION
            assert f"{field}: the run has {values[0]}, this worker {values[1]};" in str(error)
            run.coordinator.close()
            run = Run(path=tmp_path / "journal.sqlite")
        run.join("bee")
        run.coordinator.close()

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"total_rounds": 2**53 + 1}, f"total_rounds: {2**53 + 1} is not allowed; allowed are at most {2**53}"),
            (
                {"first_round": TOTAL_ROUNDS + 1},
                f"first_round: {TOTAL_ROUNDS + 1} is not allowed; allowed: 0 to total_rounds, {TOTAL_ROUNDS}",
            ),
        ],
    )
    @pytest.mark.parametrize("exchanging", [True, False])
    def test_rounds_that_no_journal_can_hold_are_refused(
        self, changes: dict[str, int], text: str, exchanging: bool
    ) -> None:
        run = Run(make_experiment() if exchanging else independent_experiment())
        error = refused(lambda: run.join("ant", **changes))
        assert (error.status, str(error)) == (Status.INVALID_ARGUMENT, text)

    def test_what_workers_write_is_short_and_does_nothing_to_a_terminal(self) -> None:
        """GetRun sends the last 200 events together, which a client must be able to receive."""
        run = Run()
        run.join("ant", device="cuda\x1b[2J\n" + "x" * 60_000)
        error = refused(lambda: run.join("bee", data__digest="\x1b[2J\n" + "d" * 60))
        run.leave("ant", pb.LEAVE_REASON_FAILED, "out of\nmemory\x07")
        assert str(error).isprintable()
        snapshot = run.coordinator.snapshot()
        assert snapshot.ByteSize() < 3000
        assert snapshot.students[0].device.startswith("cuda\\x1b[2J\\nxxx")
        assert all(event.message.isprintable() for event in snapshot.events)
        assert snapshot.events[-1].message == "out of\\nmemory\\x07"

    def test_a_worker_that_is_refused_settles_nothing(self) -> None:
        """One that comes with the checkpoint of another run must not lock out this run's workers."""
        run = Run()
        error = refused(lambda: run.join("ant", 5, data__digest="f" * 64))
        assert "journal ends at round 0" in str(error)
        run.join_all()

    def test_a_long_refusal_is_cut(self) -> None:
        run = Run()
        error = refused(lambda: run.join("é" * 50_000))
        assert len(str(error)) == 500
        assert str(error).endswith("...")
        assert len(run.events("refused")[0].message) == 500

    def test_without_an_exchange_outputs_and_first_rounds_are_free(self) -> None:
        run = Run(independent_experiment())
        run.join("ant", 7)
        assert run.coordinator.snapshot().participants[0].round == 7

    def test_a_newer_worker_supersedes_the_older(self, run: Run) -> None:
        older, session_id = run.inboxes["ant"], run.session_ids["ant"]
        run.join("ant")
        assert older.ended is not None
        status, message = older.ended
        assert status is Status.SUPERSEDED
        assert "newer worker of participant 'ant'" in message
        assert [event.participant for event in run.events("superseded")] == ["ant"]
        late = contribution(run.experiment, "ant", 0)
        assert refused(lambda: run.coordinator.contribute(session_id, late, 0)).status is Status.ABORTED
        run.coordinator.close_stream(session_id, older)
        assert run.coordinator.states["ant"] is ParticipantState.CONNECTED
        run.close_round(0)
        assert older.raw == []
