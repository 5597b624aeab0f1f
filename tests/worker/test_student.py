"""A student's loop: what it sends, measures and reports, and how it is watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from codistill import PROTOCOL_VERSION
from codistill.config.experiment import Experiment
from codistill.config.fingerprint import identity, identity_sha256
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.watchdog import Watchdog
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode
from codistill.wire.times import seconds
from codistill_worker import student
from codistill_worker.errors import ConfigurationError
from worker.support_student import NEWEST, Clock, Tiny, go, to_the_end

# --- joining and exchanging


def test_what_a_join_says(tiny: Tiny, learn: Any, load_data: Any) -> None:
    experiment = tiny()
    loop, transport = learn(experiment)
    loop.join()
    (request,) = transport.joined
    assert (request.protocol_version, request.participant) == (PROTOCOL_VERSION, "cnn")
    assert (request.experiment_json, request.experiment_sha256) == (identity(experiment), identity_sha256(experiment))
    assert request.data.data_sha256.hex() == load_data(experiment.data).fingerprint()
    assert (request.data.train_samples, request.data.classes) == (48, 10)
    assert {name: list(shape.dims) for name, shape in request.outputs.items()} == {"logits": [10]}
    assert (request.first_round, request.total_rounds) == (0, 9)
    assert (request.steps_trained, request.total_steps, request.device) == (0, 9, "cpu")
    assert (request.lanes, request.encodings) == ([pb.LANE_GRPC], [pb.ENCODING_DENSE])
    assert request.parameters == sum(each.numel() for each in loop.trainer.model.parameters())
    alone, transport = learn(tiny(distillation={"method": "independent"}), "alone")
    alone.join()
    assert not transport.joined[0].outputs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contributions_have_the_experiments_dtype(dtype: str, tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(tiny(exchange__dtype=dtype))
    go(loop, 1)
    (sent,) = transport.sent
    assert not sent.HasField("held_out")
    assert decode(sent.batch.ids).tolist() == loop.trainer._order.samples(0).tolist()
    logits = decode(sent.batch.outputs["logits"])
    assert logits.dtype is getattr(torch, dtype)
    assert list(sent.batch.outputs) == ["logits"]


def test_held_out_samples_are_sent(tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(
        tiny(data__train_size=68, data__held_out=20, distillation={"method": "kdcl", "ensemble": "general"})
    )
    go(loop)
    assert [each.round for each in transport.sent if each.HasField("held_out")] == [3, 6]
    assert decode(transport.sent[3].held_out.ids).tolist() == list(range(20))


def test_a_student_is_tried_before_it_joins_and_not_when_it_resumes(
    tiny: Tiny, learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fail(experiment: Any, plan: Any, *_: Any) -> None:
        tried.append(plan.student.name)
        raise ConfigurationError(f"{experiment.name}: no step")

    loop, _ = learn(tiny())
    loop.join()
    loop.begin_step()
    loop.end_step()
    loop.stop()
    monkeypatch.setattr(student, "try_training", fail)
    assert learn(tiny())[0].step == 1
    with pytest.raises(ConfigurationError, match="no step"):
        learn(tiny(), folder="another")
    assert tried == ["cnn"]


def test_a_batch_larger_than_the_data_is_refused(tiny: Tiny, learn: Any) -> None:
    small = tiny(data={"dataset": "digits"})
    # Copied, as the schema knows how many digits there are.
    large = small.model_copy(update={"training": small.training.model_copy(update={"batch_size": 1500})})
    with pytest.raises(ConfigurationError, match=r"training\.batch_size"):
        learn(large)


def test_where_nothing_is_exchanged_there_are_steps_and_no_rounds(tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(
        tiny(distillation={"method": "independent"}, training__checkpoint_every=0), clock=Clock(0.4)
    )
    loop.join()
    to_the_end(loop)
    (joined,) = transport.joined
    assert (joined.first_round, joined.total_rounds, joined.steps_trained, joined.total_steps) == (0, 0, 0, 9)
    assert transport.sent == []
    assert {(each.round, each.durable_round) for each in transport.reports} == {(0, 0)}
    last = transport.reports[-1]
    assert (last.steps_trained, last.epochs_trained) == (9, 3.0)


def sometimes(tiny: Tiny) -> Experiment:
    """Of the 9 steps of 3 epochs, steps 3, 5 and 7 exchange: rounds 0, 1 and 2."""
    return tiny(
        distillation={"method": "cross_architecture", "every": 2, "start_epoch": 1}, training__checkpoint_every=0
    )


def test_where_some_steps_exchange_rounds_are_dense(tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(sometimes(tiny), clock=Clock(0.4))
    transport.target = "probabilities"
    loop.join()
    to_the_end(loop)
    (joined,) = transport.joined
    assert (joined.first_round, joined.total_rounds, joined.steps_trained, joined.total_steps) == (0, 3, 0, 9)
    assert [each.round for each in transport.sent] == transport.received == [0, 1, 2]
    ids = [decode(each.batch.ids).tolist() for each in transport.sent]
    assert ids == [loop.trainer._order.samples(step).tolist() for step in (3, 5, 7)]
    before = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]  # rounds before each step
    assert all(each.round == before[each.steps_trained] for each in transport.reports)
    assert len({each.steps_trained for each in transport.reports}) >= 4
    assert (transport.reports[-1].round, transport.reports[-1].durable_round) == (3, before[8])


@pytest.mark.parametrize(("steps", "first_round"), [(1, 0), (3, 0), (4, 1), (5, 1), (6, 2), (8, 3)])
def test_where_some_steps_exchange_it_resumes_at_the_first_round_not_learned_from(
    steps: int, first_round: int, tiny: Tiny, learn: Any
) -> None:
    stopped, before = learn(sometimes(tiny))
    before.target = "probabilities"
    go(stopped, steps)
    stopped.stop()
    resumed, transport = learn(sometimes(tiny))
    transport.target = "probabilities"
    resumed.join()
    (joined,) = transport.joined
    assert (joined.steps_trained, joined.first_round) == (steps, first_round)
    to_the_end(resumed)
    assert [each.round for each in transport.sent] == list(range(first_round, 3))


# --- measuring


@pytest.mark.parametrize(("every", "epochs", "at"), [(1, 3, [3, 6, 9]), (2, 3, [6, 9]), (2, 4, [6, 12]), (100, 3, [9])])
def test_when_a_student_is_evaluated(every: int, epochs: int, at: list[int], tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(tiny(training__evaluate_every=every, training__epochs=epochs))
    to_the_end(loop)
    assert [each.steps_trained for each in transport.measured(pb.SPLIT_TEST)] == at
    assert [each.steps_trained for each in transport.measured(pb.SPLIT_TRAIN)] == list(range(3, 3 * epochs + 1, 3))
    last = transport.measured(pb.SPLIT_TEST)[-1]
    score = loop.trainer.evaluate(loop.trainer._dataset.test)
    assert (last.accuracy, last.loss) == (score.accuracy, score.loss)
    assert not last.HasField("distillation_loss")


def test_training_is_measured_over_the_epoch(tiny: Tiny, learn: Any, student: Any, targets_for: Any) -> None:
    experiment = tiny(training__epochs=1)
    loop, transport = learn(experiment)
    to_the_end(loop)
    (measured,) = transport.measured(pb.SPLIT_TRAIN)
    trainer = student(experiment)
    steps = [trainer.finish(targets_for(trainer.begin())) for _ in range(3)]
    assert measured.accuracy == sum(int(each.correct) for each in steps) / 48
    assert measured.loss == sum(each.cross_entropy.double() for each in steps).item() / 3
    assert measured.distillation_loss == sum(each.distillation.double() for each in steps).item() / 3


def test_a_method_without_distillation_reports_none(tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(tiny(distillation={"method": "independent"}))
    to_the_end(loop)
    assert transport.sent == []
    assert all(not each.HasField("distillation_loss") for each in transport.measured())
    assert len(transport.measured(pb.SPLIT_TRAIN)) == 3


def test_a_training_loss_that_is_not_finite_ends_the_student(tiny: Tiny, learn: Any) -> None:
    loop, _ = learn(
        tiny(
            distillation={"method": "independent"},
            training__optimizer={"name": "sgd", "lr": 1e30},
            training__schedule={"name": "constant"},
            students=[{"name": "cnn", "model": "mlp"}],
        )
    )
    with pytest.raises(PeerError, match="student 'cnn' has diverged in step 3: its loss is nan") as ended:
        go(loop)
    assert ended.value.code is ExitCode.DIVERGED


# --- reporting


def test_what_a_report_says(tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(tiny(training__checkpoint_every=0), clock=Clock(step=0.4))
    to_the_end(loop)
    assert [each.steps_trained for each in transport.reports] == sorted(
        each.steps_trained for each in transport.reports
    )
    assert len(transport.reports) >= 5, "after a second at the latest"
    last = transport.reports[-1]
    assert (last.steps_trained, last.epochs_trained) == (9, 3.0)
    assert [each.epochs_trained for each in transport.reports] == [each.steps_trained / 3 for each in transport.reports]
    assert [each.round for each in transport.reports] == [each.steps_trained for each in transport.reports]
    # The older of the two checkpoints kept is the one that it may have to go back to; the last is saved by finish().
    *others, saved = [(each.round, each.durable_round) for each in transport.reports]
    assert others == [(number, max(min(number, 8) - 1, 0)) for number, _ in others]
    assert saved == (9, 8)
    assert all(seconds(each.step_time) > seconds(each.wait_time) > 0 for each in transport.reports[:-1])
    assert transport.left == [(pb.LEAVE_REASON_FINISHED, "trained 9 steps")]


def test_reports_are_at_least_a_second_apart_but_for_the_last(tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(tiny(), clock=Clock(step=0))
    to_the_end(loop)
    (only,) = transport.reports
    assert len(only.measurements) == 6
    assert (seconds(only.step_time), only.durable_round) == (0, 0)


def test_a_failed_student_says_so_and_saves_nothing(tiny: Tiny, learn: Any, tmp_path: Path) -> None:
    loop, transport = learn(tiny())
    go(loop, 2)
    loop.fail("out of luck")
    assert transport.left == [(pb.LEAVE_REASON_FAILED, "out of luck")]
    assert not (tmp_path / "run" / NEWEST).exists()


# --- watched


class Marks(Watchdog):
    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[str, float]] = []

    def begin(self, what: str, seconds: float) -> None:
        self.marks.append((what, seconds))


def test_the_watchdog_is_told_of_everything_that_may_take_time(tiny: Tiny, learn: Any) -> None:
    marks = Marks()
    experiment = tiny(
        training__epochs=1,
        training__hang_after=7,
        training__evaluation_batch_size=10,
        exchange={"connect_timeout": 100, "give_up_after": 1000},
    )
    loop, _ = learn(experiment, watchdog=marks)
    loop.join()
    to_the_end(loop)
    first, last = 0, loop.trainer.total_steps
    computing, waiting = 7, 1000 + 60 + 7
    assert marks.marks[:4] == [
        (f"student 'cnn' at joining the run, step {first}", 100 + 60 + 7),
        (f"student 'cnn' at the forward pass, step {first}", computing),
        (f"student 'cnn' at waiting for the targets, step {first}", waiting),
        (f"student 'cnn' at the backward pass, step {first}", computing),
    ]
    assert marks.marks[-3:] == [
        (f"student 'cnn' at saving a checkpoint, step {last}", computing),
        (f"student 'cnn' at reporting, step {last}", waiting),
        (f"student 'cnn' at saying goodbye, step {last}", waiting),
    ]
    evaluation = (f"student 'cnn' at an evaluation, step {last}", computing)
    assert marks.marks.count(evaluation) > 2, "each batch is a step of its own"


@pytest.mark.parametrize("where", ["Trainer.restore", "checkpoints.safe_open"])
def test_memory_that_is_short_while_it_resumes_does_not_blame_the_checkpoint(
    where: str, tiny: Tiny, learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that the checkpoint is damaged would have the user delete it."""
    loop, _ = learn(tiny())
    loop.join()
    go(loop, 2)
    loop.stop()
    saved = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    place = "trainer.Trainer.restore" if where == "Trainer.restore" else where
    monkeypatch.setattr(f"codistill_worker.training.{place}", fail)
    with pytest.raises(RuntimeError) as caught:
        learn(tiny())
    assert caught.value is error
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == saved
    assert learn(tiny())[0].step == 2
