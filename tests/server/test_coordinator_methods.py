"""The coordinator with teachers, with shapes that it did not know, and with rounds that exchange nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from prometheus_client import generate_latest

from codistill.config.experiment import Experiment
from codistill.rundir.records import RoundsClosed
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill_server.admission.contributions import receive_limit
from codistill_server.observability.prometheus import registry
from codistill_server.rounds.actions import Status
from codistill_server.rounds.machine import ParticipantState
from server.support import (
    BATCH,
    CLASSES,
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    Run,
    contribution,
    make_experiment,
    refused,
)

TEACHER = {"name": "old", "model": "mlp", "weights": "runs/old"}


def taught(method: str = "kd", **sections: Any) -> Experiment:
    return make_experiment(distillation={"method": method}, teachers=[TEACHER], **sections)


def outputs(**shapes: list[int]) -> dict[str, list[int]]:
    return {name.replace("_", "/"): dims for name, dims in shapes.items()}


def published(experiment: Experiment, number: int, **arrays: torch.Tensor) -> pb.ExchangeRequest:
    message = contribution(experiment, experiment.names[0], number)
    message.batch.outputs.clear()
    for name, value in arrays.items():
        message.batch.outputs[name.replace("_", "/")].CopyFrom(encode(value, experiment.exchange.dtype))
    return message


class Taught(Run):
    """A run whose students publish nothing and whose teacher publishes logits."""

    def join_student(self, name: str, first_round: int = 0) -> pb.JoinResponse:
        return self.join(name, first_round, outputs={})

    def join_teacher(self, weights: bytes = b"\xf0\x0d", **shapes: list[int]) -> pb.JoinResponse:
        return self.join("old", outputs=outputs(**(shapes or {"logits": [CLASSES]})), weights_sha256=weights)

    def teach(self, number: int) -> torch.Tensor:
        logits = torch.full((BATCH, CLASSES), float(number))
        self.send("old", published(self.experiment, number, logits=logits))
        return logits

    def learn(self, name: str, number: int) -> None:
        self.send(name, published(self.experiment, number))

    def close_round(self, round_number: int, **options: Any) -> list[bytes]:
        for name in self.experiment.names:
            self.learn(name, round_number, **options)
        self.teach(round_number)
        return [self.inboxes[participant].raw[-1] for participant in self.experiment.participants]


@pytest.fixture
def run() -> Taught:
    made = Taught(taught())
    made.join_student("ant")
    made.join_student("bee")
    made.join_teacher()
    return made


class TestTeacher:
    def test_its_outputs_are_every_students_targets_and_it_gets_the_rounds_end(self, run: Taught) -> None:
        run.learn("ant", 0)
        logits = run.teach(0)
        assert not run.inboxes["old"].replies, "it is waited for as everybody is"
        run.learn("bee", 0)
        for participant in ("ant", "bee"):
            (reply,) = run.inboxes[participant].replies
            assert torch.equal(decode(reply.targets.targets["logits"]), logits)
        (end,) = run.inboxes["old"].replies
        assert end.targets.round == 0
        assert not end.targets.targets

    def test_it_begins_at_the_frontier_whenever_it_joins(self, run: Taught) -> None:
        for number in range(3):
            run.learn("ant", number)
            run.learn("bee", number)
            run.teach(number)
        assert run.join_teacher().frontier == 3
        assert run.coordinator.states["old"] is ParticipantState.CONNECTED

    def test_what_it_reported_lets_rounds_go(self, run: Taught) -> None:
        for number in range(3):
            run.learn("ant", number)
            run.learn("bee", number)
            run.teach(number)
        for name in ("ant", "bee", "old"):
            assert run.journal.read(1) is not None
            run.report(name, round=3, durable_round=3)
        assert run.journal.read(1) is None

    def test_other_weights_than_the_run_began_with_are_refused(self, run: Taught) -> None:
        error = refused(lambda: run.join_teacher(b"\xbe\xef"))
        assert error.status is Status.FAILED_PRECONDITION
        assert str(error) == (
            "weights_sha256: the run has a teacher 'old' with weights of SHA-256 f00d, this worker's are beef; give its "
            "teachers.weights the file that the run began with"
        )

    def test_a_student_that_publishes_although_it_only_learns_is_refused(self, run: Taught) -> None:
        error = refused(lambda: run.join("ant"))
        assert "outputs: this worker publishes {'logits': [3]}, method kd with 3 classes takes {}" in str(error)
        message = published(run.experiment, 0, logits=torch.zeros(BATCH, CLASSES))
        assert "batch.outputs: ['logits'] are not allowed; expected []" in str(
            refused(lambda: run.send("bee", message))
        )

    def test_a_teacher_of_other_classes_is_refused(self) -> None:
        run = Taught(taught())
        error = refused(lambda: run.join_teacher(logits=[CLASSES + 1]))
        assert "publishes {'logits': [4]}, method kd with 3 classes takes {'logits': [3]}" in str(error)

    def test_it_is_shown_as_a_teacher(self, run: Taught) -> None:
        assert [(each.name, each.role) for each in run.coordinator.snapshot().participants] == [
            ("ant", pb.ROLE_STUDENT),
            ("bee", pb.ROLE_STUDENT),
            ("old", pb.ROLE_TEACHER),
        ]

    def test_metrics_tell_of_it_and_of_students_that_publish_nothing(self, run: Taught) -> None:
        for number in range(2):
            run.learn("ant", number)
            run.learn("bee", number)
            run.teach(number)
        tested = pb.Measurement(split=pb.SPLIT_TEST, steps_trained=0, accuracy=0.75, loss=0.5)
        run.report("old", round=2, durable_round=2, measurements=[tested])
        run.learn("ant", 2)
        run.learn("bee", 2)
        run.clock.now += 20
        text = generate_latest(registry(run.run_state, run.coordinator.snapshot)).decode()
        assert (
            'codistill_participant_accuracy_ratio{model="mlp",participant="old",run="small",split="test"} 0.75' in text
        )
        for name in ("ant", "bee", "old"):
            assert f'codistill_participant_state{{participant="{name}",run="small",state="connected"}} 1.0' in text
        assert 'codistill_waiting_for{participant="old",run="small"} 1.0' in text
        assert "codistill_disagreement_ratio{" not in text, "of who publishes no logits there is none"
        assert "codistill_ensemble_accuracy_ratio{" not in text

    def test_what_is_not_finite_is_the_weights_fault(self, run: Taught) -> None:
        message = published(run.experiment, 0, logits=torch.full((BATCH, CLASSES), torch.nan))
        assert "the teacher's weights are damaged" in str(refused(lambda: run.send("old", message)))

    def test_rounds_go_on_without_it_and_without_targets(self) -> None:
        run = Taught(taught(exchange={"on_absence": "proceed", "round_deadline": 5.0}))
        run.join_student("ant")
        run.join_student("bee")
        run.join_teacher()
        run.learn("ant", 0)
        run.learn("bee", 0)
        run.clock.now += 6
        run.coordinator.tick()
        (reply,) = run.inboxes["ant"].replies
        assert reply.HasField("targets")
        assert not reply.targets.targets
        assert run.run_state.rounds_without_targets == 1
        assert [each.message for each in run.events("below_quorum")] == [
            "round 0 closed with 2 contributions, without its teacher: no targets"
        ]

    def test_the_run_is_complete_when_it_has_finished_too(self, run: Taught) -> None:
        run.close_rounds()
        run.leave("ant", pb.LEAVE_REASON_FINISHED)
        run.leave("bee", pb.LEAVE_REASON_FINISHED)
        assert not run.coordinator.complete
        run.leave("old", pb.LEAVE_REASON_FINISHED)
        assert run.coordinator.complete

    def test_it_has_taught_all_when_the_last_round_is_closed(self, run: Taught) -> None:
        run.close_round(0)
        error = refused(lambda: run.leave("old", pb.LEAVE_REASON_FINISHED))
        assert "while 1 of 12 rounds are closed" in str(error)
        run.close_rounds()
        run.join_teacher()  # one that comes back has nothing left to teach
        run.leave("old", pb.LEAVE_REASON_FINISHED)
        assert run.coordinator.states["old"] is ParticipantState.FINISHED


class TestShapes:
    MAPS: ClassVar = {"features_1": [4, 8, 8], "features_2": [6, 2, 2]}

    def test_the_first_join_settles_them_and_a_restart_remembers(self, tmp_path: Path) -> None:
        experiment = taught("vid")
        run = Taught(experiment, tmp_path / "journal")
        run.join_teacher(**self.MAPS)
        run.coordinator.close()
        run = Taught(experiment, tmp_path / "journal")
        error = refused(lambda: run.join_teacher(features_1=[5, 8, 8], features_2=[6, 2, 2]))
        assert error.status is Status.FAILED_PRECONDITION
        assert "'features/1': [5, 8, 8]" in str(error)
        assert "the run was settled to {'features/1': [4, 8, 8]" in str(error)
        run.join_teacher(**self.MAPS)
        run.join_student("ant")
        run.join_student("bee")
        maps = {"features_1": torch.ones(BATCH, 4, 8, 8), "features_2": torch.ones(BATCH, 6, 2, 2)}
        wrong = maps | {"features_2": torch.ones(BATCH, 6, 1, 2)}
        assert "batch.outputs.features/2.shape: [4, 6, 1, 2] is not allowed; expected [4, 6, 2, 2]" in str(
            refused(lambda: run.send("old", published(experiment, 0, **wrong)))
        )

    @pytest.mark.parametrize("dims", [[4, 9, 8], [4096, 8, 8], [4, 8], [0, 8, 8]])
    def test_what_is_larger_than_any_layer_may_be_is_refused(self, dims: list[int]) -> None:
        run = Taught(taught("vid"))
        error = refused(lambda: run.join_teacher(features_1=dims, features_2=[6, 2, 2]))
        assert "takes {'features/1': [up to 2048, up to 8, up to 8], 'features/2'" in str(error)

    def test_the_largest_message_has_the_largest_layers(self) -> None:
        floats = BATCH * (2 * 2048 * 8 * 8)
        assert receive_limit(taught("vid")) > 4 * floats
        assert receive_limit(taught("vid")) < 4 * floats + 70_000
        assert receive_limit(taught("kd")) < 70_000


class TestExchangeSchedule:
    """Every second step from the first of epoch 1 on exchanges: steps 3, 5, 7, 9, 11 of 12 are rounds 0 to 4."""

    METHOD: ClassVar = {"method": "cross_architecture", "start_epoch": 1, "every": 2}
    STEPS = (3, 5, 7, 9, 11)

    def experiment(self, **sections: Any) -> Experiment:
        return make_experiment(distillation=self.METHOD, **sections)

    def test_rounds_have_no_gaps_and_steps_are_shown_beside_them(self) -> None:
        run = Run(self.experiment())
        assert run.coordinator.snapshot().total_steps == 0
        run.join_all()
        assert STEPS_PER_EPOCH == 3
        for name, steps in (("ant", 3), ("bee", 2)):
            run.report(name, steps_trained=steps)
        for number, step in enumerate(self.STEPS):
            state = run.coordinator.snapshot()
            # Before the first round the slowest student's own report tells.
            assert (state.frontier, state.steps_trained) == (number, step if number else 2)
            assert (state.total_rounds, state.total_steps) == (len(self.STEPS), TOTAL_STEPS)
            run.close_round(number)
        assert run.inboxes["ant"].rounds == [0, 1, 2, 3, 4]
        state = run.coordinator.snapshot()
        assert (state.frontier, state.steps_trained) == (len(self.STEPS), TOTAL_STEPS), "no further than the run"

    @pytest.mark.parametrize("number", [5, 11])
    def test_no_more_rounds_are_taken_than_steps_exchange(self, number: int) -> None:
        run = Run(self.experiment())
        run.join_all()
        error = refused(lambda: run.contribute("ant", number))
        assert error.status is Status.FAILED_PRECONDITION
        assert str(error) == f"round: {number} is not one of the run's; allowed: 0 to 4"

    @pytest.mark.parametrize("number", [1, 3])
    def test_the_number_of_a_step_is_no_round(self, number: int) -> None:
        run = Run(self.experiment())
        run.join_all()
        error = refused(lambda: run.contribute("ant", number))
        assert error.status is Status.ABORTED
        assert str(error) == f"round {number} is not open; expected round 0, or one before it; join again"

    def test_a_restart_goes_on_where_the_journal_ends(self, tmp_path: Path) -> None:
        experiment = self.experiment()
        run = Run(experiment, tmp_path / "journal")
        run.join_all()
        answers = [run.close_round(number) for number in range(3)]
        run.report("ant", steps_trained=8, round=3, durable_round=3)
        run.report("bee", steps_trained=8, round=3, durable_round=1)
        assert run.journal.read(0) is None, "it is needed by nobody"
        assert run.journal.read(1) is not None
        run.coordinator.close()

        run = Run(experiment, tmp_path / "journal")
        state = run.coordinator.snapshot()
        assert (state.frontier, state.steps_trained) == (3, 9)
        assert (state.total_rounds, state.total_steps) == (len(self.STEPS), TOTAL_STEPS)
        shown = [(each.name, each.steps_trained, each.round, each.durable_round) for each in state.participants]
        assert shown == [("ant", 9, 3, 3), ("bee", 5, 1, 1)], "the steps at which those rounds take place"
        run.join("ant", 3)
        run.join("bee", 1)
        run.contribute("bee", 2)
        assert run.inboxes["bee"].raw == [answers[2][1]], "the same answer again"
        run.contribute("ant", 3)
        run.contribute("bee", 3)
        assert run.inboxes["ant"].rounds == [3]

    def test_steps_before_the_first_round_are_shown(self) -> None:
        """A student may have trained steps of which none exchanged; it needs round 0 all the same."""
        run = Run(self.experiment())
        run.join("ant", steps_trained=2)
        (ant, _) = run.coordinator.snapshot().participants
        assert (ant.steps_trained, ant.round) == (2, 0)
        (joined,) = run.events("joined")
        assert joined.message == "joined on cpu, from step 2"
        error = refused(lambda: run.join("ant", 1))
        assert "resumes at round 1" in str(error), "round 0 is not closed yet"

    def test_whom_an_open_round_waits_for_is_told_by_its_own_number(self) -> None:
        run = Run(self.experiment())
        run.join_all()
        run.close_round(0)
        run.contribute("ant", 1)
        run.clock.now += 6
        run.coordinator.tick()
        notice = run.inboxes["ant"].replies[-1]
        assert (notice.waiting.round, list(notice.waiting.participants)) == (1, ["bee"])

    def test_spans_and_events_have_the_runs_rounds(self) -> None:
        run = Run(self.experiment(exchange={"on_absence": "proceed", "round_deadline": 5.0}))
        run.join_all()
        run.close_round(0)
        run.contribute("ant", 1)
        run.clock.now += 6
        run.coordinator.tick()
        (skipped,) = run.events("skipped")
        assert skipped.message.startswith("skipped from round 1 on")
        run.run_state.flush()
        spans = [record for record in run.records if isinstance(record, RoundsClosed)]
        assert (spans[0].first, spans[-1].last, spans[-1].steps_trained) == (0, 1, 6)


DRAWING = """
import random

import numpy as np
import torch
from codistill.methods import LOGITS, Targets


class Drawing:
    heavy, student, teacher = False, {"logits": LOGITS}, {}

    def __init__(self):
        self.made = random.random() + np.random.rand() + torch.rand(())

    def targets(self, inputs):
        noise = random.random() + np.random.rand() + torch.rand(())
        return Targets(shared={"logits": inputs.outputs["logits"].mean(0) + self.made + noise})
"""


def test_what_a_users_aggregator_draws_follows_the_seed_and_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is restarted, and one process with the students in it, have drawn other numbers before."""
    (tmp_path / "drawing_aggregator.py").write_text(DRAWING)
    monkeypatch.syspath_prepend(str(tmp_path))
    custom = {"method": "custom", "server": "drawing_aggregator:Drawing", "worker": "a:b"}

    def answers(disturbance: int, seed: int = 3) -> list[bytes]:
        torch.rand(disturbance)
        run = Run(make_experiment(distillation=custom, seed=seed))
        run.join_all()
        found: list[bytes] = []
        for number in range(2):
            torch.rand(disturbance)
            found.append(run.close_round(number)[0])
        return found

    first = answers(0)
    assert answers(1) == first
    assert not set(answers(0, seed=4)) & set(first)
