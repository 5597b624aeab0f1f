"""A worker as a process: its device, its student, and how it ends."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.peer.grpc import GrpcTransport
from codistill.process.exit_codes import ExitCode
from codistill.rundir.layout import RunLayout
from codistill_worker import student
from codistill_worker.app import WorkOptions, _stop_on_signals, work
from codistill_worker.errors import ConfigurationError
from codistill_worker.training.checkpoints import read
from codistill_worker.training.trainer import Trainer

Tiny = Callable[..., Experiment]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    settings = cudnn.benchmark, cudnn.deterministic
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    cudnn.benchmark, cudnn.deterministic = settings


def test_an_unknown_student(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        work(tiny(), WorkOptions("cmn", "127.0.0.1:1", tmp_path))
    assert str(refused.value) == "student: 'cmn' is not one of the experiment's; allowed: cnn, mlp"


# --- whole workers


class Workers:
    """Both students' workers on threads, each with its own event that stops it."""

    def __init__(self, experiment: Experiment, address: str, folder: Path) -> None:
        self.stops = {name: threading.Event() for name in experiment.names}
        self.outcomes: dict[str, object] = {}
        self._threads = {
            name: threading.Thread(target=self._work, args=(experiment, WorkOptions(name, address, folder)))
            for name in experiment.names
        }
        for thread in self._threads.values():
            thread.start()

    def _work(self, experiment: Experiment, options: WorkOptions) -> None:
        try:
            self.outcomes[options.participant] = work(experiment, options, self.stops[options.participant])
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.outcomes[options.participant] = error

    def wait(self) -> dict[str, object]:
        for thread in self._threads.values():
            thread.join(60)
            assert not thread.is_alive()
        return self.outcomes


def weights(folder: Path, student: str) -> Any:
    return read(RunLayout(folder).student(student).checkpoint)


def test_workers_train_to_the_end_stop_and_go_on(tiny: Tiny, serving: Any, tmp_path: Path) -> None:
    """The bits are compared where workers are processes, in tests/system: these two share torch's global generator."""
    experiment = tiny()
    server = serving(experiment)
    undisturbed = Workers(experiment, server.address, tmp_path / "undisturbed")
    assert undisturbed.wait() == {"cnn": ExitCode.OK, "mlp": ExitCode.OK}
    server.wait()
    assert server.ended is ExitCode.OK
    tests = [(each.participant, each.steps_trained) for each in server.measured() if each.split == "test"]
    assert sorted(tests) == sorted((name, number) for name in ("cnn", "mlp") for number in (3, 6, 9))

    server = serving(experiment)
    alone = threading.Event()
    first = WorkOptions("cnn", server.address, tmp_path / "stopped")
    waiting = threading.Thread(target=lambda: outcome.append(work(experiment, first, alone)))
    outcome: list[object] = []
    waiting.start()
    while ("joined", "cnn") not in server.events():
        waiting.join(0.02)
    alone.set()  # it waits for its peer, which never came
    waiting.join(60)
    assert outcome == [ExitCode.INTERRUPTED]
    assert server.events()[-1] == ("stopped", "cnn")
    assert weights(tmp_path / "stopped", "cnn").step == 0
    again = Workers(experiment, server.address, tmp_path / "stopped")
    assert again.wait() == {"cnn": ExitCode.OK, "mlp": ExitCode.OK}
    for name in ("cnn", "mlp"):
        assert weights(tmp_path / "stopped", name).step == weights(tmp_path / "undisturbed", name).step == 9


def test_a_student_that_ends_the_process_has_failed_and_the_run_knows(
    tiny: Tiny, serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(exchange__give_up_after=5)
    server = serving(experiment)
    begin = Trainer.begin

    def leave(self: Trainer) -> Any:
        if self.step == 3 and self.student == "cnn":
            raise SystemExit(0)
        return begin(self)

    monkeypatch.setattr(Trainer, "begin", leave)
    error = Workers(experiment, server.address, tmp_path).wait()["cnn"]
    assert isinstance(error, ConfigurationError), error
    assert "of student 'cnn' failed in the forward pass, step 3: it ended the process (SystemExit: 0 at " in str(error)
    assert ("failed", "cnn") in server.events()


class Interrupting:
    """A stream to which a signal comes while it is written to, and which then takes nothing else, as a buffered one."""

    def __init__(self) -> None:
        self.lines = ""
        self._writing = False

    def write(self, text: str) -> None:
        if self._writing:
            raise RuntimeError("reentrant call")
        self._writing = True
        try:
            if not self.lines:
                signal.raise_signal(signal.SIGTERM)
            self.lines += text
        finally:
            self._writing = False

    def flush(self) -> None:
        """Do nothing."""


def test_a_signal_that_comes_while_a_line_is_logged_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Interrupting()
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", stream)
    logger = logging.getLogger("codistill_worker.app")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(stream)])
    stop = threading.Event()
    _stop_on_signals(stop)
    logger.info("a line")
    assert stop.is_set()
    assert stream.lines == "a line\n"


def test_a_stop_before_the_server_is_there(tiny: Tiny, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert work(tiny(), WorkOptions("cnn", "127.0.0.1:1", tmp_path), stop) is ExitCode.INTERRUPTED


@pytest.fixture(autouse=True)
def _untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trial step: here two workers are threads of one process, whose generators they would share."""
    monkeypatch.setattr(student, "try_training", lambda *_: None)


@pytest.mark.parametrize("gone", ["the peer", "the server"])
def test_a_worker_that_gives_up_has_saved_its_student(
    gone: str, tiny: Tiny, serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny(exchange__give_up_after=2)
    server = serving(experiment)
    send = GrpcTransport.send

    def silent(self: GrpcTransport, contribution: Any) -> None:
        if contribution.round == 4 and self._join_request.participant == "mlp":  # type: ignore[union-attr]
            if gone == "the server":
                server.stop()
            return
        send(self, contribution)

    monkeypatch.setattr(GrpcTransport, "send", silent)
    outcomes = Workers(experiment, server.address, tmp_path).wait()
    error = outcomes["cnn"]
    assert isinstance(error, PeerError)
    assert error.code is (ExitCode.GAVE_UP if gone == "the peer" else ExitCode.UNREACHABLE)
    assert weights(tmp_path, "cnn").step == 4


class Failing(nn.Module):
    """Fails in its second step, as a kernel or the memory would."""

    def __init__(self, classes: int, channels: int, size: int, how: str) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * size * size, classes)
        self.how = how
        self.steps = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        if self.steps > 1:
            if self.how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")
            if self.how == "memory of a library":
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`\nmore lines")
            if self.how == "assertion":
                raise RuntimeError("CUDA error: device-side assert triggered\nmore lines")
            if self.how == "memory of the machine":
                return torch.empty(1 << 60)
            if self.how == "memory of Python":
                bytearray(1 << 60)
            if self.how == "nan":
                return self.layer(images.flatten(1)) * float("nan")
            raise RuntimeError("a kernel failed\nmore lines")
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        (
            "memory",
            ExitCode.OUT_OF_MEMORY,
            "student 'bad' ran out of memory on cpu: CUDA out of memory. Tried to allocate; lower",
        ),
        (
            "memory of a library",
            ExitCode.OUT_OF_MEMORY,
            "student 'bad' ran out of memory on cpu: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
        ),
        (
            "assertion",
            ExitCode.DEVICE_FAILED,
            "student 'bad' can no longer use cpu in step 1: CUDA error: device-side assert triggered; an index",
        ),
        (
            "memory of the machine",
            ExitCode.OUT_OF_MEMORY,
            "student 'bad' ran out of memory on cpu: [enforce fail",
        ),
        ("memory of Python", ExitCode.OUT_OF_MEMORY, "student 'bad' ran out of memory on cpu: MemoryError; lower"),
        ("nan", ExitCode.DIVERGED, "student 'bad' has diverged in step 1"),
        (
            "kernel",
            ExitCode.CONFIGURATION,
            "students.0.model: 'failing_models:Failing' of student 'bad' failed in the forward",
        ),
    ],
)
def test_a_student_that_fails_tells_the_run(
    how: str,
    code: ExitCode | None,
    text: str,
    tiny: Tiny,
    serving: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("failing_models")
    module.Failing = Failing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "failing_models", module)
    bad = {"name": "bad", "model": "failing_models:Failing", "model_args": {"how": how}}
    experiment = tiny(distillation={"method": "kdcl"}, students=[bad, {"name": "mlp", "model": "mlp"}])
    server = serving(experiment)
    workers = Workers(experiment, server.address, tmp_path)
    while "bad" not in workers.outcomes:
        threading.Event().wait(0.02)
    error = workers.outcomes["bad"]
    assert getattr(error, "code", None) is code
    assert str(error).startswith(text)
    (failed,) = [each for each in server.records("events.jsonl") if getattr(each, "what", "") == "failed"]
    assert failed.message.startswith(str(error))
    workers.stops["mlp"].set()
    assert workers.wait()["mlp"] is ExitCode.INTERRUPTED
    assert weights(tmp_path, "mlp").step == 1
