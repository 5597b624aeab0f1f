"""A student's loop: when it measures, saves and reports, and that a restart changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
from codistill.rundir.storage import StorageError
from codistill.v1 import distillation_pb2 as pb
from codistill.wire.tensors import decode, encode
from codistill.wire.times import seconds
from codistill_worker import student
from codistill_worker.errors import ConfigurationError
from codistill_worker.student import StudentLoop
from codistill_worker.training.checkpoints import CheckpointStore, read

Tiny = Callable[..., Experiment]
NEWEST, BEST = "checkpoint.safetensors", "best.safetensors"


class RecordingTransport:
    """Answers at once, and records every message."""

    def __init__(self) -> None:
        self.joined: list[pb.JoinRequest] = []
        self.sent: list[pb.ExchangeRequest] = []
        self.received: list[int] = []
        self.target = "logits"
        self.reports: list[pb.ReportRequest] = []
        self.left: list[tuple[Any, str]] = []
        self.lost: list[pb.Measurement] = []

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        self.joined.append(request)
        return pb.JoinResponse(session_id=1, run="recorded")

    def send(self, contribution: pb.ExchangeRequest) -> None:
        self.sent.append(contribution)

    def receive(self, number: int) -> pb.Targets:
        logits = decode(self.sent[-1].batch.outputs["logits"]).float()
        assert self.sent[-1].round == number
        self.received.append(number)
        target = logits.roll(1, 0) / 2
        target = target if self.target == "logits" else target.softmax(-1)
        return pb.Targets(round=number, targets={self.target: encode(target, "float32")})

    def report(self, report: pb.ReportRequest) -> None:
        self.reports.append(report)

    def undelivered(self) -> Sequence[pb.Measurement]:
        return self.lost

    def leave(self, reason: pb.LeaveReason.ValueType, message: str) -> None:
        self.left.append((reason, message))

    def close(self) -> None:
        pass

    def measured(self, split: Any = None) -> list[pb.Measurement]:
        return [each for report in self.reports for each in report.measurements if split in (None, each.split)]


class Clock:
    """Goes on by `step` seconds each time it is read."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 100.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def learn(tmp_path: Path, load_data: Any) -> Callable[..., tuple[StudentLoop, RecordingTransport]]:
    def make(
        experiment: Experiment,
        folder: str = "run",
        name: str = "cnn",
        clock: Clock | None = None,
        watchdog: Watchdog | None = None,
    ) -> tuple[StudentLoop, RecordingTransport]:
        plan, transport = experiment.plan(name), RecordingTransport()
        store = CheckpointStore(tmp_path / folder)
        device, dataset = torch.device("cpu"), load_data(plan.data)
        return StudentLoop(experiment, plan, dataset, device, transport, store, clock or Clock(), watchdog), transport

    return make


def go(loop: StudentLoop, steps: int | None = None) -> None:
    while not loop.done and steps != 0:
        loop.begin_step()
        loop.end_step()
        steps = None if steps is None else steps - 1


def to_the_end(loop: StudentLoop) -> None:
    go(loop)
    loop.finish()


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


# --- saving


def test_the_last_step_is_saved_whatever_the_interval(tiny: Tiny, learn: Any, tmp_path: Path) -> None:
    loop, _ = learn(tiny(training__checkpoint_every=1e9))
    to_the_end(loop)
    assert read(tmp_path / "run" / NEWEST).step == 9


def test_every_step_is_saved_if_asked_to(tiny: Tiny, learn: Any, tmp_path: Path) -> None:
    loop, _ = learn(tiny(training__checkpoint_every=0))
    for number in range(1, 9):
        go(loop, 1)
        assert read(tmp_path / "run" / NEWEST).step == number
    go(loop, 1)
    assert read(tmp_path / "run" / NEWEST).step == 8, "the last one is saved by finish()"
    loop.finish()
    assert read(tmp_path / "run" / NEWEST).step == 9


def test_checkpoints_are_apart_by_the_interval(tiny: Tiny, learn: Any, tmp_path: Path) -> None:
    clock = Clock()
    loop, _ = learn(tiny(training__checkpoint_every=10), clock=clock)
    saved: list[int] = []
    for _ in range(8):
        clock.now += 4
        go(loop, 1)
        path = tmp_path / "run" / NEWEST
        saved.append(read(path).step if path.exists() else 0)
    assert saved == [0, 0, 3, 3, 3, 6, 6, 6]


def test_the_best_weights_are_kept(tiny: Tiny, learn: Any, tmp_path: Path, same: Any, state: Any) -> None:
    loop, transport = learn(tiny(training__epochs=6, training__optimizer__lr=0.5))
    best, expected, at = -1.0, None, 0
    while not loop.done:
        go(loop, 1)
        if loop.trainer.step % 3 == 0:
            accuracy = loop.trainer.evaluate(loop.trainer._dataset.test).accuracy
            if accuracy > best:
                best, expected, at = accuracy, state(loop.trainer)["model"], loop.trainer.step
    loop.finish()
    kept = read(tmp_path / "run" / BEST)
    assert kept.step == at
    assert same(dict(kept.model), expected)
    assert kept.optimizer == {}
    assert max(each.accuracy for each in transport.measured(pb.SPLIT_TEST)) == best


def full_disk(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    def fail(self: CheckpointStore, checkpoint: Any) -> None:
        raise OSError(28, "No space left on device")

    for method in methods:
        monkeypatch.setattr(CheckpointStore, method, fail)


def test_a_full_disk_is_logged_and_training_goes_on(
    tiny: Tiny, learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop, transport = learn(tiny(training__checkpoint_every=0))
    go(loop, 4)
    with monkeypatch.context() as full:
        full_disk(full, "save", "save_best")
        go(loop, 3)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) >= 3
    assert all("student cnn" in line and str(tmp_path / "run") in line for line in errors)
    assert all("No space left on device; what was saved before stays" in line for line in errors)
    assert {line.split(" of ")[0] for line in errors} <= {"checkpoint", "best weights"}
    assert read(tmp_path / "run" / NEWEST).step == 4
    to_the_end(loop)
    assert read(tmp_path / "run" / NEWEST).step == 9
    assert transport.left == [(pb.LEAVE_REASON_FINISHED, "trained 9 steps")]


def test_a_student_that_cannot_be_saved_at_the_end_has_not_finished(
    tiny: Tiny, learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As finished the server would drop the rounds that it needs; so it says nothing, fails, and can be resumed."""
    loop, transport = learn(tiny())
    go(loop, 5)
    loop._save()
    with monkeypatch.context() as full:
        full_disk(full, "save", "save_best")
        go(loop)
        with pytest.raises(
            PeerError, match=r"student 'cnn' is trained, but cannot be saved to .*mounted at .*free disk space"
        ) as raised:
            loop.finish()
    assert raised.value.code is ExitCode.STORAGE
    assert transport.left == []
    again, transport = learn(tiny())
    assert again.trainer.step == 5
    to_the_end(again)
    assert transport.left == [(pb.LEAVE_REASON_FINISHED, "trained 9 steps")]


def test_a_folder_that_is_gone_ends_the_training(tiny: Tiny, learn: Any, tmp_path: Path) -> None:
    """Though no checkpoint is due: the next report finds it out."""
    loop, _ = learn(tiny(), clock=Clock(step=1.0))
    go(loop, 1)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="the checkpoints of student") as raised:
        go(loop)
    assert raised.value.code is ExitCode.STORAGE
    assert not (tmp_path / "run").exists()


def test_a_last_checkpoint_that_was_deleted_is_written_again(tiny: Tiny, learn: Any, tmp_path: Path) -> None:
    loop, _ = learn(tiny())
    go(loop)
    loop.keep()
    (tmp_path / "run" / NEWEST).unlink()
    loop.finish()
    assert read(tmp_path / "run" / NEWEST).step == 9


# --- going on


@pytest.mark.parametrize("method", ["kdcl", "independent"])
@pytest.mark.parametrize("stop_after", [1, 4, 6, 8])
@pytest.mark.parametrize("begun", [False, True])
def test_stopped_and_resumed_it_ends_with_the_same_bits_and_the_same_measurements(
    method: str, stop_after: int, begun: bool, tiny: Tiny, learn: Any, state: Any, same: Any
) -> None:
    experiment = tiny(distillation={"method": method})
    undisturbed, expected = learn(experiment, "undisturbed")
    to_the_end(undisturbed)

    stopped, before = learn(experiment)
    go(stopped, stop_after)
    if begun:
        stopped.begin_step()
        stopped.trainer.prepare()
    stopped.stop()
    assert before.left == [(pb.LEAVE_REASON_STOPPED, f"stopped after {stop_after} steps")]
    resumed, after = learn(experiment)
    resumed.join()
    assert after.joined[0].steps_trained == stop_after
    assert after.joined[0].first_round == (stop_after if method == "kdcl" else 0)
    to_the_end(resumed)
    assert same(state(resumed.trainer), state(undisturbed.trainer))

    def values(transport: RecordingTransport) -> dict[tuple[Any, int], tuple[float, ...]]:
        return {
            (each.split, each.steps_trained): (each.accuracy, each.loss, each.distillation_loss)
            for each in transport.measured()
        }

    assert values(before) | values(after) == values(expected)
    both = values(before).items() & values(after).items()
    assert all(key in values(expected) for key, _ in both), "what is told twice is told alike"


def test_what_the_server_may_not_have_is_told_again(tiny: Tiny, learn: Any) -> None:
    """A worker that dies after its checkpoint and before its report would not measure the epoch again."""
    loop, transport = learn(tiny(training__checkpoint_every=0))
    transport.lost = [
        pb.Measurement(split=pb.SPLIT_TEST, steps_trained=3, accuracy=0.25, loss=2, distillation_loss=0.0)
    ]
    go(loop, 7)  # no report so far, and now it is gone
    assert transport.reports == []
    resumed, after = learn(tiny(training__checkpoint_every=0))
    to_the_end(resumed)
    told = [(each.split, each.steps_trained) for each in after.measured()]
    assert told[0] == (pb.SPLIT_TEST, 3)
    assert after.measured()[0] == transport.lost[0]
    assert set(told) == {(split, number) for split in (pb.SPLIT_TRAIN, pb.SPLIT_TEST) for number in (3, 6, 9)}
    assert len(after.reports) == 1


def test_a_student_killed_at_its_very_end_reports_after_all(tiny: Tiny, learn: Any) -> None:
    loop, transport = learn(tiny())
    go(loop)
    loop._save()
    assert transport.reports == []
    resumed, after = learn(tiny())
    assert resumed.done
    to_the_end(resumed)
    assert {each.steps_trained for each in after.measured(pb.SPLIT_TEST)} == {3, 6, 9}
    assert after.left == [(pb.LEAVE_REASON_FINISHED, "trained 9 steps")]


def test_the_best_accuracy_is_remembered(tiny: Tiny, learn: Any, tmp_path: Path) -> None:
    loop, _ = learn(tiny())
    go(loop, 6)
    loop.stop()
    best = (tmp_path / "run" / BEST).read_bytes()
    resumed, _ = learn(tiny())
    assert resumed._best == loop._best > 0
    resumed._best = 1.0
    to_the_end(resumed)
    assert (tmp_path / "run" / BEST).read_bytes() == best, "nothing better came"


def test_a_torn_checkpoint_costs_steps_and_changes_no_bit(
    tiny: Tiny, learn: Any, tmp_path: Path, state: Any, same: Any
) -> None:
    experiment = tiny(training__checkpoint_every=0)
    undisturbed, _ = learn(experiment, "undisturbed")
    to_the_end(undisturbed)
    loop, _ = learn(experiment)
    go(loop, 5)
    path = tmp_path / "run" / NEWEST
    path.write_bytes(path.read_bytes()[:1000])
    resumed, _ = learn(experiment)
    assert resumed.trainer.step == 4
    to_the_end(resumed)
    assert same(state(resumed.trainer), state(undisturbed.trainer))


def test_a_checkpoint_of_another_experiment_is_refused(tiny: Tiny, learn: Any) -> None:
    loop, _ = learn(tiny())
    go(loop, 1)
    loop.stop()
    with pytest.raises(ConfigurationError, match="experiment field seed: it has 3, this run has 9"):
        learn(tiny(seed=9))
    with pytest.raises(ConfigurationError, match="student 'cnn', not 'mlp'"):
        learn(tiny(), name="mlp")
    learn(tiny(training__checkpoint_every=5, exchange__give_up_after=99))  # what is operational may change


def test_a_checkpoint_that_no_longer_fits_the_model_is_refused(
    tiny: Tiny, learn: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model of the user's own may have been changed under the same name."""
    loop, _ = learn(tiny())
    go(loop, 1)
    loop.stop()
    from codistill_worker import models

    build = models.build
    monkeypatch.setattr(models, "build", lambda name, **settings: build(name, **{**settings, "args": {"width": 5}}))
    with pytest.raises(ConfigurationError, match=r"does not fit model 'cnn': .*was the model's code changed"):
        learn(tiny())


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
