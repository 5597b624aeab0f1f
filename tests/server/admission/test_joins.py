from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from codistill import PROTOCOL_VERSION
from codistill.config.fingerprint import identity, identity_sha256
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.words import word
from codistill_server.rounds.actions import Status
from codistill_server.rounds.machine import ParticipantState
from server.support import (
    BATCH,
    EPOCHS,
    STEPS_PER_EPOCH,
    TOTAL_ROUNDS,
    TOTAL_STEPS,
    Run,
    contribution,
    independent_experiment,
    join_request,
    make_experiment,
    refused,
)

SAMPLES = f"allowed: {BATCH}, one batch, to {2**53 // EPOCHS}"
STEPS = f"allowed: {TOTAL_STEPS}, {EPOCHS} epochs of {STEPS_PER_EPOCH} steps"


class TestJoin:
    def test_the_session_is_opened_and_told(self) -> None:
        run = Run()
        first, second = run.join("ant"), run.join("bee")
        assert (first.session_id, first.frontier, first.run) == (1, 0, "small")
        assert (first.lane, first.encoding) == (pb.LANE_GRPC, pb.ENCODING_DENSE)
        assert second.session_id > first.session_id
        assert [event.participant for event in run.events("joined")] == ["ant", "bee"]
        assert run.coordinator.states == {"ant": ParticipantState.CONNECTED, "bee": ParticipantState.CONNECTED}

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"protocol_version": 7}, ["protocol_version", f"server speaks {PROTOCOL_VERSION}", "this worker 7"]),
            ({"participant": "cow"}, ["'cow'", "ant, bee"]),
            ({"experiment_sha256": bytes(32), "experiment_json": "no JSON"}, ["experiment", "not the JSON"]),
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
        other = make_experiment(seed=5)
        error = refused(
            lambda: run.join("ant", experiment_sha256=identity_sha256(other), experiment_json=identity(other))
        )
        assert error.status is Status.FAILED_PRECONDITION
        assert "experiment field seed: the run has 0, this worker has 5" in str(error)

    @pytest.mark.parametrize("digest", [b"\x05" * 32, b"\x05" * 5, b""])
    def test_another_experiment_without_its_json_is_refused_by_both_digests(self, digest: bytes) -> None:
        run = Run()
        error = refused(lambda: run.join("ant", experiment_sha256=digest, experiment_json=""))
        assert error.status is Status.FAILED_PRECONDITION
        ours, theirs = identity_sha256(run.experiment).hex(), digest.hex() or "none"
        assert f"experiment_sha256: the run has {ours}, this worker {theirs}; " in str(error)

    @pytest.mark.parametrize("text", ["", "no JSON", "{}"])
    def test_the_digest_alone_decides_whether_the_experiment_is_the_same(self, text: str) -> None:
        Run().join("ant", experiment_json=text)
        error = refused(lambda: Run().join("ant", experiment_sha256=bytes(32)))
        assert "experiment_sha256: the run has " in str(error), "the JSON is the same, so the digests are named"

    def test_operational_differences_are_none_of_the_runs(self) -> None:
        run = Run()
        other = make_experiment(exchange={"give_up_after": 17})
        run.join("ant", experiment_sha256=identity_sha256(other), experiment_json=identity(other))

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
            ({"data__data_sha256": b"\xff" * 32}, "data.data_sha256", ("00" * 32, "ff" * 32)),
            ({"data__data_sha256": b""}, "data.data_sha256", ("00" * 32, "none")),
            ({"data__train_samples": 13}, "data.train_samples", ("12", "13")),
            ({"data__train_samples": 15}, "data.train_samples", ("12", "15")),
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
            ({"data__train_samples": 0}, f"data.train_samples: 0 is not allowed; {SAMPLES}"),
            ({"data__train_samples": BATCH - 1}, f"data.train_samples: {BATCH - 1} is not allowed; {SAMPLES}"),
            ({"data__train_samples": 2**53}, f"data.train_samples: {2**53} is not allowed; {SAMPLES}"),
            ({"data__train_samples": 2**64 - 1}, f"data.train_samples: {2**64 - 1} is not allowed; {SAMPLES}"),
            ({"total_steps": 0}, f"total_steps: 0 is not allowed; {STEPS}"),
            ({"total_steps": TOTAL_STEPS - 1}, f"total_steps: {TOTAL_STEPS - 1} is not allowed; {STEPS}"),
            ({"total_steps": 99}, f"total_steps: 99 is not allowed; {STEPS}"),
            ({"total_steps": 2**53 + 1}, f"total_steps: {2**53 + 1} is not allowed; {STEPS}"),
            (
                {"steps_trained": TOTAL_STEPS + 1},
                f"steps_trained: {TOTAL_STEPS + 1} is not allowed; allowed: 0 to {TOTAL_STEPS}",
            ),
            (
                {"first_round": TOTAL_ROUNDS + 1},
                f"first_round: {TOTAL_ROUNDS + 1} is not allowed; allowed: 0 to LENGTH",
            ),
            (
                {"total_rounds": TOTAL_ROUNDS + 1},
                f"total_rounds: {TOTAL_ROUNDS + 1} is not allowed; allowed: LENGTH, as many of the {TOTAL_STEPS} steps exchange",
            ),
            (
                {"total_rounds": 2**53 + 1},
                f"total_rounds: {2**53 + 1} is not allowed; allowed: LENGTH, as many of the {TOTAL_STEPS} steps exchange",
            ),
        ],
    )
    @pytest.mark.parametrize("exchanging", [True, False])
    def test_lengths_that_cannot_be_are_refused(self, changes: dict[str, int], text: str, exchanging: bool) -> None:
        run = Run(make_experiment() if exchanging else independent_experiment())
        error = refused(lambda: run.join("ant", **changes))
        allowed = text.replace("LENGTH", str(TOTAL_ROUNDS if exchanging else 0))
        assert (error.status, str(error)) == (Status.INVALID_ARGUMENT, allowed)
        assert run.coordinator.snapshot().total_steps == 0, "nothing is settled"

    @pytest.mark.parametrize("samples", [BATCH, BATCH + 1, 2**53 // EPOCHS])
    @pytest.mark.parametrize("exchanging", [True, False])
    def test_the_length_is_that_of_whole_batches(self, samples: int, exchanging: bool) -> None:
        run = Run(make_experiment() if exchanging else independent_experiment())
        run.join("ant", data__train_samples=samples)
        snapshot, steps = run.coordinator.snapshot(), EPOCHS * (samples // BATCH)
        assert (snapshot.total_steps, snapshot.total_rounds) == (steps, steps if exchanging else 0)

    @pytest.mark.parametrize("rounds", [0, 4, 6, TOTAL_STEPS])
    def test_the_number_of_rounds_follows_from_the_steps_that_exchange(self, rounds: int) -> None:
        run = Run(make_experiment(distillation={"method": "cross_architecture", "start_epoch": 1, "every": 2}))
        error = refused(lambda: run.join("ant", total_rounds=rounds))
        assert (error.status, str(error)) == (
            Status.INVALID_ARGUMENT,
            f"total_rounds: {rounds} is not allowed; allowed: 5, as many of the {TOTAL_STEPS} steps exchange",
        )
        run.join("ant", total_rounds=5)

    @pytest.mark.parametrize(
        ("field", "enum", "taken", "other"),
        [
            ("lanes", pb.Lane, pb.LANE_GRPC, pb.LANE_SHARED_MEMORY),
            ("encodings", pb.Encoding, pb.ENCODING_DENSE, pb.ENCODING_TOP_K),
        ],
    )
    def test_one_way_of_exchange_is_taken_of_those_offered(self, field: str, enum: Any, taken: int, other: int) -> None:
        run = Run()
        for offered in ([other], [other, 0], [77]):
            error = refused(partial(run.join, "ant", **{field: list(offered)}))
            assert error.status is Status.FAILED_PRECONDITION
            names = ", ".join(f"{number} ({word(enum, number)})" for number in offered)
            assert str(error) == f"{field}: {names}; allowed: {taken} ({word(enum, taken)}), or none given"
            assert f"({word(enum, other)})" in str(error) or other not in offered
        offers: list[list[int]] = [[], [taken], [other, taken], [77, taken]]
        for offered in offers:
            response = run.join("ant", **{field: list(offered)})
            assert (response.lane, response.encoding) == (pb.LANE_GRPC, pb.ENCODING_DENSE)

    def test_what_workers_write_is_short_and_does_nothing_to_a_terminal(self) -> None:
        """GetRun sends the last 200 events together, which a client must be able to receive."""
        run = Run()
        run.join("ant", device="cuda\x1b[2J\n" + "x" * 60_000)
        error = refused(lambda: run.join("bee", participant="\x1b[2J\n" + "d" * 60))
        run.leave("ant", pb.LEAVE_REASON_FAILED, "out of\nmemory\x07")
        assert str(error).isprintable()
        snapshot = run.coordinator.snapshot()
        assert snapshot.ByteSize() < 3000
        assert snapshot.participants[0].device.startswith("cuda\\x1b[2J\\nxxx")
        assert all(event.message.isprintable() for event in snapshot.events)
        assert snapshot.events[-1].message == "out of\\nmemory\\x07"

    def test_a_worker_that_is_refused_settles_nothing(self) -> None:
        """One that comes with the checkpoint of another run must not lock out this run's workers."""
        run = Run()
        error = refused(lambda: run.join("ant", 5, data__data_sha256=b"\xff" * 32))
        assert "journal ends at round 0" in str(error)
        run.join_all()

    def test_a_long_refusal_is_cut(self) -> None:
        run = Run()
        error = refused(lambda: run.join("é" * 50_000))
        assert len(str(error)) == 500
        assert str(error).endswith("...")
        assert len(run.events("refused")[0].message) == 500

    def test_without_an_exchange_outputs_are_free_and_only_steps_count(self) -> None:
        run = Run(independent_experiment())
        run.join("ant", steps_trained=7, outputs={"embedding": [8]})
        snapshot = run.coordinator.snapshot()
        assert (snapshot.participants[0].steps_trained, snapshot.participants[0].round) == (7, 0)
        assert (snapshot.total_steps, snapshot.total_rounds) == (TOTAL_STEPS, 0)

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
