"""All students in one process: every method, to the bit, stopped and resumed wherever."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from codistill.config.experiment import Experiment, parse
from codistill.config.methods import KDCL_ENSEMBLES
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.interrupts import SignalInterrupt
from codistill.process.plugins import LoadError
from codistill.rundir import records
from codistill.rundir.storage import StorageError
from codistill.v1 import distillation_pb2 as pb
from codistill_deploy.launch.in_process import run_in_process
from codistill_deploy.run_folder import RunFolder
from codistill_server.storage.journal import Journal, JournalError
from codistill_worker import student
from codistill_worker.training.checkpoints import CheckpointStore, read
from codistill_worker.training.trainer import Trainer

METHODS: dict[str, dict[str, Any]] = {
    "independent": {"method": "independent"},
    "dml": {"method": "dml", "temperature": 2},
    **{ensemble: {"method": "kdcl", "ensemble": ensemble} for ensemble in KDCL_ENSEMBLES},
}


class RecordingView:
    """A view that keeps each state that it is shown, and calls a function after each step."""

    def __init__(self, after_step: Callable[[], None] = lambda: None) -> None:
        self.runs: list[pb.Run] = []
        self._after_step = after_step

    def start(self, title: str) -> None:
        pass

    def update(self, run: pb.Run) -> None:
        self.runs.append(run)

    def offer(self, snapshot: Callable[[], pb.Run]) -> None:
        del snapshot
        self._after_step()

    def note(self, line: str) -> None:
        pass

    def finish(self) -> None:
        pass


@pytest.fixture(autouse=True)
def as_before() -> Any:
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    settings = cudnn.benchmark, cudnn.deterministic
    yield
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.deterministic = settings


def experiment(method: str = "min_logit", **training: Any) -> Experiment:
    return parse(
        yaml.safe_dump(
            {
                "name": "tiny",
                "seed": 11,
                "data": {
                    "dataset": "digits",
                    "train_size": 68,
                    "test_size": 30,
                    "held_out": 20,
                    "augment": {"crop_padding": 1},
                },
                "training": {
                    "epochs": 3,
                    "batch_size": 16,
                    "optimizer": {"name": "sgd", "lr": 0.05},
                    "checkpoint_every": 1000,
                    **training,
                },
                "distillation": METHODS[method],
                "students": [
                    {"name": "cnn", "model": "cnn", "model_args": {"width": 4, "dropout": 0.2}},
                    {"name": "mlp", "model": "mlp", "model_args": {"hidden": 16, "dropout": 0.2}},
                    {
                        "name": "adam",
                        "model": "mlp",
                        "model_args": {"hidden": 8},
                        "data": {"augment": {"flip": True}},
                        "training": {"optimizer": {"name": "adamw", "lr": 0.01}, "clip_norm": 1.0},
                    },
                ],
            }
        )
    )


def train(
    tested: Experiment,
    path: Path,
    view: RecordingView | None = None,
    stop: threading.Event | None = None,
    *,
    resume: bool = False,
) -> ExitCode:
    folder = RunFolder(path)
    folder.start(tested, mode="in-process", resume=resume)
    return run_in_process(tested, folder, view or RecordingView(), stop or threading.Event())


def bits(path: Path) -> dict[str, Any]:
    """Return every student's step, weights and optimiser state, as bytes."""
    found: dict[str, Any] = {}
    for folder in sorted((path / "students").iterdir()):
        checkpoint = read(folder / "checkpoint.safetensors")
        found[folder.name] = (
            checkpoint.step,
            {name: value.numpy().tobytes() for name, value in checkpoint.model.items()},
            repr(checkpoint.optimizer),
        )
    return found


def measured(path: Path) -> dict[tuple[str, str, int], tuple[float, float, float | None]]:
    return {
        (each.participant, each.split, each.steps_trained): (each.accuracy, each.loss, each.distillation_loss)
        for each in records.read(path / "metrics.jsonl")
        if isinstance(each, records.Measured)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(experiment(), path) is ExitCode.OK
    return path


@pytest.mark.parametrize("method", METHODS)
def test_every_ensemble_runs_and_two_runs_give_the_same_bits(method: str, tmp_path: Path) -> None:
    view = RecordingView()
    assert train(experiment(method), tmp_path / "first", view) is ExitCode.OK
    assert train(experiment(method), tmp_path / "second") is ExitCode.OK
    ours = bits(tmp_path / "first")
    assert ours == bits(tmp_path / "second")
    assert [steps for steps, _, _ in ours.values()] == [9, 9, 9]
    run = view.runs[-1]
    assert run.complete
    rounds = 0 if method == "independent" else 9
    assert (run.frontier, run.total_rounds, run.steps_trained, run.total_steps) == (rounds, rounds, 9, 9)
    assert {each.state for each in run.participants} == {pb.PARTICIPANT_STATE_FINISHED}
    results = measured(tmp_path / "first")
    assert results == measured(tmp_path / "second")
    assert results.keys() == {
        (name, split, number) for name in ours for split in ("train", "test") for number in (3, 6, 9)
    }
    distilled = [value for (_, split, _), (_, _, value) in results.items() if split == "train"]
    if method == "independent":
        assert distilled == [None] * 9
    else:
        assert all(value is not None and value >= 0 for value in distilled)
        assert any(value is not None and value > 1e-3 for value in distilled)


def test_every_forward_pass_is_launched_before_an_output_is_waited_for(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several GPUs, a student whose outputs were copied at once would keep the next from starting."""
    acts: list[str] = []
    launch, published = Trainer.launch, Trainer._published

    def note_launch(self: Trainer) -> None:
        acts.append("launch")
        launch(self)

    def note_copy(self: Trainer, outputs: Any) -> Any:
        acts.append("copy")
        return published(self, outputs)

    monkeypatch.setattr(student, "try_training", lambda *_: None)
    monkeypatch.setattr(Trainer, "launch", note_launch)
    monkeypatch.setattr(Trainer, "_published", note_copy)
    assert train(experiment(), tmp_path / "run") is ExitCode.OK
    assert acts == 9 * (3 * ["launch"] + 3 * ["copy"])
    assert bits(tmp_path / "run") == bits(undisturbed)
    acts.clear()
    assert train(experiment("general"), tmp_path / "held-out") is ExitCode.OK
    order = "".join(act[0] for act in acts)
    assert re.fullmatch(r"(lllccc){3}lllcccccc(lllccc){2}lllcccccc(lllccc){2}", order), "with those of held-out samples"


def test_the_trial_step_changes_no_bit(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The students have dropout and batch statistics."""
    monkeypatch.setattr(student, "try_training", lambda *_: None)
    assert train(experiment(), tmp_path / "run") is ExitCode.OK
    assert bits(tmp_path / "run") == bits(undisturbed)


def test_every_ensemble_trains_differently(tmp_path: Path) -> None:
    seen = []
    for method in METHODS:
        assert train(experiment(method, epochs=2), tmp_path / method) is ExitCode.OK
        seen.append(bits(tmp_path / method)["cnn"][1]["0.weight"])
    assert len(set(seen)) == len(METHODS)


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_stopped_and_resumed(steps: int, undisturbed: Path, tmp_path: Path) -> None:
    path, stop = tmp_path / "run", threading.Event()
    seen: list[int] = []

    def count() -> None:
        seen.append(1)
        if len(seen) == steps:
            stop.set()

    view = RecordingView(count)
    assert train(experiment(), path, view, stop) is ExitCode.INTERRUPTED
    assert {number for number, _, _ in bits(path).values()} == {steps}
    assert {each.state for each in view.runs[-1].participants} == {pb.PARTICIPANT_STATE_DISCONNECTED}
    assert train(experiment(), path, resume=True) is ExitCode.OK
    assert bits(path) == bits(undisturbed)
    assert measured(path) == measured(undisturbed)


class Killed(SignalInterrupt):
    """Stands for a process that ends at once: what a user's code raises is that code's error."""


@pytest.mark.parametrize("method", ["min_logit", "general", "dml", "independent"])
def test_students_that_resume_at_different_steps_catch_up(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their checkpoints lie apart, and the run dies in the midst of a step; the closed rounds are in the journal."""
    assert train(experiment(method), tmp_path / "undisturbed") is ExitCode.OK
    save, begin = CheckpointStore.save, Trainer.begin
    due = {"cnn": (2, 7), "mlp": (4,), "adam": ()}

    def some(self: CheckpointStore, checkpoint: Any) -> None:
        if checkpoint.step in due[checkpoint.student]:
            save(self, checkpoint)

    def die(self: Trainer) -> Any:
        if self.step == 7 and self.student == "adam":
            raise Killed
        return begin(self)

    path = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "save", some)
        patched.setattr(Trainer, "begin", die)
        with pytest.raises(Killed):
            train(experiment(method, checkpoint_every=0), path)
    assert sorted(each.parent.name for each in path.glob("students/*/checkpoint.safetensors")) == ["cnn", "mlp"]
    assert train(experiment(method), path, resume=True) is ExitCode.OK
    assert bits(path) == bits(tmp_path / "undisturbed")
    assert measured(path) == measured(tmp_path / "undisturbed")


def test_a_student_that_ends_the_process_has_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Trainer.begin

    def leave(self: Trainer) -> Any:
        if self.step == 3 and self.student == "adam":
            raise SystemExit(0)
        return begin(self)

    monkeypatch.setattr(Trainer, "begin", leave)
    with pytest.raises(
        LoadError,
        match=r"^students\.\d\.model: .* of student 'adam' .* step 3: it ended .*\(SystemExit: 0 at .*test_in_process\.py:",
    ):
        train(experiment(), tmp_path / "run")


def test_a_finished_run_that_is_resumed_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert train(experiment(), path) is ExitCode.OK
    assert train(experiment(), path, resume=True) is ExitCode.OK
    assert bits(path) == bits(undisturbed)


def test_a_journal_of_another_experiment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train(experiment("naive", epochs=1), path)
    other = experiment("linear", epochs=1)
    (path / "experiment.yaml").write_text(other.to_yaml())
    with pytest.raises(PeerError, match=r"belongs to another run: experiment field distillation\.ensemble") as refused:
        train(other, path, resume=True)
    assert refused.value.code is ExitCode.CONFIGURATION


def test_an_experiment_file_that_is_deleted_meanwhile_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    view = RecordingView((path / "experiment.yaml").unlink)
    with pytest.raises(
        StorageError, match=r"experiment\.yaml was deleted, moved or replaced while the run was going on"
    ):
        train(experiment(), path, view)


def test_checkpoints_without_their_journal_are_refused(tmp_path: Path) -> None:
    path, stop = tmp_path / "run", threading.Event()
    assert train(experiment(), path, RecordingView(stop.set), stop) is ExitCode.INTERRUPTED
    for each in path.glob("journal.sqlite*"):
        each.unlink()
    with pytest.raises(PeerError, match="resumes at round 1, but this server's journal ends at round 0") as refused:
        train(experiment(), path, resume=True)
    assert refused.value.code is ExitCode.REFUSED


@pytest.mark.parametrize("lost", ["", "journal.sqlite", "metrics.jsonl", "events.jsonl"])
def test_a_folder_or_a_file_of_it_that_is_gone_ends_the_run(tmp_path: Path, lost: str) -> None:
    path = tmp_path / "run"
    with pytest.raises(StorageError, match=rf"run folder {path}.* moved"):
        train(experiment(), path, RecordingView(lambda: (path / lost).rename(tmp_path / "elsewhere")))


def test_a_journal_that_cannot_be_written_ends_the_run_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Journal.append

    def fail(self: Journal, closed: Any) -> None:
        if closed.round == 2:
            raise JournalError("journal x cannot be written: disk full")
        append(self, closed)

    monkeypatch.setattr(Journal, "append", fail)
    with pytest.raises(PeerError, match="journal x cannot be written: disk full"):
        train(experiment(), tmp_path / "run")
    monkeypatch.undo()
    assert train(experiment(), tmp_path / "run", resume=True) is ExitCode.OK


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            ExitCode.OUT_OF_MEMORY,
            "student 'mlp' ran out of memory on cpu: ",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            ExitCode.OUT_OF_MEMORY,
            "student 'mlp' ran out of memory on cpu: ",
        ),
        (
            RuntimeError("CUDA error: device-side assert triggered"),
            ExitCode.DEVICE_FAILED,
            "student 'mlp' can no longer use cpu in step 2: ",
        ),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["begin", "finish"])
def test_a_device_that_fails_ends_the_run_with_its_code_and_the_run_resumes(
    error: Exception,
    code: ExitCode,
    text: str,
    where: str,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    works = getattr(Trainer, where)

    def fail(self: Trainer, *arguments: Any) -> Any:
        if self.student == "mlp" and self.step == 2 and len(self._dataset.train) > 16:
            raise error
        return works(self, *arguments)

    monkeypatch.setattr(Trainer, where, fail)
    with pytest.raises(PeerError) as caught:
        train(experiment(checkpoint_every=0), tmp_path / "run")
    assert caught.value.code is code
    assert str(caught.value).startswith(text)
    monkeypatch.undo()
    assert train(experiment(checkpoint_every=0), tmp_path / "run", resume=True) is ExitCode.OK
    assert bits(tmp_path / "run") == bits(undisturbed)
