from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from codistill import PROTOCOL_VERSION
from codistill.distillation import Independent
from codistill.experiment import Experiment
from codistill.identity import identity
from codistill.records import Happened, RoundsClosed
from codistill.tensors import decode, encode
from codistill.v1 import distillation_pb2 as pb
from codistill_server import methods
from codistill_server.contributions import receive_limit
from codistill_server.journal import ClosedRound, Journal, JournalError
from codistill_server.refusals import Refused
from codistill_server.round_events import Presence, Status
from server.support_server import (
    BATCH,
    CLASSES,
    HELD_OUT,
    ROUNDS_PER_EPOCH,
    STUDENTS,
    TOTAL_ROUNDS,
    Inbox,
    Run,
    contribution,
    general_experiment,
    join_request,
    logits_of,
    make_experiment,
    samples,
)


@pytest.fixture
def run() -> Run:
    made = Run()
    made.join_all()
    return made


def refused(call: Callable[[], object]) -> Refused:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value


class TestJoin:
    def test_the_session_is_opened_and_told(self) -> None:
        run = Run()
        first, second = run.join("ant"), run.join("bee")
        assert (first.session, first.frontier, first.run) == (1, 0, "small")
        assert second.session > first.session
        assert [event.student for event in run.events("joined")] == ["ant", "bee"]
        assert run.coordinator.presence == {"ant": Presence.PRESENT, "bee": Presence.PRESENT}

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"protocol_version": 7}, ["protocol_version", f"server speaks {PROTOCOL_VERSION}", "this worker 7"]),
            ({"student": "cow"}, ["'cow'", "ant, bee"]),
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
        assert run.coordinator.presence["ant"] is Presence.EXPECTED
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
        run = Run(make_experiment() if exchanging else _independent())
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
        run = Run(_independent())
        run.join("ant", 7)
        assert run.coordinator.snapshot().students[0].round == 7

    def test_a_newer_worker_supersedes_the_older(self, run: Run) -> None:
        older, session = run.inboxes["ant"], run.sessions["ant"]
        run.join("ant")
        assert older.ended is not None
        status, message = older.ended
        assert status is Status.SUPERSEDED
        assert "newer worker of student 'ant'" in message
        assert [event.student for event in run.events("superseded")] == ["ant"]
        late = contribution(run.experiment, "ant", 0)
        assert refused(lambda: run.coordinator.contribute(session, late, 0)).status is Status.ABORTED
        run.coordinator.close_stream(session, older)
        assert run.coordinator.presence["ant"] is Presence.PRESENT
        run.close_round(0)
        assert older.raw == []


def _independent(students: tuple[str, ...] = ("ant",)) -> Experiment:
    return make_experiment().replace(
        distillation=Independent(), students=[{"name": name, "model": "mlp"} for name in students]
    )


class TestStreams:
    def test_a_session_that_never_was_has_no_stream(self, run: Run) -> None:
        error = refused(lambda: run.coordinator.open_stream(99, Inbox()))
        assert error.status is Status.ABORTED
        assert "session 99" in str(error)

    def test_a_second_stream_ends_the_first(self, run: Run) -> None:
        first, second = run.inboxes["ant"], Inbox()
        run.inboxes["ant"] = second
        run.coordinator.open_stream(run.sessions["ant"], second)
        assert first.ended is not None
        assert first.ended[0] is Status.ABORTED
        run.coordinator.close_stream(run.sessions["ant"], first)
        assert run.coordinator.presence["ant"] is Presence.PRESENT, "the session has gone on on the second"
        run.close_round(0)
        assert second.rounds == [0]

    def test_a_broken_stream_makes_its_student_absent(self, run: Run) -> None:
        run.coordinator.close_stream(run.sessions["ant"], run.inboxes["ant"])
        assert run.coordinator.presence["ant"] is Presence.ABSENT
        assert [event.student for event in run.events("disconnected")] == ["ant"]
        run.coordinator.close_stream(run.sessions["ant"], run.inboxes["ant"])
        assert len(run.events("disconnected")) == 1

    def test_a_session_without_a_stream_is_ended(self) -> None:
        run = Run()
        session = run.coordinator.join(join_request(run.experiment, "ant")).session
        run.join("bee")
        run.coordinator.expect_stream(session)
        run.coordinator.expect_stream(run.sessions["bee"])
        assert run.coordinator.presence == {"ant": Presence.ABSENT, "bee": Presence.PRESENT}
        assert run.coordinator.student_of(session) is None

    def test_who_waits_is_told_whom_for(self, run: Run) -> None:
        run.contribute("ant", 0)
        run.clock.now += 4
        run.coordinator.tick()
        assert run.inboxes["ant"].raw == []
        run.clock.now += 2
        run.coordinator.tick()
        (reply,) = run.inboxes["ant"].replies
        assert reply.waiting == pb.Waiting(round=0, students=["bee"], seconds=6)
        state = run.coordinator.snapshot()
        assert (list(state.waiting_for), state.waiting_seconds) == (["bee"], 6)


WRONG: list[tuple[Callable[[pb.Contribution], object], list[str]]] = [
    (
        lambda m: m.batch.outputs["logits"].CopyFrom(encode(torch.zeros(BATCH, CLASSES), "float16")),
        ["batch.outputs.logits.dtype", "float16", "float32"],
    ),
    (
        lambda m: m.batch.outputs["logits"].CopyFrom(encode(torch.zeros(BATCH, CLASSES + 1), "float32")),
        ["batch.outputs.logits.shape", "[4, 4]", "[4, 3]"],
    ),
    (lambda m: m.batch.ids.CopyFrom(encode(torch.arange(BATCH + 1), "int64")), ["batch.ids.shape", "[5]", "[4]"]),
    (
        lambda m: m.batch.labels.CopyFrom(encode(torch.zeros(BATCH), "float32")),
        ["batch.labels.dtype", "float32", "int64"],
    ),
    (lambda m: setattr(m.batch.labels, "data", m.batch.labels.data[:-1]), ["batch.labels.data", "31 bytes", "32"]),
    (lambda m: setattr(m.batch.ids, "dtype", 0), ["batch.ids.dtype"]),
    (
        lambda m: m.batch.labels.CopyFrom(encode(torch.tensor([0, 3, 0, 0]), "int64")),
        ["batch.labels", "3 is not a class", "0 to 2"],
    ),
    (
        lambda m: m.batch.labels.CopyFrom(encode(torch.tensor([0, 0, -1, 0]), "int64")),
        ["batch.labels", "-1 is not a class", "0 to 2"],
    ),
    (
        lambda m: m.batch.outputs["more"].CopyFrom(encode(torch.zeros(BATCH), "float32")),
        ["batch.outputs", "['logits', 'more']", "['logits']"],
    ),
    (lambda m: m.ClearField("batch"), ["batch.ids"]),
    (lambda m: m.held_out.CopyFrom(samples(torch.zeros(0, CLASSES))), ["held_out", "holds out none"]),
]


class TestContribute:
    def test_targets_are_the_ensembles(self, run: Run) -> None:
        answers = run.close_round(0)
        assert answers[0] == answers[1]
        targets = pb.ExchangeReply.FromString(answers[0]).targets
        assert targets.round == 0
        half = methods.create(run.experiment.distillation)
        assert half is not None
        logits = torch.stack([logits_of(run.experiment, name, 0) for name in run.experiment.names])
        expected = half.targets(methods.Gathered(run.experiment.names, {"logits": logits}, torch.tensor([0, 1, 2, 0])))
        assert expected.shared is not None
        assert torch.equal(decode(targets.targets["logits"]), expected.shared["logits"])

    def test_dml_answers_each_with_its_own(self) -> None:
        run = Run(make_experiment().replace(distillation={"method": "dml"}))
        run.join_all()
        ant, bee = run.close_round(0)
        assert ant != bee
        probabilities = decode(pb.ExchangeReply.FromString(ant).targets.targets["probabilities"])
        torch.testing.assert_close(probabilities, logits_of(run.experiment, "bee", 0).softmax(-1))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_targets_travel_in_the_experiments_dtype(self, dtype: str) -> None:
        run = Run(make_experiment(exchange={"dtype": dtype}))
        run.join_all()
        reply = pb.ExchangeReply.FromString(run.close_round(0)[0])
        assert str(decode(reply.targets.targets["logits"]).dtype) == f"torch.{dtype}"

    def test_whoever_comes_first_the_bits_are_the_same(self) -> None:
        experiment = make_experiment(("ant", "bee", "cat", "dog"))
        answers: set[bytes] = set()
        for seed in range(5):
            run = Run(experiment)
            order = list(experiment.names)
            random.Random(seed).shuffle(order)
            for student in order:
                run.join(student)
            for student in reversed(order):
                run.contribute(student, 0)
            answers |= {raw for inbox in run.inboxes.values() for raw in inbox.raw}
        assert len(answers) == 1

    @pytest.mark.parametrize(("change", "parts"), WRONG, ids=[", ".join(parts) for _, parts in WRONG])
    def test_a_wrong_message_is_refused_by_field_and_value(
        self, run: Run, change: Callable[[pb.Contribution], object], parts: list[str]
    ) -> None:
        message = contribution(run.experiment, "ant", 0)
        change(message)
        error = refused(lambda: run.send("ant", message))
        assert error.status is Status.INVALID_ARGUMENT
        for part in ["student 'ant', round 0", *parts]:
            assert part in str(error)
        assert run.coordinator.presence == {"ant": Presence.ABSENT, "bee": Presence.PRESENT}
        assert run.observations.rejected[Status.INVALID_ARGUMENT] == 1
        assert [(event.student, event.message) for event in run.events("rejected")] == [("ant", str(error))]
        run.join("ant")  # and it did no harm to the round
        assert len(set(run.close_round(0))) == 1

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e31, -3e38])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_values_that_are_no_logits_are_refused_by_position(self, value: float, dtype: str) -> None:
        run = Run(make_experiment(exchange={"dtype": dtype}))
        run.join_all()
        logits = logits_of(run.experiment, "ant", 0)
        logits[2, 1] = value
        error = refused(lambda: run.send("ant", pb.Contribution(batch=samples(logits, dtype))))
        assert error.status is Status.INVALID_ARGUMENT
        assert "student 'ant', round 0: batch.outputs.logits[2, 1] is " in str(error)
        assert "the student has diverged, lower its learning rate" in str(error)
        shown = str(error).split("[2, 1] is ")[1].split(";")[0]
        assert shown == str(value) or float(shown) == pytest.approx(value, rel=1e-2)
        run.join("ant")
        run.close_round(0)

    @pytest.mark.parametrize("ensemble", ["naive", "linear", "min_logit", "general"])
    def test_the_largest_values_let_in_have_finite_targets(self, ensemble: str) -> None:
        experiment = make_experiment(data={"held_out": HELD_OUT}, distillation={"ensemble": ensemble})
        run = Run(experiment)
        run.join_all()
        for student in experiment.names:
            signs = logits_of(experiment, student, 0).sign()
            logits = signs * torch.nextafter(torch.tensor(1e30), torch.tensor(0.0))
            run.send(student, pb.Contribution(batch=samples(logits), held_out=samples(logits[:1].expand(HELD_OUT, -1))))
        for inbox in run.inboxes.values():
            (reply,) = inbox.replies
            assert bool(torch.isfinite(decode(reply.targets.targets["logits"])).all())

    def test_other_samples_are_refused_with_both_values(self, run: Run) -> None:
        run.contribute("ant", 0)
        error = refused(lambda: run.contribute("bee", 0, first=20))
        assert error.status is Status.FAILED_PRECONDITION
        assert "student 'bee' has at position 0 sample 20 with label 0" in str(error)
        assert "sample 0 with label 0, from student 'ant'" in str(error)
        assert run.observations.rejected[Status.FAILED_PRECONDITION] == 1
        assert run.inboxes["ant"].ended is None
        run.join("bee")
        run.contribute("bee", 0)
        assert run.inboxes["ant"].rounds == [0]

    def test_a_future_round_is_told_the_expected_one(self, run: Run) -> None:
        run.close_round(0)
        error = refused(lambda: run.contribute("ant", 7))
        assert error.status is Status.ABORTED
        assert "round 7 is not open; expected round 1" in str(error)
        assert run.coordinator.frontier == 1

    def test_a_session_that_is_over_contributes_nothing(self, run: Run) -> None:
        run.leave("ant", pb.LEAVE_REASON_STOPPED)
        error = refused(lambda: run.contribute("ant", 0))
        assert error.status is Status.ABORTED
        assert "join again" in str(error)

    def test_a_method_without_an_exchange_takes_none(self) -> None:
        run = Run(_independent())
        run.join("ant")
        error = refused(lambda: run.contribute("ant", 0))
        assert error.status is Status.FAILED_PRECONDITION

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_a_garbled_message_does_no_harm(self, data: st.DataObject) -> None:
        run = Run(general_experiment())
        run.join_all()
        raw = bytearray(contribution(run.experiment, "ant", 0, held_out=True).SerializeToString())
        for _ in range(data.draw(st.integers(1, 6))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(DecodeError, Refused):
            run.send("ant", pb.Contribution.FromString(bytes(raw)))
        run.join("ant")
        answers = run.close_round(0, held_out=True)
        clean = Run(run.experiment)
        clean.join_all()
        assert answers == clean.close_round(0, held_out=True)


class TestHeldOut:
    def test_its_size_is_the_experiments(self) -> None:
        run = Run(general_experiment())
        run.join_all()
        message = contribution(run.experiment, "ant", 0)
        message.held_out.CopyFrom(samples(torch.zeros(HELD_OUT + 1, CLASSES)))
        error = refused(lambda: run.send("ant", message))
        assert error.status is Status.INVALID_ARGUMENT
        assert f"held_out.ids.shape: [{HELD_OUT + 1}] is not allowed; expected [{HELD_OUT}]" in str(error)

    def test_values_are_checked_there_too(self) -> None:
        run = Run(general_experiment())
        run.join_all()
        message = contribution(run.experiment, "ant", 0)
        message.held_out.CopyFrom(samples(torch.full((HELD_OUT, CLASSES), torch.nan)))
        error = refused(lambda: run.send("ant", message))
        assert "held_out.outputs.logits[0, 0] is nan" in str(error)

    def test_all_send_them_or_none(self) -> None:
        run = Run(general_experiment())
        run.join_all()
        run.contribute("ant", 0)
        error = refused(lambda: run.contribute("bee", 0, held_out=True))
        assert error.status is Status.FAILED_PRECONDITION
        assert "held_out" in str(error)


class TestReplay:
    def test_closed_rounds_are_answered_again_with_the_same_bytes(self, run: Run) -> None:
        """More rounds than are kept in memory: the first come from the journal."""
        answers = [run.close_round(number)[0] for number in range(9)]
        run.join("ant")
        for number in (0, 8, 3, 0):
            run.contribute("ant", number)
            assert run.inboxes["ant"].raw[-1] == answers[number]
        assert run.coordinator.frontier == 9
        assert run.observations.closed_rounds == 9

    def test_dml_replays_each_students_own(self) -> None:
        run = Run(make_experiment().replace(distillation={"method": "dml"}))
        run.join_all()
        answers = [run.close_round(number) for number in range(8)]
        for position, student in enumerate(run.experiment.names):
            run.contribute(student, 0)
            assert run.inboxes[student].raw[-1] == answers[0][position]

    @pytest.mark.parametrize("number", [0, 8])
    def test_with_other_samples_they_are_not(self, run: Run, number: int) -> None:
        for each in range(9):
            run.close_round(each)
        error = refused(lambda: run.contribute("ant", number, first=1))
        assert error.status is Status.FAILED_PRECONDITION
        assert f"round {number}: student 'ant' has at position 0 sample 1" in str(error)
        assert f"the round has sample {number * BATCH % (10 * BATCH)}" in str(error)

    def test_other_logits_change_nothing_that_is_closed(self, run: Run) -> None:
        answer = run.close_round(0)[0]
        message = contribution(run.experiment, "ant", 0)
        message.batch.outputs["logits"].CopyFrom(encode(torch.zeros(BATCH, CLASSES), "float32"))
        run.send("ant", message)
        assert run.inboxes["ant"].raw == [answer, answer]


class TestRestart:
    @pytest.mark.parametrize("method", ["general", "min_logit", "dml"])
    def test_a_successor_gives_the_same_answers(self, tmp_path: Path, method: str) -> None:
        """With `general`, whose weights are measured at the first round of an epoch and carried over."""
        if method == "dml":
            experiment = make_experiment().replace(distillation={"method": "dml"})
        else:
            experiment = make_experiment(data={"held_out": HELD_OUT}, distillation={"ensemble": method})

        def held_out(number: int) -> bool:
            return method == "general" and number > 0 and number % ROUNDS_PER_EPOCH == 0

        whole = Run(experiment)
        whole.join_all()
        expected = [whole.close_round(number, held_out=held_out(number)) for number in range(8)]
        for number in range(8):
            run = Run(experiment, tmp_path / "journal.sqlite")
            assert run.coordinator.frontier == number
            assert (len(run.events("resumed")) == 1) == (number > 0)
            run.join_all(number)
            assert run.close_round(number, held_out=held_out(number)) == expected[number]
            run.contribute("ant", 0)
            assert run.inboxes["ant"].raw[-1] == expected[0][0]
            run.coordinator.close()
        if method == "general":
            assert len({_ratio(answers[0], experiment, number) for number, answers in enumerate(expected)}) > 1

    def test_sessions_of_before_are_over_and_numbers_go_on(self, tmp_path: Path) -> None:
        run = Run(path=tmp_path / "journal.sqlite")
        run.join_all()
        before = dict(run.sessions)
        run.coordinator.close()
        run = Run(path=tmp_path / "journal.sqlite")
        assert refused(lambda: run.coordinator.open_stream(before["ant"], Inbox())).status is Status.ABORTED
        run.join_all()
        assert min(run.sessions.values()) > max(before.values())

    def test_finished_students_stay_finished(self, tmp_path: Path) -> None:
        run = Run(path=tmp_path / "journal.sqlite")
        run.join_all()
        run.close_round(0)
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        run.leave("bee", pb.LEAVE_REASON_STOPPED)
        run.coordinator.close()
        run = Run(path=tmp_path / "journal.sqlite")
        assert run.coordinator.presence == {"ant": Presence.FINISHED, "bee": Presence.EXPECTED}
        assert not run.coordinator.complete
        run.join("bee", 1)
        run.leave("bee", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1
        run.coordinator.close()
        run = Run(path=tmp_path / "journal.sqlite")
        assert run.coordinator.complete
        assert run.completed == 0, "nothing happened in this one"

    def test_a_worker_ahead_of_the_journal_is_refused(self) -> None:
        run = Run()
        error = refused(lambda: run.join("ant", 3))
        assert error.status is Status.FAILED_PRECONDITION
        assert "resumes at round 3" in str(error)
        assert "ends at round 0" in str(error)


def _ratio(answer: bytes, experiment: Experiment, number: int) -> tuple[float, ...]:
    """Returns the weights of the two students that a round's target was made with."""
    target = decode(pb.ExchangeReply.FromString(answer).targets.targets["logits"]).double().reshape(-1, 1)
    logits = torch.stack([logits_of(experiment, name, number).double().reshape(-1) for name in experiment.names], 1)
    return tuple(round(each, 3) for each in torch.linalg.lstsq(logits, target).solution.reshape(-1).tolist())


def test_the_span_of_an_epoch_tells_of_all_its_rounds(run: Run) -> None:
    """The ensemble is measured before a round counts as closed, so the epoch's last round is in its epoch's span."""
    for number in range(2 * ROUNDS_PER_EPOCH):
        run.close_round(number)
    spans = [record for record in run.records if isinstance(record, RoundsClosed)]
    for span, epoch in zip(spans, range(2), strict=True):
        right = 0
        for number in range(epoch * ROUNDS_PER_EPOCH, (epoch + 1) * ROUNDS_PER_EPOCH):
            mean = torch.stack([logits_of(run.experiment, name, number).softmax(-1) for name in STUDENTS]).mean(0)
            right += int((mean.argmax(-1) == torch.arange(BATCH) % CLASSES).sum())
        assert span.ensemble_accuracy == right / (ROUNDS_PER_EPOCH * BATCH)


class TestReports:
    def test_measurements_reach_the_observations(self, run: Run) -> None:
        measured = pb.Measurement(split=pb.SPLIT_TEST, round=3, accuracy=0.5, loss=1.25)
        run.report("ant", round=4, epoch=4 / 3, measurements=[measured], step_seconds=0.5, wait_seconds=0.1)
        (student, _) = run.coordinator.snapshot().students
        assert student.round == 4
        assert list(student.measurements) == [measured]
        assert (student.step_seconds, student.wait_seconds) == (0.5, 0.1)

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
        run = Run(make_experiment() if exchanging else _independent())
        run.join("ant")
        error = refused(lambda: run.report("ant", **fields))
        assert error.status is Status.INVALID_ARGUMENT
        assert part in str(error)
        assert run.coordinator.presence["ant"] is Presence.PRESENT
        run.report("ant", round=1, durable_round=1)

    def test_a_session_that_is_over_reports_nothing(self, run: Run) -> None:
        session = run.sessions["ant"]
        run.join("ant")
        error = refused(lambda: run.coordinator.report(pb.ReportRequest(session=session, round=2)))
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
        for student in run.experiment.names:
            run.report(student, round=6, durable_round=6)
        assert run.journal.restore().oldest == 0


class TestLeave:
    def test_each_reason_has_its_event_and_state(self) -> None:
        for reason, what, presence in (
            (pb.LEAVE_REASON_STOPPED, "left", Presence.ABSENT),
            (pb.LEAVE_REASON_FAILED, "failed", Presence.FAILED),
            (pb.LEAVE_REASON_FINISHED, "finished", Presence.FINISHED),
        ):
            run = Run()
            run.join_all()
            run.leave("ant", reason, "x" * 600)
            assert [(event.student, event.message) for event in run.events(what)] == [("ant", "x" * 500)]
            assert run.coordinator.presence["ant"] is presence
            run.coordinator.close_stream(run.sessions["ant"], run.inboxes["ant"])
            assert run.events("disconnected") == []

    def test_an_unknown_reason_is_refused(self, run: Run) -> None:
        error = refused(lambda: run.leave("ant", pb.LEAVE_REASON_UNSPECIFIED))
        assert error.status is Status.INVALID_ARGUMENT
        assert "FINISHED, STOPPED, FAILED" in str(error)
        assert run.coordinator.presence["ant"] is Presence.PRESENT

    def test_a_session_leaves_once(self, run: Run) -> None:
        run.leave("ant", pb.LEAVE_REASON_STOPPED)
        assert refused(lambda: run.leave("ant", pb.LEAVE_REASON_STOPPED)).status is Status.ABORTED

    def test_the_run_is_complete_when_the_last_has_finished(self, run: Run) -> None:
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 0
        assert not run.coordinator.snapshot().complete
        run.leave("bee", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1
        assert run.coordinator.complete
        assert run.coordinator.snapshot().complete
        assert [record.what for record in run.records if isinstance(record, Happened)][-2:] == ["finished", "complete"]


class _FullJournal(Journal):
    """A journal whose disk is full from a round on."""

    def __init__(self, experiment: Experiment, full_from: int) -> None:
        super().__init__(None, identity(experiment))
        self._full_from = full_from

    def append(self, closed: ClosedRound) -> None:
        if closed.round >= self._full_from:
            raise JournalError("the disk is full")
        super().append(closed)


class TestFaults:
    def test_nobody_is_answered_before_the_round_is_written(self) -> None:
        experiment = make_experiment()
        run = Run(experiment, journal=_FullJournal(experiment, 2))
        run.join_all()
        run.close_round(0)
        run.close_round(1)
        run.contribute("ant", 2)
        with pytest.raises(JournalError, match="disk is full"):
            run.contribute("bee", 2)
        assert [inbox.rounds for inbox in run.inboxes.values()] == [[0, 1], [0, 1]]
        assert run.coordinator.frontier == 2
        assert run.journal.restore().frontier == 2

    def test_work_that_takes_time_delays_the_answers_only(self) -> None:
        """While a round's targets are made, students come and go; then whoever is there is answered."""
        pending: list[Callable[[], None]] = []

        def later(work: Callable[[], Any], done: Callable[[Any], None], *, heavy: bool) -> None:
            assert heavy
            pending.append(lambda: done(work()))

        run = Run(make_experiment(distillation={"ensemble": "linear"}), submit=later)
        run.join_all()
        run.contribute("ant", 0)
        run.contribute("bee", 0)
        assert run.coordinator.frontier == 0
        run.coordinator.close_stream(run.sessions["ant"], run.inboxes["ant"])
        gone = run.inboxes["ant"]
        run.join("ant")
        run.contribute("ant", 0)
        assert len(pending) == 1, "the round is decided on once"
        pending.pop()()
        assert (gone.rounds, run.inboxes["ant"].rounds, run.inboxes["bee"].rounds) == ([], [0], [0])
        assert run.inboxes["ant"].raw == run.inboxes["bee"].raw
        assert run.coordinator.frontier == 1

    def test_bytes_are_counted(self, run: Run) -> None:
        messages = [contribution(run.experiment, student, 0) for student in run.experiment.names]
        for student, message in zip(run.experiment.names, messages, strict=True):
            run.send(student, message)
        assert run.observations.bytes_in == sum(message.ByteSize() for message in messages)
        assert run.observations.bytes_out == sum(len(raw) for inbox in run.inboxes.values() for raw in inbox.raw)


class TestReceiveLimit:
    @given(
        batch=st.integers(1, 600),
        classes=st.integers(2, 1500),
        held_out=st.integers(0, 900),
        dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    )
    @settings(max_examples=25, deadline=None)
    def test_it_is_enough_and_not_much_more(self, batch: int, classes: int, held_out: int, dtype: str) -> None:
        experiment = make_experiment(
            ("a" * 64, "b" * 64),
            data={"classes": classes, "held_out": held_out},
            training={"batch_size": batch},
            exchange={"dtype": dtype},
        )
        message = pb.Contribution(round=2**63, batch=samples(torch.zeros(batch, classes), dtype, 10**9, [0] * batch))
        if held_out:
            held = samples(torch.zeros(held_out, classes), dtype, 10**9, [0] * held_out)
            message.held_out.CopyFrom(held)
        limit = receive_limit(experiment)
        assert message.ByteSize() <= limit
        assert join_request(experiment, "a" * 64).ByteSize() <= limit
        if message.ByteSize() > 100_000:
            assert limit <= 2 * message.ByteSize()

    def test_a_large_experiment_can_still_join(self) -> None:
        experiment = make_experiment([f"student-{number:03}" for number in range(256)])
        assert json.loads(identity(experiment))
        assert join_request(experiment, "student-000").ByteSize() <= receive_limit(experiment)


class TestAbsence:
    """A run that goes on without the absent; the core's own cases are in test_rounds_absence.py."""

    def run(self, **sections: Any) -> Run:
        exchange = {"on_absence": "proceed", "round_deadline": 3, "evict_after": 10, **sections.pop("exchange", {})}
        made = Run(make_experiment(("ant", "bee", "cat"), exchange=exchange, **sections))
        made.join_all()
        return made

    def late(self, run: Run) -> None:
        run.clock.now += 3
        run.coordinator.tick()

    @pytest.mark.parametrize("method", [{"method": "dml"}, {"method": "kdcl", "ensemble": "min_logit"}])
    def test_targets_are_made_of_those_that_are_there(self, method: dict[str, Any]) -> None:
        run = self.run(distillation=method)
        for student in ("ant", "cat"):
            run.contribute(student, 0)
        assert run.inboxes["ant"].rounds == []
        self.late(run)
        experiment = run.experiment
        logits = torch.stack([logits_of(experiment, student, 0) for student in ("ant", "cat")])
        half = methods.create(experiment.distillation)
        assert half is not None
        labels = decode(contribution(experiment, "ant", 0).batch.labels)
        made = half.targets(methods.Gathered(("ant", "cat"), {"logits": logits}, labels, outsiders=True))
        run.contribute("bee", 0)
        for student in run.experiment.names:
            (reply,) = [reply for reply in run.inboxes[student].replies if reply.HasField("targets")]
            expected = (made.each or {}).get(student, made.shared)
            assert expected is not None
            assert {name: decode(value).tolist() for name, value in reply.targets.targets.items()} == {
                name: value.tolist() for name, value in expected.items()
            }
        closed = run.journal.read(0)
        assert closed is not None
        assert closed.contributors == ("ant", "cat")

    def test_the_absent_are_named_in_events_and_records(self) -> None:
        run = self.run()
        for number in range(3):
            run.contribute("ant", number)
            run.contribute("bee", number)
            self.late(run)
        (absent,) = run.events("absent")
        assert (absent.student, absent.message) == (
            "cat",
            "absent from round 0 on: without cat after 3.0 s; 2 contributions, quorum 2",
        )
        for number in range(3):
            run.contribute("cat", number)
        (returned,) = run.events("returned")
        assert (returned.student, returned.message) == (
            "cat", "back at round 3; it missed rounds from 0 on, 3 rounds missed in all"
        )  # fmt: skip
        run.observations.flush()
        spans = [record for record in run.records if record.kind == "rounds"]
        assert sum(span.missed.get("cat", 0) for span in spans) == 3
        assert sum(span.without_targets for span in spans) == 0

    def test_below_the_quorum_there_are_no_targets_and_it_is_counted(self) -> None:
        run = self.run()
        run.contribute("bee", 0)
        self.late(run)
        run.contribute("bee", 1)
        replies = [reply.targets for reply in run.inboxes["bee"].replies]
        assert [(each.round, len(each.targets)) for each in replies] == [(0, 0), (1, 0)]
        assert run.observations.rounds_without_targets == 2
        (event,) = run.events("below quorum")
        assert event.message == "round 0 closed with 1 contributions, below the quorum: no targets"
        run.contribute("ant", 0)
        assert [len(reply.targets.targets) for reply in run.inboxes["ant"].replies] == [0], "the same for everybody"

    def test_what_is_not_a_number_is_left_out_and_the_others_go_on(self) -> None:
        run = self.run()
        for student in ("ant", "cat"):
            run.contribute(student, 0)
        broken = contribution(run.experiment, "bee", 0)
        broken.batch.outputs["logits"].CopyFrom(encode(torch.full((BATCH, CLASSES), torch.nan), "float32"))
        error = refused(lambda: run.send("bee", broken))
        assert "diverged" in str(error)
        assert run.inboxes["ant"].rounds == run.inboxes["cat"].rounds == [0], "at once"
        (reply,) = run.inboxes["ant"].replies
        assert bool(torch.isfinite(decode(reply.targets.targets["logits"])).all())
        assert [event.student for event in run.events("rejected")] == ["bee"]
        assert [event.student for event in run.events("absent")] == ["bee"]

    def test_samples_that_are_not_the_rounds_are_left_out_and_the_others_go_on(self) -> None:
        run = self.run()
        for student in ("ant", "cat"):
            run.contribute(student, 0)
        error = refused(lambda: run.contribute("bee", 0, first=8))
        assert error.status is Status.FAILED_PRECONDITION
        assert run.inboxes["ant"].rounds == run.inboxes["cat"].rounds == [0], "at once"
        assert [event.student for event in run.events("rejected")] == ["bee"]
        assert [event.student for event in run.events("absent")] == ["bee"]

    def test_one_that_cannot_be_answered_costs_nobody_else_the_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reply_to = ClosedRound.reply_to
        monkeypatch.setattr(
            ClosedRound, "reply_to", lambda closed, name: None if name == "bee" else reply_to(closed, name)
        )
        run = self.run()
        for student in ("bee", "ant", "cat"):  # the last one's call is that which closes the round
            run.contribute(student, 0)
        assert run.inboxes["ant"].rounds == run.inboxes["cat"].rounds == [0]
        ended = run.inboxes["bee"].ended
        assert ended is not None
        assert ended[0] is Status.FAILED_PRECONDITION
        assert "targets for nobody else" in ended[1]
        assert [event.student for event in run.events("rejected")] == ["bee"]
        assert run.coordinator.student_of(run.sessions["bee"]) is None
        assert run.coordinator.student_of(run.sessions["cat"]) is not None
        run.contribute("ant", 1)
        run.contribute("cat", 1)
        assert run.inboxes["cat"].rounds == [0, 1], "it is not waited for"

    def test_a_silent_absent_student_is_told_to_join_again(self) -> None:
        run = self.run()
        run.contribute("ant", 0)
        run.contribute("bee", 0)
        self.late(run)
        run.clock.now += 10
        run.coordinator.tick()
        ended = run.inboxes["cat"].ended
        assert ended is not None
        assert ended[0] is Status.ABORTED
        assert [event.student for event in run.events("evicted")] == ["cat"]
        assert run.coordinator.student_of(run.sessions["cat"]) is None

    def test_general_goes_on_with_the_errors_it_has(self, tmp_path: Path) -> None:
        run = self.run(data={"held_out": HELD_OUT}, distillation={"method": "kdcl", "ensemble": "general"})
        for number in range(ROUNDS_PER_EPOCH):
            run.close_round(number)
        run.close_round(ROUNDS_PER_EPOCH, held_out=True)
        for student in ("ant", "cat"):
            run.contribute(student, ROUNDS_PER_EPOCH + 1)
        self.late(run)
        assert run.inboxes["cat"].rounds[-1] == ROUNDS_PER_EPOCH + 1


class TestLateStudents:
    """With every round kept, students may be added to the experiment later."""

    @pytest.mark.parametrize("method", [{"method": "dml"}, {"method": "kdcl", "ensemble": "naive"}])
    def test_one_learns_the_whole_run_from_the_journal(self, method: dict[str, Any], tmp_path: Path) -> None:
        sections: dict[str, Any] = {"distillation": method, "exchange": {"journal": {"keep": "all"}}}
        before = Run(make_experiment(("ant", "bee"), **sections), path=tmp_path / "journal.sqlite")
        before.join_all()
        for number in range(TOTAL_ROUNDS):
            before.close_round(number)
        for student in before.experiment.names:
            before.leave(student, pb.LEAVE_REASON_FINISHED)
        assert before.completed == 1
        before.coordinator.close()

        experiment = make_experiment(("ant", "bee", "cat"), **sections)
        journal = Journal(tmp_path / "journal.sqlite", identity(experiment), may_grow=True)
        run = Run(experiment, journal=journal)
        assert not run.coordinator.complete
        run.join("cat")
        for number in range(TOTAL_ROUNDS):
            run.contribute("cat", number)
        assert run.inboxes["cat"].rounds == list(range(TOTAL_ROUNDS))
        assert all(reply.targets.targets for reply in run.inboxes["cat"].replies)
        run.leave("cat", pb.LEAVE_REASON_FINISHED)
        assert run.completed == 1

    def test_without_a_target_for_it_it_is_told_why(self, tmp_path: Path) -> None:
        kept = {"distillation": {"method": "dml"}}
        before = Run(make_experiment(("ant", "bee"), **kept), path=tmp_path / "journal.sqlite")
        before.join_all()
        before.close_round(0)
        before.coordinator.close()
        experiment = make_experiment(("ant", "bee", "cat"), **kept, exchange={"journal": {"keep": "all"}})
        run = Run(experiment, journal=Journal(tmp_path / "journal.sqlite", identity(experiment), may_grow=True))
        run.join("cat")
        error = refused(lambda: run.contribute("cat", 0))
        assert error.status is Status.FAILED_PRECONDITION
        assert "round 0 was closed by ant, bee" in str(error)
        assert "exchange.journal.keep: all" in str(error)
