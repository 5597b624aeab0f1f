"""Errors that a user's model raises while a run is under way: whose they are, and the line that says so."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from codistill.config.experiment import Experiment
from codistill.peer.errors import PeerError
from codistill.process.exit_codes import ExitCode
from codistill.process.interrupts import SignalInterrupt, mark_interrupts
from codistill_worker.student import StudentLoop
from codistill_worker.training.checkpoints import CheckpointStore
from codistill_worker.training.users_errors import running

Tiny = Callable[..., Experiment]

MODEL = """
import torch
from torch import nn

class Odd(BaseException):
    pass

class Own(nn.Module):
    where = None
    def __init__(self, classes, channels, size):
        super().__init__()
        self.layer = nn.Linear(channels * size * size, classes)
    def forward(self, images):
        logits = self.layer(images.flatten(1))
        if Own.where == ("training" if self.training else "evaluating"):
            return Own.answer(logits)
        if Own.where == "backward" and self.training:
            logits.register_hook(Own.answer)
        return logits
    def get_extra_state(self):
        return Own.answer(None) if Own.where == "saving" else torch.zeros(1)
    def set_extra_state(self, state):
        if Own.where == "restoring":
            Own.answer(None)

def fail(error):
    raise error  # the line
"""
ERRORS = [
    ("training", "ValueError('mine [/b]')", "the forward pass, step 2: ValueError at {}: mine [/b]"),
    ("training", "KeyboardInterrupt()", "the forward pass, step 2: KeyboardInterrupt at {}"),
    ("training", "GeneratorExit()", "the forward pass, step 2: GeneratorExit at {}"),
    ("training", "Odd('mine')", "the forward pass, step 2: Odd at {}: mine"),
    ("training", "SystemExit(0)", "the forward pass, step 2: it ended the process (SystemExit: 0 at {})"),
    ("backward", "TypeError('mine')", "the backward pass, step 2: TypeError at {}: mine"),
    ("backward", "Odd('mine')", "the backward pass, step 2: Odd at {}: mine"),
    ("evaluating", "KeyError('mine')", "the evaluation, step 3: KeyError at {}: 'mine'"),
    ("saving", "KeyError('mine')", "the forward pass, step 2: KeyError at {}: 'mine'"),
]
ANSWERS = [
    ("training", lambda logits: (logits, logits), "the forward pass, step 2: it gives a tuple as logits for 16 images"),
    (
        "training",
        lambda logits: logits[1:],
        "the forward pass, step 2: it gives torch.float32 [15, 10] as logits for 16",
    ),
    (
        "training",
        lambda logits: logits.argmax(1),
        "the forward pass, step 2: it gives torch.int64 [16] as logits for 16",
    ),
    ("evaluating", lambda _: None, "the evaluation, step 3: it gives a NoneType as logits for 13 images"),
    (
        "evaluating",
        lambda logits: logits[:, 1:],
        "the evaluation, step 3: it gives torch.float32 [13, 9] as logits for 13",
    ),
]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the user's model; SIGINT is handled as in the commands."""
    (tmp_path / "failing_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    mark_interrupts()
    import failing_model  # pyright: ignore[reportMissingImports]

    yield failing_model
    del sys.modules["failing_model"]
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def make(tiny: Tiny, tmp_path: Path, load_data: Any, own: Any) -> Callable[[], StudentLoop]:
    del own

    def made() -> StudentLoop:
        experiment = tiny(
            students=[{"name": "cnn", "model": "mlp"}, {"name": "a", "model": "failing_model:Own"}],
            distillation={"method": "independent"},
        )
        plan = experiment.plan("a")
        store = CheckpointStore(tmp_path / "run")
        return StudentLoop(experiment, plan, load_data(plan.data), torch.device("cpu"), Transport(), store)

    return made


class Transport:
    """Takes everything."""

    def __getattr__(self, name: str) -> Any:
        del name
        return lambda *_: []


def step(loop: StudentLoop) -> None:
    loop.begin_step()
    loop.end_step()


def failure(make: Callable[[], StudentLoop], own: Any, where: str, answer: Any) -> str:
    """Train two steps as if all were well, then the rest; return the error's text."""
    loop = make()
    for _ in range(2):
        step(loop)
    own.Own.where, own.Own.answer = where, answer
    with pytest.raises(
        Exception, match=r"^students\.1\.model: 'failing_model:Own' of student 'a' failed in "
    ) as caught:
        step(loop)
    assert getattr(caught.value, "code", None) is ExitCode.CONFIGURATION  # so it is never restarted
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).partition(" failed in ")[2]


def line_of(own: Any) -> str:
    return f"{own.__file__}:{1 + MODEL.splitlines().index('    raise error  # the line')}"


@pytest.mark.parametrize(("where", "error", "text"), ERRORS)
def test_an_error_names_the_field_the_student_the_step_and_the_line(
    where: str, error: str, text: str, make: Any, own: Any
) -> None:
    raised = eval(error, vars(own))  # noqa: S307 - of this file

    def answer(_: Any) -> None:
        own.fail(raised)

    assert failure(make, own, where, answer).startswith(text.format(line_of(own)))


@pytest.mark.parametrize(("where", "answer", "text"), ANSWERS)
def test_other_outputs_in_a_later_step_are_refused(where: str, answer: Any, text: str, make: Any, own: Any) -> None:
    message = failure(make, own, where, answer)
    assert message.startswith(text)
    assert own.__file__ in message
    assert "expected a floating-point tensor [" in message


def test_an_error_at_a_resume_names_the_line(make: Any, own: Any) -> None:
    loop = make()
    step(loop)
    loop.stop()
    own.Own.where, own.Own.answer = "restoring", lambda _: own.fail(own.Odd("mine"))
    with pytest.raises(
        Exception, match=r"of student 'a' cannot be restored from its checkpoint: Odd at .*: mine$"
    ) as caught:
        make()
    assert getattr(caught.value, "code", None) is ExitCode.CONFIGURATION


def test_an_error_without_a_line_of_a_users_can_be_restarted_and_names_the_participant() -> None:
    made: dict[str, Any] = {"__name__": "codistill_worker.made", "running": running}
    exec("def call(function):\n    with running('student'):\n        function()\n", made)  # noqa: S102 - as codistill's own
    with pytest.raises(PeerError, match=r"^student: RuntimeError at .*: shape ") as caught:
        made["call"](partial(torch.zeros(2).view, 3))
    assert caught.value.code is ExitCode.ERROR
    changed = torch.ones(2, requires_grad=True).exp()
    changed.add_(1)
    with pytest.raises(PeerError, match=r"^student: RuntimeError at .*; let the forward pass make a new tensor where"):
        made["call"](changed.sum().backward)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("of the GPU"),
        RuntimeError("CUDA error: ECC"),
        PeerError("diverged", ExitCode.DIVERGED),
        OSError(28, "No space left on device"),
        SignalInterrupt(),
    ],
    ids=repr,
)
def test_errors_that_have_a_code_of_their_own_stay(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, running("student 'a'"):
        raise error
    assert caught.value is error
