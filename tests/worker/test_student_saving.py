"""A student's loop: when it saves, and that a restart changes nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.rundir.storage import StorageError
from codistill.v1 import distillation_pb2 as pb
from codistill_worker.errors import ConfigurationError
from codistill_worker.training.checkpoints import CheckpointStore, read
from worker.support_student import BEST, NEWEST, Clock, RecordingTransport, Tiny, go, to_the_end

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
